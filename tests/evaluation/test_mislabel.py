"""Finding wrong labels: against scikit-learn, SciPy, and every order of what is tied."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from upweight.errors import DataError, DtypeError, NonFinite, ShapeError, SpecError
from upweight.evaluation import (
    auroc,
    average_precision,
    mislabel_detection,
    recall_at_budget,
    recall_curve,
)

SKLEARN = {auroc: roc_auc_score, average_precision: average_precision_score}


def rows(n=80, ties=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, generator=g) < 0.25
    ranking = mask + torch.randn(n, generator=g)
    return (2 * ranking).round() if ties else ranking, mask


@pytest.mark.parametrize("metric", SKLEARN)
@pytest.mark.parametrize("ties", [False, True])
def test_value_is_that_of_scikit_learn(metric, ties):
    ranking, mask = rows(ties=ties)
    assert metric(ranking, mask).value == pytest.approx(SKLEARN[metric](mask, ranking), rel=1e-12)


def test_auroc_is_mann_whitney():
    ranking, mask = rows(ties=True)
    u = scipy.stats.mannwhitneyu(ranking[mask], ranking[~mask]).statistic
    expected = u / (int(mask.sum()) * int((~mask).sum()))
    assert auroc(ranking, mask).value == pytest.approx(expected, rel=1e-12)
    assert auroc(-ranking, mask).value == pytest.approx(1 - expected, rel=1e-12)


def recall(ranking, mask, k):
    """Mean over every order of the rows that respects the ranking."""
    n, found = len(ranking), []
    for order in itertools.permutations(range(n)):
        values = [float(ranking[i]) for i in order]
        if values == sorted(values, reverse=True):
            found.append(sum(bool(mask[i]) for i in order[:k]))
    return np.mean(found) / int(mask.sum())


def test_recall_is_the_mean_over_all_orders_of_tied_rows():
    ranking = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 2.0])
    mask = torch.tensor([True, False, False, True, True, False])
    curve = recall_curve(ranking, mask)
    expected = [recall(ranking, mask, k) for k in range(7)]
    torch.testing.assert_close(curve, torch.tensor(expected))
    for k in range(1, 7):
        found = recall_at_budget(ranking, mask, k / 6).value
        assert found == pytest.approx(expected[k], rel=1e-12)


@pytest.mark.parametrize(
    "metric, loop",
    [
        (auroc, roc_auc_score),
        (average_precision, average_precision_score),
        (
            lambda r, m: recall_at_budget(r, m, 0.2),
            lambda m, r: float(recall_curve(torch.tensor(r), torch.tensor(m))[16]),
        ),
    ],
)
def test_interval_is_that_of_resampling_row_by_row(metric, loop):
    ranking, mask = rows(ties=True)
    found = metric(ranking, mask)
    generator, values = np.random.default_rng(0), []
    for _ in range(500):
        drawn = generator.integers(80, size=80)
        values.append(loop(mask.numpy()[drawn], ranking.numpy()[drawn]))
    low, high = np.quantile(values, [0.025, 0.975])
    # A quantile of 500 draws has a standard error of about 0.12 spreads; 4 of them.
    assert abs(found.low - low) < 0.5 * np.std(values)
    assert abs(found.high - high) < 0.5 * np.std(values)
    assert found.low < found.value < found.high


def test_rankings_without_a_choice_get_what_chance_gets():
    _, mask = rows()
    same = torch.full((80,), 3.0)
    share = float(mask.double().mean())
    assert auroc(same, mask).value == pytest.approx(0.5)
    assert average_precision(same, mask).value == pytest.approx(share)
    assert recall_at_budget(same, mask, 0.3).value == pytest.approx(0.3)


def test_a_ranking_that_knows_is_perfect_and_certain():
    _, mask = rows()
    for metric in SKLEARN:
        found = metric(mask.double(), mask)
        assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_comparison_holds_each_ranking_in_the_same_resamples():
    ranking, mask = rows()
    table = mislabel_detection({"loss": ranking, "monotone": ranking.exp()}, mask, 0.25)
    assert table.auroc["loss"] == auroc(ranking, mask)
    assert table.average_precision["loss"] == average_precision(ranking, mask)
    assert table.recall["loss"] == recall_at_budget(ranking, mask, 0.25)
    assert table.auroc["monotone"] == table.auroc["loss"]  # only the order counts
    summary = json.loads(json.dumps(table.summary()))
    assert (summary["n"], summary["positives"], summary["inspected"]) == (80, int(mask.sum()), 20)
    assert summary["recall"]["loss"][0] == table.recall["loss"].value
    text = str(table)
    assert f"{int(mask.sum())} of 80 rows" in text
    assert "recall in 20 rows" in text
    assert f"monotone  {table.auroc['monotone']}" in text


RANKING, MASK = rows(10, seed=1)


@pytest.mark.parametrize(
    "ranking, mask, error, given",
    [
        (RANKING, torch.ones(10, dtype=torch.bool), DataError, "10 of 10 positive"),
        (RANKING, torch.zeros(10, dtype=torch.bool), DataError, "0 of 10 positive"),
        (RANKING[:9], MASK, ShapeError, r"ranking \(9,\), mask \(10,\)"),
        (RANKING[None], MASK[None], ShapeError, r"ranking \(1, 10\)"),
        (RANKING, MASK.double(), DtypeError, "float64"),
        (RANKING, torch.tensor([3, 5]), DtypeError, "int64"),
        (RANKING / 0.0, MASK, NonFinite, "10 of 10"),
    ],
)
@pytest.mark.parametrize(
    "measure",
    [
        auroc,
        average_precision,
        recall_curve,
        lambda r, m: recall_at_budget(r, m, 0.5),
        lambda r, m: mislabel_detection({"one": r}, m, 0.5),
    ],
)
def test_what_cannot_be_found_is_refused(measure, ranking, mask, error, given):
    with pytest.raises(error, match=given):
        measure(ranking, mask)


@pytest.mark.parametrize("budget", [0.0, 0.01, 10, -0.5, float("nan")])
def test_a_budget_is_a_share(budget):
    with pytest.raises(SpecError, match=r"budget=.* of 10 rows"):
        recall_at_budget(RANKING, MASK, budget)


def test_a_comparison_of_nothing_is_refused():
    with pytest.raises(ShapeError, match="empty"):
        mislabel_detection({}, MASK)
