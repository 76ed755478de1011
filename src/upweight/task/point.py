"""Point: where gradients are taken."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Point:
    """θ_k and its weight a_k in S[q, i] = −(1/n) Σ_k a_k ⟨P_k ∇m_q(θ_k), gᵢ(θ_k)⟩."""

    theta: Float[Tensor, " p"]
    weight: float = 1.0
