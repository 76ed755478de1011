"""The page on the training set: value, suspicious labels, duplicates, classes, groups.

Everything is told for columns of the scores; which of them are shown with their contents is said in
`listed`, so that they can be read from the data together with those that queries show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.notation import short
from upweight.report.duplicates import CANDIDATES, Duplicates, duplicates
from upweight.report.live import TrainFacts
from upweight.report.totals import MOST_GROUPS, Grouping, Totals, grouping, totals
from upweight.scores import Scores

LISTED = 24
"""Examples in the list of the most valuable, and of the most suspicious."""

POINTS = 3000
"""Dots of the scatter of self-influence over loss; of more examples, evenly spaced ranks."""

QUANTILES = 200
"""Points of a curve of sorted values, on each of two scales."""

MOST_CLASSES = 40
"""Classes on a side of the matrix of classes."""

LABELS = "label"
"""The grouping by label, which makes the matrix of classes."""


@dataclass(frozen=True, eq=False)
class Training:
    """What the page says of the training set: JSON, and the columns whose contents it shows.

    `twins` are equal and nearly equal inputs; None where they were not looked for.
    """

    data: dict[str, Any]
    listed: tuple[int, ...]
    twins: Duplicates | None = None


def training_set(
    scores: Scores,
    labels: Sequence[str] | None,
    inputs: "Tensor | Sequence[str] | Duplicates | None",
    metadata: Mapping[str, Sequence[Any]],
    facts: TrainFacts,
    query_labels: Sequence[str],
    summed: Callable[[Scores, Mapping[str, Grouping]], Totals] = totals,
) -> tuple[Totals, Training]:
    """Sums over the scores, and the page.

    `inputs` are searched for duplicates, or are what was found in them before; None: not searched.
    `summed` takes the sums, or has kept them.

    Raises:
        ShapeError: A column of metadata has not one value per example.

    Cost: that of `totals` and `duplicates`.
    """
    n = scores.values.shape[1]
    groupings = {name: grouping(values, n, name) for name, values in metadata.items()}
    if labels is not None and 1 < len(set(labels)) <= MOST_GROUPS:
        groupings = {LABELS: grouping(labels, n, LABELS), **groupings}
    found, twins = summed(scores, groupings), None
    if isinstance(inputs, Duplicates):
        twins = inputs
    elif inputs is not None:
        doubted = suspicious(facts)
        valued = np.argsort(-found.absolute, kind="stable")[:CANDIDATES]
        first = [] if doubted is None else doubted.tolist()
        twins = duplicates(inputs, labels, [*first, *valued.tolist()])
    return found, training(found, groupings, facts, twins, labels, query_labels)


def training(
    found: Totals,
    groupings: Mapping[str, Grouping],
    facts: TrainFacts,
    twins: Duplicates | None,
    train_labels: Sequence[str] | None,
    query_labels: Sequence[str],
) -> Training:
    """The page, of sums over the scores; arguments as for `training_set`."""
    valued = np.argsort(-found.absolute, kind="stable")[:LISTED]
    doubted = suspicious(facts)
    data: dict[str, Any] = {
        "value": _value(found) | {"top": _rows(valued, found, facts)},
        "groups": [_groups(name, each, found.groups[name]) for name, each in groupings.items()],
    }
    listed = [int(i) for i in valued]
    if doubted is not None:
        data["suspicious"] = _rows(doubted, found, facts)
        data["ranked_by"] = "loss" if facts.self_influence is None else "self-influence"
        listed += [int(i) for i in doubted]
    if facts.losses is not None and facts.self_influence is not None:
        data["scatter"] = _scatter(facts.losses, facts.self_influence)
    if twins is not None:
        conflicts = [
            train_labels is not None and len({train_labels[i] for i in group}) > 1
            for group in twins.same
        ]
        data["twins"] = {
            "same": [list(group[:12]) for group in twins.same],
            "sizes": [len(group) for group in twins.same],
            "conflicts": conflicts,
            "sets": twins.sets,
            "extra": twins.extra,
            "near": [
                [*pair, short(cosine, 5)]
                for pair, cosine in zip(twins.near, twins.cosines, strict=True)
            ],
            "candidates": twins.candidates,
            "among": twins.among,
            "read": twins.read,
        }
        listed += [i for group in (*twins.same, *twins.near) for i in group[:12]]
    if LABELS in groupings:
        data["classes"] = classes(groupings[LABELS], found.groups[LABELS], query_labels)
    return Training(data, tuple(dict.fromkeys(listed)), twins)


def numbers_of(found: Totals, facts: TrainFacts) -> dict[str, NDArray[np.float64]]:
    """All that is known of every training example, by the name that the page gives it."""
    known = {"signed": found.signed, "absolute": found.absolute}
    live = {"loss": facts.losses, "self": facts.self_influence}
    return known | {name: values for name, values in live.items() if values is not None}


def suspicious(facts: TrainFacts) -> NDArray[np.int64] | None:
    """The examples of largest self-influence, or of largest loss where that is not known."""
    values = facts.losses if facts.self_influence is None else facts.self_influence
    return None if values is None else np.argsort(-values, kind="stable")[:LISTED]


def classes(
    grouping: Grouping, sums: NDArray[np.float64], query_labels: Sequence[str]
) -> dict[str, Any] | None:
    """Mean score of an example of training class a on a query of class b; None where it is no use.

    M[a, b] = mean over i ∈ a, q ∈ b of S[q, i]
    """
    names = sorted({label for label in query_labels if label}, key=_natural)
    rows = sorted(range(len(grouping.names)), key=lambda g: _natural(grouping.names[g]))
    if not names or len(rows) < 2 or max(len(names), len(rows)) > MOST_CLASSES:
        return None
    sizes = grouping.sizes[rows]
    mean = [
        sums[[q for q, label in enumerate(query_labels) if label == name]][:, rows].mean(axis=0)
        for name in names
    ]
    matrix = np.stack(mean, axis=1) / np.maximum(sizes, 1)[:, None]
    return {
        "train": [grouping.names[g] for g in rows],
        "sizes": sizes.tolist(),
        "query": names,
        "matrix": [[short(v, 5) for v in row] for row in matrix],
    }


def _value(found: Totals) -> dict[str, Any]:
    n = len(found.absolute)
    # Evenly spaced, and evenly spaced on a logarithmic axis: the few largest are a part of it.
    evenly = np.concatenate([np.linspace(1, n, QUANTILES), np.geomspace(1, n, QUANTILES)])
    places = np.unique(evenly.round().astype(int) - 1)
    absolute = np.sort(found.absolute)[::-1]
    total = float(absolute.sum())
    shares = np.cumsum(absolute) / total if total > 0 else np.ones(n)
    tenth, half = (int(np.searchsorted(shares, part)) + 1 for part in (0.1, 0.5))
    return {
        "places": places.tolist(),
        "signed": [short(v, 5) for v in np.sort(found.signed)[::-1][places]],
        "absolute": [short(v, 5) for v in absolute[places]],
        "tenth": min(tenth, n),
        "half": min(half, n),
        "positive": int((found.signed > 0).sum()),
    }


def _rows(chosen: NDArray[np.int64], found: Totals, facts: TrainFacts) -> list[dict[str, Any]]:
    numbers = numbers_of(found, facts)
    return [{"id": i} | {k: short(x[i], 5) for k, x in numbers.items()} for i in chosen.tolist()]


def _scatter(losses: NDArray[np.float64], own: NDArray[np.float64]) -> dict[str, Any]:
    n = len(own)
    order = np.argsort(-own, kind="stable")
    if n > POINTS:
        # The suspicious whole, the rest thinned: evenly spaced ranks keep the shape of the cloud.
        head = POINTS // 3
        rest = np.linspace(head, n - 1, POINTS - head).round().astype(int)
        order = order[np.concatenate([np.arange(head), np.unique(rest)])]
    return {
        "n": n,
        "id": order.tolist(),
        "loss": [short(v, 5) for v in losses[order]],
        "self": [short(v, 5) for v in own[order]],
    }


def _groups(name: str, grouping: Grouping, sums: NDArray[np.float64]) -> dict[str, Any]:
    total = sums.sum(axis=0)
    order = sorted(range(len(total)), key=lambda g: (-abs(total[g]), grouping.names[g]))
    return {
        "name": name,
        "groups": [grouping.names[g] for g in order],
        "sizes": [int(grouping.sizes[g]) for g in order],
        "totals": [short(total[g], 5) for g in order],
        "raised": [int((sums[:, g] > 0).sum()) for g in order],
    }


def _natural(name: str) -> tuple[bool, float, str]:
    """Numbers by size, before words."""
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name
