"""What every `Solver` owes its callers, as named checks over a market of spectra.

    for name, check in check_solver(CG(rtol=1e-10)): check()

A solver says which spectra it accepts. Those it must solve, for one or many right-hand sides, to
the residual it promises and to the right solution. The others it may solve or not, but it must be
honest: whatever it calls converged has a small residual computed from x, an approximation states
its residual, and everything else can be thrown.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DtypeError, NonFinite, ShapeError, UpweightError
from upweight.linalg.matrices import Dense
from upweight.linalg.operator import Tag
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver

Check = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A named spectrum, and the property that a solver must accept in order to solve it."""

    name: str
    eigenvalues: Float[Tensor, " p"]
    needs: str  # "definite", "singular" or "indefinite"

    def operator(self, dtype: torch.dtype = torch.float64) -> Dense:
        """Q diag(eigenvalues) Qᵀ for a fixed orthogonal Q."""
        generator = torch.Generator().manual_seed(7)
        p = len(self.eigenvalues)
        Q, _ = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))
        tag = Tag.PSD if bool((self.eigenvalues >= 0).all()) else Tag.SYMMETRIC
        matrix = (Q * self.eigenvalues) @ Q.mT
        return Dense((0.5 * (matrix + matrix.mT)).to(dtype), frozenset({tag}))

    @property
    def condition(self) -> float:
        """Largest over smallest nonzero |eigenvalue|."""
        sizes = self.eigenvalues.abs()
        return float(sizes.max() / sizes[sizes > 0].min())


def spectra(p: int = 24) -> list[Spectrum]:
    """The market: well and ill conditioned, clustered, singular, indefinite."""
    linear = torch.linspace(1.0, 10.0, p, dtype=torch.float64)
    decaying = torch.logspace(-4, 0, p, dtype=torch.float64)
    holes = torch.where(torch.arange(p) < 3, 0.0, linear)
    signs = torch.where(torch.arange(p) % 3 == 0, -1.0, 1.0).double()
    return [
        Spectrum("well conditioned", linear, "definite"),
        Spectrum("ill conditioned", decaying, "definite"),
        Spectrum("two clusters", torch.where(linear < 5.0, 1e-3, 1.0).double(), "definite"),
        Spectrum("one eigenvalue", torch.full_like(linear, 3.0), "definite"),
        Spectrum("tiny", 1e-12 * linear, "definite"),
        Spectrum("singular", holes, "singular"),
        Spectrum("indefinite", signs * linear, "indefinite"),
        Spectrum("singular and indefinite", signs * holes, "indefinite"),
    ]


def check_solver(
    solver: Solver[Any], accepts: Collection[str] = ("definite",)
) -> Iterator[tuple[str, Check]]:
    """Yield (name, check) pairs; a check raises `AssertionError` where the contract is broken.

    Args:
        solver: A solver with an rtol of 1e-6 or less, and steps enough for 24 parameters; or one
            that promises no tolerance, whose answers are `Result.APPROXIMATE`: it is held to its
            stated residuals, not to the solution.
        accepts: What it promises to solve: "definite" (A ≻ 0), "singular" (A ⪰ 0 and b in its
            range; the solution of least norm) and "indefinite" (A = Aᵀ; likewise of least norm).
    """
    suite = _Suite(solver)
    for spectrum in spectra():
        check = suite.solves if spectrum.needs in accepts else suite.is_honest
        yield f"{check.__name__.replace('_', ' ')}: {spectrum.name}", partial(check, spectrum)
        yield f"is honest, inconsistent: {spectrum.name}", partial(suite.is_honest, spectrum, False)
    yield "right-hand sides do not mix", suite.columns_do_not_mix
    yield "dependent right-hand sides", suite.dependent
    yield "zero right-hand side", suite.zero
    yield "no right-hand side", suite.empty
    yield "scale of b", suite.scale
    yield "float32", suite.single_precision
    yield "NaN in b", suite.nan_in_b
    yield "NaN in A", suite.nan_in_A
    yield "leaves b alone, answers twice the same", suite.pure
    yield "refuses b that does not fit", suite.refuses


class _Suite:
    def __init__(self, solver: Solver[Any]) -> None:
        self.solver = solver
        self.well = spectra()[0].operator()

    def solve(self, A: Dense, b: Tensor) -> Solution:
        return self.solver.solve(self.solver.init(A), b)

    def draw(self, *leading: int) -> Tensor:
        generator = torch.Generator().manual_seed(11)
        return torch.randn(*leading, 24, generator=generator, dtype=torch.float64)

    def answer(self, A: Dense, b: Tensor) -> Tensor:
        """The value, checked to be an answer, with the residuals it states."""
        solution = self.solve(A, b)
        assert solution.is_answer, f"{self.solver!r} on {A!r}: {solution.result}"
        assert solution.value.shape == b.shape and solution.value.dtype == b.dtype
        self.residuals_are_true(A, b, solution)
        return solution.value

    def residuals_are_true(self, A: Dense, b: Tensor, solution: Solution) -> None:
        rtol = solution.stats.extra["rtol"]
        r = torch.linalg.vector_norm(b - A.mv(solution.value), dim=-1)
        relative = r / torch.linalg.vector_norm(b, dim=-1).clamp_min(torch.finfo(b.dtype).tiny)
        if solution.result is Result.CONVERGED:
            # 1.5: products of vectors alone and in a batch round differently
            assert bool((relative <= 1.5 * rtol).all()), f"residual {float(relative.max()):.1e}"
        known = solution.stats.residuals.isfinite()
        atol = 0.1 * rtol + 10 * torch.finfo(b.dtype).eps
        stated = solution.stats.residuals[known]
        torch.testing.assert_close(stated, relative[known], rtol=0.5, atol=atol)

    def solves(self, spectrum: Spectrum) -> None:
        A = spectrum.operator()
        b = A.mv(self.draw(2, 2))
        x = self.answer(A, b)
        assert self.solve(A, b).converged, f"{self.solver!r} on {spectrum.name} only approximates"
        least_norm = b @ torch.linalg.pinv(A.matrix, rtol=1e-10, hermitian=True).mT
        error = torch.linalg.vector_norm(x - least_norm) / torch.linalg.vector_norm(least_norm)
        rtol = self.solve(A, b).stats.extra["rtol"]
        assert float(error) <= 10 * rtol * spectrum.condition, (
            f"{self.solver!r} on {spectrum.name}: x is off by {float(error):.1e}, relatively"
        )

    def is_honest(self, spectrum: Spectrum, in_range: bool = True) -> None:
        A = spectrum.operator()
        b = A.mv(self.draw(3)) if in_range else self.draw(3)
        solution = self.solve(A, b)
        self.residuals_are_true(A, b, solution)
        if solution.is_answer:
            return
        try:
            solution.throw()
        except UpweightError as error:
            carried = getattr(error, "solution", None)
            assert carried is solution, "the error does not carry the solution"
            return
        raise AssertionError(f"{solution.result} and throw() did not raise")

    def columns_do_not_mix(self) -> None:
        b = torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None] * self.draw(5)
        together = self.answer(self.well, b)
        alone = torch.stack([self.answer(self.well, row) for row in b])
        self.same_solution(together, alone)

    def dependent(self) -> None:
        u, v = self.draw(2)
        b = torch.stack([u, 2.0 * u, v, u - v, u + 1e-12 * v, torch.zeros_like(u)])
        self.same_solution(self.answer(self.well, b), self.exact(self.well, b))

    def exact(self, A: Dense, b: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.inv(A.matrix)
        return b @ inverse.mT

    def same_solution(self, actual: Tensor, expected: Tensor, rtol: float | None = None) -> None:
        """Equal row by row, relative to the size of the row: condition 10, two solves."""
        of_one = self.solve(self.well, self.draw())
        if not of_one.converged:  # an approximation is of the size of its residual
            rtol = float(of_one.stats.residuals.max())
        elif rtol is None:
            rtol = of_one.stats.extra["rtol"]
        gap = torch.linalg.vector_norm(actual - expected, dim=-1)
        bound = 30 * rtol * torch.linalg.vector_norm(expected, dim=-1)
        assert bool((gap <= bound).all()), f"off by {float((gap / bound).max()):.1e} × the bound"

    def zero(self) -> None:
        b = self.draw(2)
        b[0] = 0.0
        x = self.answer(self.well, b)
        assert torch.equal(x[0], torch.zeros_like(x[0])), "A x = 0 was not solved by x = 0"

    def empty(self) -> None:
        assert self.answer(self.well, self.draw(0)).shape == (0, 24)

    def scale(self) -> None:
        b = self.draw()
        for factor in (1e-30, 1e30):
            self.same_solution(
                self.answer(self.well, factor * b), factor * self.exact(self.well, b)
            )

    def single_precision(self) -> None:
        # An rtol made for float64 is out of reach in float32; then the result must say so.
        A, b = spectra()[0].operator(torch.float32), self.draw(2).float()
        solution = self.solve(A, b)
        assert solution.value.dtype == torch.float32
        self.residuals_are_true(A, b, solution)
        assert solution.is_answer or solution.result in (Result.STAGNATED, Result.MAX_STEPS)
        self.same_solution(solution.value, self.exact(A, b), rtol=1e-5)

    def nan_in_b(self) -> None:
        b = self.draw(3)
        b[1, 4] = torch.nan
        solution = self.solve(self.well, b)
        assert solution.result is Result.NON_FINITE
        assert bool(solution.value[1].isnan().all()), "an answer for a right-hand side with a NaN"
        self.same_solution(solution.value[::2], self.exact(self.well, b[::2]))
        self.throws(solution, NonFinite)

    def nan_in_A(self) -> None:
        matrix = self.well.matrix.clone()
        matrix[3, 5] = matrix[5, 3] = torch.nan
        solution = self.solve(Dense(matrix, self.well.tags), self.draw(2))
        assert solution.result is Result.NON_FINITE
        assert bool(solution.value.isnan().all()), "an answer for an operator with a NaN"
        self.throws(solution, NonFinite)

    def throws(self, solution: Solution, error: type[Exception]) -> None:
        try:
            solution.throw()
        except error:
            return
        raise AssertionError(f"{solution.result} did not raise {error.__name__}")

    def pure(self) -> None:
        b = self.draw(2)
        before, state = b.clone(), self.solver.init(self.well)
        first = self.solver.solve(state, b)
        assert torch.equal(b, before), "solve changed b"
        assert torch.equal(first.value, self.solver.solve(state, b).value), "two answers for one b"

    def refuses(self) -> None:
        state = self.solver.init(self.well)
        for b, error in ((self.draw(2)[:, :-1], ShapeError), (self.draw().float(), DtypeError)):
            try:
                self.solver.solve(state, b)
            except error:
                continue
            raise AssertionError(f"b of {tuple(b.shape)}, {b.dtype} without {error.__name__}")
        try:
            self.solver.init(Dense(self.draw(3)))
        except ShapeError:
            return
        raise AssertionError("an operator of shape (3, 24) was accepted")
