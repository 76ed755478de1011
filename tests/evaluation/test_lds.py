"""The linear datamodeling score: against SciPy, closed forms, and noise of a known size."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

import upweight as uw
from tests.evaluation.models import additive, effects, retrained, scored
from tests.market import problem
from tests.reference import closed_form
from upweight.errors import DataError, NonFinite, ShapeError, UpweightError
from upweight.evaluation import LDS, Bootstrap, lds, predicted_changes
from upweight.scores import Unit
from upweight.training import retrain, subset_weights
from upweight.training.newton import Newton

FAST = Bootstrap(resamples=20)


def scipy_lds(x, y):
    each = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)]
    return np.mean(each)


def noisy(seeds, s=60, q=4, noise=1.0, seed=0):
    """A signal, and measurements of it by several seeds."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(s, q, generator=g)
    noises = noise * torch.randn(seeds, s, q, generator=g)
    return signal, [retrained(signal + e) for e in noises]


def test_scores_of_an_additive_world_are_perfect_and_their_negation_is_the_opposite():
    S, weights = torch.randn(5, 30), subset_weights(30, 40)
    truth = additive(S, weights)
    for scores in (scored(S), effects(scored(S))):
        assert lds(scores, weights, truth).spearman.value == pytest.approx(1.0, rel=1e-12)
    opposite = lds(scored(-S), weights, truth)
    assert opposite.spearman.value == pytest.approx(-1.0, rel=1e-12)
    assert opposite.kendall.value == pytest.approx(-1.0, rel=1e-12)


def test_ridge_is_that_of_closed_forms_and_scipy():
    """Predicted by −(1/n) x_qᵀ H⁻¹ gᵢ written out, measured by solving for each subset."""
    p = problem("ridge")
    X, y = p.train
    strength = p.task.penalty.strength

    def prediction(outputs, targets):
        return outputs[:, 0]

    weights = subset_weights(p.n, 25, renormalize=True)
    truth = retrain(Newton(), p.task, p.train, weights, p.queries, prediction)
    scores = uw.Influence(solver=uw.solvers.Cholesky()).fit(p.task, p.train)
    found = lds(scores.attribute(p.queries, prediction), weights, truth)

    theta = closed_form.ridge(X, y, strength)
    H = X.T @ X / p.n + strength * torch.eye(3)
    gradients = (X @ theta.T - y) * X
    S = -(p.queries[0] @ torch.linalg.solve(H, gradients.T)) / p.n
    kept = [row.nonzero()[:, 0] for row in weights]
    models = torch.stack([closed_form.ridge(X[k], y[k], strength)[0] for k in kept])
    expected = scipy_lds((weights - 1) @ S.T, models @ p.queries[0].T)
    assert found.spearman.value == pytest.approx(expected, rel=1e-9)


def test_value_queries_and_kendall_are_those_of_scipy():
    signal, truth = noisy(3)
    predicted = (4 * signal + torch.randn(60, 4)).round()  # with ties
    found = lds(predicted, torch.randn(60, 7), truth, bootstrap=FAST)
    measured = torch.stack([t.values for t in truth]).mean(dim=0)
    assert found.spearman.value == pytest.approx(scipy_lds(predicted, measured), rel=1e-12)
    for j in range(4):
        rho = scipy.stats.spearmanr(predicted[:, j], measured[:, j]).statistic
        assert float(found.per_query[j]) == pytest.approx(rho, rel=1e-12)
    taus = [scipy.stats.kendalltau(predicted[:, j], measured[:, j]).statistic for j in range(4)]
    assert found.kendall.value == pytest.approx(np.mean(taus), rel=1e-12)


def test_ceiling_of_two_seeds_is_spearman_brown():
    _, truth = noisy(2)
    found = lds(truth[0].values, torch.randn(60, 7), truth, bootstrap=FAST)
    r = scipy_lds(truth[0].values, truth[1].values)
    assert found.ceiling.value == pytest.approx(2 * r / (1 + r), rel=1e-12)


def test_ceiling_of_further_seeds_is_their_score():
    _, truth = noisy(5)
    found = lds(truth[0].values, torch.randn(60, 7), truth[:3], truth[3:], bootstrap=FAST)
    means = [torch.stack([t.values for t in part]).mean(0) for part in (truth[:3], truth[3:])]
    assert found.ceiling.value == pytest.approx(scipy_lds(*means), rel=1e-12)
    assert found.relative.value == pytest.approx(
        found.spearman.value / found.ceiling.value, rel=1e-12
    )


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_split_halves_foretell_what_further_seeds_get(seeds):
    """Normal signal and noise of equal variance: k seeds correlate by k/(k+1) with k others.

    The rank correlation is then (6/π) asin(ρ/2). Without the step from halves to all seeds it would
    be 0.05 to 0.16 lower; with 2r/(1+r) for three seeds, 0.09.
    """
    _, truth = noisy(seeds, s=1000, q=30)
    found = lds(truth[0].values, torch.randn(1000, 3), truth, bootstrap=Bootstrap(resamples=1))
    expected = 6 / math.pi * math.asin(seeds / (seeds + 1) / 2)
    # A correlation over 1000 subsets has a standard error of at most 0.03, and there are 30.
    assert found.ceiling.value == pytest.approx(expected, abs=4 * 0.03 / math.sqrt(30))


def test_noise_alone_has_no_ceiling_to_reach():
    values = torch.randn(20, 2)
    found = lds(values, torch.randn(20, 3), [retrained(v) for v in (values, 1 - 0.5 * values)])
    assert found.ceiling.value == pytest.approx(-1.0)
    assert math.isnan(found.relative.value) and math.isnan(found.relative.low)


def test_interval_covers_the_score_of_the_population():
    """Normal prediction and truth with ρ = 0.6; the interval should hold (6/π) asin(0.3)."""
    truth = 6 / math.pi * math.asin(0.3)
    covered = 0
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 20, generator=g)
        y = 0.6 * x + 0.8 * torch.randn(40, 20, generator=g)
        found = LDS(x, y[None], bootstrap=Bootstrap(resamples=200, seed=seed)).spearman
        covered += found.low <= truth <= found.high
    # Binomial(100, 0.95) has a standard deviation of 2.2. Two-way resampling counts a little of the
    # noise twice, so it covers more; intervals of half the width would cover about 67.
    assert covered >= 95 - 4 * 2.2


def test_one_query_has_an_interval_from_its_subsets():
    signal, truth = noisy(2, q=1)
    found = lds(signal, torch.randn(60, 7), truth)
    assert found.spearman.low < found.spearman.value < found.spearman.high


def test_summary_and_text():
    signal, truth = noisy(4, s=30, q=2)
    found = lds(signal, torch.randn(30, 7), truth)
    summary = json.loads(json.dumps(found.summary()))
    assert (summary["subsets"], summary["queries"], summary["seeds"]) == (30, 2, 4)
    assert summary["intervals"]["ceiling"] == [found.ceiling.low, found.ceiling.high]
    score = found.spearman
    text = str(found)
    assert f"(LDS) {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" in text
    assert f"over 30 subsets × 2 queries (ceiling {found.ceiling.value:.2f})" in text
    assert "split halves of 4 seeds" in text
    assert "only 2 queries" in text
    alone = lds(signal, torch.randn(30, 7), truth[0])
    assert alone.ceiling is None and alone.relative is None
    assert alone.summary()["ceiling"] is None
    assert "no ceiling: one seed" in str(alone)
    assert "1 against 3 seeds" in str(lds(signal, torch.randn(30, 7), truth[1:], truth[:1]))


@pytest.mark.parametrize("given", [lambda scores: scores, effects], ids=["scores", "effects"])
def test_predicted_changes_are_the_sum(given):
    S, weights = torch.randn(3, 6).double(), torch.rand(4, 6).double()
    expected = torch.tensor(
        [
            [sum(S[q, i] * (w[i] - 1) for i in range(6)) for q in range(3)]
            for w in weights
        ]
    )  # fmt: skip
    torch.testing.assert_close(predicted_changes(given(scored(S)), weights), expected)


S3, W5, T5 = torch.randn(3, 8), torch.rand(5, 8), retrained(torch.randn(5, 3))
BROKEN = retrained(torch.full((5, 3), torch.nan))


@pytest.mark.parametrize(
    "arguments, error, given",
    [
        ((scored(S3), W5[:, :7], T5), ShapeError, r"weights \(5, 7\), scores \(3, 8\)"),
        ((scored(S3[:2]), W5, T5), ShapeError, r"predicted \(5, 2\), measured \(5, 3\)"),
        ((scored(S3), torch.rand(6, 8), T5), ShapeError, r"weights \(6, 8\), predicted \(6, 3\)"),
        ((torch.randn(5, 3), torch.rand(6, 8), T5), ShapeError, r"weights \(6, 8\)"),
        ((scored(S3), W5[[0, 1, 2, 3, 0]], T5), ShapeError, "4 distinct rows"),
        ((scored(S3), torch.arange(5), T5), ShapeError, r"weights \(5,\)"),
        ((scored(S3), W5[:2], retrained(torch.randn(2, 3))), ShapeError, "at least 3 rows"),
        ((scored(S3), W5, []), ShapeError, r"shapes \[\]"),
        ((scored(S3), W5, [T5, retrained(torch.randn(5, 2))]), ShapeError, r"\(5, 3\), \(5, 2\)"),
        ((scored(S3), W5, T5, retrained(torch.randn(4, 3))), ShapeError, r"\(5, 3\), \(4, 3\)"),
        ((scored(S3), W5, [T5, T5]), DataError, "2 seeds, some of them the same"),
        ((scored(S3), W5, T5, T5), DataError, "listed twice"),
        ((scored(0 * S3), W5, T5), DataError, "predicted values of 3 of 3 queries are constant"),
        ((scored(S3), W5, retrained(torch.ones(5, 3))), DataError, "actual values of 3 of 3"),
        ((scored(S3), W5, T5, retrained(torch.ones(5, 3))), DataError, "actual values of 3"),
        ((scored(S3), W5, BROKEN), NonFinite, r"15 of 15 are not, in seeds \[0\]"),
        ((torch.full((5, 3), torch.nan), W5, T5), NonFinite, "15 of 15 predicted"),
        ((scored(S3, Unit.RANK), W5, T5), UpweightError, "only rank"),
        ((scored(S3, Unit.VALUE), W5, T5), UpweightError, "share out a total"),
        ((effects(scored(S3)).of([0, 1]), W5, T5), ShapeError, r"asked for \[\(2,\)"),
        ((scored(S3, columns=tuple("abcdefgh")), W5, T5), ShapeError, "in order"),
    ],
)
def test_what_has_no_score_is_refused(arguments, error, given):
    with pytest.raises(error, match=given):
        lds(*arguments)
