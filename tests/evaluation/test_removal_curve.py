"""Removal curves: in a world where effects add up, and against leave-one-out."""

import json
import math

import numpy as np
import pytest
import torch

import upweight as uw
from tests.evaluation.models import additive, retrained, scored
from tests.market import problem
from upweight.errors import NonFinite, ShapeError
from upweight.evaluation import (
    RemovalCurve,
    leave_one_out,
    loss_order,
    random_order,
    ranked_removal_weights,
    removal_curve,
    removal_order,
)
from upweight.training import retrain
from upweight.training.newton import Newton

SIZES = (1, 3, 4, 8)


def test_weights_remove_the_first_of_each_ranking():
    order = torch.stack([torch.randperm(10) for _ in range(3)])
    weights = ranked_removal_weights(order, SIZES)
    rows = [set((row == 0).nonzero()[:, 0].tolist()) for row in weights]
    assert rows == [set(ranking[:k].tolist()) for ranking in order for k in SIZES]
    assert torch.equal(ranked_removal_weights(order[1], SIZES), weights[4:8])


def test_where_effects_add_up_the_curve_is_their_running_sum():
    S = torch.randn(5, 10)
    weights = ranked_removal_weights(removal_order(scored(S)), SIZES)
    curve = removal_curve(additive(S, weights, baseline=torch.randn(5)), SIZES)
    sums = -S.sort(dim=1, descending=True).values.cumsum(dim=1).mean(dim=0)
    for k, estimate in zip(SIZES, curve.mean, strict=True):
        assert estimate.value == pytest.approx(float(sums[k - 1]), rel=1e-12)
        assert estimate.low < estimate.value < estimate.high
    # Removing everything that lowers m and nothing else is as low as any removal of that size.
    for seed in range(5):
        shared = additive(S, ranked_removal_weights(random_order(10, seed), SIZES))
        other = removal_curve(shared, SIZES)
        assert all(a.value < b.value for a, b in zip(curve.mean, other.mean, strict=True))


def test_one_removal_is_leave_one_out():
    p = problem("logistic")
    fitted = uw.Influence(solver=uw.solvers.Cholesky()).fit(p.task, p.train)
    order = removal_order(fitted.attribute(p.queries, uw.Margin()))
    about = {"task": p.task, "train": p.train, "queries": p.queries, "measure": uw.Margin()}
    weights = ranked_removal_weights(order, [1, 2])
    truth = retrain(Newton(), weights=weights, **about)
    curve = removal_curve(truth, [1, 2])
    firsts = order[:, 0].tolist()
    alone = leave_one_out(Newton(), examples=sorted(set(firsts)), **about)
    expected = [
        alone.change[sorted(set(firsts)).index(first), q] for q, first in enumerate(firsts)
    ]  # fmt: skip
    torch.testing.assert_close(curve.changes[0, 0], torch.stack(expected), rtol=1e-7, atol=1e-9)


def test_interval_is_that_of_drawing_seeds_and_queries():
    changes = torch.randn(4, 2, 12) + torch.randn(4, 1, 1)
    curve = RemovalCurve((1, 2), changes)
    generator = np.random.default_rng(0)
    at = changes[:, 1].numpy()
    draws = [
        at[generator.integers(4, size=4)][:, generator.integers(12, size=12)].mean()
        for _ in range(4000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert curve.mean[1].value == pytest.approx(at.mean(), rel=1e-12)
    # A quantile of thousands of draws has a standard error of about 0.05 spreads; 4 of them, twice.
    assert curve.mean[1].low == pytest.approx(low, abs=0.3 * np.std(draws))
    assert curve.mean[1].high == pytest.approx(high, abs=0.3 * np.std(draws))


def test_what_queries_have_in_common_cancels_in_a_difference():
    common = 10 * torch.randn(1, 2, 40)
    first = RemovalCurve((1, 2), common)
    second = RemovalCurve((1, 2), common + 0.5 + 0.1 * torch.randn(1, 2, 40))
    difference = second.against(first).mean[0]
    assert difference.low < 0.5 < difference.high
    assert difference.high - difference.low < 0.1  # about 6 for either curve
    assert first.against(first).mean[1].value == 0.0
    with pytest.raises(ShapeError, match=r"\(1, 2, 40\), and \(1, 3\)"):
        first.against(RemovalCurve((1, 3), common))


def test_random_order_is_a_permutation_and_losses_fall():
    assert torch.equal(random_order(9, 1).sort().values, torch.arange(9))
    assert not torch.equal(random_order(9, 1), random_order(9, 2))
    losses = torch.tensor([0.5, 2.0, 0.5, 3.0])
    assert loss_order(losses).tolist() == [3, 1, 0, 2]
    with pytest.raises(NonFinite, match="1 of 2"):
        loss_order(torch.tensor([1.0, torch.inf]))


def test_one_query_and_one_seed_have_no_interval():
    found = removal_curve(retrained(torch.tensor([[1.0], [2.0]]), torch.zeros(1)), [1, 2]).mean
    assert [e.value for e in found] == [1.0, 2.0]
    assert all(math.isnan(e.low) and math.isnan(e.high) for e in found)


def test_summary_and_text():
    curve = RemovalCurve((1, 20), torch.randn(2, 2, 5))
    summary = json.loads(json.dumps(curve.summary()))
    assert summary["sizes"] == [1, 20]
    assert summary["intervals"][1] == [curve.mean[1].low, curve.mean[1].high]
    assert f"remove     20  {curve.mean[1]}" in str(curve)
    assert "5 queries, 2 seeds (" in str(curve)
    assert ", 1 seed (" in str(RemovalCurve((1,), torch.randn(1, 1, 5)))


@pytest.mark.parametrize(
    "make, error, given",
    [
        (lambda: ranked_removal_weights(torch.arange(5), [1, 5]), ShapeError, r"sizes \[5\]"),
        (lambda: ranked_removal_weights(torch.arange(5), [2, 2]), ShapeError, r"sizes \[2, 2\]"),
        (lambda: ranked_removal_weights(torch.arange(5), []), ShapeError, r"sizes \[\]"),
        (lambda: ranked_removal_weights(torch.rand(2, 5), [1]), ShapeError, "float64"),
        (lambda: ranked_removal_weights(torch.tensor([0, 0, 1]), [1]), ShapeError, "once"),
        (lambda: ranked_removal_weights(torch.tensor(3), [1]), ShapeError, r"shape \(\)"),
        (
            lambda: removal_curve(retrained(torch.rand(5, 3)), [1, 2]),
            ShapeError,
            "2, or one per query and k, 6.*\n.*5 models measured on 3",
        ),
        (
            lambda: removal_curve(retrained(torch.rand(2, 2), [0.0, torch.nan]), [1, 2]),
            NonFinite,
            "1 of 2 are not",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, given):
    with pytest.raises(error, match=given):
        make()
