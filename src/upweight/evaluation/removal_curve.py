"""Counterfactual removal: take out what a ranking puts first, retrain, and see how far m moves.

    curve[k] = mean over q of  m_q(𝒜(w)) − m_q(𝒜(1)),        wᵢ = 0 on the first k of q's ranking

The counterfactuals of Ilyas et al. (2022, "Datamodels") and Park et al. (2023, "TRAK"). A curve
says how good a ranking is only beside another: `random_order` and `loss_order` make the usual two,
and `against` subtracts one curve from another.

Three steps: weights for a ranking; `retrain` with them, once per seed; the answer read off. The
page on evaluation shows them. `upweight.evaluation.brittleness` reads off the same models how few
removals flip a prediction.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NonFinite, ShapeError
from upweight.evaluation.bootstrap import Bootstrap, Estimate, estimate, weighted_mean
from upweight.evaluation.groups import require_sizes
from upweight.evaluation.seeds import Truth, baselines_by_seed, values_by_seed
from upweight.training.weights import removal_weights


def random_order(n: int, seed: int = 0) -> Int[Tensor, " n"]:
    """The training examples in random order, the same for every query."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def loss_order(losses: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The training examples by falling ℓ(θ; zᵢ), the same for every query.

    Raises:
        NonFinite: A loss is NaN or infinite.
    """
    if not bool(losses.isfinite().all()):
        raise NonFinite(
            "An order needs finite losses.",
            f"{int((~losses.isfinite()).sum())} of {losses.numel()} are not.",
            "a probability of zero, or a model that diverged.",
            "look at those examples first.",
        )
    return losses.detach().cpu().argsort(descending=True, stable=True)


def ranked_removal_weights(
    order: Int[Tensor, "*q n"], sizes: Sequence[int]
) -> Float[Tensor, "s n"]:
    """Weights that remove the first k examples of a ranking, for each k.

    Args:
        order: One ranking for all queries `[n]`, or one each `[q, n]`, as from `removal_order`:
            every training example once.
        sizes: k, growing, 1 ≤ k < n.

    Returns:
        `[len(sizes), n]`, or `[q · len(sizes), n]`, query by query.

    Raises:
        ShapeError: A ranking does not hold every example once, or a k is not possible.
    """
    rankings = order.detach().cpu().reshape(-1, order.shape[-1]) if order.ndim else order
    n = order.shape[-1] if order.ndim else 0
    if order.ndim not in (1, 2) or not torch.equal(
        rankings.sort(dim=1).values, torch.arange(n).expand(len(rankings), n)
    ):
        raise ShapeError(
            "A ranking holds the index of every training example once: [n], or [q, n].",
            f"{order.dtype} of shape {tuple(order.shape)}.",
            "scores in place of their order, or only the top of it.",
            "use removal_order(scores), or scores.argsort(descending=True).",
        )
    require_growing(sizes)
    require_sizes(sizes, n)
    groups = [ranking[:size].tolist() for ranking in rankings for size in sizes]
    return removal_weights(n, groups)


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """How far the measurements of queries move as more of their ranking is removed.

    Args:
        sizes: k.
        changes: Δm of each query after the first k of its ranking are gone, for each seed.
        bootstrap: How the intervals are made; seeds and queries are drawn with replacement.
    """

    sizes: tuple[int, ...]
    changes: Float[Tensor, "m k q"]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @cached_property
    def mean(self) -> tuple[Estimate, ...]:
        """Mean Δm over seeds and queries, for each k. NaN bounds for one query and one seed."""
        seeds, _, queries = self.changes.shape
        return tuple(
            estimate(
                lambda m, q, at=at: weighted_mean(m / m.sum(dim=1, keepdim=True) @ at, q),
                (seeds, queries),
                self.bootstrap,
            )
            for at in self.changes.unbind(dim=1)
        )

    def against(self, other: "RemovalCurve") -> "RemovalCurve":
        """This curve minus another, query by query and seed by seed.

        What queries have in common cancels, so the interval of the difference is narrower than two
        curves side by side suggest.

        Raises:
            ShapeError: The curves are of other sizes, seeds or queries.
        """
        if self.sizes != other.sizes or self.changes.shape != other.changes.shape:
            raise ShapeError(
                "Curves are subtracted for the same k, seeds and queries.",
                f"k {self.sizes} of shape {tuple(self.changes.shape)}, and {other.sizes} of "
                f"shape {tuple(other.changes.shape)} (seeds, k, queries).",
                "a baseline retrained for fewer seeds.",
                "retrain both with the same seeds, sizes and queries.",
            )
        return RemovalCurve(self.sizes, self.changes - other.changes, self.bootstrap)

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them."""
        return {
            "sizes": list(self.sizes),
            "mean": [e.value for e in self.mean],
            "intervals": [[e.low, e.high] for e in self.mean],
            "level": self.bootstrap.level,
        }

    def __str__(self) -> str:
        seeds, _, q = self.changes.shape
        drawn = "1 seed" if seeds == 1 else f"{seeds} seeds"
        lines = [f"mean Δm over {q} queries, {drawn} ({self.bootstrap.level:.0%} interval)"]
        lines += [
            f"  remove {k:>6}  {e}" for k, e in zip(self.sizes, self.mean, strict=True)
        ]  # fmt: skip
        return "\n".join(lines)


def removal_curve(
    truth: Truth,
    sizes: Sequence[int],
    *,
    bootstrap: Bootstrap = Bootstrap(),
) -> RemovalCurve:
    """Read the curve off models retrained with `ranked_removal_weights`.

    Raises:
        ShapeError: The models are not one per k, nor one per query and k.
        DataError, NonFinite: As `lds`.
    """
    values = own_values(values_by_seed(truth), sizes)
    return RemovalCurve(tuple(sizes), values - baselines_by_seed(truth)[:, None], bootstrap)


def own_values(values: Float[Tensor, "m s q"], sizes: Sequence[int]) -> Float[Tensor, "m k q"]:
    """Each query's measurement after its own removals."""
    require_growing(sizes)
    (seeds, s, q), steps = values.shape, len(sizes)
    if s == steps:
        return values
    if s != q * steps:
        raise ShapeError(
            f"There is one model per k, {steps}, or one per query and k, {q * steps}.",
            f"{s} models measured on {q} queries.",
            "other sizes than the weights were made for, or another choice of queries.",
            "pass the sizes that ranked_removal_weights was called with.",
        )
    return values.reshape(seeds, q, steps, q).diagonal(dim1=1, dim2=3)


def require_growing(sizes: Sequence[int]) -> None:
    """Refuse sizes that do not rise."""
    if not len(sizes) or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ShapeError(
            "Removals grow along a ranking: sizes k in rising order.",
            f"sizes {list(sizes)[:10]}.",
            "a size listed twice, or sorted the other way.",
            "use sizes such as (1, 2, 5, 10, 20).",
        )
