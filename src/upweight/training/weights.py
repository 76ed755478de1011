"""w: the data weights that ask a question of retraining.

wᵢ = 0 removes example i; w = 1 elsewhere         J(θ, w) = (1/n) Σᵢ wᵢ ℓᵢ(θ) + R(θ)
"""

import math
from collections.abc import Sequence
from typing import SupportsIndex, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError, SpecError

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


def subset_weights(
    n: int,
    subsets: int,
    fraction: float = 0.5,
    seed: int = 0,
    *,
    renormalize: bool = False,
) -> Float[Tensor, "s n"]:
    """Random subsets of the training data: wᵢ = 1 on the m = round(fraction · n) rows kept, else 0.

    Subsets are drawn uniformly, without repeats. They are what the linear datamodeling score is
    measured on (Ilyas et al. 2022, §2; Park et al. 2023, §2).

    Args:
        n: Training examples.
        subsets: How many, s.
        fraction: The share of the training data that each keeps.
        seed: Of the draw.
        renormalize: Whether kept rows weigh n/m in place of 1, as when the model is fitted to the
            subset alone; see `removal_weights`.

    Raises:
        SpecError: m is 0 or n, or there are fewer than `subsets` different subsets of m rows.
    """
    kept = round(fraction * n) if 0 < fraction < 1 else 0
    possible = math.comb(n, kept) if 0 < kept < n else 0
    if not 0 < subsets <= possible:
        few = f", of which there are {possible}" if possible < subsets else ""
        raise SpecError(
            "Subsets keep some rows, not all, and no subset comes twice.",
            f"{subsets} subsets of {kept} of {n} rows (fraction={fraction}){few}.",
            "a fraction in percent, or more subsets than a small data set has.",
            "use a fraction near 0.5, and fewer subsets.",
        )
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[tuple[int, ...], None] = {}  # in the order drawn
    while len(drawn) < subsets:
        rows = torch.randperm(n, generator=generator)[:kept].sort().values
        drawn.setdefault(tuple(rows.tolist()))
    weights = torch.zeros(subsets, n, dtype=torch.float64)
    weights.scatter_(1, torch.tensor(list(drawn)), n / kept if renormalize else 1.0)
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
            f"A removal names some, not all, of the {n} training examples, each once, by "
            f"integers in 0…{n - 1}.",
            f"{list(indices[:10])} of dtype {values.dtype}"
            + (f", repeated: {_repeated(indices)}." if not distinct else "."),
            "indices of another data set, a boolean mask, an empty group or an example listed "
            "twice.",
            "pass an index, or a list of distinct indices for a group.",
        )
    return indices


def _repeated(indices: tuple[int, ...]) -> list[int]:
    return sorted({i for i in indices if indices.count(i) > 1})[:10]
