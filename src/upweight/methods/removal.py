"""Remove examples for real: one Newton step of the objective without them.

The first-order score keeps H of the full data. Without the examples U the objective is
J − (1/n) Σ_U ℓᵢ, whose Newton step from θ̂ is

    Δθ = (H + λI − (1/n) Σ_U Hᵢ)⁻¹ (1/n) Σ_U gᵢ          Δm_q ≈ ∇m_qᵀ Δθ

The objective keeps its 1/n and its penalty: removal is wᵢ = 0. Where f is linear in θ each example
contributes Hᵢ = Jᵢᵀ Λᵢ Jᵢ of rank at most c, and the push-through identity turns the step into a
correction of the output gradients (Cook & Weisberg 1982 for c = 1; Pregibon 1981 for logistic):

    Δm_q = (1/n) ∇m_qᵀ (H + λI)⁻¹ J_Uᵀ u,   u = (I − Λ K)⁻¹ δ,   K = (1/n) J_U (H + λI)⁻¹ J_Uᵀ

For one example of a scalar-output model K Λ is the leverage h and u = δ / (1 − h).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, message


def corrected_output_gradients(
    delta: Float[Tensor, "k c"], lambdas: Float[Tensor, "k c c"], leverage: Float[Tensor, "k c c"]
) -> Float[Tensor, "k c"]:
    """u = (I − Λ K)⁻¹ δ for each of k removals of one example.

    Args:
        delta: δ = ∂ℓ/∂f.
        lambdas: Λ = ∂²ℓ/∂f².
        leverage: K = (1/n) J (H + λI)⁻¹ Jᵀ.

    Raises:
        NonFinite: I − Λ K is singular: without that example the minimum is not determined.

    Exact when: J is quadratic in θ (it is then the exact change of θ). Otherwise one Newton step,
    wrong in second order of the step where the first-order score is wrong in first.
    """
    return solve_removal(lambdas @ leverage, delta)


def group_output_gradients(
    delta: Float[Tensor, "e c"],
    lambdas: Float[Tensor, "e c c"],
    leverage: Float[Tensor, "e c e c"],
) -> Float[Tensor, "e c"]:
    """u for the e examples of one group removed together; see `corrected_output_gradients`."""
    e, c = delta.shape
    weighted = torch.einsum("eab,ebfd->eafd", lambdas, leverage)
    return solve_removal(weighted.reshape(1, e * c, e * c), delta.reshape(1, -1)).reshape(e, c)


def solve_removal(
    hat: Float[Tensor, "k m m"], delta: Float[Tensor, "k m"]
) -> Float[Tensor, "k m"]:
    """(I − hat)⁻¹ δ, refusing a singular system.

    Raises:
        NonFinite: An eigenvalue of `hat` reaches 1.
    """
    identity = torch.eye(hat.shape[-1], dtype=hat.dtype, device=hat.device)
    solution, info = torch.linalg.solve_ex(identity - hat, delta[..., None])
    solution = solution[..., 0]
    limit = 1.0 / (hat.shape[-1] * torch.finfo(hat.dtype).eps)
    grown = solution.abs().amax(dim=-1) > limit * delta.abs().amax(dim=-1)
    bad = (info != 0) | ~solution.isfinite().all(dim=-1) | grown
    if bool(bad.any()):
        raise NonFinite(
            message(
                "Removing examples needs a minimum that the others still determine: leverage < 1.",
                f"leverage 1 to rounding for removal {bad.nonzero()[:5, 0].tolist()}.",
                "an example that alone fixes a parameter (the only one with some feature), and no "
                "penalty on it.",
                "add a penalty or damping, or leave these examples out of the groups.",
            )
        )
    return solution
