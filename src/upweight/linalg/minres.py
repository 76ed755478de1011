"""Minimum residuals: A x = b for A symmetric, definite or not, singular or not.

    x_k = argmin ‖A x − b‖  over  span{b, Ab, …, A^{k−1} b}

Paige & Saunders (1975): Lanczos, A V_k = V_{k+1} T_k, with a running QR factorization of T_k by
Givens rotations, so that only the last few vectors are kept. The iterates stay in the range of A
where b does, so the solution of a singular, consistent system is the one of least norm.

Refuses to call a least-squares solution an answer: where b has a part outside the range of A the
residual cannot reach zero, and the result is SINGULAR.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.linalg.columns import Columns
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver
from upweight.runtime.progress import Lines

RESTARTS = 3  # restarts from the true residual, none of which halved it, before giving up


@dataclass(frozen=True)
class MINRES(Solver[LinearOperator]):
    """Minimum residuals, for many right-hand sides side by side.

    Args:
        rtol, max_steps: As for `CG`.

    The residual never grows. For a spectrum in [−a, −c] and [c, a] it takes about 2a/c steps
    for each digit: indefinite systems are harder than definite ones, where √κ enters.

    Whenever a right-hand side seems solved its residual is computed from x; if it is not, the
    method restarts from that residual, which costs steps but reaches full accuracy.

    Exact when: after as many steps as A has distinct eigenvalues, in exact arithmetic.
    Cost: one product with A a step, and seven vectors for each right-hand side.
    """

    rtol: float | None = None
    max_steps: int = 2000

    def init(self, A: LinearOperator) -> LinearOperator:
        square(A, "MINRES")
        return A

    def solve(self, state: LinearOperator, b: Float[Tensor, "*k p"]) -> Solution:
        columns = Columns(state, b, self.rtol)
        return _Run(self, state, columns).solution()


@dataclass(frozen=True, eq=False)
class _Rows:
    """The unsolved right-hand sides; names as in Choi, Paige & Saunders (2011)."""

    index: Int[Tensor, " r"]
    x: Float[Tensor, "r p"]
    target: Float[Tensor, " r"]  # ‖b − A x‖ at the last restart
    failures: Int[Tensor, " r"]  # restarts in a row that did not halve it
    v_old: Float[Tensor, "r p"]  # Lanczos vectors v_{k−1} and v_k
    v: Float[Tensor, "r p"]
    beta: Float[Tensor, " r"]  # β_k, which couples them
    d_old: Float[Tensor, "r p"]  # directions: D = V R⁻¹
    d: Float[Tensor, "r p"]
    phi: Float[Tensor, " r"]  # estimated residual norm
    c: Float[Tensor, " r"]  # last rotation
    s: Float[Tensor, " r"]
    delta: Float[Tensor, " r"]  # entries of T touched by it
    epsilon: Float[Tensor, " r"]
    slope: Float[Tensor, " r"]  # smallest ‖Ar‖/‖r‖ since the restart
    phi_there: Float[Tensor, " r"]  # and φ where it was met

    @classmethod
    def start(
        cls,
        index: Int[Tensor, " r"],
        x: Float[Tensor, "r p"],
        r: Float[Tensor, "r p"],
        failures: Int[Tensor, " r"],
    ) -> "_Rows":
        size = torch.linalg.vector_norm(r, dim=1)
        o, none = torch.zeros_like(size), torch.zeros_like(x)
        unit = r / size[:, None]
        return cls(
            index,
            x,
            size,
            failures,
            none,
            unit,
            o,
            none,
            none,
            size,
            o - 1,
            o,
            o,
            o,
            o + torch.inf,
            size,
        )

    def keep(self, mask: Bool[Tensor, " r"]) -> "_Rows":
        return type(self)(*(getattr(self, field.name)[mask] for field in fields(self)))

    def join(self, other: "_Rows") -> "_Rows":
        names = [field.name for field in fields(self)]
        return type(self)(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in names))


class _Run:
    """One solve: rows leave through `columns` as they end."""

    def __init__(self, solver: MINRES, A: LinearOperator, columns: Columns) -> None:
        self.solver, self.A, self.columns = solver, A, columns
        self.eps = torch.finfo(A.dtype).eps
        self.norm_A = 0.0  # largest ‖Av‖ seen for a unit v: a lower bound on ‖A‖

    def solution(self) -> Solution:
        index = self.columns.rows
        r = self.columns.units[index]
        rows = _Rows.start(index, torch.zeros_like(r), r, torch.zeros_like(index))
        steps, most, lines = 0, self.solver.max_steps, Lines("MINRES", "products or so")
        while len(rows.index) and steps < most:
            rows, exhausted, hopeless, broken = self.step(rows)
            steps += 1
            total = self.columns.expected(steps, most, rows.phi)
            lines.tell(steps, total, self.columns.left(rows.index))
            self.columns.close_without_answer(rows.index[broken], Result.NON_FINITE)
            due = ((rows.phi <= self.columns.rtol) | exhausted) & ~broken
            again = self.verify(rows.keep(due), hopeless[due]) if bool(due.any()) else None
            rows = rows.keep(~due & ~broken)
            rows = rows if again is None else rows.join(again)
        self.columns.close(rows.index, rows.x, Result.MAX_STEPS)
        return self.columns.solution(steps, repr(self.solver))

    def step(self, rows: _Rows) -> tuple[_Rows, Tensor, Tensor, Tensor]:
        """One Lanczos step and one rotation; which rows are exhausted, hopeless, not finite."""
        w = self.A.mv(rows.v)
        stretch = torch.linalg.vector_norm(w, dim=1)
        self.norm_A = max(self.norm_A, float(stretch.nan_to_num(0.0, 0.0, 0.0).max()))
        alpha = (rows.v * w).sum(1)
        w = w - alpha[:, None] * rows.v - rows.beta[:, None] * rows.v_old
        beta = torch.linalg.vector_norm(w, dim=1)
        # Apply the last rotation to the new column of T, then choose the next one.
        delta = rows.c * rows.delta + rows.s * alpha
        gamma_bar = rows.s * rows.delta - rows.c * alpha
        epsilon, delta_next = rows.s * beta, -rows.c * beta
        gamma = torch.hypot(gamma_bar, beta)
        tiny = 10 * self.eps * self.norm_A
        flat = gamma <= tiny  # no step is left along this direction
        # ‖Ar‖/‖r‖ of the residual before this step (Paige & Saunders 1975).
        slope = torch.hypot(gamma_bar, delta_next)
        lower = slope < rows.slope
        hopeless = flat | self.inconsistent(rows, slope)
        # β = 0: the Krylov space is exhausted. ‖r‖ ≤ eps·‖A‖‖x‖: it is all rounding.
        length = torch.linalg.vector_norm(rows.x, dim=1)
        exhausted = hopeless | (beta <= tiny) | (rows.phi <= self.eps * self.norm_A * length)
        safe = torch.where(flat, torch.ones_like(gamma), gamma)
        c, s = gamma_bar / safe, beta / safe
        d = (rows.v - delta[:, None] * rows.d - rows.epsilon[:, None] * rows.d_old) / safe[:, None]
        tau = torch.where(flat, 0.0, c * rows.phi)
        moved = replace(
            rows,
            x=rows.x + tau[:, None] * d,
            phi=torch.where(flat, rows.phi, s * rows.phi),
            v_old=rows.v,
            v=w / torch.where(beta > 0, beta, 1.0)[:, None],
            beta=beta,
            d_old=rows.d,
            d=d,
            c=c,
            s=s,
            delta=delta_next,
            epsilon=epsilon,
            slope=torch.where(lower, slope, rows.slope),
            phi_there=torch.where(lower, rows.phi, rows.phi_there),
        )
        return moved, exhausted, hopeless, ~stretch.isfinite()

    def inconsistent(self, rows: _Rows, slope: Float[Tensor, " r"]) -> Bool[Tensor, " r"]:
        """Where x has become a least-squares solution, and further steps only add rounding.

        ‖Ar‖/‖r‖ fell below √eps·‖A‖, which is as far as it gets, and has risen tenfold while the
        residual did not move: observed for inconsistent systems only, since in a consistent one the
        slope rises because the residual falls.
        """
        met = rows.slope <= math.sqrt(self.eps) * self.norm_A
        return met & (slope >= 10 * rows.slope) & (rows.phi >= 0.99 * rows.phi_there)

    def verify(self, rows: _Rows, hopeless: Bool[Tensor, " r"]) -> _Rows:
        """End what is solved by its true residual, or cannot be; restart the rest from it."""
        r = self.columns.units[rows.index] - self.A.mv(rows.x)
        size = torch.linalg.vector_norm(r, dim=1)
        solved = size <= self.columns.rtol
        self.columns.accept(rows.index[solved], rows.x[solved], size[solved])
        singular = hopeless & ~solved
        self.columns.close(rows.index[singular], rows.x[singular], Result.SINGULAR)
        failures = torch.where(size > 0.5 * rows.target, rows.failures + 1, 0)
        stuck = ~solved & ~singular & (failures >= RESTARTS)
        self.columns.close(rows.index[stuck], rows.x[stuck], Result.STAGNATED)
        left = ~solved & ~singular & ~stuck
        return _Rows.start(rows.index[left], rows.x[left], r[left], failures[left])
