"""Leave-one-out: where theory says what the comparison must show."""

import json
from types import SimpleNamespace

import pytest
import torch

import upweight as uw
from tests.market import problem
from tests.reference import closed_form
from upweight.errors import MissingContext, ShapeError
from upweight.evaluation import (
    LOO,
    compare,
    leave_one_out,
    loo,
    predicted_removals,
)
from upweight.training import removal_weights, retrain
from upweight.training.newton import Newton


def prediction(outputs, targets):
    """m = f, linear in θ, so that a Newton step of a quadratic J is the whole truth."""
    return outputs[:, 0]


@pytest.fixture
def ridge():
    p = problem("ridge")
    return p, uw.Influence(solver=uw.solvers.Cholesky()).fit(p.task, p.train)


def test_actual_is_the_closed_form(ridge):
    p, fitted = ridge
    X, y = p.train
    result = loo(fitted.attribute(p.queries, prediction), Newton(), range(p.n))
    expected = closed_form.ridge_removals(X, y, p.task.penalty.strength, p.queries[0])
    torch.testing.assert_close(result.actual, expected[:, :, 0].T, rtol=1e-8, atol=1e-9)


def test_leverage_correction_is_exact_on_ridge(ridge):
    p, fitted = ridge
    removal = fitted.removal(p.queries, prediction, groups=range(p.n))
    result = loo(removal, Newton(tol=1e-12), range(p.n))
    assert result.label == "Newton step"
    torch.testing.assert_close(result.predicted, result.actual, rtol=1e-10, atol=1e-10)
    assert result.pearson.value == pytest.approx(1.0, abs=1e-10)
    assert result.slope.value == pytest.approx(1.0, abs=1e-9)


def test_first_order_is_off_by_one_over_one_minus_leverage(ridge):
    p, fitted = ridge
    X, _ = p.train
    scores = fitted.attribute(p.queries, prediction)
    result = loo(scores, Newton(tol=1e-12), range(p.n))
    gram = X.T @ X + p.n * p.task.penalty.strength * torch.eye(3, dtype=torch.float64)
    h = (X * torch.linalg.solve(gram, X.T).T).sum(dim=1)
    torch.testing.assert_close(
        result.predicted, (1 - h)[:, None] * result.actual, rtol=1e-9, atol=1e-10
    )
    assert result.slope.value > 1.0


def test_groups_are_removed_together(ridge):
    p, fitted = ridge
    groups = [[0, 4], [3], [5, 6, 7]]
    removal = fitted.removal(p.queries, prediction, groups=groups)
    result = loo(removal, Newton(tol=1e-12), groups)
    torch.testing.assert_close(result.predicted, result.actual, rtol=1e-10, atol=1e-10)
    assert result.examples == ((0, 4), (3,), (5, 6, 7))


def test_one_retraining_serves_several_predictions(ridge):
    p, fitted = ridge
    examples = [2, 7, 1, 9]
    truth = leave_one_out(Newton(), p.task, p.train, examples, p.queries, prediction)
    first = compare(fitted.attribute(p.queries, prediction), truth, examples)
    second = compare(fitted.removal(p.queries, prediction, groups=examples), truth, examples)
    assert torch.equal(first.actual, second.actual)
    assert (second.predicted - second.actual).abs().max() < 1e-8
    assert (first.predicted - first.actual).abs().max() > 1e-3


def test_effects_are_found_by_their_groups(ridge):
    p, fitted = ridge
    every = fitted.removal(p.queries, prediction, groups=[4, [2, 1], 8])
    found = predicted_removals(every, [8, [1, 2]])
    torch.testing.assert_close(found, every.values[:, [2, 1]].T, rtol=0, atol=0)
    with pytest.raises(ShapeError, match=r"asked for \[\(3,\)(.|\n)*fitted\.removal"):
        predicted_removals(every, [3])
    with pytest.raises(ShapeError, match="scores of groups"):
        predicted_removals(fitted.attribute(p.queries).group([0] * 5 + [1] * 6), [0, 1])


def test_one_query_by_index(ridge):
    p, fitted = ridge
    scores = fitted.attribute(p.queries, prediction)
    everything = loo(scores, Newton(), range(6))
    single = loo(scores, Newton(), range(6), query=-1)
    torch.testing.assert_close(single.actual, everything.actual[:, 3:], rtol=0, atol=1e-12)
    assert single.pearson.value == pytest.approx(everything.query(3).pearson.value, rel=1e-9)
    assert (single.n, everything.n) == (6, 24)
    with pytest.raises(ShapeError, match="query=4"):
        loo(scores, Newton(), range(6), query=4)


def test_renormalized_removal_is_a_refit_of_the_smaller_data_set(ridge):
    p, fitted = ridge
    X, y = p.train
    strength = p.task.penalty.strength
    weights = removal_weights(p.n, [3, [0, 1]], renormalize=True)
    truth = retrain(Newton(), p.task, p.train, weights, p.queries, prediction)
    for row, gone in zip(truth.values, ([3], [0, 1]), strict=True):
        keep = [i for i in range(p.n) if i not in gone]
        theta = closed_form.ridge(X[keep], y[keep], strength)
        torch.testing.assert_close(row, (p.queries[0] @ theta.T)[:, 0], rtol=1e-8, atol=1e-9)
    predicted = torch.stack(
        [fitted.attribute(p.queries, prediction).predict(weights=w) for w in weights]
    )
    assert (predicted - truth.change).abs().max() < 0.5 * truth.change.abs().max()


def test_summary_and_text(ridge):
    p, fitted = ridge
    result = loo(fitted.attribute(p.queries), Newton(), range(8), query=0)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["n"] == 8
    assert {"pearson", "spearman", "slope", "n"} <= set(summary)
    low, high = summary["intervals"]["slope"]
    assert low <= summary["slope"] <= high
    text = str(result)
    assert f"Pearson   {result.pearson.value:.4f}" in text
    assert "only 8 removals" in text
    assert "‖∇J‖" in text


def test_a_model_the_recipe_would_not_make_is_said():
    p = problem("ridge")
    X, y = p.train
    scores = uw.Influence().fit(p.task, (X, y + 1.0)).attribute(p.queries)  # θ̂ fits another y
    found = loo(scores, Newton(), range(8))
    assert str(found).startswith("the model is not what the recipe makes"), "before the numbers"
    assert found.summary()["notes"] == list(found.notes)
    scores = uw.Influence().fit(p.task, p.train).attribute(p.queries)
    assert "not what" not in str(loo(scores, Newton(), range(8)))


@pytest.mark.parametrize(
    "examples, given",
    [
        ([0, 11], r"\[11\]"),
        ([-1], r"\[-1\]"),
        ([3, 5, 3], r"repeated: \[\(3,\)\]"),
        ([[1, 2], [2, 1]], r"repeated: \[\(1, 2\)\]"),
        ([[4, 4]], r"repeated: \[4\]"),
        ([], "0 removals"),
        ([[]], r"\[\]"),
        ([True, False], "bool"),
        ([list(range(11))], "not all"),
    ],
)
def test_bad_examples_are_named(ridge, examples, given):
    p, fitted = ridge
    scores = fitted.attribute(p.queries)
    with pytest.raises(ShapeError, match=given):
        loo(scores, Newton(), examples)


def test_examples_as_a_ranking_gives_them(ridge):
    p, fitted = ridge
    scores = fitted.attribute(p.queries)
    order = scores.values[0].argsort(descending=True)[:3]
    by_list = loo(scores, Newton(), order.tolist())
    for examples in (order, order.numpy(), (int(i) for i in order)):
        result = loo(scores, Newton(), examples)
        assert result.examples == by_list.examples
        assert torch.equal(result.actual, by_list.actual)


def test_loaded_scores_cannot_retrain(ridge, tmp_path):
    p, fitted = ridge
    scores = uw.Scores.load(fitted.attribute(p.queries).save(tmp_path))
    with pytest.raises(MissingContext, match="attach"):
        loo(scores, Newton(), [0])


def test_compare_refuses_what_does_not_fit(ridge):
    p, fitted = ridge
    truth = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"predicted \(3, 4\), actual \(3, 1\)"):
        compare(fitted.attribute(p.queries), truth, [0, 1, 2])
    assert isinstance(compare(fitted.attribute(p.queries), truth, [0, 1, 2], query=0), LOO)


def test_several_rounds_are_compared_by_their_mean_and_keep_their_standard_error():
    groups, generator = [[0, 1], [2], [3, 4]], torch.Generator().manual_seed(0)
    changes = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    rounds = [SimpleNamespace(change=each) for each in changes]
    predicted = changes.mean(dim=0) * 0.5
    found = compare(predicted, rounds, groups, label="halves", names=["a", "b", "c"])
    torch.testing.assert_close(found.actual, changes.mean(dim=0))
    torch.testing.assert_close(found.errors, changes.std(dim=0) / 2)
    assert (found.repeats, found.label, found.queries) == (4, "halves", None)
    second = found.query(1)
    assert (second.queries, second.names, second.query(0).queries) == ((1,), ["a", "b", "c"], (1,))
    torch.testing.assert_close(second.errors, found.errors[:, 1:])
    assert second.slope.value == pytest.approx(2.0)
    one = compare(predicted[:, :1], changes[0, :, :1], groups, query=7)
    assert (one.queries, one.errors, one.repeats) == ((7,), None, 1)
    with pytest.raises(ShapeError, match="3 removals, 2 names"):
        compare(predicted, rounds, groups, names=["a", "b"])
