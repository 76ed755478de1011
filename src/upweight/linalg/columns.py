"""Right-hand sides as rows [k p] that are solved, and closed, one by one.

    open(b) ──► iterate ──► close(rows, x, result) ──► solution()

Each row ends for its own reason with its own true residual, so that one hard right-hand side
neither spoils nor delays the others. Solvers work on b/‖b‖, so that no scale of b is too small or
too large. What ends here: rows of zeros (x = 0), rows with a NaN, and all other rows when a solver
closes them.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.linalg.operator import LinearOperator
from upweight.linalg.solution import Result, Solution, SolverStats

WITHIN_REACH = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative residuals that rounding leaves within reach of an iterative solver, by dtype."""


class Columns:
    """The right-hand sides of one solve, and how each of them ended."""

    def __init__(self, A: LinearOperator, b: Float[Tensor, "*k p"], rtol: float | None) -> None:
        """End the right-hand sides that need no solver; `rows` are the others."""
        A.check(b)
        self.A, self.shape = A, b.shape
        self.rtol = WITHIN_REACH.get(b.dtype, 1e-2) if rtol is None else rtol
        flat = b.reshape(-1, b.shape[-1])
        # In float32 the squares of entries below 1e-23 are zero, and a gradient that small would be
        # taken for zero. The largest entry is divided out first.
        peak = flat.abs().amax(1, keepdim=True) if flat.numel() else flat.new_zeros(len(flat), 1)
        solvable = peak.isfinite() & (peak > 0)
        flat = flat / torch.where(solvable, peak, 1.0)
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        self.units = flat / torch.where(solvable, length, 1.0)
        self.norms = peak * length
        self.x = torch.zeros_like(flat)
        self.residuals = flat.new_zeros(len(flat))
        self.results = [Result.CONVERGED] * len(flat)
        self.extra: dict[str, float] = {}
        bad = ~peak.isfinite().flatten()
        self.close_without_answer(bad.nonzero().flatten(), Result.NON_FINITE)
        self.rows = solvable.flatten().nonzero().flatten()

    def left(self, rows: Int[Tensor, " r"]) -> str:
        """How many right-hand sides are not solved yet, in words."""
        return f"{len(rows)} of {len(self.units)} right-hand sides are not solved yet"

    def expected(self, steps: int, max_steps: int, residuals: Float[Tensor, " r"]) -> int:
        """How many products there will be, about, after so many that left these residuals.

        As many more as they take if their logarithm goes on to fall evenly; no more than p, but for
        rounding.
        """
        p, worst = self.shape[-1], float(residuals.max()) if len(residuals) else 0.0
        most = min(max_steps, p) if steps < p else max_steps
        if worst <= self.rtol:
            return steps
        if not worst < 1:
            return most
        return min(most, math.ceil(steps * math.log(self.rtol) / math.log(worst)))

    def close(self, rows: Int[Tensor, " r"], x: Float[Tensor, "r p"], result: Result) -> None:
        """End these rows at x, a solution for `units`; converged only if its residual says so.

        APPROXIMATE becomes DIVERGED where the residual is above that of x = 0.
        """
        if len(rows) == 0 or result is Result.NON_FINITE:
            return self.close_without_answer(rows, result)
        r = self.units[rows] - self.A.mv(x)
        residuals = torch.linalg.vector_norm(r, dim=1)
        self._keep(rows, x, residuals)
        for row, residual in zip(rows.tolist(), residuals.tolist(), strict=True):
            # An approximation with more residual than x = 0 has, past rounding, is no answer.
            grown = result is Result.APPROXIMATE and residual > 1.0 + self.rtol
            ended = Result.DIVERGED if grown else result
            self.results[row] = Result.CONVERGED if residual <= self.rtol else ended
        finite = residuals.isfinite() & self.x[rows].isfinite().all(1)
        self.close_without_answer(rows[~finite], Result.NON_FINITE)

    def accept(
        self, rows: Int[Tensor, " r"], x: Float[Tensor, "r p"], residuals: Float[Tensor, " r"]
    ) -> None:
        """End these rows as converged, with true residuals that were just computed."""
        assert bool((residuals <= self.rtol).all())
        self._keep(rows, x, residuals)

    def _keep(self, rows: Tensor, x: Tensor, residuals: Tensor) -> None:
        self.x[rows], self.residuals[rows] = x * self.norms[rows], residuals

    def close_without_answer(self, rows: Int[Tensor, " r"], result: Result) -> None:
        """End these rows with NaN."""
        self.x[rows] = torch.nan
        self.residuals[rows] = torch.nan
        for row in rows.tolist():
            self.results[row] = result

    def solution(self, steps: int, solver: str) -> Solution:
        """The whole answer: the worst result of all rows, in the shape of b."""
        worst = max(self.results, key=lambda result: result.severity, default=Result.CONVERGED)
        residuals = self.residuals.reshape(self.shape[:-1])
        numbers = {"rtol": self.rtol, **self.extra}
        stats = SolverStats(steps, residuals, numbers, solver, self.A.is_psd)
        return Solution(self.x.reshape(self.shape), worst, stats)
