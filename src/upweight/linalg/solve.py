"""x = A⁻¹ b: the one entry point, and the solver that is used if none is named.

Which one `Auto` would use is a question that can be asked: `Auto().select(A)`.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from upweight.errors import UnsupportedModel
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.minres import MINRES
from upweight.linalg.operator import LinearOperator, SymmetricOperator, Tag, square
from upweight.linalg.solution import Solution
from upweight.linalg.solver import Solver


@dataclass(frozen=True)
class Auto(Solver[tuple[Solver[Any], Any]]):
    """The solver that what is known about A allows.

        positive semi-definite, p ≤ largest_dense     Cholesky()
        positive semi-definite, larger                CG()
        symmetric                                     MINRES()

    Args:
        largest_dense: Largest p for which p² numbers in float64 are asked for; 10 000 is 0.8 GB,
            held twice while A is a matrix itself.
    """

    largest_dense: int = 10_000

    def select(self, A: LinearOperator) -> Solver[Any]:
        """The solver that `solve(A, b)` would use.

        Raises:
            ShapeError: A is not square.
            UnsupportedModel: A is not known to be symmetric.
        """
        p = square(A, "A solver")
        if A.is_psd:
            return Cholesky() if p <= self.largest_dense else CG()
        if A.is_symmetric:
            return MINRES()
        raise UnsupportedModel(
            "Auto() needs an operator tagged PSD (for Cholesky or CG) or SYMMETRIC (for MINRES).",
            f"{A!r}.",
            "a matrix passed as Dense(M) without tags, or a product A @ B, whose symmetry "
            "cannot be seen.",
            "say what is known: Dense(M, tags=frozenset({Tag.SYMMETRIC})), or a LinearOperator "
            "of your own whose `tags` say it.",
        )

    def init(self, A: LinearOperator) -> tuple[Solver[Any], Any]:
        solver = self.select(A)
        return solver, solver.init(A)

    def solve(self, state: tuple[Solver[Any], Any], b: Float[Tensor, "*k p"]) -> Solution:
        solver, inner = state
        return solver.solve(inner, b)


def solve(
    A: LinearOperator,
    b: Float[Tensor, "*k p"],
    solver: Solver[Any] = Auto(),
    *,
    throw: bool = True,
) -> Solution:
    """Solve A x = b for each right-hand side along the leading axes of b; damping is part of A.

    Without `throw`, look at `result` before `value`.

    Raises:
        NotPositiveDefinite, NotConverged, NonFinite: As `Solution.throw`, if `throw`.
        ShapeError, DtypeError: A and b do not fit.
    """
    solution = solver.solve(solver.init(A), b)
    return solution.throw() if throw else solution


def inverse(A: LinearOperator, solver: Solver[Any] = Auto()) -> LinearOperator:
    """A⁻¹ as an operator: `init` runs once, here, and every `mv` is a solve that throws.

    Keeps the tags of A (the inverse of a definite operator is definite).

    Raises:
        UnsupportedModel: A is not known to be symmetric, so the transpose is not known either.
    """
    square(A, "An inverse")
    if not A.is_symmetric:
        raise UnsupportedModel(
            "An inverse needs an operator tagged SYMMETRIC: all solvers here assume it.",
            f"{A!r}.",
            "a matrix passed as Dense(M) without tags.",
            "say so, if it is: Dense(M, tags=frozenset({Tag.SYMMETRIC})).",
        )
    return Inverse(A, solver, solver.init(A))


@dataclass(frozen=True, eq=False, repr=False)
class Inverse(SymmetricOperator):
    """A⁻¹ : b ↦ x with A x = b. Made by `inverse`."""

    operator: LinearOperator
    solver: Solver[Any]
    state: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    @property
    def like(self) -> LinearOperator:
        return self.operator

    @property
    def tags(self) -> frozenset[Tag]:
        return self.operator.tags

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        return self.solution(v).throw().value

    def solution(self, b: Float[Tensor, "*k p"]) -> Solution:
        """The solve behind `mv`, with its statistics; does not throw."""
        self.check(b)
        return self.solver.solve(self.state, b)
