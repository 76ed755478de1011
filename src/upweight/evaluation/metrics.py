"""How well predictions agree with the truth, each with a confidence interval.

    pearson    linear correlation
    spearman   Pearson correlation of the ranks, ties sharing their mean rank
    kendall    τ_b: concordant minus discordant pairs, over the pairs that are not tied
    slope      least squares slope b of  actual ≈ a + b · predicted: 1 where magnitudes are right

These take all entries together. `mean_spearman` and `mean_kendall` take each query by itself and
average over queries, so that only the order within a query counts; `slope_within` has one slope,
but compares within queries only.

Values are `[e]` or `[e, q]`, within queries always the latter, the predicted and the actual of one
shape. Intervals are percentile bootstraps (`upweight.evaluation.bootstrap`): rows are drawn with
replacement, and the values of one row (an example's effects on several queries) stay together,
since they are not independent. What looks within queries draws queries too, where there are
several; the mean of ρ is centered.

Everything here raises
    ShapeError    shapes that differ, or fewer than three rows
    NonFinite     a value that is NaN or infinite
    DataError     values that are all the same, where a quantity does not exist; says which
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight.errors import DataError, NonFinite, ShapeError
from upweight.evaluation.bootstrap import (
    Bootstrap,
    Estimate,
    centered_estimate,
    estimate,
    weighted_mean,
)

CONSTANT = 1e-13  # variance, in units of the whole sample's, that rounding leaves of a constant

Values: TypeAlias = Float[Tensor, "..."]  # of any shape: others are refused in words

Correlation: TypeAlias = Callable[
    [Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, "r m"]], Float[Tensor, " r"]
]
"""x, y and how often each resample drew each pair, to one correlation per resample."""


def pearson(predicted: Values, actual: Values, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """Linear correlation, Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²), over all entries together."""
    x, y = _standardized(predicted, actual, "A correlation")
    return estimate(lambda counts: _correlation(*_moments(x, y, counts)), [len(x)], bootstrap)


def spearman(predicted: Values, actual: Values, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """Pearson correlation of the ranks over all entries together; resamples are ranked anew."""
    return _pooled(rank_correlation, predicted, actual, bootstrap)


def kendall(predicted: Values, actual: Values, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """Kendall's τ_b over all entries together (Kendall 1945).

        τ_b = Σ sign(xᵢ−xⱼ) sign(yᵢ−yⱼ) / √(#{xᵢ≠xⱼ} #{yᵢ≠yⱼ})          over pairs i, j

    Cost: m² numbers in memory and m² multiply-adds per resample, for m entries.
    """
    return _pooled(tau_b, predicted, actual, bootstrap)


def slope(predicted: Values, actual: Values, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """b of the least squares line actual ≈ a + b · predicted, intercept included.

    1 means right magnitudes; 1.5 that the truth is half as much again as predicted.
    """
    x, y = _standardized(predicted, actual, "A slope")
    unit = float(actual.detach().double().std() / predicted.detach().double().std())

    def statistic(counts: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        xx, _, xy = _moments(x, y, counts)
        return unit * xy / torch.where(xx > CONSTANT, xx, torch.nan)

    return estimate(statistic, [len(x)], bootstrap)


def slope_within(predicted: Values, actual: Values, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """b of the least squares lines actual ≈ a_q + b · predicted: one b, each query its own a."""
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
    predicted: Values, actual: Values, bootstrap: Bootstrap = Bootstrap()
) -> Estimate:
    """(1/q) Σ_q ρ_q, with ρ_q the rank correlation over the rows of one query.

    The interval is centered, see `upweight.evaluation.bootstrap.centered_estimate`.
    """
    x, y = varying(predicted, actual)
    return centered_estimate(over_queries(rank_correlation, x, y), x.shape, bootstrap)


def mean_kendall(predicted: Values, actual: Values, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """(1/q) Σ_q τ_q, with τ_q Kendall's τ_b over the rows of one query.

    Cost: q s² multiply-adds per resample.
    """
    x, y = varying(predicted, actual)
    return estimate(over_queries(tau_b, x, y), x.shape, bootstrap)


def over_queries(
    correlation: Correlation, x: Float[Tensor, "s q"], y: Float[Tensor, "s q"]
) -> Callable[[Float[Tensor, "r s"], Float[Tensor, "r q"]], Float[Tensor, " r"]]:
    """Mean correlation of the queries drawn, each over the rows drawn, as a bootstrap needs it."""
    return lambda rows, queries: weighted_mean(each_query(correlation, x, y, rows), queries)


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
    share = counts / counts.sum(dim=1, keepdim=True)
    a, b = _ranks(x, share), _ranks(y, share)
    return _correlation(*((share * u * v).sum(dim=1) for u, v in ((a, a), (b, b), (a, b))))


def tau_b(
    x: Float[Tensor, " m"], y: Float[Tensor, " m"], counts: Float[Tensor, "r m"]
) -> Float[Tensor, " r"]:
    """Kendall's τ_b within each resample; an entry drawn twice is a tied pair."""
    signs = (x[:, None] - x).sign() * (y[:, None] - y).sign()
    held = (_levels(values, counts)[0] for values in (x, y))
    untied_x, untied_y = (counts.sum(dim=1) ** 2 - h.square().sum(dim=1) for h in held)
    # Where all that was drawn is tied, 0/0 = NaN.
    return ((counts @ signs) * counts).sum(dim=1) / (untied_x * untied_y).sqrt()


def _pooled(
    correlation: Correlation, predicted: Tensor, actual: Tensor, bootstrap: Bootstrap
) -> Estimate:
    x, y = _standardized(predicted, actual, "A rank correlation")

    def statistic(counts: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        each = counts.repeat_interleave(x.shape[1], dim=1)
        return correlation(x.reshape(-1), y.reshape(-1), each)

    return estimate(statistic, [len(x)], bootstrap, width=x.numel())


def _moments(
    x: Float[Tensor, "e q"], y: Float[Tensor, "e q"], counts: Float[Tensor, "r e"]
) -> tuple[Tensor, Tensor, Tensor]:
    """var x, var y and cov(x, y) of each resample. x and y are centered, so little cancels."""
    share = counts / counts.sum(dim=1, keepdim=True)
    means = torch.stack([x, y, x * x, y * y, x * y]).mean(dim=2)
    mx, my, xx, yy, xy = (share @ means.T).unbind(dim=1)
    return xx - mx * mx, yy - my * my, xy - mx * my


def _correlation(
    xx: Float[Tensor, " r"], yy: Float[Tensor, " r"], xy: Float[Tensor, " r"]
) -> Float[Tensor, " r"]:
    scale = torch.where((xx > CONSTANT) & (yy > CONSTANT), xx * yy, torch.nan).sqrt()
    return (xy / scale).clamp(-1.0, 1.0)  # rounding can exceed 1 in the last digit


def _ranks(values: Float[Tensor, " m"], share: Float[Tensor, "r m"]) -> Float[Tensor, "r m"]:
    """Rank of each value within each resample over its size, less the mean rank, ½.

    Equal values share their mean rank.
    """
    held, where = _levels(values, share)
    return (held.cumsum(dim=1) - held / 2 - 0.5)[:, where]


def _levels(values: Float[Tensor, " m"], counts: Float[Tensor, "r m"]) -> tuple[Tensor, Tensor]:
    """How often each resample drew each distinct value, ascending; and which one each entry has."""
    levels, where = torch.unique(values, return_inverse=True)
    return counts.new_zeros(len(counts), len(levels)).index_add_(1, where, counts), where


def _standardized(predicted: Tensor, actual: Tensor, what: str) -> tuple[Tensor, ...]:
    """Both as `[e, q]` in float64, centered and scaled to variance 1."""
    pair = _differing(predicted, actual, what, by_query=False)
    return tuple((values - values.mean()) / values.std() for values in pair)


def varying(predicted: Values, actual: Values) -> tuple[Float[Tensor, "s q"], ...]:
    """Both as `[s, q]` in float64, every query with values that differ between rows."""
    what = "A rank correlation per query"
    if predicted.ndim != 2 or predicted.shape[1] == 0:
        raise ShapeError(
            f"{what} needs one row per subset and one column per query: [s, q].",
            f"predicted {tuple(predicted.shape)}.",
            "one query's values as a vector.",
            "use values[:, None] for a single query.",
        )
    return _differing(predicted, actual, what, by_query=True)


def differing(values: Float[Tensor, "s q"]) -> Bool[Tensor, " q"]:
    """Queries whose values differ between rows by more than rounding."""
    return ~(values.std(dim=0) <= 1e-14 * values.abs().amax(dim=0))  # NaN counts as different


def _differing(
    predicted: Tensor, actual: Tensor, what: str, *, by_query: bool
) -> tuple[Float[Tensor, "e q"], ...]:
    """Both as `[e, q]` in float64: finite, and not all the same, of every query or together."""
    if predicted.shape != actual.shape or predicted.ndim == 0 or len(predicted) < 3:
        raise ShapeError(
            f"{what} needs predicted and actual values of one shape, with at least 3 rows.",
            f"predicted {tuple(predicted.shape)}, actual {tuple(actual.shape)}.",
            "too few examples, or one query's predictions beside all queries' truth.",
            "compare more removals, or pick the query with query=.",
        )
    pair = tuple(v.detach().cpu().double().reshape(len(v), -1) for v in (predicted, actual))
    for name, values in zip(("predicted", "actual"), pair, strict=True):
        if not bool(values.isfinite().all()):
            raise NonFinite(
                f"{what} needs finite values.",
                f"{int((~values.isfinite()).sum())} of {values.numel()} {name} values are not.",
                "models that failed to train.",
                "leave those removals out, or train them with another recipe.",
            )
        columns = values if by_query else values.reshape(-1, 1)
        flat = ~differing(columns)
        if bool(flat.any()):
            which = flat.nonzero()[:, 0].tolist()
            first = f"{float(columns[0, which[0]]):.6g}"
            raise DataError(
                f"{what} needs values that differ between rows.",
                f"{name} values of {len(which)} of {len(flat)} queries are constant: "
                f"queries {which[:5]}, the first at {first}."
                if by_query
                else f"{len(columns)} {name} values, all {first}.",
                "removals that change nothing: a measure that ignores the model, scores of "
                "zero, or an algorithm that ignores its weights.",
                "look at the values themselves; choose examples that matter, and leave "
                "queries without a change out, saying so.",
            )
    return pair
