"""Retraining from several seeds: mₖ(θ(w)) for seed k, stacked [k, s, q].

A retrained number holds noise of training besides what the weights did. Averaging over k
independent seeds takes the noise's variance down by k.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DataError, NonFinite, ShapeError
from upweight.training.retrain import Retrained

Truth: TypeAlias = Retrained | Sequence[Retrained]
"""Models of one seed, or of several: one `Retrained` each, for the same weights and queries."""


def by_seed(truth: Truth) -> tuple[Retrained, ...]:
    """One `Retrained` per seed, checked.

    Raises:
        ShapeError: There is none, or they differ in shape.
        DataError: One of them is listed twice.
    """
    seeds = (truth,) if isinstance(truth, Retrained) else tuple(truth)
    shapes = [tuple(seed.values.shape) for seed in seeds]
    if len(set(shapes)) != 1:
        raise ShapeError(
            "Retraining from several seeds gives measurements [s, q] of one shape.",
            f"shapes {shapes}.",
            "seeds retrained for other weights or other queries, or an empty list.",
            "call retrain with the same weights and queries for every seed.",
        )
    if len({id(seed) for seed in seeds}) < len(seeds):
        raise DataError(
            "Every seed must be models of its own.",
            f"{len(seeds)} seeds, some of them the same object.",
            "one result listed twice.",
            "retrain again with another seed in the recipe.",
        )
    return seeds


def values_by_seed(truth: Truth) -> Float[Tensor, "k s q"]:
    """m(θ(w)) of each seed.

    Raises:
        NonFinite: A measurement is NaN or infinite.
        ShapeError, DataError: As `by_seed`.
    """
    return _stacked([seed.values for seed in by_seed(truth)])


def baselines_by_seed(truth: Truth) -> Float[Tensor, "k q"]:
    """m(θ(1)) of each seed. Raises as `values_by_seed`."""
    return _stacked([seed.baseline for seed in by_seed(truth)])


def _stacked(parts: Sequence[Tensor]) -> Float[Tensor, "k ..."]:
    stacked = torch.stack([part.detach().cpu().double() for part in parts])
    if not bool(stacked.isfinite().all()):
        bad = [k for k, part in enumerate(stacked) if not bool(part.isfinite().all())]
        raise NonFinite(
            "Measurements of retrained models must be finite.",
            f"{int((~stacked.isfinite()).sum())} of {stacked.numel()} are not, in seeds "
            f"{bad[:5]} of {len(stacked)}.",
            "the .solution of an error, which has NaN for models that failed.",
            "leave those rows of weights out of every seed, or train with another recipe.",
        )
    return stacked
