"""How well predictions agree with the truth, each with a confidence interval.

    pearson    linear correlation
    spearman   Pearson correlation of the ranks, ties sharing their mean rank
    slope      least squares slope b of  actual ≈ a + b · predicted: 1 where magnitudes are right

Intervals are percentile bootstraps (Efron & Tibshirani 1993, §13.3): rows are drawn with
replacement, and the values of one row (an example's effects on several queries) stay together,
since they are not independent. With fewer than about 20 rows such an interval is too narrow.

Refuses inputs for which the quantity does not exist: fewer than three rows, constant values, NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import DataError, NonFinite, ShapeError, SpecError, message

CHUNK = 4_000_000  # numbers per array while resampling
CONSTANT = 1e-13  # variance, in units of the whole sample's, that rounding leaves of a constant


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval. The bounds may be NaN where resampling gave none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: `resamples` draws of the rows, from `seed`."""

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.level < 1 and self.resamples >= 1):
            raise SpecError(
                message(
                    "A bootstrap needs a level between 0 and 1 and at least one resample.",
                    f"{self!r}.",
                    "a level in percent.",
                    "use Bootstrap(level=0.95).",
                )
            )


def pearson(
    predicted: Float[Tensor, "e *q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Linear correlation, Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²), over all entries together.

    Raises:
        ShapeError, NonFinite, DataError: See the module.
    """
    x, y = _checked(predicted, actual, "A correlation")
    return _estimate(lambda counts: _correlation(_moments(x, y, counts)), len(x), bootstrap)


def spearman(
    predicted: Float[Tensor, "e *q"],
    actual: Float[Tensor, "..."],  # of predicted's shape; another is refused in words
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Pearson correlation of the ranks over all entries together; resamples are ranked anew.

    Raises:
        ShapeError, NonFinite, DataError: See the module.
    """
    x, y = _checked(predicted, actual, "A rank correlation")

    def statistic(counts: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        each = counts.repeat_interleave(x.shape[1], dim=1)
        ranks = (_ranks(x.reshape(-1), each), _ranks(y.reshape(-1), each))
        return _correlation(_moments_by_resample(*ranks, each))

    return _estimate(statistic, len(x), bootstrap, width=x.numel())


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
    x, y = _checked(predicted, actual, "A slope")
    unit = float(actual.detach().double().std() / predicted.detach().double().std())

    def statistic(counts: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        moments = _moments(x, y, counts)
        return unit * moments.xy / torch.where(moments.xx > CONSTANT, moments.xx, torch.nan)

    return _estimate(statistic, len(x), bootstrap)


def _estimate(
    statistic: Callable[[Float[Tensor, "r e"]], Float[Tensor, " r"]],
    rows: int,
    bootstrap: Bootstrap,
    width: int = 0,
) -> Estimate:
    """The statistic with each row once, and its percentiles over resamples.

    A resample in which a variable is constant has no correlation; it is left out.
    """
    value = statistic(torch.ones(1, rows, dtype=torch.float64))
    generator = torch.Generator().manual_seed(bootstrap.seed)
    chunk = max(1, CHUNK // max(rows, width))
    parts = []
    for start in range(0, bootstrap.resamples, chunk):
        size = min(chunk, bootstrap.resamples - start)
        drawn: Int[Tensor, "r e"] = torch.randint(rows, (size, rows), generator=generator)
        counts = torch.zeros(size, rows, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        parts.append(statistic(counts))
    values = torch.cat(parts)
    values = values[values.isfinite()]
    if len(values) == 0:
        return Estimate(float(value), torch.nan, torch.nan)
    tail = (1.0 - bootstrap.level) / 2
    ends = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    low, high = torch.quantile(values, ends).tolist()
    return Estimate(float(value), low, high)


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
    levels, where = torch.unique(values, return_inverse=True)
    held = counts.new_zeros(len(counts), len(levels)).index_add_(1, where, counts)
    middle = held.cumsum(dim=1) - held / 2
    size = counts.sum(dim=1, keepdim=True)
    return (middle / size - 0.5)[:, where]


def _checked(
    predicted: Tensor, actual: Tensor, what: str
) -> tuple[Float[Tensor, "e q"], Float[Tensor, "e q"]]:
    """Both as `[e, q]` in float64, centered and scaled to variance 1."""
    if predicted.shape != actual.shape or predicted.ndim == 0 or len(predicted) < 3:
        raise ShapeError(
            message(
                f"{what} needs predicted and actual values of one shape, with at least 3 rows.",
                f"predicted {tuple(predicted.shape)}, actual {tuple(actual.shape)}.",
                "too few examples, or one query's predictions beside all queries' truth.",
                "compare more removals, or pick the query with query=.",
            )
        )
    pair = []
    for name, values in (("predicted", predicted), ("actual", actual)):
        flat = values.detach().cpu().double().reshape(len(values), -1)
        if not bool(flat.isfinite().all()):
            raise NonFinite(
                message(
                    f"{what} needs finite values.",
                    f"{int((~flat.isfinite()).sum())} of {flat.numel()} {name} values are not.",
                    "models that failed to train.",
                    "leave those removals out, or train them with another recipe.",
                )
            )
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
