"""Conjugate gradients: A x = b for A positive definite, by products with A.

    α = rᵀz / pᵀAp;  x ← x + αp;  r ← r − αAp;  z = M r;  β = r₊ᵀz₊ / rᵀz;  p ← z + βp

Hestenes & Stiefel (1952); with the preconditioner M ≈ A⁻¹, Saad (2003), Algorithm 9.1. Every
right-hand side has its own scalars, and leaves the batch when it is done. Differences from the
textbook: the residual is computed from x every `refresh` steps and before a right-hand side counts
as solved; a direction of negative curvature is an error and not a step.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.linalg.columns import Columns
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.preconditioner import Preconditioned
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver
from upweight.runtime.progress import Lines

# Looks at the true residual in a row, none with progress, after which a right-hand side has
# stagnated.
STALLS = 10

RITZ_STEPS = 400
"""Steps whose coefficients the ends of the spectrum are taken from: eigenvalues of a matrix of that
size cost less than a product."""


def most_steps(condition: float, rtol: float) -> int:
    """Steps within which ‖Ax − b‖ ≤ rtol ‖b‖ in exact arithmetic, from A's condition number κ.

        2√κ ((√κ − 1)/(√κ + 1))^steps ≤ rtol

    From the bound on the error in the A-norm; MINRES needs no more.
    """
    root = math.sqrt(condition)
    if root <= 1:
        return 1
    return max(1, math.ceil(math.log(2 * root / rtol) / math.log((root + 1) / (root - 1))))


@dataclass(frozen=True)
class CG(Solver[Preconditioned]):
    """Conjugate gradients, for many right-hand sides side by side.

    Args:
        rtol: Tolerance on the true residual ‖Ax − b‖/‖b‖ of each right-hand side. None stands for
            1e-6 in float64, 1e-4 in float32 and 1e-2 below, which rounding leaves within reach.
        max_steps: Most products with A; each is for all unsolved right-hand sides at once.
        preconditioner: M ≈ A⁻¹, positive definite: an operator as `inverse(DiagonalMatrix(d),
            Cholesky())`, or `Nystrom(rank)`, which makes one from A. In a method also the spec of a
            curvature by layer, `EKFAC()`.
        refresh: Steps between residuals computed from x rather than by recurrence.

    The error in the A-norm falls at least as fast as 2((√κ − 1)/(√κ + 1))^steps, κ the ratio of
    largest to smallest eigenvalue.

    Ends with NEGATIVE_CURVATURE where A is seen to be indefinite, SINGULAR where a direction is
    flat, and STAGNATED where rounding keeps the residual above rtol. On a singular A with b in its
    range the answer is the solution of least norm; MINRES is the solver that expects that case.

    Without a preconditioner `stats.extra` has what the steps of one right-hand side, which took
    most, saw of A: `smallest_ritz` and `largest_ritz`, the ends of the spectrum of Lanczos'
    matrix, which are within that of A, and their ratio `condition`, which is at most κ. They take
    no further product (Saad 2003, Section 6.7.3).

    Exact when: after as many steps as A has distinct eigenvalues, in exact arithmetic.
    Cost: one product with A a step, and five vectors for each right-hand side.
    """

    rtol: float | None = None
    max_steps: int = 1000
    preconditioner: Any = None
    refresh: int = 50

    def init(self, A: LinearOperator) -> Preconditioned:
        square(A, "CG")
        return Preconditioned.of(A, self.preconditioner)

    def solve(self, state: Preconditioned, b: Float[Tensor, "*k p"]) -> Solution:
        columns = Columns(state.A, b, self.rtol)
        return _Run(self, state, columns).solution()


@dataclass(frozen=True, eq=False)
class _Rows:
    """The unsolved right-hand sides: one row each."""

    index: Int[Tensor, " r"]
    x: Float[Tensor, "r p"]
    residual: Float[Tensor, "r p"]
    direction: Float[Tensor, "r p"]
    rz: Float[Tensor, " r"]
    best: Float[Tensor, " r"]  # smallest true residual so far, for stagnation
    energy: Float[Tensor, " r"]  # xᵀAx/2 − bᵀx, which CG lowers at every step
    stalls: Int[Tensor, " r"]  # looks without progress

    def keep(self, mask: Bool[Tensor, " r"]) -> "_Rows":
        return type(self)(*(getattr(self, field.name)[mask] for field in fields(self)))


class _Run:
    """One solve: rows leave through `columns` as they end."""

    def __init__(self, solver: CG, state: Preconditioned, columns: Columns) -> None:
        self.solver, self.A, self.M, self.columns = solver, state.A, state.M, columns
        self.eps = torch.finfo(state.A.dtype).eps
        self.norm_A = 0.0  # largest ‖Av‖/‖v‖ seen: a lower bound on ‖A‖
        self.seen = _Seen(columns)

    def precondition(self, r: Tensor) -> Tensor:
        return r if self.M is None else self.M.mv(r)

    def solution(self) -> Solution:
        index = self.columns.rows
        r = self.columns.units[index]
        z = self.precondition(r)
        zero = torch.zeros(len(index), dtype=r.dtype, device=r.device)
        x, rz = torch.zeros_like(r), (r * z).sum(1)
        rows = _Rows(index, x, r, z, rz, zero + torch.inf, zero, zero.long())
        rows = self.check_preconditioner(rows)
        steps, most, lines = 0, self.solver.max_steps, Lines("CG", "products or so")
        while len(rows.index) and steps < most:
            rows, steps = self.step(rows), steps + 1
            norms = torch.linalg.vector_norm(rows.residual, dim=1)
            total = self.columns.expected(steps, most, norms)
            lines.tell(steps, total, self.columns.left(rows.index))
            due = norms <= self.columns.rtol  # ‖b‖ = 1
            if steps % self.solver.refresh == 0:
                due = torch.ones_like(due)
            if bool(due.any()):
                rows = self.refresh(rows, due)
        self.columns.close(rows.index, rows.x, Result.MAX_STEPS)
        if self.M is None:
            self.columns.extra.update(self.seen.ends())
        return self.columns.solution(steps, repr(self.solver))

    def step(self, rows: _Rows) -> _Rows:
        p = rows.direction
        Ap = self.A.mv(p)
        pp, pAp = p.square().sum(1), (p * Ap).sum(1)
        stretch = (Ap.square().sum(1) / pp).sqrt()
        self.norm_A = max(self.norm_A, float(stretch.nan_to_num(0.0, 0.0, 0.0).max()))
        # Rounding in pᵀAp is of order eps·‖A‖‖p‖²; within it the sign means nothing.
        rounding = 10 * self.eps * self.norm_A * pp
        broken = ~(pAp.isfinite() & pp.isfinite())
        negative, flat = pAp < -rounding, pAp.abs() <= rounding
        stop = broken | negative | flat
        if bool(stop.any()):
            self.end(rows, broken, Result.NON_FINITE)
            self.end(rows, negative & ~broken, Result.NEGATIVE_CURVATURE)
            self.end(rows, flat & ~broken, Result.SINGULAR)
            lowest = (pAp / pp)[negative & ~broken]
            if len(lowest):
                known = self.columns.extra.get("curvature", 0.0)
                self.columns.extra["curvature"] = min(known, float(lowest.min()))
            rows, p, Ap, pAp = rows.keep(~stop), p[~stop], Ap[~stop], pAp[~stop]
        alpha = (rows.rz / pAp)[:, None]
        x, residual = rows.x + alpha * p, rows.residual - alpha * Ap
        turned = self.turn(replace(rows, x=x, residual=residual))
        if self.M is None:  # with it the coefficients are of M A, and `turned` may have fewer rows
            self.seen.step(rows.index, alpha[:, 0], turned.rz / rows.rz)
        return turned

    def turn(self, rows: _Rows) -> _Rows:
        """The next direction, conjugate to the last."""
        z = self.precondition(rows.residual)
        rz = (rows.residual * z).sum(1)
        beta = (rz / rows.rz).nan_to_num(0.0)
        direction = z + beta[:, None] * rows.direction
        return self.check_preconditioner(replace(rows, direction=direction, rz=rz))

    def check_preconditioner(self, rows: _Rows) -> _Rows:
        """End the rows on which M is not positive definite."""
        if self.M is None:
            return rows
        size = torch.linalg.vector_norm(rows.residual, dim=1)
        bad = (rows.rz <= 0) & (size > 0)
        if bool(bad.any()):
            curvature = float((rows.rz / size.square())[bad].min())
            self.columns.extra["preconditioner_curvature"] = curvature
            self.end(rows, bad, Result.NOT_POSITIVE_DEFINITE)
        return rows.keep(~bad)

    def refresh(self, rows: _Rows, due: Bool[Tensor, " r"]) -> _Rows:
        """Replace the residuals of these rows by true ones; end those that are solved or stuck."""
        true = self.columns.units[rows.index] - self.A.mv(rows.x)
        size = torch.linalg.vector_norm(true, dim=1)
        solved = due & (size <= self.columns.rtol)
        self.columns.accept(rows.index[solved], rows.x[solved], size[solved])
        # Where the recurrence has drifted from the truth, restart from the truth.
        drift = torch.linalg.vector_norm(true - rows.residual, dim=1)
        restart = due & (drift > 0.1 * size)
        # Stuck is what lowers neither the residual nor the energy, or is all rounding:
        # ‖r‖ ≤ eps·‖A‖‖x‖. The residual alone may rise for hundreds of steps on the way down.
        energy = -0.5 * (rows.x * (self.columns.units[rows.index] + true)).sum(1)
        lower = energy < rows.energy - 100 * self.eps * rows.energy.abs()
        progress = due & (lower | (size <= 0.5 * rows.best))
        stalls = torch.where(progress, 0, rows.stalls + due)
        floor = self.eps * self.norm_A * torch.linalg.vector_norm(rows.x, dim=1)
        stuck = due & ~solved & ((stalls >= STALLS) | (size <= floor))
        self.end(rows, stuck, Result.STAGNATED)
        best = torch.where(due, torch.minimum(rows.best, size), rows.best)
        energy = torch.where(due, torch.minimum(rows.energy, energy), rows.energy)
        residual = torch.where(restart[:, None], true, rows.residual)
        z = self.precondition(residual)
        rz = torch.where(restart, (residual * z).sum(1), rows.rz)
        direction = torch.where(restart[:, None], z, rows.direction)
        self.seen.restart(rows.index, restart)
        fresh = _Rows(rows.index, rows.x, residual, direction, rz, best, energy, stalls)
        return fresh.keep(~solved & ~stuck)

    def end(self, rows: _Rows, mask: Bool[Tensor, " r"], result: Result) -> None:
        self.columns.close(rows.index[mask], rows.x[mask], result)


class _Seen:
    """α and β of every step up to a restart, which are Lanczos' matrix T for A and r.

    T has 1/αₖ + βₖ₋₁/αₖ₋₁ on its diagonal, √βₖ/αₖ beside it: Saad (2003), Section 6.7.3.
    """

    def __init__(self, columns: Columns) -> None:
        self.none = torch.zeros_like(columns.residuals)
        self.goes_on = torch.ones_like(self.none, dtype=torch.bool)
        self.steps: list[tuple[Tensor, Tensor]] = []  # of all rows; 0 where one has left

    def step(self, index: Int[Tensor, " r"], alpha: Tensor, beta: Tensor) -> None:
        if len(index) and len(self.steps) < RITZ_STEPS:
            alpha = alpha * self.goes_on[index]
            self.steps.append(
                (self.none.index_copy(0, index, alpha), self.none.index_copy(0, index, beta))
            )

    def restart(self, index: Int[Tensor, " r"], mask: Bool[Tensor, " r"]) -> None:
        """The next direction of these is not conjugate to the last."""
        self.goes_on[index] &= ~mask

    def ends(self) -> dict[str, float]:
        """Of the right-hand side with most steps; nothing where none took a step."""
        if not self.steps:
            return {}
        alphas, betas = (torch.stack(part).double().cpu() for part in zip(*self.steps, strict=True))
        lengths = (alphas > 0).sum(dim=0)
        row = int(lengths.argmax())
        alpha, beta = alphas[: lengths[row], row], betas[: lengths[row], row]
        if not len(alpha) or not bool((alpha.isfinite() & beta.isfinite()).all()):
            return {}
        diagonal, off = 1 / alpha, (beta.sqrt() / alpha)[:-1]
        diagonal[1:] += (beta / alpha)[:-1]
        ritz = torch.linalg.eigvalsh(
            torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
        )
        low, high = float(ritz[0]), float(ritz[-1])
        ends = {"smallest_ritz": low, "largest_ritz": high}
        # Below that the smallest is rounding.
        if low > 10 * torch.finfo(self.none.dtype).eps * high:
            ends["condition"] = high / low
        return ends
