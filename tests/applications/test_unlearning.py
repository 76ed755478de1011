"""Models without some examples against refits, and the certificate against its theorem."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.testing import assert_close

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import unlearning
from upweight.applications.unlearning import Certificate, without
from upweight.errors import (
    AssumptionWarning,
    DataError,
    NonFinite,
    NotConverged,
    NotOffered,
    ShapeError,
    SpecError,
    UnsupportedModel,
)
from upweight.training.newton import Newton

GONE = [3, 17, 40, 41, 200]


def cancer(n=300):
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    return (X / np.linalg.norm(X, axis=1, keepdims=True))[:n], y[:n]


def logistic(C=1.0):
    X, y = cancer()
    fitted = LogisticRegression(C=C, tol=1e-12, max_iter=2000, solver="newton-cholesky").fit(X, y)
    return fitted, X, y


def task_of(strength=1e-2, loss=None, outputs=1, bias=False):
    torch.manual_seed(0)
    model = nn.Linear(30, outputs, bias=bias).double()
    return uw.Task(model, loss or uw.Bernoulli(), uw.L2(strength))


def tensors(n=300):
    X, y = cancer(n)
    return torch.tensor(X), torch.tensor(y).double()[:, None]


def weights_without(gone, n):
    weights = np.ones(n)
    weights[gone] = 0
    return weights


@dataclasses.dataclass(frozen=True)
class Stops:
    """A recipe that fails without some examples."""

    def prepare(self, task, train):
        trainer = Newton().prepare(task, train)

        class Trainer:
            at_once = 1

            def __call__(self, weights):
                made = trainer(weights)
                failures = {0: "it diverged"} if bool((weights == 0).any()) else {}
                return dataclasses.replace(made, failures=failures)

        return Trainer()


# -- without ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [Ridge(1.0), Ridge(0.1, fit_intercept=False)])
def test_one_newton_step_of_least_squares_is_the_refit(estimator):
    X, y = load_diabetes(return_X_y=True)
    X, y = X * 10, y / 100
    estimator.fit(X, y)
    before = copy.deepcopy(estimator)
    got = holds(without(estimator, GONE, (X, y)))
    kept = np.setdiff1d(np.arange(len(X)), GONE)
    refit = copy.deepcopy(before).fit(X[kept], y[kept])
    np.testing.assert_allclose(got.model.coef_, refit.coef_, atol=1e-10)
    np.testing.assert_allclose(got.model.intercept_, refit.intercept_, atol=1e-10)
    np.testing.assert_allclose(got.model.predict(X), refit.predict(X), atol=1e-10)
    assert got.is_confirmed and got.distance < 1e-10 and got.remaining < 1e-8
    assert type(got.model.intercept_) is type(estimator.intercept_)
    # What was lent is as it was.
    np.testing.assert_array_equal(estimator.coef_, before.coef_)
    assert vars(estimator).keys() == vars(before).keys()


def test_newton_steps_end_at_the_refit_of_scikit_learn():
    estimator, X, y = logistic(C=10.0)
    one = holds(without(estimator, GONE, (X, y)))
    many = holds(without(estimator, GONE, (X, y), steps=20))
    refit = LogisticRegression(C=10.0, tol=1e-14, solver="newton-cholesky", max_iter=500)
    refit.fit(X, y, sample_weight=weights_without(GONE, len(X)))
    np.testing.assert_allclose(many.model.coef_, refit.coef_, atol=1e-8)
    assert 1e-7 < one.remaining < 0.2 and many.remaining < 1e-6
    assert many.how.endswith("Newton steps") and 2 <= len(many.gradients) - 1 < 20
    assert list(many.gradients) == sorted(many.gradients, reverse=True)
    np.testing.assert_array_equal(many.model.predict(X), refit.predict(X))
    # Change in predictions, as measured by scikit-learn itself.
    moved = refit.decision_function(X) - estimator.decision_function(X)
    assert_close(many.change.refit_outputs[:, 0], torch.tensor(moved), atol=1e-6, rtol=1e-6)
    assert many.remaining_outputs < 1e-6
    forgotten, after, really = many.change.forgotten
    assert forgotten < after and after == pytest.approx(really, rel=1e-6)


def test_one_step_is_removal_step_and_a_module_comes_back_as_lent():
    task, data = task_of(), tensors()
    task = task.moved_to(Newton().prepare(task, uw.as_data(data)).center)
    fitted = uw.Influence().fit(task, data)
    before = copy.deepcopy(task.model.state_dict())
    got = holds(without(fitted, GONE, recipe=Newton(), queries=tensors(20)))
    for name, step in fitted.removal_step(GONE).items():
        moved = dict(got.model.named_parameters())[name] - before[name]
        assert_close(moved.detach(), step)
    assert all(torch.equal(task.model.state_dict()[k], v) for k, v in before.items())
    assert got.model is not task.model and got.is_confirmed and got.remaining < 0.05
    assert got.drift < 1e-9 and not any("recipe" in note for note in got.notes)
    table = got.frame()
    assert table.loc["(all)", "actual"] == pytest.approx(got.moved)
    assert len(got.change.outputs) == 20


def test_nothing_is_held_against_a_refit_where_none_was_made():
    task, data = task_of(), tensors()
    task = task.moved_to(Newton().prepare(task, uw.as_data(data)).center)
    fitted = uw.Influence().fit(task, data)
    got = holds(without(fitted, 5))
    assert not got.is_confirmed and got.distance is None and "nothing" in got.verdict
    estimator, X, y = logistic()
    assert not holds(without(estimator, 5, (X, y), confirm=False)).is_confirmed
    with pytest.raises(SpecError, match="steps=1"):
        without(fitted, 5, steps=0)
    with pytest.raises(ShapeError):
        without(fitted, [])
    with pytest.raises(ShapeError):
        without(fitted, [1, 1])
    with pytest.raises(ShapeError):
        without(fitted, list(range(300)))
    assert holds(without(fitted, 5, steps=1)).how == "one Newton step"


def test_a_network_by_layer_says_first_order_and_no_certificate():
    X, y = tensors(120)
    X, y = X.float(), y[:, 0].long()

    def net():
        return nn.Sequential(nn.Linear(30, 6), nn.Tanh(), nn.Linear(6, 2)).float()

    recipe = uw.Training(net, uw.SGD(0.5), epochs=20, batch=50)  # n is no multiple of it
    task = uw.Task(recipe.trained(uw.Task(net(), uw.CrossEntropy()), (X, y)), uw.CrossEntropy())
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, (X, y))
    before = copy.deepcopy(task.model.state_dict())
    got = holds(without(fitted, GONE[:4], recipe=recipe))
    assert got.how == "a first-order step by layer" and got.is_confirmed
    assert "no certificate" in str(got) and got.drift == 0
    assert got.predicted.dtype == torch.float32
    assert all(torch.equal(task.model.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(NotOffered, match="steps=1"):
        without(fitted, GONE[:4], steps=3)
    dense = uw.Influence(uw.GGN(), damping=0.01).fit(task, (X, y))
    with pytest.warns(AssumptionWarning):  # it was stopped early
        assert holds(without(dense, GONE[:4])).how == "one Newton step"
    with pytest.raises(NotOffered):
        without(uw.GradientDot().fit(task, (X, y)), 3)


def test_statsmodels_results_have_their_coefficients_moved():
    sm = pytest.importorskip("statsmodels.api")
    X, y = cancer(200)
    results = sm.OLS(y.astype(float), sm.add_constant(X[:, :4])).fit()
    got = holds(without(results, [0, 1]))
    refit = sm.OLS(y[2:].astype(float), sm.add_constant(X[2:, :4])).fit()
    moved = torch.cat([p.flatten() for p in got.parameters.values()])
    assert_close(moved, torch.tensor(refit.params), atol=1e-9, rtol=1e-9)


def test_a_pipeline_and_a_failing_refit():
    X, y = cancer(60)
    made = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-12, max_iter=2000))
    made.fit(X, y)
    coefficients = made[-1].coef_.copy()
    got = holds(without(made, [1, 2], (X, y)))
    assert not np.array_equal(got.model[-1].coef_, coefficients)
    np.testing.assert_array_equal(made[-1].coef_, coefficients)
    assert got.remaining < 0.05
    with pytest.raises(NotConverged, match="confirm=False") as caught:
        without(made, [1, 2], (X, y), recipe=Stops())
    assert not holds(caught.value.solution).is_confirmed
    assert not holds(without(made, [1, 2], (X, y), recipe=Stops(), confirm=False)).is_confirmed


def test_coefficients_find_their_way_back_into_an_estimator():
    import upweight.adapters.sklearn as sk

    X, y = cancer(100)
    for estimator in (
        LinearRegression(),
        LogisticRegression(tol=1e-10, max_iter=1000),
        Ridge(fit_intercept=False),
    ):
        estimator.fit(X[:, :5], y)
        task, _ = sk.task(estimator, X[:, :5], y)
        same = sk.with_parameters(estimator, task.named(task.theta()))
        assert same is not estimator and same.coef_ is not estimator.coef_
        assert same.coef_.shape == estimator.coef_.shape
        np.testing.assert_array_equal(same.predict(X[:, :5]), estimator.predict(X[:, :5]))
    with pytest.raises(UnsupportedModel):
        sk.with_parameters(StandardScaler(), {})


# -- the certificate --------------------------------------------------------------------------


def test_the_bound_really_bounds_the_gradient_of_the_perturbed_objective():
    X, y = tensors()
    made = Certificate(1.0, 1e-4, 10.0).train(task_of(0.1), (X, y), seed=0)
    b, draw = made.problem.b, torch.Generator().manual_seed(1)
    for order in (torch.randperm(300, generator=draw)[:30].tolist() for _ in range(3)):
        now, before = made, made.began
        for i in order:
            now = now.remove(i)
            # By autograd of the formula of the paper, on the rows that are left.
            theta = now.theta.clone().requires_grad_()
            kept = [k for k in range(300) if k not in now.removed]
            f = (2 * y[kept, 0] - 1) * (X[kept] @ theta)
            value = -nn.functional.logsigmoid(f).sum() + b @ theta
            value = value + 0.1 * len(kept) / 2 * theta.square().sum()
            (gradient,) = torch.autograd.grad(value, theta)
            residual = float(gradient.norm())
            assert residual == pytest.approx(now.residual, abs=1e-12)
            assert residual <= before + now.removals[-1].bound + 1e-12
            assert now.spent == pytest.approx(made.began + sum(r.bound for r in now.removals))
            before = residual
        assert now.spent <= now.budget
    together = made.remove(order)
    assert together.residual <= together.spent and together.spent > now.spent


def test_the_bound_is_near_where_it_must_be():
    """Equal rows where |σ''| is largest: nothing is lost but 1/4 for 1/(6√3), and a half."""
    X, y = torch.ones(100, 1).double(), (torch.arange(100) % 5 > 0).double()[:, None]
    task = uw.Task(nn.Linear(1, 1, bias=False).double(), uw.Bernoulli(), uw.L2(1e-6))
    made = Certificate(sigma=1e-3).train(task, (X, y), seed=0)
    made = dataclasses.replace(made, certificate=Certificate(sigma=100.0))
    step = made.remove([0, 1]).removals[0]
    assert 1 < step.bound / step.residual < 8


def test_delta_is_what_the_gaussian_mechanism_has_at_the_budget():
    """Balle & Wang (2018), Theorem 8: δ(ε) of a Gaussian shifted by at most the budget."""
    for epsilon in (0.01, 0.1, 0.5, 1.0):
        for delta in (1e-10, 1e-6, 1e-4, 1e-2, 0.3):
            made = Certificate(epsilon, delta, sigma=3.0)
            assert 1.5 * math.exp(-(made.c**2) / 2) == pytest.approx(delta)
            ratio = made.budget / made.sigma
            a, c = ratio / 2, epsilon / ratio
            assert norm.cdf(a - c) - math.exp(epsilon) * norm.cdf(-a - c) <= delta
    ratio = 10 / Certificate(1.0, 1e-4).c
    really = norm.cdf(ratio / 2 - 10 / ratio) - math.exp(10) * norm.cdf(-ratio / 2 - 10 / ratio)
    assert really == pytest.approx(2.2e-4, rel=0.05)
    for wrong in ({"epsilon": 10.0}, {"delta": 0.0}, {"sigma": 0.0}, {"sigma": math.nan}):
        with pytest.raises(SpecError, match=r"Certificate\(epsilon=1\.0"):
            Certificate(**wrong)


def test_training_is_the_minimum_of_the_perturbed_objective_and_bias_is_a_column_of_ones():
    X, y = tensors()
    with_bias = Certificate(sigma=2.0).train(task_of(bias=True), (X, y), seed=3)
    ones = torch.cat([X, torch.ones(300, 1).double()], dim=1)
    wide = uw.Task(nn.Linear(31, 1, bias=False).double(), uw.Bernoulli(), uw.L2(1e-2))
    column = Certificate(sigma=2.0).train(wide, (ones, y), seed=3)
    assert_close(with_bias.theta, column.theta)
    b = column.problem.b
    penalized = uw.Task(
        wide.model,
        uw.Bernoulli(),
        lambda p: 5e-3 * p["weight"].square().sum() + p["weight"][0] @ b / 300,
    )
    by_another = Newton(tol=1e-11).prepare(penalized, uw.as_data((ones, y))).center
    assert_close(column.theta, by_another, atol=1e-8, rtol=1e-8)
    assert_close(with_bias.model(X), column.model(ones))


def test_removals_in_sequence_are_the_removal_of_all_together_and_the_refit():
    data = tensors()
    made = Certificate(sigma=10.0).train(task_of(0.1), data, seed=0)
    gone = list(range(0, 60, 3))
    now = made
    for i in gone:
        now = now.remove(i)
    together = made.remove(gone)
    refit = holds(now.confirm())
    assert refit.distance < 0.01 * refit.moved
    assert together.confirm().distance < 0.02 * refit.moved
    assert_close(now.theta, together.theta, atol=0.02 * refit.moved, rtol=0)
    assert now.removed == tuple(gone) and len(now.frame()) == 20
    assert made.removals == () and made.removed == () and made.spent == made.began
    holds(made)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.theta = now.theta
    assert "tensor" not in repr(now)  # which would show b
    assert holds(made.confirm()).moved < 1e-10


def test_least_squares_spend_nothing():
    X, y = load_diabetes(return_X_y=True)
    data = torch.tensor(X * 10), torch.tensor(y / 100)[:, None]
    task = uw.Task(nn.Linear(10, 1).double(), uw.SquaredError(), uw.L2(0.1))
    now = Certificate(sigma=1.0).train(task, data, seed=0)
    for group in ([0], [5, 6, 7], [100]):
        now = now.remove(group)
    got = holds(now.confirm())
    assert got.spent < 1e-10 and got.distance < 1e-10 * max(1.0, got.moved)
    assert now.removals[-1].bound == 0


def test_a_spent_budget_is_refused_and_the_way_out_works():
    made = Certificate(sigma=0.02).train(task_of(), tensors(), seed=0)
    now, wanted = made, 0

    def spend():
        nonlocal now, wanted
        for wanted in range(290):
            now = now.remove(wanted)

    with pytest.raises(NotOffered, match=r"retrained\(without=examples\)"):
        spend()
    assert now.removed == tuple(range(wanted)) and now.spent <= now.budget
    fresh = holds(now.retrained(without=wanted))
    assert len(fresh.kept) == 300 - wanted - 1 and fresh.removed == ()
    assert fresh.spent < 1e-10 and not torch.equal(fresh.problem.b, now.problem.b)
    assert fresh.remove(0).spent <= fresh.budget
    with pytest.raises(SpecError, match="left already"):
        made.remove(0).remove(0)
    with pytest.raises(SpecError, match="all that is left"):
        made.remove(range(300))
    with pytest.raises(ShapeError):
        made.remove(300)
    assert now.kept.tolist() == list(range(wanted, 300))


def test_noise_is_new_each_time_but_under_a_seed():
    data = tensors(60)
    spec = Certificate()
    assert not torch.equal(spec.train(task_of(), data).theta, spec.train(task_of(), data).theta)
    one, two = (spec.train(task_of(), data, seed=4).theta for _ in range(2))
    assert torch.equal(one, two)
    b = torch.cat([spec.train(task_of(), data, seed=k).problem.b for k in range(40)])
    assert abs(float(b.mean())) < 4 * 10 / len(b) ** 0.5
    assert abs(float(b.std()) - 10) < 4 * 10 / (2 * len(b)) ** 0.5


def test_other_models_are_refused_with_a_way_out():
    X, y = tensors()
    spec = Certificate()
    deep = nn.Sequential(nn.Linear(30, 1)).double()
    for task, given in (
        (uw.Task(deep, uw.Bernoulli(), uw.L2(0.1)), "Sequential"),
        (uw.Task(nn.Linear(30, 2).double(), uw.CrossEntropy(), uw.L2(0.1)), "2 outputs"),
        (uw.Task(nn.Linear(30, 1).double(), uw.Bernoulli(pos_weight=(2.0,)), uw.L2(0.1)), "pos"),
        (uw.Task(nn.Linear(30, 1).double(), uw.Bernoulli()), "NoPenalty"),
        (task_of(0.0), "strength=0.0"),
        (uw.Task(nn.Linear(30, 1).double(), uw.Bernoulli(), uw.L2(0.1, exclude="*bias")), "leaves"),
        (uw.Task(nn.Linear(30, 1).double(), uw.Bernoulli(), uw.L2(0.1), params="bias"), "frozen"),
    ):
        with pytest.raises(UnsupportedModel, match=given):
            spec.train(task, (X, y if given != "2 outputs" else y[:, 0].long()))
    cubed = uw.Task(
        nn.Linear(30, 1).double(),
        uw.Bernoulli(),
        uw.L2(0.1),
        forward=lambda model, batch: (model(batch[0]) ** 3, batch[1]),
    )
    with pytest.raises(UnsupportedModel, match=r"W x \+ b"):
        spec.train(cubed, (X, y))
    with pytest.raises(UnsupportedModel, match="at least one row"):
        spec.train(task_of(), (X[:0], y[:0]))
    estimator, A, labels = logistic()
    with pytest.raises(UnsupportedModel, match="fit_intercept=False"):
        spec.train(estimator, (A, labels))
    ones = np.column_stack([A, np.ones(len(A))])
    settings = {"C": 1 / 3, "fit_intercept": False, "tol": 1e-12, "max_iter": 2000}
    plain = LogisticRegression(**settings).fit(ones, labels)
    made = spec.train(plain, (ones, labels), seed=0)
    assert made.problem.strength == pytest.approx(0.01)
    assert made.remove(3).model.predict(ones).shape == (300,)
    assert made.model.coef_.shape == plain.coef_.shape
    with pytest.raises(DataError):
        spec.train(task_of(), (X, 2 * y - 1))
    X[3, 2] = torch.nan
    with pytest.raises(NonFinite, match="missing"):
        spec.train(task_of(), (X, y))


def test_public_names():
    assert uw.applications.unlearning is unlearning
    assert set(unlearning.__all__) <= set(vars(unlearning))


def test_a_class_is_not_unlearned_whole():
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)[:150, :5]
    y = np.array(["ill", "well"])[y[:150]]
    clf = LogisticRegression(tol=1e-10).fit(X, y)
    every = np.flatnonzero(y == "well")
    with pytest.raises(DataError, match=f"all {len(every)} of class 'well'"):
        unlearning.without(clf, every, (X, y))
    assert unlearning.without(clf, every[:-1], (X, y), steps=30).is_confirmed
