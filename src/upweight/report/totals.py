"""Sums over the scores, taken in blocks of queries: nothing of size q·n is held besides them.

    value[i] = Σ_q S[q, i]     |value|[i] = Σ_q |S[q, i]|     group[q, g] = Σ_{i ∈ g} S[q, i]

Signed as everywhere on the page: positive raised the measurements.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.report.display import require_one_each
from upweight.report.strongest import numbers
from upweight.scores import Scores

BLOCK = 4_000_000
"""Scores looked at together."""

MOST_GROUPS = 200
"""Values of a column of metadata that are told apart; a column of numbers with more is binned."""

BINS = 10
"""Bins of such a column, with about equally many examples each."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """A partition of the training examples: names of groups, and which one each example is in."""

    names: tuple[str, ...]
    codes: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Examples of each group."""
        return np.bincount(self.codes, minlength=len(self.names))


@dataclass(frozen=True, eq=False)
class Totals:
    """Σ_q S[q, i], Σ_q |S[q, i]|, and for each grouping Σ_{i ∈ g} S[q, i], `[q, g]`."""

    signed: NDArray[np.float64]
    absolute: NDArray[np.float64]
    groups: Mapping[str, NDArray[np.float64]]


def totals(scores: Scores, groupings: Mapping[str, Grouping]) -> Totals:
    """Sums over scores `[q, n]`, and over groupings of the n columns.

    Cost: O(q·n) for each grouping. Memory: `BLOCK` scores in double precision, twice.
    """
    q, n = scores.values.shape
    signed, absolute = np.zeros(n), np.zeros(n)
    orders = {name: np.argsort(g.codes, kind="stable") for name, g in groupings.items()}
    sums = {name: np.zeros((q, len(g.names))) for name, g in groupings.items()}
    for start, block in blocks(scores):
        signed += block.sum(axis=0)
        absolute += np.abs(block).sum(axis=0)
        for name, grouping in groupings.items():
            present = np.flatnonzero(grouping.sizes)
            starts = np.concatenate([[0], np.cumsum(grouping.sizes[present])[:-1]])
            found = np.add.reduceat(block[:, orders[name]], starts, axis=1)
            sums[name][start : start + len(block), present] = found
    return Totals(signed, absolute, sums)


def blocks(scores: Scores) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(first query, scores [b, n]) of some queries at a time."""
    q, n = scores.values.shape
    size = max(1, BLOCK // n)
    for start in range(0, q, size):
        yield start, numbers(scores, slice(start, start + size))


def grouping(values: Sequence[Any], n: int, name: str) -> Grouping:
    """The groups of one column of metadata: its values, or bins of numbers.

    Raises:
        ShapeError: There is not one value per example.
    """
    require_one_each(f"metadata[{name!r}]", values, n)
    array = np.asarray(values)
    if array.dtype.kind in "iuf" and len(np.unique(array)) > MOST_GROUPS:
        return _bins(array.astype(np.float64))
    texts = np.asarray([str(value) for value in array.tolist()])
    names, codes, sizes = np.unique(texts, return_inverse=True, return_counts=True)
    if len(names) > MOST_GROUPS:
        kept = np.sort(np.argsort(-sizes, kind="stable")[: MOST_GROUPS - 1])
        place = np.full(len(names), len(kept), dtype=np.int64)
        place[kept] = np.arange(len(kept))
        told = (*(str(names[k]) for k in kept), f"{len(names) - len(kept):,} others")
        return Grouping(told, place[codes])
    return Grouping(tuple(str(text) for text in names), codes.astype(np.int64))


def _bins(values: NDArray[np.float64]) -> Grouping:
    known = values[np.isfinite(values)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)))
    codes = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    names = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)]
    if len(known) < len(values):
        codes = np.where(np.isfinite(values), codes, len(names))
        names.append("not a number")
    return Grouping(tuple(names), codes.astype(np.int64))
