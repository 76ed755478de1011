"""EK-FAC: K-FAC's eigenbases with the eigenvalues that are right for them."""

from dataclasses import dataclass

import torch

from upweight.curvature.estimators import (
    DenseBlock,
    DiagonalBlock,
    EKFACBlock,
    Estimator,
    Expand,
    Sharing,
)
from upweight.curvature.labels import Labels, Sampled
from upweight.curvature.layerwise import LayerwiseCurvature
from upweight.gradients.blocks import Block, MatrixBlock

DENSE_LIMIT = 1024
"""Vectors up to this length (gains, biases) get their whole second moment, longer ones its
diagonal: at 1024 the matrix is as large as that of a weight of ordinary width."""


def vector_estimator(block: Block, dtype: torch.dtype, device: torch.device) -> Estimator:
    """What learns a block that is no matrix: exact within the block while it is small."""
    size = torch.Size(block.shape).numel()
    kind = DenseBlock if size <= DENSE_LIMIT else DiagonalBlock
    return kind(block, dtype, device)


@dataclass(frozen=True)
class EKFAC(LayerwiseCurvature):
    """H ≈ ⊕ₗ (Q_G ⊗ Q_A) Λ (Q_G ⊗ Q_A)ᵀ + ∇²R, with Λ = E[(Q_Gᵀ g Q_A)²] on each weight.

    Q_A and Q_G are the eigenvectors of A = E[a aᵀ] and G = E[δ δᵀ], of a layer's inputs and of the
    gradients at its outputs. George et al. (2018); for influence functions Grosse et al. (2023),
    Eq. 17–20. Gains and biases that go with no weight get E[g gᵀ] itself up to 1024 entries.

    Args:
        labels: `Sampled()` for the Fisher, `Expected()` for its exact expectation, `Observed()` for
            the empirical Fisher.
        sharing: What counts as one pair (a, δ) where a weight is used at many positions: `Expand()`
            or `Reduce()`. It changes the basis only; Λ sees the whole gradient either way. Expand
            is the default: its covariances keep directions that cancel within an example.
        examples: Learn from this many training examples, evenly spaced; None: all.

    Exact when: in expectation over labels, for the Fisher's diagonal in the basis; for the block
    itself where E[g gᵀ] = G ⊗ A, as in linear networks with independent inputs.
    Cost: two passes (forward, and backward through the activations), i² + o² multiply-adds per
    position twice and one eigendecomposition per layer; memory i² + o² + i·o numbers per layer.
    """

    labels: Labels = Sampled()  # noqa: RUF009  a frozen spec
    sharing: Sharing = Expand()  # noqa: RUF009  a frozen spec
    examples: int | None = None

    def estimator(self, block: Block, dtype: torch.dtype, device: torch.device) -> Estimator:
        if isinstance(block, MatrixBlock):
            return EKFACBlock(block, dtype, device, self.sharing)
        return vector_estimator(block, dtype, device)
