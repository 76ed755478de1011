"""A⁻¹ on the Krylov space of a random vector: the eigenvalues that Lanczos finds, at both ends.

    Q = span{v, Av, A²v, …},   Qᵀ A Q = S Θ Sᵀ,   U = Q S

Arnoldi's iteration as Schioppa et al. (2022) use it for influence, Section 3.2; for a symmetric A
it is Lanczos' with all vectors kept, which are orthogonalized twice (Giraud et al. 2005). Negative
eigenvalues are kept like positive ones.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError
from upweight.linalg.damping import undamped
from upweight.linalg.lanczos import normal
from upweight.linalg.low_rank import LowRankState, pseudo_inverse, require_rank
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver


@dataclass(frozen=True)
class Lanczos(Solver[LowRankState]):
    """x = (U Θ Uᵀ + μI)⁻¹ b, with Θ the Ritz values of A − μI that are largest in magnitude.

    Args:
        rank: Directions that are kept.
        steps: Products with A, at least `rank`; None: twice the rank. More of them make the kept
            directions eigenvectors.
        seed: Of the start vector.

    μ is the multiple of the identity that A is seen to contain: damping, and an L2 penalty on all
    of θ. Without one, what is orthogonal to U is left out of x, as Schioppa et al. (2022) do.

    `stats.extra` says what was seen of the spectrum: `smallest_eigenvalue` and `largest_eigenvalue`
    of A, how many of those kept are `negative`, and `ritz_residual`, the largest ‖A u − θ u‖ of a
    kept direction over the largest |θ|.

    The result is CONVERGED where the residual of A itself is within what CG reaches (1e-6 in
    float64, 1e-4 in float32), and else APPROXIMATE: no residual is promised. Above 1,
    the residual of x = 0, it is DIVERGED: the rank leaves out eigenvalues far above μ.

    Exact when: rank ≥ the rank of A − μI. A may be indefinite.
    Cost: `steps` products with A one after the other, O(p · steps²), and steps · p numbers; then a
    product for each right-hand side, for its residual.

    Raises:
        SpecError: The rank is not a whole number ≥ 1, or there are fewer steps than that.
    """

    rank: int = 50
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_rank(self.rank, "Lanczos")
        if self.steps is not None and self.steps < self.rank:
            raise SpecError(
                "Lanczos takes at least as many steps as it keeps directions.",
                f"rank={self.rank}, steps={self.steps}.",
                "the two in the wrong order.",
                f"Lanczos({self.rank}, steps={2 * self.rank}), or leave steps out.",
            )

    def init(self, A: LinearOperator) -> LowRankState:
        p = square(A, "Lanczos")
        steps = min(p, 2 * self.rank if self.steps is None else self.steps)
        B, shift = undamped(A)
        Q = torch.empty(steps, p, dtype=A.dtype, device=A.device)
        H = torch.zeros(steps, steps, dtype=torch.float64, device=A.device)
        w = normal(A, self.seed)
        scale, coupling = 0.0, 0.0
        for step in range(steps):
            length = float(torch.linalg.vector_norm(w))
            if step > 0 and length <= 10 * p**0.5 * torch.finfo(A.dtype).eps * scale:
                # An invariant subspace: go on from another vector, in what is orthogonal to it.
                w = _orthogonal(normal(A, self.seed + step), Q[:step])
                length = float(torch.linalg.vector_norm(w))
            Q[step] = w / length
            w = B.mv(Q[step])
            if not bool(w.isfinite().all()):
                return LowRankState(A, None, step + 1, Result.NON_FINITE)
            scale = max(scale, float(torch.linalg.vector_norm(w)))
            H[step, : step + 1] = H[: step + 1, step] = (Q[: step + 1] @ w).double()
            w = _orthogonal(w, Q[: step + 1])
            coupling = float(torch.linalg.vector_norm(w))
        theta, S = torch.linalg.eigh(H)
        kept = theta.abs().argsort(descending=True)[: self.rank].sort().values
        inverse = pseudo_inverse(S[:, kept].mT.to(A.dtype) @ Q, theta[kept].to(A.dtype), shift)
        largest = float(theta.abs().max()) + shift
        residual = coupling * float(S[-1, kept].abs().max())  # ‖A u − θ u‖ = β |s_last|
        extra = {
            "smallest_eigenvalue": float(theta[0]) + shift,
            "largest_eigenvalue": float(theta[-1]) + shift,
            "negative": float((theta[kept] + shift < 0).sum()),
            "ritz_residual": residual / largest if largest > 0 else math.nan,
        }
        return LowRankState(A, inverse, steps, extra=extra)

    def solve(self, state: LowRankState, b: Float[Tensor, "*k p"]) -> Solution:
        return state.solution(b, repr(self))


def _orthogonal(w: Float[Tensor, " p"], Q: Float[Tensor, "s p"]) -> Float[Tensor, " p"]:
    """w without what it has of the rows of Q."""
    for _ in range(2):
        w = w - (Q @ w) @ Q
    return w
