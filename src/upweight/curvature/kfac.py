"""K-FAC: a Kronecker product per weight."""

from dataclasses import dataclass

import torch

from upweight.curvature.ekfac import vector_estimator
from upweight.curvature.estimators import Estimator, Expand, KFACBlock, Sharing
from upweight.curvature.labels import Labels, Sampled
from upweight.curvature.layerwise import LayerwiseCurvature
from upweight.gradients.blocks import Block, MatrixBlock


@dataclass(frozen=True)
class KFAC(LayerwiseCurvature):
    """H ≈ ⊕ₗ Gₗ ⊗ Aₗ + ∇²R, with A = E[a aᵀ] and G = E[δ δᵀ] on each weight; set as `EKFAC`.

    Martens & Grosse (2015); for weights used at many positions Eschenhagen et al. (2023). Damping
    is added to the eigenvalues of the product, not to those of the factors.

    Exact when: deep linear networks with squared loss and independent inputs; one linear layer with
    squared loss, whatever its inputs.
    Cost: half of EK-FAC's.
    """

    labels: Labels = Sampled()  # noqa: RUF009  a frozen spec
    sharing: Sharing = Expand()  # noqa: RUF009  a frozen spec
    examples: int | None = None

    def estimator(self, block: Block, dtype: torch.dtype, device: torch.device) -> Estimator:
        if isinstance(block, MatrixBlock):
            return KFACBlock(block, dtype, device, self.sharing)
        return vector_estimator(block, dtype, device)
