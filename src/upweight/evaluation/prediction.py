"""Δm as scores predict it, for removals and for any data weights.

predicted[e, q] = −Σ_{i ∈ e} S[q, i]          or, for scores of removals, Δm as it stands
predicted[s, q] = Σᵢ S[q, i] (w[s, i] − 1)
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError, UpweightError, message
from upweight.scores import Scores, Unit
from upweight.training.weights import Removal, members


def removals(examples: Iterable[Removal], n: int) -> tuple[tuple[int, ...], ...]:
    """Each removal as the indices it takes out: some, in range, none of them twice."""
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


def predicted_changes(scores: Scores, weights: Float[Tensor, "..."]) -> Float[Tensor, "s q"]:
    """Δm that scores predict for each row of data weights, Σᵢ S[q, i] (w[s, i] − 1).

    Raises:
        ShapeError: The columns of the scores are not the training examples in order, or the
            weights are not `[s, n]`.
        UpweightError: The scores only rank: sums of them mean nothing by themselves.
    """
    require_examples(scores)
    n = scores.values.shape[1]
    if weights.ndim != 2 or weights.shape[1] != n or len(weights) == 0:
        raise ShapeError(
            message(
                f"Data weights have one row per model and one column per score: [s, {n}].",
                f"weights {tuple(weights.shape)}, scores {tuple(scores.values.shape)}.",
                "weights of another data set, or scores of a part of it.",
                "use the weights that the models were retrained with.",
            )
        )
    if scores.unit is Unit.RANK:
        raise UpweightError(
            message(
                "The effect of many weights at once is a sum of scores in ∂m/∂w or Δm.",
                "scores that only rank.",
                "a similarity or an uncalibrated projection method.",
                "where the method claims that its scores add up, pass the sums as a matrix: "
                "(weights - 1) @ scores.values.T.",
            )
        )
    return torch.stack([scores.predict(weights=row) for row in weights]).detach().cpu().double()


def require_examples(scores: Scores) -> None:
    """Refuse scores whose columns are not the training examples in order."""
    in_order = tuple(map(str, range(scores.values.shape[1])))
    if scores.columns is not None and scores.columns != in_order:
        raise ShapeError(
            message(
                "This needs one column per training example, in order.",
                f"columns {list(scores.columns[:5])}.",
                "scores of groups, or removals of chosen examples.",
                "use attribute(...) as it comes, over all training examples.",
            )
        )


def query_index(index: int, q: int) -> int:
    """A row of the scores, counted from either end; another is refused."""
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
