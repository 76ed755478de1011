"""Δm as scores or effects predict it, for removals and for any data weights.

predicted[e, q] = −Σ_{i ∈ e} S[q, i]          or, of effects, Δm as it stands
predicted[s, q] = Σᵢ S[q, i] (w[s, i] − 1)    or, of effects of single examples, Σᵢ Δm (1 − w[s, i])
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.effects import Effects, Groups, reweighted, without
from upweight.errors import ShapeError
from upweight.scores import Scores
from upweight.training.weights import Removal, members


def removals(examples: Iterable[Removal], n: int) -> Groups:
    """Each removal as the indices it takes out: some, in range, none of them twice."""
    groups = tuple(members(group, n) for group in examples)
    seen = [tuple(sorted(group)) for group in groups]
    twice = sorted({group for group in seen if seen.count(group) > 1})
    if not groups or twice:
        raise ShapeError(
            "Leave-one-out needs at least one removal, each asked for once.",
            f"{len(groups)} removals" + (f", repeated: {twice[:5]}." if twice else "."),
            "a list of examples put together from several rankings.",
            "drop duplicates: they would count twice in every correlation.",
        )
    return groups


def predicted_removals(
    predicted: Scores | Effects, examples: Iterable[Removal], query: int | None = None
) -> Float[Tensor, "e q"]:
    """Δm that is predicted for each removal: of scores to first order, of effects as they are.

    Raises:
        ShapeError: The scores are of groups, or a removal is not among the effects.
        UpweightError: The scores are not ∂m/∂w.
    """
    groups = [torch.as_tensor(g).reshape(-1) for g in examples]
    if isinstance(predicted, Effects):
        found = predicted.of(groups)
    else:
        found = predicted.removal(groups)
    values = found.values.T.detach().cpu().double()
    if query is None:
        return values
    row = query_index(query, len(predicted))
    return values[:, row : row + 1]


def single_removals(predicted: Scores | Effects) -> Float[Tensor, "q n"]:
    """Δm of removing each training example; of scores that are no derivatives, a like order.

    Raises:
        ShapeError: The columns of the scores are groups, or an example is not among the effects.
    """
    if isinstance(predicted, Effects):
        return predicted.of().values.detach().cpu().double()
    predicted.require_examples()
    return without(predicted.values.detach().cpu().double())


def predicted_changes(
    predicted: Scores | Effects, weights: Float[Tensor, "..."]
) -> Float[Tensor, "s q"]:
    """Δm that is predicted for each row of data weights: effects of single examples add up.

    Raises:
        ShapeError: See `single_removals`; or the weights are not `[s, n]`.
        NonFinite: A weight is NaN or infinite.
        UpweightError: The scores are not ∂m/∂w: sums of them mean nothing by themselves.
    """
    if isinstance(predicted, Scores):
        predicted.require_derivatives()
    changes = single_removals(predicted)
    n = changes.shape[1]
    if weights.ndim != 2 or weights.shape[1] != n or len(weights) == 0:
        raise ShapeError(
            f"Data weights have one row per model and one column per score: [s, {n}].",
            f"weights {tuple(weights.shape)}, scores {tuple(changes.shape)}.",
            "weights of another data set, or scores of a part of it.",
            "use the weights that the models were retrained with.",
        )
    return torch.stack([reweighted(without(changes), row) for row in weights])


def query_index(index: int, q: int) -> int:
    """A row of the scores, counted from either end; another is refused."""
    if not -q <= index < q:
        raise ShapeError(
            f"The query must be one of the {q} scored.",
            f"query={index}.",
            "an index into the full data set where only some queries were scored.",
            f"use an index in 0…{q - 1}.",
        )
    return index % q
