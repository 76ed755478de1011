"""diag(E[g gᵀ]): the cheapest curvature that still knows which parameters matter."""

from dataclasses import dataclass

import torch

from upweight.curvature.estimators import DiagonalBlock, Estimator
from upweight.curvature.labels import Labels, Sampled
from upweight.curvature.layerwise import LayerwiseCurvature
from upweight.gradients.blocks import Block


@dataclass(frozen=True)
class Diagonal(LayerwiseCurvature):
    """H ≈ diag(E[g²]) + ∇²R: one number per parameter; set as `EKFAC`.

    Exact when: the Fisher is diagonal, as for one linear layer with squared loss whose inputs are
    uncorrelated and one-hot.
    Cost: one pass; memory p numbers.
    """

    labels: Labels = Sampled()  # noqa: RUF009  a frozen spec
    examples: int | None = None

    def estimator(self, block: Block, dtype: torch.dtype, device: torch.device) -> Estimator:
        return DiagonalBlock(block, dtype, device)
