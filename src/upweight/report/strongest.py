"""Which examples raised and lowered one measurement most, and how all its scores are spread.

    effect[q, i] = S[q, i] for derivatives, −Δm[q, i] for removals:   > 0 raised m, < 0 lowered it

Both conventions give one order: what its presence did to the measurement.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upweight.errors import DataError, NonFinite, message
from upweight.scores import Scores, Unit

BINS = 40
"""Bars of a histogram, about; one edge is always at zero."""


@dataclass(frozen=True, eq=False)
class Strongest:
    """The ends of one row of effects.

    Args:
        raised: Columns with the largest positive effect, largest first.
        lowered: Columns with the most negative effect, most negative first.
    """

    raised: tuple[int, ...]
    lowered: tuple[int, ...]


def effects(scores: Scores, query: int) -> NDArray[np.float64]:
    """One row, signed so that positive means: training on the example raised the measurement."""
    row = np.asarray(scores.values[query].detach().double().cpu().numpy())
    return -row if scores.unit is Unit.DIFFERENCE else row


def require_scores(scores: Scores) -> None:
    """Refuse scores of which no page can be made.

    Raises:
        DataError: There is no query or no training example.
        NonFinite: A score is NaN or infinite.
    """
    q, n = scores.values.shape
    if not q or not n:
        raise DataError(
            message(
                "A report needs at least one query and one training example.",
                f"scores of shape ({q}, {n}).",
                "a filter that left nothing.",
                "attribute at least one query.",
            )
        )
    for row, values in enumerate(scores.values):  # a row at a time: asking takes as much again
        bad = ~values.isfinite()
        if not bool(bad.any()):
            continue
        column = int(bad.nonzero()[0])
        raise NonFinite(
            message(
                "A report needs finite scores: NaN has no place in a ranking.",
                f"{float(values[column])} for query {row}, column {column}.",
                "a gradient that overflowed, or a solve that failed and was not raised.",
                "use a float64 model, and solve with throw=True to see what failed.",
            )
        )


def strongest(effect: NDArray[np.float64], k: int) -> Strongest:
    """The k columns at each end; zeros and the other sign are never listed, ties go by column."""
    return Strongest(ranked(effect, k), ranked(-effect, k))


def ranked(effect: NDArray[np.float64], k: int) -> tuple[int, ...]:
    """The k largest of the positive, largest first."""
    candidates = np.flatnonzero(effect > 0)
    if k < len(candidates):
        # A partition first: sorting a million scores for a dozen winners takes a hundred times.
        kth = np.partition(effect[candidates], len(candidates) - k)[len(candidates) - k]
        candidates = candidates[effect[candidates] >= kth]
    order = np.argsort(-effect[candidates], kind="stable")[:k]
    return tuple(int(i) for i in candidates[order])


def histogram(effect: NDArray[np.float64]) -> tuple[float, float, list[int]]:
    """Counts of equally wide bins from `start`, of which one edge is zero: (start, width, counts).

    A row of zeros is one bin of no width.
    """
    low, high = min(float(effect.min()), 0.0), max(float(effect.max()), 0.0)
    if high == low:
        return 0.0, 0.0, [len(effect)]
    width = (high - low) / BINS
    below, above = math.ceil(-low / width - 1e-9), math.ceil(high / width - 1e-9)
    place = np.clip(np.floor(effect / width).astype(np.int64), -below, above - 1)
    counts = np.bincount(place + below, minlength=below + above)
    return -below * width, width, [int(count) for count in counts]
