"""Where gradients are taken: a point of θ, and what it counts."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Point:
    """One term of S[q, i] = −(1/n) Σ_k a_k ⟨P_k ∇m_q(θ_k), gᵢ(θ_k)⟩.

    Args:
        theta: θ_k.
        weight: a_k.
    """

    theta: Float[Tensor, " p"]
    weight: float = 1.0
