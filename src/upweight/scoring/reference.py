"""What are untruncated scores, on some queries and training examples, and how far off is a kernel?

The error of a query is ‖Ŝ_q − S_q‖/‖S_q‖ over the training set, estimated from a few examples, and
what is bounded is its root mean square over queries: a query with small scores counts as much as
one with large ones. Two kinds of sample tell different things. A few examples with large losses
make most of ‖S_q‖, so one group of examples is drawn by loss; most examples have small losses, so
another is drawn evenly. An error is that of the group where it is larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.gradients.factored import Factors, Rows, Tokens
from upweight.scoring.kernels import Kernel
from upweight.scoring.queries import BlockQueries, FactoredQueries, rotated

SOLVE_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Sample:
    """Gradients of some training examples, scaled so that sums of squares estimate those of all.

    Args:
        factors: By block.
        groups: Where each group of examples ends.
    """

    factors: tuple[Factors, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Reference:
    """Untruncated scores of a few queries and training examples, block by block.

    Args:
        rows: Which queries.
        parts: The share of each block.
        groups: Where each group of examples ends.
    """

    rows: Int[Tensor, " k"]
    parts: tuple[Float[Tensor, "k s"], ...]
    groups: tuple[int, ...]

    def relative(self, error: Float[Tensor, "k s"]) -> Float[Tensor, "g k"]:
        """‖error_q‖/‖S_q‖ within each group, 0 for a query without any score."""
        total = torch.stack(self.parts).sum(dim=0)
        found, start = [], 0
        for stop in self.groups:
            norms = total[:, start:stop].norm(dim=1)
            size = error[:, start:stop].norm(dim=1)
            found.append(torch.where(norms > 0, size / norms.clamp_min(1e-300), 0.0))
            start = stop
        return torch.stack(found)

    def rms(self, error: Float[Tensor, "k s"]) -> float:
        """Its root mean square over queries, of the group where it is largest."""
        return float(self.relative(error).double().square().mean(dim=1).max().sqrt())


def reference_scores(
    queries: Sequence[BlockQueries], rows: Int[Tensor, " k"], sample: Sample
) -> Reference:
    """⟨V_q, gᵢ⟩ of some queries and examples in full, in full precision."""
    parts = tuple(_share(q, rows, part) for q, part in zip(queries, sample.factors, strict=True))
    return Reference(rows, parts, sample.groups)


def _share(queries: BlockQueries, rows: Tensor, part: Factors) -> Float[Tensor, "k s"]:
    if not isinstance(queries, FactoredQueries):
        g = part.values if isinstance(part, Rows) else part.matrices().flatten(1)
        return queries.reference.flatten(1) @ g.mT
    assert isinstance(part, Tokens)
    o, i = queries.inverse.shape
    width = max(i, len(part) * part.positions)
    size = max(1, SOLVE_BYTES // (o * width * queries.left.element_size()))
    # In the eigenbases: rotating the examples takes far less than turning the queries back.
    tokens = rotated(part, queries.eigen)
    left, right = tokens.left.flatten(0, 1).mT, tokens.right.flatten(0, 1).mT
    shares = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        v = Tokens(queries.left[some], queries.right[some]).matrices() * queries.inverse
        shares.append(((v @ right) * left).sum(dim=1))  # [k, o, st] summed over o
    return torch.cat(shares).reshape(len(rows), len(part), -1).sum(dim=2)


@dataclass(frozen=True)
class Measured:
    """The error of kernels on a sample.

    Args:
        error: Root mean square over the reference queries.
        worst: Of the worst of them.
        by_block: The root mean square error that each block alone contributes.
    """

    error: float
    worst: float
    by_block: tuple[float, ...]


def measured(kernels: Sequence[Kernel], q: int, reference: Reference, sample: Sample) -> Measured:
    """The error of the kernels themselves on a sample."""
    total = torch.zeros_like(reference.parts[0])
    by_block = []
    for kernel, part, exact in zip(kernels, sample.factors, reference.parts, strict=True):
        scores = exact.new_zeros(q, exact.shape[1])
        kernel.add_to(scores, part)
        error = scores[reference.rows] - exact
        by_block.append(reference.rms(error))
        total += error
    return Measured(reference.rms(total), float(reference.relative(total).max()), tuple(by_block))
