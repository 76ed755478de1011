"""A ≈ U Λ Uᵀ + μI from one product of A with a block of random vectors.

    Y = B Ω,   B̂ = Y (Ωᵀ Y)⁻¹ Yᵀ,   A = B + μI

The Nyström approximation of a positive semi-definite B in the stable form of Tropp et al. (2017,
Algorithm 3): B is shifted by ν, of the order of rounding, before the small matrix is inverted, and
ν is taken off the eigenvalues afterwards. Frangella, Tropp & Udell (2023), Algorithm 2.1, make it a
preconditioner.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.linalg.damping import undamped
from upweight.linalg.lanczos import normal
from upweight.linalg.low_rank import LowRankState, pseudo_inverse, require_rank
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.partial_eigen import PartialEigen
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver


@dataclass(frozen=True)
class Nystrom(Solver[LowRankState]):
    """x = (U Λ Uᵀ + μI)⁻¹ b, with U Λ Uᵀ the Nyström approximation of A − μI.

    Args:
        rank: Random vectors, and directions kept at most.
        seed: Of the random vectors.

    μ is the multiple of the identity that A is seen to contain: damping, and an L2 penalty on all
    of θ. Without one, what is orthogonal to U is left out of x. As a preconditioner,
    `CG(preconditioner=Nystrom(rank))`, it is U (Λ + μ)⁻¹ Uᵀ + (λ_k + μ)⁻¹ (I − UUᵀ), λ_k the
    smallest eigenvalue kept (Frangella et al. 2023, Eq. 1.3, times 1/(λ_k + μ)).

    The result is CONVERGED where the residual of A itself is within what CG reaches (1e-6 in
    float64, 1e-4 in float32), and else APPROXIMATE: no residual is promised. Above 1,
    the residual of x = 0, it is DIVERGED: the rank leaves out eigenvalues far above μ. It is
    NEGATIVE_CURVATURE where A − μI is seen not to be positive semi-definite.

    Exact when: rank ≥ the rank of A − μI. In expectation ‖A − Â‖ is at most of the order of the
    eigenvalues past rank/2 (Frangella et al. 2023, Proposition 2.2).
    Cost: one product of A with `rank` vectors, O(p · rank²), and rank · p numbers; then a product
    for each right-hand side, for its residual.

    Raises:
        SpecError: The rank is not a whole number ≥ 1.
    """

    rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_rank(self.rank, "Nystrom")

    def init(self, A: LinearOperator) -> LowRankState:
        square(A, "Nystrom")
        B, shift = undamped(A)
        found = _sketched(B, self.rank, self.seed)
        if isinstance(found, Result):
            return LowRankState(A, None, 1, found)
        vectors, values, lowest = found
        if lowest < 0:
            return LowRankState(
                A, None, 1, Result.NEGATIVE_CURVATURE, {"curvature": lowest + shift}
            )
        extra = {"rank": float(len(values)), "largest_eigenvalue": float(values.max()) + shift}
        return LowRankState(A, pseudo_inverse(vectors, values, shift), 1, extra=extra)

    def solve(self, state: LowRankState, b: Float[Tensor, "*k p"]) -> Solution:
        return state.solution(b, repr(self))

    def preconditioner(self, A: LinearOperator) -> PartialEigen:
        """(λ_k + μ)⁻¹ on what is orthogonal to U, (Λ + μ)⁻¹ along it: positive definite."""
        B, shift = undamped(A)
        found = _sketched(B, self.rank, self.seed)
        if isinstance(found, Result):  # the solver meets the NaN by itself, and reports it
            none = torch.zeros(0, A.shape[1], dtype=A.dtype, device=A.device)
            return PartialEigen(none, none[:, 0], 1.0)
        vectors, values, _ = found
        total = values + shift
        floor = torch.finfo(A.dtype).eps * float(total.max()) or 1.0
        total = total.clamp_min(floor)  # of a preconditioner only: the answer is the solver's
        return PartialEigen(vectors, 1.0 / total, 1.0 / float(total.min()))


def _sketched(
    B: LinearOperator, rank: int, seed: int
) -> tuple[Float[Tensor, "k p"], Float[Tensor, " k"], float] | Result:
    """U, Λ ≥ 0, and the lowest Rayleigh quotient seen where it is below zero, else 0."""
    p = B.shape[1]
    rank = min(rank, p)
    omega = torch.linalg.qr(normal(B, seed, rank).mT)[0].mT.contiguous()
    Y = B.mv(omega)
    if not bool(Y.isfinite().all()):
        return Result.NON_FINITE
    eps = torch.finfo(B.dtype).eps
    size = float(torch.linalg.vector_norm(Y.double()))
    shift = p**0.5 * eps * size
    Y = Y + shift * omega
    small = (omega @ Y.mT).double()
    ritz, basis = torch.linalg.eigh(0.5 * (small + small.mT))
    lowest = float(ritz[0]) - shift
    keep = ritz > 0.1 * shift
    if not bool(keep.any()):  # B = 0
        return omega, torch.zeros(rank, dtype=B.dtype, device=B.device), 0.0
    half = (basis[:, keep] * ritz[keep].rsqrt()).mT.to(B.dtype) @ Y
    _, singular, vectors = torch.linalg.svd(half, full_matrices=False)
    values = (singular.square() - shift).clamp_min(0.0)  # Algorithm 3: ν is taken off again
    return vectors, values, lowest if lowest < -10 * shift else 0.0
