"""Confidence intervals by resampling what was sampled: subsets, queries, seeds or rows.

    statistic(counts of the rows, counts of the queries, …)  →  one number per resample

A percentile bootstrap (Efron & Tibshirani 1993, §13.3). Each way that was sampled is drawn with
replacement, independently of the others, and a draw is how often each of its items came up. With
fewer than about 20 items such an interval is too narrow.

By counts a statistic of all resamples is a matrix product or a cumulative sum. SciPy's statistics
and its `bootstrap` take the drawn values themselves and sort them in every resample, which takes
three times as long for rank correlations and ROC curves, and a hundred times for Kendall's τ.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import SpecError

CHUNK = 4_000_000  # numbers per array while resampling
FEW = 20  # items of a way below which a percentile interval is too narrow
NORMAL = 1.959963984540054  # standard errors on either side of a normal 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval. The bounds may be NaN where resampling gave none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self, ".4f")

    def __format__(self, spec: str) -> str:
        """Each of the three by the spec: `f"{found:.2f}"` is `0.98 [0.97, 0.99]`."""
        if not spec:
            return str(self)
        value, low, high = (format(each, spec) for each in self)
        return f"{value} [{low}, {high}]"

    def __iter__(self) -> Iterator[float]:
        return iter((self.value, self.low, self.high))

    def __rmul__(self, factor: float) -> "Estimate":
        """In another unit, `100 * found`, or of the other sign, `-1 * found`."""
        return Estimate(factor * self.value, *sorted((factor * self.low, factor * self.high)))


def standard_error(
    values: Float[Tensor, " n"], groups: Sequence[Sequence[int]] | None = None
) -> float:
    """Of the mean of n values; of clusters, by the sums of their deviations. NaN for one.

    s/√n,    or  √(G/(G − 1) Σ_g (Σ_{i∈g} (vᵢ − v̄))²) / n
    """
    centred = (values - values.mean()).double()
    parts = centred if groups is None else torch.stack([centred[list(g)].sum() for g in groups])
    g, n = len(parts), len(values)
    if g < 2:
        return float("nan")
    return float((g / (g - 1) * parts.square().sum()).sqrt()) / n


def around(value: float, error: float) -> Estimate:
    """value ± 1.96 standard errors: the 95 % interval of a normal estimate."""
    return Estimate(value, value - NORMAL * error, value + NORMAL * error)


def student(degrees: int) -> float:
    """Student's t: standard errors on either side of a 95 % interval. NaN for no degree of freedom.

    By bisection of its distribution in closed form (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).
    """
    if degrees < 1:
        return math.nan
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < 0.95 else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """The probability of |t| ≤ √ν tan(angle)."""
    cosine, odd = math.cos(angle), degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def wilson(hits: int, count: int) -> Estimate:
    """A share and its 95 % score interval (Wilson 1927), which is no point at 0 and 1.

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)
    """
    share, slack = hits / count, NORMAL * NORMAL / count
    middle = (share + slack / 2) / (1 + slack)
    half = NORMAL * (share * (1 - share) / count + slack / (4 * count)) ** 0.5 / (1 + slack)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def summarized(estimates: Mapping[str, Estimate | None], level: float) -> dict[str, Any]:
    """Values by name as JSON would hold them, and their bounds under `intervals`."""
    return {
        **{name: e.value if e else None for name, e in estimates.items()},
        "level": level,
        "intervals": {name: [e.low, e.high] if e else None for name, e in estimates.items()},
    }


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: `resamples` draws of the rows, from `seed`."""

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.level < 1 and self.resamples >= 1):
            raise SpecError(
                "A bootstrap needs a level between 0 and 1 and at least one resample.",
                f"{self!r}.",
                "a level in percent.",
                "use Bootstrap(level=0.95).",
            )


def estimate(
    statistic: Callable[..., Float[Tensor, " r"]],
    sizes: Sequence[int],
    bootstrap: Bootstrap,
    width: int = 0,
) -> Estimate:
    """The statistic of the sample itself, and its percentiles over resamples.

    A resample in which the statistic does not exist (NaN: a variable is constant in it, say) is
    left out. The bounds are NaN where that leaves none, and where nothing varies between resamples
    because every way has one item only.

    Args:
        statistic: Counts `[r, size]`, one tensor per way, to `[r]`.
        sizes: Items of each way.
        bootstrap: How many draws, from which seed, to which level.
        width: Numbers that the statistic holds per resample, where that is more than the sizes.
    """
    value, values = _resampled(statistic, sizes, bootstrap, width)
    return Estimate(float(value), *_bounds(values, bootstrap.level).tolist())


def centered_estimate(
    statistic: Callable[..., Float[Tensor, " r"]], sizes: Sequence[int], bootstrap: Bootstrap
) -> Estimate:
    """As `estimate`, moved by the bias that resampling adds: the mean over resamples − the value.

    For means of rank correlations. An item drawn twice is a tie, which takes about 3 (ρ − τ)/s off
    Spearman's ρ over s items (τ: Kendall's), in every query alike. Over many queries the interval
    is narrower than that and plain percentiles would lie below the value. The bias is estimated as
    in Efron & Tibshirani (1993, §10.2); the interval is for what s items give on average.
    """
    value, values = _resampled(statistic, sizes, bootstrap, 0)
    centered = values - (values.nanmean() - value)
    return Estimate(float(value), *_bounds(centered, bootstrap.level).tolist())


def mean(values: Float[Tensor, " q"], bootstrap: Bootstrap) -> Estimate:
    """The mean of values, which are drawn with replacement. NaN bounds for one."""
    return estimate(lambda counts: weighted_mean(values, counts), [len(values)], bootstrap)


def estimates(
    statistic: Callable[[Float[Tensor, "r q"]], Float[Tensor, "r k"]],
    size: int,
    bootstrap: Bootstrap,
    width: int = 0,
) -> tuple[Estimate, ...]:
    """As `estimate` for k numbers that share their resamples, of one way with `size` items.

    `width` is k, where it is more than the size.
    """
    every, drawn = _resampled(statistic, [size], bootstrap, width)
    low, high = _bounds(drawn, bootstrap.level)
    ends = zip(every.tolist(), low.tolist(), high.tolist(), strict=True)
    return tuple(Estimate(*each) for each in ends)


def means(values: Float[Tensor, "q k"], bootstrap: Bootstrap) -> tuple[Estimate, ...]:
    """The mean of every column, over rows that are drawn with replacement."""
    values = values.double()

    def statistic(counts: Float[Tensor, "r q"]) -> Float[Tensor, "r k"]:
        return counts @ values / len(values)

    return estimates(statistic, len(values), bootstrap, values.shape[1])


def _resampled(
    statistic: Callable[..., Float[Tensor, " r"]],
    sizes: Sequence[int],
    bootstrap: Bootstrap,
    width: int,
) -> tuple[Float[Tensor, "*k"], Float[Tensor, "r *k"]]:
    """The statistic of the sample, one number or k, and of each resample."""
    value = statistic(*(torch.ones(1, size, dtype=torch.float64) for size in sizes))[0]
    if max(sizes) == 1:
        return value, torch.full_like(value[None], torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(bootstrap.seed)
    chunk = max(1, CHUNK // max(*sizes, width))
    parts = []
    for start in range(0, bootstrap.resamples, chunk):
        count = min(chunk, bootstrap.resamples - start)
        parts.append(statistic(*(_counts(count, size, generator) for size in sizes)))
    return value, torch.cat(parts)


def _bounds(values: Float[Tensor, "r *k"], level: float) -> Float[Tensor, "two *k"]:
    tails = torch.tensor([(1.0 - level) / 2, (1.0 + level) / 2], dtype=torch.float64)
    return values.nanquantile(tails, dim=0)


def _counts(count: int, size: int, generator: torch.Generator) -> Float[Tensor, "r e"]:
    drawn: Int[Tensor, "r e"] = torch.randint(size, (count, size), generator=generator)
    counts = torch.zeros(count, size, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def weighted_mean(
    values: Float[Tensor, "*r q"], counts: Float[Tensor, "r q"]
) -> Float[Tensor, " r"]:
    """Mean over the items drawn, Σ counts · values / Σ counts; NaN where a drawn value is NaN."""
    total = torch.where(counts > 0, values * counts, 0.0).sum(dim=1)  # not drawn: 0, not NaN · 0
    return total / counts.sum(dim=1)
