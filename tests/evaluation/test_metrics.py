"""Metrics against SciPy, and intervals that cover."""

import numpy as np
import pytest
import scipy.stats
import torch

from upweight.errors import DataError, NonFinite, ShapeError, SpecError
from upweight.evaluation.bootstrap import Bootstrap, estimate
from upweight.evaluation.metrics import (
    kendall,
    mean_kendall,
    mean_spearman,
    over_queries,
    pearson,
    rank_correlation,
    slope,
    slope_within,
    spearman,
)


def pairs(e=40, q=1, noise=0.5, seed=0, ties=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(e, q, generator=g, dtype=torch.float64)
    y = 1.5 * x + 0.3 + noise * torch.randn(e, q, generator=g, dtype=torch.float64)
    return ((4 * x).round() / 4, (4 * y).round() / 4) if ties else (x, y)


SCIPY = {
    pearson: lambda x, y: scipy.stats.pearsonr(x, y).statistic,
    spearman: lambda x, y: scipy.stats.spearmanr(x, y).statistic,
    kendall: lambda x, y: scipy.stats.kendalltau(x, y, variant="b").statistic,
    slope: lambda x, y: scipy.stats.linregress(x, y).slope,
}


@pytest.mark.parametrize("metric", SCIPY)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("q", [1, 3])
def test_value_is_that_of_scipy(metric, ties, q):
    x, y = pairs(q=q, ties=ties)
    expected = SCIPY[metric](x.reshape(-1).numpy(), y.reshape(-1).numpy())
    assert metric(x, y).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", SCIPY)
def test_interval_is_that_of_resampling_row_by_row(metric):
    """The same percentiles from a loop over resamples with SciPy, up to resampling noise."""
    x, y = pairs(e=25, ties=True)
    estimate = metric(x, y, Bootstrap(resamples=4000))
    generator = np.random.default_rng(1)
    values = []
    for _ in range(1000):
        rows = generator.integers(25, size=25)
        values.append(SCIPY[metric](x[rows, 0].numpy(), y[rows, 0].numpy()))
    low, high = np.quantile(values, [0.025, 0.975])
    spread = np.std(values)
    # A quantile of 1000 draws has a standard error of about 0.085 spreads, of 4000 half of it.
    assert abs(estimate.low - low) < 0.4 * spread
    assert abs(estimate.high - high) < 0.4 * spread


def test_interval_of_the_slope_covers_the_truth():
    covered = 0
    for seed in range(200):
        x, y = pairs(e=60, seed=seed)
        estimate = slope(x, y, Bootstrap(resamples=500, seed=seed))
        covered += estimate.low <= 1.5 <= estimate.high
    # Binomial(200, 0.95) has a standard deviation of 3.1; intervals of half the width cover 67 %.
    assert 190 - 4 * 3.1 <= covered <= 200


def within(x, y):
    """One slope with an intercept per query, by least squares on indicators."""
    s, q = x.shape
    columns = np.column_stack([x.reshape(-1), np.tile(np.eye(q), (s, 1))])
    return np.linalg.lstsq(columns, y.reshape(-1), rcond=None)[0][0]


@pytest.mark.parametrize("q", [1, 3])
def test_slope_within_is_that_of_indicators(q):
    x, y = pairs(q=q)
    y = y + 7 * torch.arange(q)
    assert slope_within(x, y).value == pytest.approx(within(x.numpy(), y.numpy()), rel=1e-10)


def test_interval_of_slope_within_is_that_of_resampling_both_ways():
    g = torch.Generator().manual_seed(3)
    x, y = pairs(e=25, q=6)
    y = y + x * torch.randn(6, generator=g, dtype=torch.float64)  # slopes differ between queries
    found = slope_within(x, y, Bootstrap(resamples=4000))
    generator = np.random.default_rng(1)
    values = []
    for _ in range(2000):
        rows, columns = generator.integers(25, size=25), generator.integers(6, size=6)
        values.append(within(x.numpy()[rows][:, columns], y.numpy()[rows][:, columns]))
    low, high = np.quantile(values, [0.025, 0.975])
    spread = np.std(values)
    # Two quantiles of 2000 and 4000 draws: standard errors of about 0.06 and 0.045 spreads; four of
    # them together. With rows drawn alone the interval is less than half as wide.
    assert abs(found.low - low) < 0.3 * spread
    assert abs(found.high - high) < 0.3 * spread
    assert slope(x, y).high - slope(x, y).low < 0.6 * (high - low)


def test_rows_stay_together():
    """Copies of a column add nothing to the interval; independent columns narrow it."""
    x, y = pairs(e=30)
    once = slope(x, y)
    copied = slope(x.expand(-1, 8), y.expand(-1, 8))
    assert copied.value == pytest.approx(once.value, rel=1e-12)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), rel=1e-9)


@pytest.mark.parametrize("metric", SCIPY)
def test_interval_holds_the_value_and_repeats(metric):
    x, y = pairs()
    estimate = metric(x, y)
    assert estimate.low < estimate.value < estimate.high
    assert metric(x, y) == estimate
    assert metric(x, y, Bootstrap(seed=1)) != estimate
    wide = metric(x, y, Bootstrap(level=0.99))
    assert wide.low < estimate.low
    assert estimate.high < wide.high


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_scale_does_not_matter(scale):
    x, y = pairs()
    assert pearson(scale * x, y).value == pytest.approx(pearson(x, y).value, rel=1e-12)
    assert slope(x, scale * y).low == pytest.approx(scale * slope(x, y).low, rel=1e-9)


def test_exact_agreement_is_one():
    x, _ = pairs()
    for metric in SCIPY:
        estimate = metric(x, x)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1), rel=1e-12)


@pytest.mark.parametrize("metric", SCIPY)
def test_constant_values_are_refused(metric):
    x, y = pairs()
    with pytest.raises(DataError, match="40 actual values, all 2"):
        metric(x, torch.full_like(y, 2.0))


@pytest.mark.parametrize("metric", SCIPY)
def test_values_that_are_not_numbers_are_refused(metric):
    x, y = pairs()
    y[3] = torch.nan
    with pytest.raises(NonFinite, match="1 of 40 actual values"):
        metric(x, y)


def test_shapes_must_fit():
    x, y = pairs()
    with pytest.raises(ShapeError, match=r"predicted \(40, 1\), actual \(39, 1\)"):
        pearson(x, y[1:])
    with pytest.raises(ShapeError, match="at least 3 rows"):
        pearson(x[:2], y[:2])


def test_level_in_percent_is_refused():
    with pytest.raises(SpecError, match=r"Bootstrap\(level=0\.95\)"):
        Bootstrap(level=95.0)


def test_resamples_without_spread_are_left_out():
    x = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    y = torch.tensor([0.0, 0.1, 0.0, 1.0], dtype=torch.float64)
    estimate = pearson(x, y)  # a third of the resamples never draw the last row
    assert np.isfinite([estimate.value, estimate.low, estimate.high]).all()
    assert estimate.low > 0.9


BY_QUERY = {mean_spearman: spearman, mean_kendall: kendall}


@pytest.mark.parametrize("metric", BY_QUERY)
@pytest.mark.parametrize("ties", [False, True])
def test_mean_over_queries_is_that_of_scipy(metric, ties):
    x, y = pairs(q=4, ties=ties)
    y = y * torch.tensor([1.0, -2.0, 1e-9, 1e6])  # each query on a scale of its own
    each = [SCIPY[BY_QUERY[metric]](x[:, j].numpy(), y[:, j].numpy()) for j in range(4)]
    assert min(each) < 0 < max(each)
    assert metric(x, y).value == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("metric", BY_QUERY)
def test_mean_interval_is_that_of_drawing_rows_and_queries(metric):
    """The same percentiles from a loop with SciPy; drawing rows only would be far narrower."""
    x, y = pairs(e=30, q=5, ties=True)
    y = y + torch.arange(5.0) * torch.randn(30, 5)  # queries differ in how well they agree
    estimate = metric(x, y)
    generator = np.random.default_rng(1)
    values, rows_only = [], []
    one = SCIPY[BY_QUERY[metric]]
    for _ in range(600):
        rows = generator.integers(30, size=30)
        each = np.array([one(x[rows, j].numpy(), y[rows, j].numpy()) for j in range(5)])
        values.append(each[generator.integers(5, size=5)].mean())
        rows_only.append(each.mean())
    values = np.array(values)
    if metric is mean_spearman:
        values -= values.mean() - metric(x, y).value  # ties of rows drawn twice take something off
    low, high = np.quantile(values, [0.025, 0.975])
    spread = np.std(values)
    # In the long tail a quantile of 600 draws has a standard error of about 0.15 spreads.
    assert abs(estimate.low - low) < 0.6 * spread
    assert abs(estimate.high - high) < 0.6 * spread
    low_rows, high_rows = np.quantile(rows_only, [0.025, 0.975])
    assert high_rows - low_rows < 0.75 * (high - low)


@pytest.mark.parametrize("metric", BY_QUERY)
def test_one_query_is_the_metric_itself(metric):
    x, y = pairs(ties=True)
    pooled = BY_QUERY[metric](x, y)
    assert metric(x, y).value == pytest.approx(pooled.value, rel=1e-12)
    assert metric(x, y).low < metric(x, y).value < metric(x, y).high


@pytest.mark.parametrize("metric", BY_QUERY)
def test_queries_without_a_correlation_are_named(metric):
    x, y = pairs(q=4)
    y[:, 2] = 0.1
    with pytest.raises(DataError, match=r"actual values of 1 of 4 queries.*queries \[2\].*0\.1"):
        metric(x, y)
    with pytest.raises(DataError, match=r"predicted values of 4 of 4 queries"):
        metric(torch.zeros(40, 4), x)
    x[1, 1] = torch.inf
    with pytest.raises(NonFinite, match="1 of 160 predicted"):
        metric(x, y)
    with pytest.raises(ShapeError, match=r"values\[:, None\]"):
        metric(x[:, 0], y[:, 0])
    with pytest.raises(ShapeError, match="at least 3 rows"):
        metric(x[:2], y[:2])
    with pytest.raises(ShapeError, match=r"predicted \(40, 0\)"):
        metric(x[:, :0], y[:, :0])


def test_over_many_queries_the_interval_still_holds_the_value():
    """Ties of rows drawn twice lower ρ by 3(ρ − τ)/s, here by more than the interval is wide."""
    x, y = pairs(e=60, q=400, noise=0.8)
    rho, tau = mean_spearman(x, y, Bootstrap(resamples=300)), mean_kendall(x, y)
    assert rho.low < rho.value < rho.high
    assert tau.low < tau.value < tau.high
    plain = estimate(over_queries(rank_correlation, x, y), x.shape, Bootstrap(resamples=300))
    assert plain.high < rho.value
    assert rho.low - plain.low == pytest.approx(3 * (rho.value - tau.value) / 60, rel=0.1)
