"""Resampling several ways at once, and what it says where there is nothing to resample."""

import math

import pytest
import torch
from scipy import stats

from upweight.evaluation import bootstrap
from upweight.evaluation.bootstrap import Bootstrap, estimate, student, weighted_mean


def test_a_mean_over_two_ways_has_the_variance_of_both():
    """Var of the mean of aᵢ + bⱼ under two-way resampling: (var a)/m + (var b)/k, known exactly."""
    a, b = torch.randn(40), 2 * torch.randn(25)
    table = a[:, None] + b

    def statistic(rows, columns):
        return weighted_mean(rows / rows.sum(1, keepdim=True) @ table, columns)

    found = estimate(statistic, table.shape, Bootstrap(resamples=20000))
    spread = math.sqrt(a.var(correction=0) / 40 + b.var(correction=0) / 25)
    assert found.value == pytest.approx(float(table.mean()), rel=1e-12)
    # Nearly normal: ±1.96 spreads. The standard error of such a quantile is 0.02 spreads.
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, abs=0.1 * spread)


def test_chunks_do_not_change_the_interval(monkeypatch):
    values = torch.randn(30)
    whole = estimate(lambda c: weighted_mean(values, c), [30], Bootstrap(resamples=100))
    monkeypatch.setattr(bootstrap, "CHUNK", 7 * 30)
    parts = estimate(lambda c: weighted_mean(values, c), [30], Bootstrap(resamples=100))
    assert parts.value == whole.value
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_one_item_gives_no_interval():
    found = estimate(lambda c: weighted_mean(torch.tensor([3.0]), c), [1], Bootstrap())
    assert found.value == 3.0
    assert math.isnan(found.low) and math.isnan(found.high)


def test_a_statistic_that_never_exists_gives_no_interval():
    found = estimate(lambda c: torch.full((len(c),), torch.nan), [5], Bootstrap())
    assert all(math.isnan(x) for x in (found.value, found.low, found.high))


def test_a_value_that_was_not_drawn_does_not_matter_and_one_that_was_does():
    values = torch.tensor([[1.0, torch.nan, 4.0]])
    torch.testing.assert_close(
        weighted_mean(values, torch.tensor([[2.0, 0.0, 1.0]])), torch.tensor([2.0])
    )
    assert weighted_mean(values, torch.tensor([[1.0, 1.0, 1.0]])).isnan().all()


def test_students_quantile_is_that_of_scipy():
    expected = [stats.t.ppf(0.975, degrees) for degrees in range(1, 60)]
    assert [student(degrees) for degrees in range(1, 60)] == pytest.approx(expected, rel=1e-10)
    assert math.isnan(student(0))
