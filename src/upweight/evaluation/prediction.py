"""Δm as scores predict it for removals.

predicted[e, q] = −Σ_{i ∈ e} S[q, i]          or, for scores of removals, Δm as it stands
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError, message
from upweight.evaluation.weights import Removal, members
from upweight.scores import Scores, Unit


def removals(examples: Iterable[Removal], n: int) -> tuple[tuple[int, ...], ...]:
    """Each removal as the indices it takes out, checked.

    Raises:
        ShapeError: None is given, one is out of range, or the same removal is asked for twice.
    """
    groups = tuple(members(group, n) for group in examples)
    seen = [tuple(sorted(group)) for group in groups]
    twice = sorted({group for group in seen if seen.count(group) > 1})
    if not groups or twice:
        raise ShapeError(
            message(
                "Leave-one-out needs at least one removal, each asked for once.",
                f"{len(groups)} removals" + (f", repeated: {twice[:5]}." if twice else "."),
                "a list of examples put together from several rankings.",
                "drop duplicates: they would count twice in every correlation.",
            )
        )
    return groups


def predicted_removals(
    scores: Scores, examples: Iterable[Removal], query: int | None = None
) -> Float[Tensor, "e q"]:
    """Δm that scores predict for each removal.

    Scores over training examples predict −Σ S (or, in Δm, the sum of single removals). Scores whose
    columns are removals, as from `fitted.removal(queries, groups=examples)`, are taken as they are.

    Raises:
        ShapeError: A removal is not among the columns.
        UpweightError: The scores only rank.
    """
    groups = [tuple(torch.as_tensor(g).reshape(-1).tolist()) for g in examples]
    if scores.columns is None:
        predicted = torch.stack([scores.predict(drop=group) for group in groups])
    else:
        labels = [",".join(map(str, group)) for group in groups]
        missing = [label for label in labels if label not in scores.columns]
        if scores.unit is not Unit.DIFFERENCE or missing:
            raise ShapeError(
                message(
                    "Scores with labeled columns must be removals in Δm, labeled by the examples "
                    "they take out.",
                    f"unit {scores.unit.name}, columns {list(scores.columns[:5])}, "
                    f"asked for {missing[:5] or labels[:5]}.",
                    "scores of groups by class, or removals of other examples.",
                    "use fitted.removal(queries, measure, groups=examples), or scores over "
                    "training examples.",
                )
            )
        place = {label: k for k, label in enumerate(scores.columns)}
        predicted = scores.values[:, [place[label] for label in labels]].T
    predicted = predicted.detach().cpu().double()
    if query is None:
        return predicted
    row = query_index(query, len(scores))
    return predicted[:, row : row + 1]


def query_index(index: int, q: int) -> int:
    """A row of the scores, counted from either end.

    Raises:
        ShapeError: There is no such row.
    """
    if not -q <= index < q:
        raise ShapeError(
            message(
                f"The query must be one of the {q} scored.",
                f"query={index}.",
                "an index into the full data set where only some queries were scored.",
                f"use an index in 0…{q - 1}.",
            )
        )
    return index % q
