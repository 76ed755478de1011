"""w: the data weights that ask a question of retraining.

wᵢ = 0 removes example i; w = 1 elsewhere         J(θ, w) = (1/n) Σᵢ wᵢ ℓᵢ(θ) + R(θ)
"""

from collections.abc import Sequence
from typing import SupportsIndex, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError, message

Removal: TypeAlias = SupportsIndex | Sequence[int]
"""One example, or several that go together."""


def removal_weights(
    n: int, groups: Sequence[Removal], *, renormalize: bool = False
) -> Float[Tensor, "s n"]:
    """One row of weights per removal.

    Args:
        n: Training examples.
        groups: What each row removes: one example, or several together.
        renormalize: Whether the mean is taken over what is left, (1/(n−k)) Σ over the n − k others,
            as when the rows are deleted and the model is fitted anew. Then the others weigh
            n/(n−k), and the penalty counts for less against the data. By default the objective
            keeps its 1/n. First-order predictions for any weights are `scores.predict(weights=w)`.

    Raises:
        ShapeError: A group is empty, out of range, names an example twice, or is everything.
    """
    weights = torch.ones(len(groups), n, dtype=torch.float64)
    for row, group in enumerate(groups):
        indices = members(group, n)
        weights[row, list(indices)] = 0.0
        if renormalize:
            weights[row] *= n / (n - len(indices))
    return weights


def members(group: Removal, n: int) -> tuple[int, ...]:
    """The examples of a group, checked.

    Raises:
        ShapeError: As for `removal_weights`.
    """
    values = torch.as_tensor(group).reshape(-1)
    indices = tuple(values.tolist())
    whole = bool(indices) and not (values.is_floating_point() or values.dtype == torch.bool)
    distinct = len(set(indices)) == len(indices)
    if not (whole and distinct and len(indices) < n and all(0 <= i < n for i in indices)):
        raise ShapeError(
            message(
                f"A removal names some, not all, of the {n} training examples, each once, by "
                f"integers in 0…{n - 1}.",
                f"{list(indices[:10])} of dtype {values.dtype}"
                + (f", repeated: {_repeated(indices)}." if not distinct else "."),
                "indices of another data set, a boolean mask, an empty group or an example listed "
                "twice.",
                "pass an index, or a list of distinct indices for a group.",
            )
        )
    return indices


def _repeated(indices: tuple[int, ...]) -> list[int]:
    return sorted({i for i in indices if indices.count(i) > 1})[:10]
