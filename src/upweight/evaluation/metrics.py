"""How well predictions agree with the truth, each with a confidence interval.

    pearson    linear correlation
    spearman   Pearson correlation of the ranks, ties sharing their mean rank
    kendall    τ_b: concordant minus discordant pairs, over the pairs that are not tied
    slope      least squares slope b of  actual ≈ a + b · predicted: 1 where magnitudes are right

These take all entries together. `mean_spearman` and `mean_kendall` take each query by itself and
average over queries, so that only the order within a query counts; `slope_within` has one slope,
but compares within queries only.

Intervals are percentile bootstraps (`upweight.evaluation.bootstrap`): rows are drawn with
replacement, and the values of one row (an example's effects on several queries) stay together,
since they are not independent. What looks within queries draws queries too;
the mean of ρ is centered.

Refuses inputs for which the quantity does not exist: fewer than three rows, constant values, NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DataError, NonFinite, ShapeError, message
from upweight.evaluation.bootstrap import (
    Bootstrap,
    Estimate,
    centered_estimate,
    estimate,
    weighted_mean,
)

CONSTANT = 1e-13  # variance, in units of the whole sample's, that rounding leaves of a constant

Correlation: TypeAlias = Callable[
    [Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, "r m"]], Float[Tensor, " r"]
]
"""x, y and how often each resample drew each pair, to one correlation per resample."""


def pearson(
    predicted: Float[Tensor, "e *q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Linear correlation, Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²), over all entries together.

    Raises:
        ShapeError, NonFinite, DataError: See the module.
    """
    x, y = _standardized(predicted, actual, "A correlation")
    return estimate(lambda counts: _correlation(_moments(x, y, counts)), [len(x)], bootstrap)


def spearman(
    predicted: Float[Tensor, "e *q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Pearson correlation of the ranks over all entries together; resamples are ranked anew.

    Raises:
        ShapeError, NonFinite, DataError: See the module.
    """
    return _pooled(rank_correlation, predicted, actual, bootstrap)


def kendall(
    predicted: Float[Tensor, "e *q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Kendall's τ_b over all entries together (Kendall 1945).

        τ_b = Σ sign(xᵢ−xⱼ) sign(yᵢ−yⱼ) / √(#{xᵢ≠xⱼ} #{yᵢ≠yⱼ})          over pairs i, j

    Raises:
        ShapeError, NonFinite, DataError: See the module.

    Cost: m² numbers in memory and m² multiply-adds per resample, for m entries.
    """
    return _pooled(tau_b, predicted, actual, bootstrap)


def slope(
    predicted: Float[Tensor, "e *q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """b of the least squares line actual ≈ a + b · predicted, intercept included.

    1 means right magnitudes; 1.5 that the truth is half as much again as predicted.

    Raises:
        ShapeError, NonFinite, DataError: See the module.
    """
    x, y = _standardized(predicted, actual, "A slope")
    unit = float(actual.detach().double().std() / predicted.detach().double().std())

    def statistic(counts: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        moments = _moments(x, y, counts)
        return unit * moments.xy / torch.where(moments.xx > CONSTANT, moments.xx, torch.nan)

    return estimate(statistic, [len(x)], bootstrap)


def slope_within(
    predicted: Float[Tensor, "s q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """b of the least squares lines actual ≈ a_q + b · predicted: one slope, each query its own a.

    Rows and queries are drawn with replacement; with one query, rows only.

    Raises:
        ShapeError, NonFinite: See the module.
        DataError: As `mean_spearman`.
    """
    x, y = (v - v.mean(dim=0) for v in varying(predicted, actual))
    products, squares = x * y, x.square()

    def statistic(rows: Float[Tensor, "r s"], queries: Float[Tensor, "r q"]) -> Tensor:
        total = rows.sum(dim=1, keepdim=True)
        mean_x, mean_y = rows @ x / total, rows @ y / total
        xy = ((rows @ products - total * mean_x * mean_y) * queries).sum(dim=1)
        xx = ((rows @ squares - total * mean_x.square()) * queries).sum(dim=1)
        enough = CONSTANT * total[:, 0] * x.var(dim=0, correction=0).mean()
        return xy / torch.where(xx > enough, xx, torch.nan)

    return estimate(statistic, x.shape, bootstrap)


def mean_spearman(
    predicted: Float[Tensor, "s q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """(1/q) Σ_q ρ_q, with ρ_q the rank correlation over the rows of one query.

    Rows and queries are drawn with replacement; with one query, rows only. The interval is
    centered, see `upweight.evaluation.bootstrap.centered_estimate`.

    Raises:
        ShapeError, NonFinite: See the module.
        DataError: The predicted or actual values of a query are all the same; says which query.
    """
    x, y = varying(predicted, actual)
    return centered_estimate(over_queries(rank_correlation, x, y), x.shape, bootstrap)


def mean_kendall(
    predicted: Float[Tensor, "s q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """(1/q) Σ_q τ_q, with τ_q Kendall's τ_b over the rows of one query. As `mean_spearman`.

    Raises:
        ShapeError, NonFinite, DataError: As `mean_spearman`.

    Cost: q s² multiply-adds per resample.
    """
    x, y = varying(predicted, actual)
    return estimate(over_queries(tau_b, x, y), x.shape, bootstrap)


def over_queries(
    correlation: Correlation, x: Float[Tensor, "s q"], y: Float[Tensor, "s q"]
) -> Callable[[Float[Tensor, "r s"], Float[Tensor, "r q"]], Float[Tensor, " r"]]:
    """Mean correlation of the queries drawn, each over the rows drawn, as a bootstrap needs it."""

    def statistic(rows: Float[Tensor, "r s"], queries: Float[Tensor, "r q"]) -> Tensor:
        return weighted_mean(each_query(correlation, x, y, rows), queries)

    return statistic


def each_query(
    correlation: Correlation,
    x: Float[Tensor, "s q"],
    y: Float[Tensor, "s q"],
    rows: Float[Tensor, "r s"],
) -> Float[Tensor, "r q"]:
    """The correlation of every query, over the rows that each resample drew."""
    return torch.stack([correlation(a, b, rows) for a, b in zip(x.T, y.T, strict=True)], dim=1)


def rank_correlation(
    x: Float[Tensor, " m"], y: Float[Tensor, " m"], counts: Float[Tensor, "r m"]
) -> Float[Tensor, " r"]:
    """Spearman's ρ within each resample."""
    return _correlation(_moments_by_resample(_ranks(x, counts), _ranks(y, counts), counts))


def tau_b(
    x: Float[Tensor, " m"], y: Float[Tensor, " m"], counts: Float[Tensor, "r m"]
) -> Float[Tensor, " r"]:
    """Kendall's τ_b within each resample; an entry drawn twice is a tied pair."""
    signs = (x[:, None] - x).sign() * (y[:, None] - y).sign()
    untied = _untied(x, counts) * _untied(y, counts)
    scale = torch.where(untied > 0, untied, torch.nan).sqrt()
    return ((counts @ signs) * counts).sum(dim=1) / scale


def _untied(values: Float[Tensor, " m"], counts: Float[Tensor, "r m"]) -> Float[Tensor, " r"]:
    """Ordered pairs of each resample whose values differ."""
    held, _ = _levels(values, counts)
    return counts.sum(dim=1) ** 2 - (held**2).sum(dim=1)


def _pooled(
    correlation: Correlation, predicted: Tensor, actual: Tensor, bootstrap: Bootstrap
) -> Estimate:
    x, y = _standardized(predicted, actual, "A rank correlation")

    def statistic(counts: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        each = counts.repeat_interleave(x.shape[1], dim=1)
        return correlation(x.reshape(-1), y.reshape(-1), each)

    return estimate(statistic, [len(x)], bootstrap, width=x.numel())


@dataclass(frozen=True, eq=False)
class _Moments:
    """Variances and covariance of each resample."""

    xx: Float[Tensor, " r"]
    yy: Float[Tensor, " r"]
    xy: Float[Tensor, " r"]


def _moments(
    x: Float[Tensor, "e q"], y: Float[Tensor, "e q"], counts: Float[Tensor, "r e"]
) -> _Moments:
    """From one product with the counts. The data are centered, so little cancels."""
    means = torch.stack([x, y, x * x, y * y, x * y]).mean(dim=2)
    share = counts / counts.sum(dim=1, keepdim=True)
    mx, my, xx, yy, xy = (share @ means.T).unbind(dim=1)
    return _Moments(xx - mx * mx, yy - my * my, xy - mx * my)


def _moments_by_resample(
    x: Float[Tensor, "r m"], y: Float[Tensor, "r m"], counts: Float[Tensor, "r m"]
) -> _Moments:
    """The same for values that differ between resamples."""
    share = counts / counts.sum(dim=1, keepdim=True)
    x = x - (share * x).sum(dim=1, keepdim=True)
    y = y - (share * y).sum(dim=1, keepdim=True)
    return _Moments(
        (share * x * x).sum(dim=1), (share * y * y).sum(dim=1), (share * x * y).sum(dim=1)
    )


def _correlation(moments: _Moments) -> Float[Tensor, " r"]:
    varies = (moments.xx > CONSTANT) & (moments.yy > CONSTANT)
    scale = torch.where(varies, moments.xx * moments.yy, torch.nan).sqrt()
    return (moments.xy / scale).clamp(-1.0, 1.0)  # rounding can exceed 1 in the last digit


def _ranks(values: Float[Tensor, " m"], counts: Float[Tensor, "r m"]) -> Float[Tensor, "r m"]:
    """Rank of each value within each resample, centered; equal values share their mean rank."""
    held, where = _levels(values, counts)
    middle = held.cumsum(dim=1) - held / 2
    size = counts.sum(dim=1, keepdim=True)
    return (middle / size - 0.5)[:, where]


def _levels(values: Float[Tensor, " m"], counts: Float[Tensor, "r m"]) -> tuple[Tensor, Tensor]:
    """How often each resample drew each distinct value, ascending; and which one each entry has."""
    levels, where = torch.unique(values, return_inverse=True)
    return counts.new_zeros(len(counts), len(levels)).index_add_(1, where, counts), where


def _standardized(
    predicted: Tensor, actual: Tensor, what: str
) -> tuple[Float[Tensor, "e q"], Float[Tensor, "e q"]]:
    """Both as `[e, q]` in float64, centered and scaled to variance 1."""
    pair = []
    for name, flat in zip(("predicted", "actual"), _finite(predicted, actual, what), strict=True):
        spread = float(flat.std())
        if spread <= 1e-14 * float(flat.abs().max()):
            raise DataError(
                message(
                    f"{what} needs values that differ.",
                    f"{flat.numel()} {name} values, all {float(flat.reshape(-1)[0]):.6g}.",
                    "removals that change nothing: a measure that ignores the model, examples "
                    "with zero gradient, or an algorithm that ignores its weights.",
                    "look at the values themselves; choose examples that matter.",
                )
            )
        pair.append((flat - flat.mean()) / spread)
    return pair[0], pair[1]


def varying(predicted: Tensor, actual: Tensor) -> tuple[Float[Tensor, "s q"], Float[Tensor, "s q"]]:
    """Both as `[s, q]` in float64, every query with values that differ between rows.

    Raises:
        ShapeError, NonFinite, DataError: As `mean_spearman`.
    """
    what = "A rank correlation per query"
    if predicted.ndim != 2 or predicted.shape[1] == 0:
        raise ShapeError(
            message(
                f"{what} needs one row per subset and one column per query: [s, q].",
                f"predicted {tuple(predicted.shape)}.",
                "one query's values as a vector.",
                "use values[:, None] for a single query.",
            )
        )
    pair = _finite(predicted, actual, what)
    for name, values in zip(("predicted", "actual"), pair, strict=True):
        constant = values.std(dim=0) <= 1e-14 * values.abs().amax(dim=0)
        if bool(constant.any()):
            which = constant.nonzero()[:, 0].tolist()
            raise DataError(
                message(
                    f"{what} needs values that differ between rows, for every query.",
                    f"{name} values of {len(which)} of {values.shape[1]} queries are constant: "
                    f"queries {which[:5]}, the first at {float(values[0, which[0]]):.6g}.",
                    "scores of zero throughout, a measure that ignores the model, or an algorithm "
                    "that ignores its weights.",
                    "look at the values themselves; leave those queries out and say so.",
                )
            )
    return pair


def _finite(
    predicted: Tensor, actual: Tensor, what: str
) -> tuple[Float[Tensor, "e q"], Float[Tensor, "e q"]]:
    """Both as `[e, q]` in float64."""
    if predicted.shape != actual.shape or predicted.ndim == 0 or len(predicted) < 3:
        raise ShapeError(
            message(
                f"{what} needs predicted and actual values of one shape, with at least 3 rows.",
                f"predicted {tuple(predicted.shape)}, actual {tuple(actual.shape)}.",
                "too few examples, or one query's predictions beside all queries' truth.",
                "compare more removals, or pick the query with query=.",
            )
        )
    x, y = (v.detach().cpu().double().reshape(len(v), -1) for v in (predicted, actual))
    for name, flat in (("predicted", x), ("actual", y)):
        if not bool(flat.isfinite().all()):
            raise NonFinite(
                message(
                    f"{what} needs finite values.",
                    f"{int((~flat.isfinite()).sum())} of {flat.numel()} {name} values are not.",
                    "models that failed to train.",
                    "leave those removals out, or train them with another recipe.",
                )
            )
    return x, y
