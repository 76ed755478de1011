"""Block conjugate gradients: many right-hand sides in one Krylov space.

    x_j ∈ span{B, AB, …, A^{t−1}B}   for every column j,   not only span{b_j, Ab_j, …}

O'Leary (1980), in the orthonormal form of Dubrulle (2001): the block of residuals is kept as R = Q
C with QᵀQ = I, so that nothing is inverted but the small matrix ZᵀAZ of an orthonormal basis Z of
the directions. Directions that become dependent, because right-hand sides are, or because some are
already solved, are dropped from the block. Each step needs one product with A for the whole block,
and a block of k vectors reaches past the k − 1 eigenvalues that slow CG the most.

Refuses what CG refuses: negative curvature is a result, not a step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.linalg.columns import Columns
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.preconditioner import Preconditioned
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver

RESTARTS = 3  # restarts from the true residuals, none of which halved them, before giving up


@dataclass(frozen=True)
class BlockCG(Solver[Preconditioned]):
    """Conjugate gradients in the Krylov space that all right-hand sides share.

    Args:
        rtol: As for `CG`.
        max_steps: Most products with A, each for the whole block.
        preconditioner: M ≈ A⁻¹, an `Eigen` or a `BlockDiagonal` of them with positive eigenvalues,
            whose square root splits it: M½ A M½ y = M½ b, x = M½ y; or `Nystrom(rank)`. In a method
            also the spec of a curvature by layer, `EKFAC()`.

    The error falls at least as fast as CG's with κ replaced by the ratio of the largest to the k-th
    smallest eigenvalue, k independent right-hand sides (O'Leary 1980).

    Exact when: after ⌈p/k⌉ steps, k independent right-hand sides, in exact arithmetic.
    Cost: one product of A with ≤ k vectors a step, O(p k²) besides, and five blocks of k vectors.
    """

    rtol: float | None = None
    max_steps: int = 1000
    preconditioner: Any = None

    def init(self, A: LinearOperator) -> Preconditioned:
        square(A, "BlockCG")
        return Preconditioned.of(A, self.preconditioner)

    def solve(self, state: Preconditioned, b: Float[Tensor, "*k p"]) -> Solution:
        columns = Columns(state.A, b, self.rtol)
        return _Run(self, state, columns).solution()


class _Run:
    """One solve: rows leave through `columns` at each restart, all of them at the end."""

    def __init__(self, solver: BlockCG, state: Preconditioned, columns: Columns) -> None:
        self.solver, self.A, self.columns = solver, state.A, columns
        self.eps = torch.finfo(state.A.dtype).eps
        self.norm_A = 0.0  # largest Ritz value seen: a lower bound on ‖A‖
        self.steps = 0
        M: Any = state.M  # one that has functions
        self.root = None if M is None else M.function(torch.sqrt)
        self.inverse_root = None if M is None else M.function(torch.rsqrt)

    def product(self, Z: Float[Tensor, "p r"]) -> Float[Tensor, "p r"]:
        """A Z, or M½ A M½ Z."""
        if self.root is None:
            return self.A.mv(Z.mT).mT
        return self.root.mv(self.A.mv(self.root.mv(Z.mT))).mT

    def solution(self) -> Solution:
        rows = self.columns.rows
        goal = self.columns.units[rows]
        x, r = torch.zeros_like(goal), goal
        failures = 0
        while len(rows):
            before = torch.linalg.vector_norm(r, dim=1)
            change, failure = self.sweep(r)
            x = x + change
            r = goal - self.A.mv(x)
            size = torch.linalg.vector_norm(r, dim=1)
            solved = size <= self.columns.rtol
            self.columns.close(rows[solved], x[solved], Result.STAGNATED)
            keep = ~solved
            halved = bool((size <= 0.5 * before)[keep].any())
            failures = 0 if halved else failures + 1
            rows, goal, x, r = rows[keep], goal[keep], x[keep], r[keep]
            if failure is None and failures >= RESTARTS:
                failure = Result.STAGNATED
            if failure is not None:
                self.columns.close(rows, x, failure)
                break
        return self.columns.solution(self.steps, repr(self.solver))

    def sweep(self, R: Float[Tensor, "k p"]) -> tuple[Float[Tensor, "k p"], Result | None]:
        """Block CG on A X = R from zero until it claims to be done, or the reason it stopped."""
        if self.root is not None:
            R = self.root.mv(R)
        X, failure = self.split_sweep(R)
        return X if self.root is None else self.root.mv(X), failure

    def is_solved(self, Q: Float[Tensor, "p r"], C: Float[Tensor, "r k"]) -> bool:
        """Whether the residuals Q C, before they were split, are within the tolerance."""
        if self.inverse_root is None:  # ‖r_j‖ = ‖C e_j‖
            norms = torch.linalg.vector_norm(C, dim=0)
        else:
            norms = torch.linalg.vector_norm(self.inverse_root.mv((Q @ C).mT), dim=1)
        return bool((norms <= self.columns.rtol).all())

    def split_sweep(self, R: Float[Tensor, "k p"]) -> tuple[Float[Tensor, "k p"], Result | None]:
        """Block CG on M½ A M½ X = R."""
        X = torch.zeros_like(R)
        Q, C = orthonormal(R.mT)  # R = Q C: [p r] and [r k]
        Z = Q
        while Q.shape[1] and self.steps < self.solver.max_steps:
            W = self.product(Z)
            self.steps += 1
            if not bool(W.isfinite().all()):
                return X, Result.NON_FINITE
            small = Z.mT @ W
            ritz, basis = torch.linalg.eigh(0.5 * (small + small.mT))
            failure = self.definite(ritz)
            if failure is not None:
                return X, failure
            inverse = (basis / ritz) @ basis.mT
            alpha = inverse @ (Z.mT @ Q)
            X = X + (Z @ (alpha @ C)).mT
            Q_next, zeta = orthonormal(Q - W @ alpha)
            C = zeta @ C
            if self.is_solved(Q_next, C):
                return X, None
            # The next directions are conjugate to these: ZᵀA P = 0.
            P = Q_next - Z @ (inverse @ (W.mT @ Q_next))
            Q, (Z, _) = Q_next, orthonormal(P)
        return X, Result.MAX_STEPS if Q.shape[1] else None

    def definite(self, ritz: Float[Tensor, " r"]) -> Result | None:
        """Whether A is positive definite on this block, by its Ritz values."""
        self.norm_A = max(self.norm_A, float(ritz.abs().max()))
        rounding = 10 * self.eps * self.norm_A
        if float(ritz[0]) < -rounding:
            self.columns.extra["curvature"] = float(ritz[0])
            return Result.NEGATIVE_CURVATURE
        return Result.SINGULAR if float(ritz[0]) <= rounding else None


def orthonormal(V: Float[Tensor, "p k"]) -> tuple[Float[Tensor, "p r"], Float[Tensor, "r k"]]:
    """V ≈ Q C with QᵀQ = I and r ≤ k the numerical rank of V.

    QR, then the singular values of the small factor decide the rank: a QR factorization alone would
    complete dependent columns with arbitrary directions, which for a singular A may be flat.
    """
    Q, upper = torch.linalg.qr(V)
    left, values, right = torch.linalg.svd(upper)
    largest = float(values.max()) if len(values) else 0.0
    keep = values > 10 * max(V.shape[1], 10) * torch.finfo(V.dtype).eps * largest
    rank = int(keep.sum())
    return Q @ left[:, :rank], values[:rank, None] * right[:rank]
