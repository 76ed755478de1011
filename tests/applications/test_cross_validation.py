"""Cross-validation from one fit: against closed forms, and against refits by the libraries."""

import dataclasses
import functools

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import (
    ElasticNet,
    Lasso,
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import nn

import upweight as uw
import upweight.adapters.sklearn as sk
from tests.applications.outcomes import holds
from upweight.applications import cross_validation as cv
from upweight.applications.regression import ridge_loo_residuals
from upweight.errors import (
    DataError,
    NonFinite,
    NotStationary,
    ShapeError,
    SpecError,
    UnsupportedModel,
)
from upweight.training.newton import Newton

EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())


@functools.cache
def cancer(rows=569):
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X)[:rows], y[:rows]


@functools.cache
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return StandardScaler().fit_transform(X), (y - y.mean()) / y.std()


def logistic(C=1.0, rows=569):
    X, y = cancer(rows)
    return LogisticRegression(C=C, tol=1e-9, max_iter=5000).fit(X, y)


# -- what it is -----------------------------------------------------------------------------------


def test_leave_one_out_of_ridge_is_allens_formula():
    """(y − xᵀβ₋ᵢ)²/2 with the intercept free: PRESS residuals, by another factorization."""
    X, y = diabetes()
    found = holds(cv.loo(Ridge(alpha=3.0).fit(X, y), (X, y)))
    design = np.c_[X, np.ones(len(X))]
    press = ridge_loo_residuals(design, y, [3.0] * 10 + [0.0])
    torch.testing.assert_close(found.per_example, press.square() / 2, rtol=1e-9, atol=1e-12)
    assert found.mean == pytest.approx(float(press.square().mean()) / 2)
    assert not found.refitted
    assert not found.is_confirmed


def test_folds_of_least_squares_are_fits_without_them():
    X, y = diabetes()
    folds = np.arange(len(y)) % 7
    found = holds(cv.kfold(LinearRegression().fit(X, y), (X, y), folds))
    expected = np.empty(len(y))
    for k in range(7):
        fit = LinearRegression().fit(X[folds != k], y[folds != k])
        expected[folds == k] = fit.predict(X[folds == k])
    np.testing.assert_allclose(found.outputs[:, 0].numpy(), expected, atol=1e-8)
    assert found.mean == pytest.approx(0.5 * ((y - expected) ** 2).mean(), rel=1e-9)


@pytest.mark.parametrize("C", [0.1, 10.0])
def test_leave_one_out_of_a_classifier_is_that_of_569_fits(C):
    """Within .1 %; the infinitesimal jackknife is 46 % too low at C = 10."""
    X, y = cancer()
    found = cv.loo(logistic(C), (X, y))
    task, train = sk.task(logistic(C), X, y)
    exact = cv.loo(EXACT.fit(task, train), recipe=Newton(tol=1e-9), refit_above=0)
    assert len(exact.refitted) == len(y)
    assert holds(exact, figure=False).is_confirmed
    assert found.mean == pytest.approx(exact.mean, rel=1e-3)
    assert found.unsafe == ((68,) if C == 10 else ())
    assert found.refitted == found.unsafe


def test_folds_of_a_softmax_are_those_of_scikit_learn():
    X, y = load_digits(return_X_y=True)
    X, y = X[:500] / 16, y[:500]
    folds = np.random.default_rng(0).permutation(500) % 5
    fit = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000)
    found = cv.kfold(fit.fit(X, y), (X, y), folds, confirm=5)
    assert found.is_confirmed
    assert found.refitted == (0, 1, 2, 3, 4)
    approximate, exact = float(found.predicted.mean()), float(found.actual.mean())
    assert approximate == pytest.approx(exact, rel=3e-3)
    assert found.mean == pytest.approx(float(found.exact.mean()))


def test_a_pipeline_is_refitted_whole():
    """Its scaler too: what it leaks is in the refits."""
    X, y = load_breast_cancer(return_X_y=True)
    X, y = X[:80, :5], y[:80]
    pipe = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-9)).fit(X, y)
    found = cv.loo(pipe, (X, y), refit_above=0)
    for i in (0, 17):
        rows = np.arange(80) != i
        fit = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-9)).fit(X[rows], y[rows])
        assert float(found.outputs[i]) == pytest.approx(
            float(fit.decision_function(X[i : i + 1])[0]), abs=1e-4
        )
    assert any("leaks" in note for note in found.notes)


def test_alpha_of_the_mean_stays_with_the_mean():
    """Of PoissonRegressor, and of Lasso: scikit-learn's own fit on fewer rows."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(90, 3))
    y = draw.poisson(np.exp(X @ [0.5, -0.3, 0.0]))
    folds = np.arange(90) % 3
    fit = PoissonRegressor(alpha=2.0, tol=1e-10, max_iter=1000).fit(X, y)
    found = cv.kfold(fit, (X, y), folds)
    for k in range(3):
        own = PoissonRegressor(alpha=2.0, tol=1e-10, max_iter=1000).fit(
            X[folds != k], y[folds != k]
        )
        expected = np.log(own.predict(X[folds == k]))
        np.testing.assert_allclose(found.outputs[folds == k, 0], expected, atol=2e-3)


def test_statsmodels_results_are_refitted_by_statsmodels():
    data = sm.datasets.spector.load_pandas()
    results = sm.Logit(data.endog, sm.add_constant(data.exog)).fit(disp=0, tol=1e-10)
    found = holds(cv.loo(results, confirm=32))
    rows = np.arange(32) != 4
    X = sm.add_constant(data.exog)
    own = sm.Logit(data.endog[rows], X[rows]).fit(disp=0, tol=1e-10)
    assert float(found.outputs[4]) == pytest.approx(float(X.iloc[4] @ own.params), rel=1e-6)
    assert found.is_confirmed


# -- ℓ1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Lasso, ElasticNet])
def test_leave_one_out_on_the_support_is_near_that_of_refits(kind):
    """65 polynomial columns, of which two depend on each other."""
    X, y = load_diabetes(return_X_y=True)
    X = StandardScaler().fit_transform(PolynomialFeatures(2, include_bias=False).fit_transform(X))
    fit = kind(alpha=1.0, tol=1e-10, max_iter=100_000).fit(X, y)
    found = holds(cv.loo(fit, (X, y), confirm=4))
    exact = cv.loo(fit, (X, y), refit_above=0)
    assert found.mean == pytest.approx(exact.mean, rel=0.01)
    assert any("support" in note for note in found.notes)
    # The outputs at θ̂ itself, with the dependent column taken out, are the estimator's.
    losses = 0.5 * (y - fit.predict(X)) ** 2
    np.testing.assert_allclose(found.train_losses.numpy(), losses, rtol=1e-6)


def test_lasso_without_a_column_is_the_mean():
    X, y = diabetes()
    found = cv.loo(Lasso(alpha=10.0).fit(X, y), (X, y))
    others = (y.sum() - y) / (len(y) - 1)
    np.testing.assert_allclose(found.per_example.numpy(), 0.5 * (y - others) ** 2, rtol=1e-8)
    with pytest.raises(UnsupportedModel, match="fit_intercept=True"):
        cv.loo(Lasso(alpha=10.0, fit_intercept=False).fit(X, y), (X, y))


def test_a_sparse_classifier():
    """liblinear, which penalizes its intercept as well."""
    X, y = cancer(200)
    fit = LogisticRegression(C=0.1, l1_ratio=1.0, solver="liblinear", tol=1e-9, max_iter=20_000)
    found = cv.loo(fit.fit(X, y), (X, y), confirm=10)
    assert found.is_confirmed
    assert abs(found.missed) < 0.015 * found.mean


def test_what_changes_the_support_is_refitted():
    """Held to the support, one patient would make the loss .0830; 569 fits give .07708."""
    X, y = cancer()
    fit = LogisticRegression(C=1.0, l1_ratio=1.0, solver="liblinear", tol=1e-9, max_iter=20_000)
    found = holds(cv.loo(fit.fit(X, y), (X, y)))
    assert 68 in found.refitted
    assert set(found.refitted) == set(found.unsafe)
    assert len(found.refitted) <= 32
    assert found.mean == pytest.approx(0.07708, rel=3e-3)
    assert float(found.approximate.mean()) > 0.08


def test_a_sparse_softmax_has_its_own_support_for_each_class():
    X, y = load_digits(return_X_y=True)
    X, y = X[:120, 20:44] / 16, y[:120] % 3
    fit = LogisticRegression(C=0.5, l1_ratio=1.0, solver="saga", tol=1e-6, max_iter=20_000)
    found = holds(cv.loo(fit.fit(X, y), (X, y)), figure=False)
    losses = -fit.predict_log_proba(X)[np.arange(120), y]
    np.testing.assert_allclose(found.train_losses.numpy(), losses, rtol=1e-9)
    rows, kept = np.arange(120) != 7, fit.coef_ != 0
    again = LogisticRegression(C=0.5, l1_ratio=1.0, solver="saga", tol=1e-6, max_iter=20_000)
    again.fit(X[rows], y[rows])
    assert kept.sum() < kept.size
    expected = -again.predict_log_proba(X[7:8])[0, y[7]]
    assert float(found.per_example[7]) == pytest.approx(expected, rel=0.05)


# -- parts of the answer --------------------------------------------------------------------------


def test_groups_leave_together_and_vary_together():
    X, y = diabetes()
    fit, labels = Ridge(alpha=3.0).fit(X, y), np.repeat(np.arange(17), 26)
    found = holds(cv.grouped(fit, labels, (X, y)))
    rows = labels != 3
    own = Ridge(alpha=3.0).fit(X[rows], y[rows])
    np.testing.assert_allclose(found.outputs[~rows, 0], own.predict(X[~rows]), atol=1e-7)
    sums = np.array(
        [(found.per_example.numpy() - found.mean)[labels == g].sum() for g in range(17)]
    )
    expected = np.sqrt(17 / 16 * (sums**2).sum()) / len(y)
    assert found.standard_error == pytest.approx(expected)
    plain = cv.kfold(fit, (X, y), labels)
    assert plain.standard_error == pytest.approx(float(plain.per_example.std()) / len(y) ** 0.5)


def test_the_difference_is_paired():
    X, y = cancer()
    first, second = cv.loo(logistic(1.0), (X, y)), cv.loo(logistic(0.1), (X, y))
    found = holds(cv.difference(first, second, ("C = 1", "C = 0.1")))
    d = (first.per_example - second.per_example).numpy()
    assert found.mean == pytest.approx(d.mean())
    assert found.standard_error == pytest.approx(d.std(ddof=1) / len(d) ** 0.5)
    assert found.mean == pytest.approx(first.mean - second.mean)
    assert "C = 1 is" in found.verdict
    with pytest.raises(ShapeError, match="same folds="):
        cv.difference(first, cv.kfold(logistic(0.1), (X, y)))


def test_random_refits_estimate_what_all_would_change():
    """Unbiased: over seeds the mean is what 200 refits change, within four standard errors."""
    X, y = cancer(100)
    task, train = sk.task(logistic(30.0, 100), X, y)
    fitted = EXACT.fit(task, train)
    exact = cv.loo(fitted, recipe=Newton(), refit_above=0)
    true = float((exact.exact - exact.approximate).mean())
    asked = {"recipe": Newton(), "refit_above": 2, "confirm": 5}
    some = [cv.loo(fitted, **asked, seed=seed).missed for seed in range(8)]
    assert abs(np.mean(some) - true) <= 4 * np.std(some, ddof=1) / 8**0.5


def test_the_interval_of_what_one_fit_misses_holds_it_in_95_of_100_draws():
    """Against leave-one-out itself, by draws of the same refits."""
    X, y = diabetes()
    fit = LogisticRegression(C=1.0, tol=1e-9, max_iter=5000).fit(X, y > np.median(y))
    fitted = EXACT.fit(*sk.task(fit, X, y > np.median(y)))
    exact = cv.loo(fitted, recipe=Newton(tol=1e-9), refit_above=0)
    drawn = cv.loo(fitted, recipe=Newton(tol=1e-9), confirm=10)
    true = float((exact.exact - drawn.approximate).mean())
    draws, held = 400, {10: 0, 40: 0}
    generator = torch.Generator().manual_seed(0)
    for count in held:
        for _ in range(draws):
            places = drawn.chances.multinomial(count, replacement=True, generator=generator)
            sampled = tuple(places.tolist())
            one = dataclasses.replace(drawn, exact=exact.exact, sampled=sampled)
            low, high = one.missed_interval
            held[count] += low <= true <= high
    least = 0.95 - 4 * (0.95 * 0.05 / draws) ** 0.5
    assert all(hits / draws >= least for hits in held.values()), held
    # Not by being wide: the errors of single examples add up to more.
    assert high - low < 2 * float((exact.exact - drawn.approximate).abs().mean())


def test_no_draw_no_interval_and_all_refits_no_error():
    X, y = cancer(60)
    task, train = sk.task(logistic(rows=60), X, y)
    fitted, newton = EXACT.fit(task, train), Newton(tol=1e-9)
    none, one, some, every = (
        cv.loo(fitted, recipe=newton, confirm=confirm) for confirm in (0, 1, 8, 60)
    )
    assert none.missed is None and none.missed_interval is None
    assert "no random refit" in none.verdict
    assert np.isnan(one.missed_interval).all() and "one has no interval" in one.verdict
    low, high = some.missed_interval
    assert low < some.missed < high
    assert f"(95 % interval {low:+.2g} to {high:+.2g})" in some.verdict
    assert every.missed_interval == (every.missed, every.missed)
    assert every.missed == pytest.approx(float((every.exact - every.approximate).mean()))


def drawn(misses, losses=None, draws=3):
    """Cross-validation of 40 examples of which `draws` were refitted, each chance 1/40."""
    losses = torch.linspace(0.0, 2.0, 40) if losses is None else losses
    exact = losses.clone()
    exact[: len(misses)] += torch.tensor(misses)
    at = tuple(range(draws))
    return cv.CrossValidated(
        kind="leave-one-out", approximate=losses, exact=exact, train_losses=losses,
        outputs=losses[:, None], leverage=None, groups=tuple((i,) for i in range(40)),
        refitted=at, sampled=at, chances=torch.full((40,), 1 / 40),
    )  # fmt: skip


def test_what_is_confirmed_is_the_whole_interval_of_what_one_fit_misses():
    """By hand: z = misses here, √(Σ z² / 6) and t = 4.3027 for two degrees of freedom."""
    z = [0.03, -0.02, 0.01]
    found = holds(drawn(z))
    half = 4.302653 * (sum(v * v for v in z) / 6) ** 0.5
    middle = sum(z) / 3
    assert found.missed_interval == pytest.approx((middle - half, middle + half), rel=1e-5)
    assert found.missed < half < found.standard_error and found.is_confirmed

    wide = holds(drawn([0.15, -0.1, 0.0]))
    assert abs(wide.missed) < wide.standard_error < wide.missed_interval[1]
    assert not wide.is_confirmed
    assert "reaches beyond a standard error: it is not confirmed" in wide.verdict
    far = holds(drawn([0.5, 0.4, 0.6]))
    assert not far.is_confirmed and "more than a standard error" in far.verdict
    for unknown in (drawn([0.0, 0.0, 0.0]), drawn([0.01], draws=1)):  # no refit differs; one draw
        assert not np.isfinite(holds(unknown).missed_interval).any()
        assert not unknown.is_confirmed and unknown.verdict.endswith(": it is not confirmed.")


def test_a_difference_is_confirmed_by_its_own_standard_error():
    """Two models whose losses vary together: each is confirmed, what they differ by is not."""
    losses = torch.linspace(0.0, 2.0, 40)
    near = losses + 0.01 + 0.01 * torch.sin(torch.arange(40.0))
    first, second = drawn([0.02, -0.01, 0.01], near), drawn([0.01, -0.02, 0.01], losses)
    found = holds(cv.difference(first, second))
    assert first.is_confirmed and second.is_confirmed and found.actual is not None
    (low, high), (a, b) = first.missed_interval, second.missed_interval
    assert found.missed_interval == (low - b, high - a)
    assert found.standard_error < high - a and not found.is_confirmed
    assert "not confirmed by refits of both" in found.verdict

    apart = losses.flip(0)
    other = holds(cv.difference(drawn([0.02, -0.01, 0.01], apart), second))
    assert other.standard_error > max(map(abs, other.missed_interval)) and other.is_confirmed


def test_verdicts_name_the_loss():
    X, y = cancer(60)
    first, second = (cv.loo(logistic(C, 60), (X, y)) for C in (1.0, 0.1))
    assert first.verdict.startswith("The leave-one-out loss (log loss) of 60 examples is ")
    assert (
        "leave-one-out loss (log loss) of C = 1 is"
        in cv.difference(first, second, ("C = 1", "")).verdict
    )

    def wrong(outputs, targets):
        return ((outputs[:, 0] > 0) != (targets[:, 0] > 0)).double()

    assert "5-fold loss (wrong) of" in cv.kfold(logistic(rows=60), (X, y), 5, loss=wrong).verdict
    path = cv.path(LogisticRegression(), X, y, {"C": [0.1, 1.0]})
    assert path.verdict.startswith("The leave-one-out loss (log loss) is smallest at C = ")
    X, y = diabetes()
    ridge = cv.loo(Ridge().fit(X, y, np.arange(len(y)) + 1.0), (X, y, np.arange(len(y)) + 1.0))
    assert "loss (weighted half the squared error) of" in ridge.verdict


def test_the_path_chooses_what_refits_choose():
    X, y = cancer()
    pipe = make_pipeline(StandardScaler(), LogisticRegression())
    found = holds(cv.path(pipe, X, y, {"logisticregression__C": [0.01, 0.1, 1.0, 10.0]}, confirm=3))
    assert found.chosen == 1.0
    limit = found.mean[2] + found.standard_error[2]
    assert found.mean[0] > limit
    assert found.chosen_within_one_standard_error == (0.1 if found.mean[1] <= limit else 1.0)
    assert found.unsafe == (0, 0, 0, 1)
    exact = [0.1667, 0.0921, 0.0757, 0.1160]
    np.testing.assert_allclose(found.mean.numpy(), exact, atol=2e-4)


def test_a_value_without_a_minimum_takes_no_part():
    X = np.linspace(-1, 1, 20)[:, None]
    y = (X[:, 0] > 0).astype(int)
    grid = {"C": [0.1, 1.0, np.inf]}
    found = holds(cv.path(LogisticRegression(), X, y, grid))
    assert bool(found.mean[2].isnan())
    assert "minimum" in found.reasons[2]
    with pytest.raises(NotStationary, match="a penalty"):
        cv.path(LogisticRegression(), X, y, {"C": [np.inf]})


def test_an_error_rate_in_place_of_the_loss():
    X, y = cancer(200)

    def wrong(outputs, targets):
        return ((outputs[:, 0] > 0) != (targets[:, 0] > 0)).double()

    found = holds(cv.loo(logistic(rows=200), (X, y), loss=wrong), figure=False)
    assert 0 < found.mean < 0.1
    with pytest.raises(ShapeError, match="one value per example"):
        cv.loo(logistic(rows=200), (X, y), loss=lambda f, y: (f - y).square().mean())


# -- other methods --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    X = torch.randn(30, 3)
    y = (X[:, :1] * X[:, 1:2] > 0).long()[:, 0]
    recipe = uw.Training(Net, uw.SGD(0.3), epochs=40, batch=30)
    task = uw.Task(Net(), uw.CrossEntropy())
    return uw.Task(recipe.trained(task, (X, y)), uw.CrossEntropy()), (X, y), recipe


class Net(nn.Sequential):
    """A small network in single precision."""

    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")
@pytest.mark.parametrize(
    "method",
    [
        uw.Influence(uw.GGN(), damping=0.05),
        uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.05),
    ],
    ids=["dense", "by layer"],
)
def test_a_network_by_any_method(network, method):
    task, train, recipe = network
    fitted = method.fit(task, train)
    with pytest.raises(SpecError, match="recipe=") as raised:
        cv.loo(fitted, confirm=2)
    assert "no recipe" in str(raised.value)
    for found in (
        cv.loo(fitted, recipe=recipe, confirm=2),
        cv.kfold(fitted, folds=3, recipe=recipe, confirm=1),
        cv.grouped(fitted, np.arange(30) // 10),
    ):
        holds(found, figure=False)
        assert any("not convex" in note for note in found.notes)


def test_an_unsafe_example_is_named_where_nobody_can_refit():
    X, y = cancer()
    task, train = sk.task(logistic(10.0), X, y)
    found = holds(cv.loo(EXACT.fit(task, train)))
    assert found.unsafe == (68,)
    assert found.refitted == ()
    assert any("68" in note and "not refitted" in note for note in found.notes)


def test_a_refit_that_fails_keeps_the_approximation_and_says_so():
    """Without its only example a class is missing."""
    X, y = cancer(60)
    labels = np.where(np.arange(60) == 7, 2, y)
    fit = LogisticRegression(C=0.1, tol=1e-9, max_iter=5000).fit(X, labels)
    found = holds(cv.loo(fit, (X, labels), refit_above=0))
    assert list(found.failures) == [7]
    assert 7 not in found.refitted
    assert found.exact[7] == found.approximate[7]
    assert any("a class is missing" in note for note in found.notes)
    assert not found.is_confirmed


# -- refusals, and the way out of each ------------------------------------------------------------


def test_bad_questions_say_the_way_out():
    X, y = cancer(100)
    fit = logistic(rows=100)
    for folds in (1, 101, True):
        with pytest.raises(ShapeError, match="folds=10"):
            cv.kfold(fit, (X, y), folds)
    cv.kfold(fit, (X, y), folds=10)
    for labels in (np.zeros(100), np.arange(99)):
        with pytest.raises(ShapeError, match="one label per row"):
            cv.grouped(fit, labels, (X, y))
    for above in (-1, float("nan"), "all"):
        with pytest.raises(SpecError, match="leverage, at least 0"):
            cv.loo(fit, (X, y), refit_above=above)
    for confirm in (True, -1, 0.5):
        with pytest.raises(SpecError, match="confirm=20"):
            cv.loo(fit, (X, y), confirm=confirm)
    cv.loo(fit, (X, y), confirm=20)
    for grid in ({}, {"C": []}, {"C": [1.0], "tol": [1.0]}, [0.1, 1.0]):
        with pytest.raises(SpecError, match="along one parameter"):
            cv.path(fit, X, y, grid)
    with pytest.raises(SpecError, match="one of C, "):
        cv.path(fit, X, y, {"alpha": [1.0]})
    cv.path(fit, X, y, {"C": [1.0]})


def test_a_row_that_alone_determines_a_coefficient_is_refused():
    X = np.c_[np.ones(10), np.arange(10) == 3].astype(float)
    y = np.arange(10.0)
    with pytest.raises(NonFinite, match="leverage 1"):
        cv.loo(sm.OLS(y, X).fit())


# -- losses that have no limit ---------------------------------------------------------------------


def separated_without_a_row():
    """Of the two rows with `rare` one is a success: without either the other decides alone."""
    draw = np.random.default_rng(0)
    X = sm.add_constant(draw.normal(size=(120, 1)))
    y = (draw.uniform(size=120) < 0.4).astype(float)
    rare = np.zeros(120)
    rare[[5, 80]], y[[5, 80]] = 1, (0, 1)
    return np.c_[X, rare], y


@pytest.mark.parametrize("confirm", [0, 30])
def test_a_mean_is_not_confirmed_where_classes_separate_without_an_example(confirm):
    X, y = separated_without_a_row()
    found = holds(cv.loo(sm.Logit(y, X).fit(disp=0), confirm=confirm))
    assert {5, 80} <= set(found.unsafe) and set(found.failures) == {5, 80}
    assert not found.is_confirmed
    assert "without 5, 80 no refit succeeds: the mean is not confirmed" in found.verdict
    assert any("no finite estimate" in note for note in found.notes)
    held = cv.loo(sm.Logit(y, X[:, :2]).fit(disp=0), confirm=30)
    assert held.is_confirmed and not held.unsafe


def test_a_class_that_leaves_whole_is_refused():
    X, y = cancer(120)
    clf = logistic(rows=120)
    with pytest.raises(DataError, match=r"all \d+ of class 0 leave together"):
        cv.kfold(clf, (X, y), folds=y)
    with pytest.raises(DataError, match=r"all \d+ of class 0 leave together"):
        cv.grouped(sm.Logit(y, sm.add_constant(X[:, :2])).fit(disp=0), y)
    single = np.where(np.arange(120) == 7, 2, y)
    one = LogisticRegression(tol=1e-9, max_iter=5000).fit(X, single)
    found = cv.loo(one, (X, single))
    assert list(found.failures) == [7] and not found.is_confirmed
    assert "without 7 no refit succeeds" in found.verdict
    assert cv.kfold(clf, (X, y), folds=10).mean


def test_a_group_that_is_missing_is_no_group():
    X, y = cancer(120)
    clinic = np.where(np.arange(120) % 7 == 0, np.nan, np.arange(120) % 5)
    with pytest.raises(DataError, match="Every example belongs to a group") as caught:
        cv.grouped(logistic(rows=120), clinic, (X, y))
    assert "[0, 7, 14, 21, 28] and more" in str(caught.value)
    assert cv.grouped(logistic(rows=120), np.nan_to_num(clinic, nan=-1), (X, y)).mean
