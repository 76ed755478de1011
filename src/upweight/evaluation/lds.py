"""The linear datamodeling score: do scores order retrained models as they came out?

    LDS = (1/q) Σ_q ρ( Σᵢ S[q, i] (w[·, i] − 1),  m_q(𝒜(w[·])) )       ρ: Spearman, over subsets w

Ilyas et al. (2022, "Datamodels"); Park et al. (2023, "TRAK", §2), who gave it its name. The subsets
usually keep half of the data (`subset_weights`), so what is predicted are large changes.

Training noise keeps even a perfect method below 1. Two numbers say how much there is of it. The
*ceiling* is the LDS of retraining itself: the same models from other seeds, as a prediction. A
method that knew the noiseless m(𝒜(w)) could get above it, up to about √ceiling (Spearman 1904,
attenuation), because a prediction from other seeds has noise of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.effects import Effects
from upweight.errors import ShapeError
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import FEW, Bootstrap, Estimate, centered_estimate, summarized
from upweight.evaluation.prediction import predicted_changes
from upweight.evaluation.seeds import Truth, by_seed, values_by_seed
from upweight.scores import Scores


@dataclass(frozen=True, eq=False)
class LDS:
    """Predicted against measured values of models trained on subsets.

    Args:
        predicted: Predicted Δm of each subset and query.
        values: m(𝒜(w)) as measured, of each seed. Its mean over seeds is the truth.
        again: The same from further seeds, for the ceiling.
        bootstrap: How the intervals are made; subsets and queries are drawn with replacement.
    """

    predicted: Float[Tensor, "s q"]
    values: Float[Tensor, "k s q"]
    again: Float[Tensor, "k s q"] | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @property
    def measured(self) -> Float[Tensor, "s q"]:
        """m(𝒜(w)), mean over seeds."""
        return self.values.mean(dim=0)

    @cached_property
    def spearman(self) -> Estimate:
        """The score: mean over queries of the rank correlation over subsets."""
        return metrics.mean_spearman(self.predicted, self.measured, self.bootstrap)

    @cached_property
    def kendall(self) -> Estimate:
        """The same with Kendall's τ_b."""
        return metrics.mean_kendall(self.predicted, self.measured, self.bootstrap)

    @cached_property
    def per_query(self) -> Float[Tensor, " q"]:
        """The rank correlation of each query."""
        rows = self.predicted.new_ones(1, len(self.predicted))
        return metrics.each_query(metrics.rank_correlation, self.predicted, self.measured, rows)[0]

    @cached_property
    def ceiling(self) -> Estimate | None:
        """The score of retraining again. None where there is one seed and nothing else.

        With `again`, the LDS of its mean as a prediction. Without, k ≥ 2 seeds are split into
        halves of h = ⌊k/2⌋, the mean r of the halves' scores is taken over splits, and what k
        seeds would get follows Spearman (1910) and Brown (1910): with f = k/h,

            ceiling = f r / (1 + (f − 1) |r|)          2 r / (1 + r) for even k and r ≥ 0

        with |r| after Krus & Helmstadter (1993), so that noise about zero stays about zero. That
        formula is for linear correlations; for ranks it is an approximation.
        """
        statistic = self._ceiling()
        if statistic is None:
            return None
        return centered_estimate(statistic, self.predicted.shape, self.bootstrap)

    @cached_property
    def relative(self) -> Estimate | None:
        """Score over ceiling, in the same resamples. NaN where the ceiling is not positive."""
        ceiling = self._ceiling()
        if ceiling is None:
            return None
        score = metrics.over_queries(metrics.rank_correlation, self.predicted, self.measured)

        def statistic(rows: Float[Tensor, "r s"], queries: Float[Tensor, "r q"]) -> Tensor:
            top = ceiling(rows, queries)
            return score(rows, queries) / torch.where(top > 0, top, torch.nan)

        return centered_estimate(statistic, self.predicted.shape, self.bootstrap)

    def _ceiling(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        over = metrics.over_queries
        if self.again is not None:
            return over(metrics.rank_correlation, self.again.mean(dim=0), self.measured)
        k = len(self.values)
        if k < 2:
            return None
        half = k // 2
        # Seeds in a circle, cut at each place: every seed is in as many halves as any other.
        # For even k the second half of the cuts repeats the first with the halves exchanged.
        circles = [self.values.roll(-cut, dims=0) for cut in range(k if k % 2 else half)]
        scores = [
            over(
                metrics.rank_correlation,
                circle[:half].mean(dim=0),
                circle[half : 2 * half].mean(dim=0),
            )
            for circle in circles
        ]

        def statistic(rows: Float[Tensor, "r s"], queries: Float[Tensor, "r q"]) -> Tensor:
            r = torch.stack([score(rows, queries) for score in scores]).mean(dim=0)
            factor = k / half
            return factor * r / (1 + (factor - 1) * r.abs())

        return statistic

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them; intervals under `intervals`."""
        names = ("spearman", "kendall", "ceiling", "relative")
        estimates = {name: getattr(self, name) for name in names}
        seeds, subsets, queries = self.values.shape
        sizes = {"subsets": subsets, "queries": queries, "seeds": seeds}
        return summarized(estimates, self.bootstrap.level) | sizes

    def __str__(self) -> str:
        s, q = self.predicted.shape
        k = len(self.values)
        score, top = self.spearman, self.ceiling
        found = f"ceiling {top.value:.2f}" if top else "no ceiling: one seed"
        lines = [
            f"rank correlation with retraining (LDS) {score:.3f} over {s} subsets × {q} "
            f"{'query' if q == 1 else 'queries'} ({found})",
            f"  {self.bootstrap.level:.0%} interval over subsets and queries; per query "
            f"{float(self.per_query.min()):.3f} to {float(self.per_query.max()):.3f}",
        ]
        if self.again is not None:
            lines.append(f"  ceiling: retraining again, {len(self.again)} against {k} seeds")
        elif top:
            lines.append(f"  ceiling: split halves of {k} seeds, Spearman–Brown")
        if min(s, q) < FEW:
            few = f"{s} subsets" if s <= q else f"{q} queries"
            lines.append(f"  only {few}: such intervals are too narrow below {FEW}")
        return "\n".join(lines)


def lds(
    predicted: Scores | Effects | Float[Tensor, "..."],
    weights: Float[Tensor, "..."],
    truth: Truth,
    again: Truth | None = None,
    *,
    bootstrap: Bootstrap = Bootstrap(),
) -> LDS:
    """The linear datamodeling score of predictions, with its noise ceiling.

    Args:
        predicted: Scores or effects of single examples, which are summed, or Δm of each subset
            and query as a matrix `[s, q]`.
        weights: The subsets `[s, n]`, as from `subset_weights`.
        truth: What `retrain` returned for these weights; one, or one per seed. Values of several
            seeds are averaged.
        again: Further seeds of the same, for the ceiling.
        bootstrap: How the intervals are made.

    Raises:
        ShapeError: Sizes disagree, there are fewer than three subsets, or one comes twice.
        DataError: Predictions or measurements of a query are constant, or models are listed twice.
        NonFinite: A prediction or measurement is NaN or infinite.
        UpweightError: The scores are not ∂m/∂w.

    Cost: resamples × s × q numbers ranked; Kendall's τ takes s times as many multiply-adds.
    """
    seeds = by_seed(truth)
    values = values_by_seed(seeds)
    repeated = None
    if again is not None:
        further = by_seed(again)
        by_seed((*seeds, *further))
        repeated = values_by_seed(further)
    _require_distinct(weights)
    if isinstance(predicted, Scores | Effects):
        predicted = predicted_changes(predicted, weights)
    s, q = values.shape[1:]
    if tuple(predicted.shape) != (s, q) or len(weights) != s:
        raise ShapeError(
            "Weights, predictions and measurements have one row per subset, the last two one "
            "column per query.",
            f"weights {tuple(weights.shape)}, predicted {tuple(predicted.shape)}, "
            f"measured {(s, q)}.",
            "scores of all queries beside retraining for some, or weights of another run.",
            "retrain with the same weights, for the queries that were scored.",
        )
    checked, _ = metrics.varying(predicted, values.mean(dim=0))
    if repeated is not None:
        metrics.varying(checked, repeated.mean(dim=0))
    return LDS(checked, values, repeated, bootstrap)


def _require_distinct(weights: Float[Tensor, "..."]) -> None:
    distinct = len(torch.unique(weights, dim=0)) if weights.ndim == 2 else 0
    if weights.ndim != 2 or distinct < len(weights):
        raise ShapeError(
            "Subsets are rows of weights [s, n], each of them once.",
            f"weights {tuple(weights.shape)}, {distinct} distinct rows.",
            "indices in place of weights, or several seeds as rows in place of a list.",
            "use subset_weights(n, subsets), and pass one Retrained per seed: repeated rows "
            "would count twice in every correlation.",
        )
