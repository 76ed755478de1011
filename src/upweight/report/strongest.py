"""Which examples raised and lowered one measurement most, and how all its scores are spread.

S[q, i] > 0: its presence raised m, < 0: lowered it
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.effects import Effects
from upweight.errors import DataError
from upweight.scores import Scores

BINS = 40
"""Bars of a histogram, about; one edge is always at zero."""


def numbers(scores: Scores | Effects, part: Any) -> NDArray[np.float64]:
    """A row or another part of the values."""
    return np.asarray(scores.values[part].detach().double().cpu().numpy())


def require_scores(scores: Scores) -> None:
    """Refuse, by a DataError, scores without a query or a training example: no page can be made."""
    q, n = scores.values.shape
    if not q or not n:
        raise DataError(
            "A report needs at least one query and one training example.",
            f"scores of shape ({q}, {n}).",
            "a filter that left nothing.",
            "attribute at least one query.",
        )


def ranked(effect: NDArray[np.float64], k: int) -> tuple[int, ...]:
    """The k largest of the positive, largest first; ties go by column."""
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
