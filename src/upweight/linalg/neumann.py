"""x ← x + ωP(b − A x): the Neumann series of (PA)⁻¹, a product with A at a time.

    x_t = ω Σ_{s<t} (I − ωPA)ˢ P b      →  A⁻¹ b   iff   ρ(I − ωPA) < 1

Also Richardson's iteration; with P = I and ω the step size it is gradient descent on ½xᵀAx − bᵀx,
so a series cut off early damps the small eigenvalues. Saad (2003), Section 4.2.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, SpecError
from upweight.linalg.columns import Columns
from upweight.linalg.lanczos import extreme_eigenvalues
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.preconditioner import Preconditioned
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver

LOOKS = 10
"""Products with A that the spectrum of PA is estimated from."""

GROWTH = 1e4
"""A residual this many times that of x = 0 has left; √cond(P) may come and go on the way down."""


@dataclass(frozen=True, eq=False)
class NeumannState:
    """A and P, the step, and what is known of the spectrum of PA."""

    system: Preconditioned
    step_size: float
    extra: dict[str, float]
    result: Result = Result.CONVERGED


@dataclass(frozen=True)
class Neumann(Solver[NeumannState]):
    """x ← x + ωP(b − A x), for many right-hand sides side by side.

    Args:
        steps: Most terms of the series.
        preconditioner: P ≈ A⁻¹, positive definite, as for `CG`: an operator, `Nystrom(rank)`, or in
            a method the spec of a curvature by layer, `EKFAC()`.
        step_size: ω; None: 1 / the largest eigenvalue of PA as estimated by Lanczos. 1 is the
            series in its plain form, which needs eigenvalues of PA below 2.
        rtol: Residual at which a right-hand side is done, as for `CG`.

    Every residual is a true one. A right-hand side that used all its terms is APPROXIMATE: a series
    cut off on purpose is an answer, with its residual stated. `stats.extra` has `spectral_radius`,
    of I − ωPA, estimated by Lanczos from below: where it is 1 or more the series has no limit.
    DIVERGED where a residual is above that of x = 0, with the best x that was reached.

    Exact when: in the limit, if the spectral radius is below 1; each step then multiplies the error
    by at most that radius, in the norm of P⁻¹.
    Cost: a product with A a step, and 10 once for the spectrum.

    Raises:
        SpecError: Fewer than one step, or a step size that is not a positive number.
    """

    steps: int = 100
    preconditioner: Any = None
    step_size: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise SpecError(
                "Neumann sums a whole number of terms, at least one.",
                f"steps={self.steps!r}.",
                "a tolerance where a count is meant, or a zero.",
                "Neumann(steps=100).",
            )
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise SpecError(
                "The step ω of x ← x + ωP(b − Ax) is a positive number.",
                f"step_size={self.step_size!r}.",
                "a sign slip, or a number that overflowed.",
                "leave it out: it is then 1 / the largest eigenvalue of PA.",
            )

    def init(self, A: LinearOperator) -> NeumannState:
        square(A, "Neumann")
        system = Preconditioned.of(A, self.preconditioner)
        try:
            ends = extreme_eigenvalues(A, LOOKS, 1e-2, preconditioner=system.M)
        except NonFinite:
            return NeumannState(system, 1.0, {}, Result.NON_FINITE)
        size = self.step_size
        if size is None:
            size = 1.0 / (max(abs(ends.smallest), abs(ends.largest)) + ends.largest_error or 1.0)
        radius = max(abs(1.0 - size * ends.smallest), abs(1.0 - size * ends.largest))
        extra = {"spectral_radius": radius, "step_size": size}
        if ends.smallest < 0:
            extra["smallest_eigenvalue"] = ends.smallest
        return NeumannState(system, size, extra)

    def solve(self, state: NeumannState, b: Float[Tensor, "*k p"]) -> Solution:
        A, P = state.system.A, state.system.M
        columns = Columns(A, b, self.rtol)
        columns.extra.update(state.extra)
        if state.result is not Result.CONVERGED:
            columns.close_without_answer(torch.arange(len(columns.units)), state.result)
            return columns.solution(0, repr(self))
        rows = columns.rows
        goal = columns.units[rows]
        x, r = torch.zeros_like(goal), goal
        best, least = x, torch.ones_like(goal[:, 0])
        steps = 0
        while len(rows) and steps < self.steps:
            x = x + state.step_size * (r if P is None else P.mv(r))
            r = goal - A.mv(x)
            steps += 1
            size = torch.linalg.vector_norm(r, dim=1)
            better = size < least
            best, least = torch.where(better[:, None], x, best), torch.where(better, size, least)
            solved, gone = size <= columns.rtol, ~(size <= GROWTH)
            if bool((solved | gone).any()):
                columns.accept(rows[solved], x[solved], size[solved])
                columns.close(rows[gone], best[gone], Result.DIVERGED)
                left = ~(solved | gone)
                rows, goal, x, r = rows[left], goal[left], x[left], r[left]
                best, least = best[left], least[left]
        if len(rows):
            grown = torch.linalg.vector_norm(r, dim=1) > 1.0
            columns.close(rows[grown], best[grown], Result.DIVERGED)
            columns.close(rows[~grown], x[~grown], Result.APPROXIMATE)
        return columns.solution(steps, repr(self))
