"""1/(Λ + λ) ≈ Σ_r u_r v_rᵀ: a dense contraction as a few products of small ones.

In the eigenbases a block's score is Σⱼₖ M[j, k] δ̃_q[j] ã_q[k] δ̃ᵢ[j] ãᵢ[k] with M = 1/(Λ + λ). If M
were u vᵀ it would be ((δ̃_q∘u)·δ̃ᵢ) ((ã_q∘v)·ãᵢ). M is nearly of low rank, and more so where it
matters: each entry is weighted by the expected size of what it multiplies before the singular value
decomposition, and unweighted after it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Expansion:
    """M ≈ Σ_r left[r] ⊗ right[r], best first.

    Args:
        left: u_r [r, o], the singular value included.
        right: v_r [r, i].
    """

    left: Float[Tensor, "r o"]
    right: Float[Tensor, "r i"]


def expansion(
    inverse: Float[Tensor, "o i"],
    left_weight: Float[Tensor, " o"],
    right_weight: Float[Tensor, " i"],
    most: int,
) -> Expansion:
    """The best sum of products under weights, by an SVD of diag(left) M diag(right).

    Args:
        inverse: M, the eigenvalues of the inverse.
        left_weight: Root mean square of what row j multiplies.
        right_weight: Root mean square of what column k multiplies.
        most: How many terms to return at most.

    A coordinate of weight 0 multiplies nothing and gets no share.
    """
    # Tiny weights would be divided by below; what they weigh is far under any tolerance.
    left = torch.where(left_weight > 1e-10 * left_weight.max(), left_weight, 0.0)
    right = torch.where(right_weight > 1e-10 * right_weight.max(), right_weight, 0.0)
    weighted = left[:, None] * inverse * right
    u, s, vh = torch.linalg.svd(weighted, full_matrices=False)
    keep = slice(min(most, len(s)))
    return Expansion(
        ((u * s) * _reciprocal(left)[:, None]).mT[keep], (vh * _reciprocal(right))[keep]
    )


def _reciprocal(weights: Tensor) -> Tensor:
    return torch.where(weights > 0, 1.0 / weights, 0.0)
