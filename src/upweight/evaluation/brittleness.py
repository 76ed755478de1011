"""Brittleness: how few removals flip a prediction?

    brittle[k] = share of queries, right before, with margin < 0 after removing the first k or fewer

Ilyas et al. (2022, "Datamodels", brittle predictions) ask for the smallest set of training examples
whose removal makes the model wrong; Park et al. (2023, "TRAK", counterfactuals) compare rankings by
it. Read off the models of `upweight.evaluation.removal_curve`, measured by `Margin()`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from upweight.errors import DataError
from upweight.evaluation.bootstrap import Bootstrap, Estimate, mean
from upweight.evaluation.removal_curve import own_values
from upweight.evaluation.seeds import Truth, baselines_by_seed, values_by_seed


@dataclass(frozen=True, eq=False)
class Brittleness:
    """How few removals flip predictions.

    A prediction counts if the mean margin over seeds is not negative on all data; it is flipped
    where that mean is negative after the removal. The k found is an upper bound of the smallest set
    that flips it: only sets that the ranking puts first were tried.

    Read flips off with a measure that is negative exactly where the model is wrong. `Margin()` is,
    for two classes. For more it asks whether p(y | x) < ½, and a model can be right with less; for
    the predicted class pass a function: the target's output minus the largest other.

    Args:
        sizes: k.
        margins: Margins after the first k of each query's ranking are gone, for each seed.
        baseline: Margins on all data.
        bootstrap: How the intervals are made; queries are drawn with replacement.
    """

    sizes: tuple[int, ...]
    margins: Float[Tensor, "m k q"]
    baseline: Float[Tensor, "m q"]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @cached_property
    def smallest(self) -> Mapping[int, int | None]:
        """The smallest k tried that flips each query that counts; None where none does."""
        flipped = self.margins.mean(dim=0) < 0
        right = (self.baseline.mean(dim=0) >= 0).nonzero()[:, 0].tolist()
        hits = {q: flipped[:, q].nonzero()[:, 0].tolist() for q in right}
        return {q: self.sizes[hit[0]] if hit else None for q, hit in hits.items()}

    @cached_property
    def flipped(self) -> tuple[Estimate, ...]:
        """Share of the queries that count which k or fewer removals flip, for each k.

        Queries are drawn with replacement. Seeds are not: a mean over fewer distinct seeds is
        noisier, and noise flips. NaN bounds where one query counts.
        """
        right = self.baseline.mean(dim=0) >= 0
        ever = (self.margins.mean(dim=0)[:, right] < 0).double().cummax(dim=0).values
        return tuple(mean(at, self.bootstrap) for at in ever)

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them."""
        return {
            "sizes": list(self.sizes),
            "flipped": [e.value for e in self.flipped],
            "intervals": [[e.low, e.high] for e in self.flipped],
            "queries": len(self.smallest),
            "wrong_before": self.baseline.shape[1] - len(self.smallest),
            "seeds": len(self.margins),
            "level": self.bootstrap.level,
        }

    def __str__(self) -> str:
        counted, wrong = len(self.smallest), self.baseline.shape[1] - len(self.smallest)
        lines = [
            f"share of {counted} predictions flipped ({self.bootstrap.level:.0%} interval; "
            f"{wrong} more were wrong on all data; mean margin of {len(self.margins)} seeds)"
        ]
        lines += [
            f"  remove {k:>6} or fewer  {e}" for k, e in zip(self.sizes, self.flipped, strict=True)
        ]
        return "\n".join(lines)


def brittleness(
    truth: Truth,
    sizes: Sequence[int],
    *,
    bootstrap: Bootstrap = Bootstrap(),
) -> Brittleness:
    """Read flips off models retrained with `ranked_removal_weights` and measured by a margin.

    Raises:
        ShapeError: The models are not one per k, nor one per query and k.
        DataError: No prediction is right on all data; or as `lds`.
        NonFinite: As `lds`.
    """
    margins, baseline = own_values(values_by_seed(truth), sizes), baselines_by_seed(truth)
    if not bool((baseline.mean(dim=0) >= 0).any()):
        raise DataError(
            "A prediction that flips is right before: its margin is not negative.",
            f"{baseline.shape[1]} queries, the largest mean margin "
            f"{float(baseline.mean(dim=0).max()):.3g}.",
            "a measure that is not a margin, such as LogProb().",
            "retrain with measure=Margin(), for queries that the model gets right.",
        )
    return Brittleness(tuple(sizes), margins, baseline, bootstrap)
