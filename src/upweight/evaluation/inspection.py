"""Going down a ranking, largest first: how soon are the positives found?

Functions of counts, as a bootstrap needs them: `counts[r, i]` says how often resample r drew row i.
Rows with equal values have no order; what is found among them is the mean over all their orders.
Where a resample drew no positive, or no negative where one is needed, a share is 0/0 = NaN.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Levels:
    """Positives and negatives drawn of each distinct value, largest value first."""

    positive: Float[Tensor, "r l"]
    negative: Float[Tensor, "r l"]

    @property
    def held(self) -> Float[Tensor, "r l"]:
        """All rows drawn."""
        return self.positive + self.negative

    @property
    def positives(self) -> Float[Tensor, " r"]:
        """Positives of each resample."""
        return self.positive.sum(dim=1)


def levels(
    ranking: Float[Tensor, " n"], positive: Bool[Tensor, " n"], counts: Float[Tensor, "r n"]
) -> Levels:
    """The rows drawn, by value."""
    values, where = torch.unique(-ranking, return_inverse=True)
    empty = counts.new_zeros(len(counts), len(values))
    return Levels(
        empty.index_add(1, where[positive], counts[:, positive]),
        empty.index_add(1, where[~positive], counts[:, ~positive]),
    )


def area(found: Levels) -> Float[Tensor, " r"]:
    """Area under the ROC curve: P(positive above negative) + ½ P(equal)."""
    above = found.positive.cumsum(dim=1) - found.positive
    u = (found.negative * (above + found.positive / 2)).sum(dim=1)
    return u / (found.positives * found.negative.sum(dim=1))


def precision(found: Levels) -> Float[Tensor, " r"]:
    """Average precision: Σ over thresholds of (gain in recall) × (precision there)."""
    inspected = found.held.cumsum(dim=1)
    # A level that no resampled row has gains nothing, whatever its precision, 0/0 at the top.
    at = found.positive.cumsum(dim=1) / torch.where(inspected > 0, inspected, 1.0)
    return (found.positive * at).sum(dim=1) / found.positives


def hits(found: Levels, k: int) -> Float[Tensor, " r"]:
    """Positives among the first k rows; a level that k cuts gives its share."""
    above = found.held.cumsum(dim=1) - found.held
    share = ((k - above) / torch.where(found.held > 0, found.held, 1.0)).clamp(0.0, 1.0)
    return (found.positive * share).sum(dim=1)
