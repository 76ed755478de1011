"""The adapter and the classical diagnostics agree with statsmodels on its own real data."""

import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import upweight as uw
from upweight.adapters import statsmodels as smx
from upweight.errors import NotStationary, UnsupportedModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import statsmodels.api as sm

EIGHT = {"rtol": 1e-8, "atol": 1e-8}


def stackloss():
    return sm.OLS(*columns(sm.datasets.stackloss)).fit()


def columns(dataset):
    loaded = dataset.load_pandas()
    return loaded.endog, sm.add_constant(loaded.exog)


def scotland():
    y, X = columns(sm.datasets.scotland)
    return sm.GLM(y, X, family=sm.families.Gaussian()).fit(tol=1e-14)


def star98():
    y, X = columns(sm.datasets.star98)
    X = X.iloc[:, [0, 1, 2, 3, 4, 20]]
    return sm.GLM(y, X, family=sm.families.Binomial()).fit(tol=1e-14)


def spector():
    y, X = columns(sm.datasets.spector)
    return sm.GLM(y, X, family=sm.families.Binomial()).fit(tol=1e-14)


def randhie(n=400):
    y, X = columns(sm.datasets.randhie)
    X = X[["const", "lncoins", "lpi", "physlm", "disea"]]
    return sm.GLM(y[:n], X[:n], family=sm.families.Poisson()).fit(tol=1e-14)


def wls():
    y, X = columns(sm.datasets.stackloss)
    return sm.WLS(y, X, weights=np.linspace(0.5, 2.0, len(y))).fit()


def logit():
    y, X = columns(sm.datasets.spector)
    return sm.Logit(y, X).fit(disp=0, tol=1e-14, maxiter=100)


def counts():
    y, X = columns(sm.datasets.randhie)
    X = X[["const", "lncoins", "physlm"]]
    return sm.Poisson(y[:300], X[:300]).fit(disp=0, tol=1e-14, maxiter=100)


GLMS = [scotland, star98, spector, randhie]
EVERY = [stackloss, wls, logit, counts, *GLMS]


def tensor(array):
    return torch.tensor(np.asarray(array, dtype=np.float64))


def test_linear_diagnostics_are_those_of_statsmodels():
    results = stackloss()
    theirs, ours = results.get_influence(), smx.diagnostics(results)
    for mine, other in (
        (ours.leverage, theirs.hat_matrix_diag),
        (ours.residuals, theirs.resid),
        (ours.loo_residuals, theirs.resid_press),
        (ours.studentized, theirs.resid_studentized_internal),
        (ours.studentized_external, theirs.resid_studentized_external),
        (ours.cooks_distance, theirs.cooks_distance[0]),
        (ours.dffits, theirs.dffits[0]),
        (ours.dfbeta, theirs.dfbeta),
        (ours.dfbetas, theirs.dfbetas),
        (ours.covariance_ratio, theirs.cov_ratio),
        (ours.covariance, results.cov_params()),
        (ours.covariance_jackknife, results.get_robustcov_results("HC0").cov_params()),
    ):
        assert_close(mine, tensor(other), **EIGHT)


@pytest.mark.parametrize("fit", GLMS)
def test_glm_diagnostics_are_those_of_statsmodels(fit):
    results = fit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statsmodels warns of its own deprecations here
        theirs = results.get_influence()
        other = {
            "leverage": theirs.hat_matrix_diag,
            "studentized": theirs.resid_studentized,
            "cooks_distance": theirs.cooks_distance[0],
            "dfbeta": theirs.d_params,
        }
    ours = smx.diagnostics(results)
    for name, value in other.items():
        assert_close(getattr(ours, name), tensor(value), **EIGHT)
    assert_close(ours.covariance, tensor(results.cov_params()), **EIGHT)


def test_jackknife_covariance_is_the_sandwich():
    y, X = columns(sm.datasets.spector)
    robust = sm.GLM(y, X, family=sm.families.Binomial()).fit(tol=1e-14, cov_type="HC0")
    ours = smx.diagnostics(spector()).covariance_jackknife
    assert_close(ours, tensor(robust.cov_params()), **EIGHT)


@pytest.mark.parametrize("fit", EVERY)
def test_influence_returns_the_influence_curve(fit):
    results = fit()
    task, train = smx.task(results)
    fitted = uw.Influence(uw.Hessian(), uw.Cholesky()).fit(task, train)
    curve = smx.diagnostics(results).influence_curve
    for row in (0, 5, len(curve) - 1):
        ours = fitted.parameter_influence(row)["weight"][0]
        assert_close(ours, curve[row], rtol=1e-6, atol=1e-8 * float(curve.abs().max()))


@pytest.mark.parametrize("fit", [stackloss, spector, randhie])
def test_a_removal_step_is_dfbeta(fit):
    results = fit()
    task, train = smx.task(results)
    fitted = uw.Influence(uw.Hessian(), uw.Cholesky()).fit(task, train)
    dfbeta = smx.diagnostics(results).dfbeta
    for row in (0, 3, 9):
        step = fitted.removal_step([row])["weight"][0]
        assert_close(-step, dfbeta[row], rtol=1e-7, atol=1e-9 * float(dfbeta.abs().max()))


@pytest.mark.parametrize("fit", [stackloss, spector, wls])
def test_refits_confirm_removals(fit):
    results = fit()
    task, train = smx.task(results)
    scores = uw.Influence().fit(task, train).attribute(train)
    loo = uw.evaluation.loo(scores, smx.recipe(results), range(15), query=2, progress=False)
    assert loo.pearson.value > 0.9
    removal = scores.context.fitted.removal(train, groups=range(15))
    corrected = uw.evaluation.loo(
        scores, smx.recipe(results), range(15), removal=removal, query=2, progress=False
    )
    assert corrected.pearson.value >= loo.pearson.value - 1e-6


def test_queries_take_exog_and_endog():
    results = stackloss()
    task, train = smx.task(results)
    y, X = columns(sm.datasets.stackloss)
    scores = uw.Influence().fit(task, train).attribute(smx.data(results, X[:3], y[:3]))
    everything = uw.Influence().fit(task, train).attribute(train)
    assert_close(scores.values, everything.values[:3])


@pytest.mark.parametrize(
    "fit, reason",
    [
        (lambda y, X: sm.GLM(y, X, family=sm.families.Gamma()).fit(), "Gamma"),
        (
            lambda y, X: sm.GLM(y, X, family=sm.families.Poisson(), offset=np.ones(len(y))).fit(),
            "offset",
        ),
        (lambda y, X: sm.RLM(y, X).fit(), "RLM"),
        (lambda y, X: "not results", "not a fitted"),
    ],
)
def test_a_no_has_its_reason(fit, reason):
    y, X = columns(sm.datasets.stackloss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = fit(y, X)
    assert not smx.supports(results)
    assert reason in smx.supports(results).reason
    with pytest.raises(UnsupportedModel, match=reason):
        smx.diagnostics(results)


def test_an_early_stop_is_refused():
    y, X = columns(sm.datasets.spector)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = sm.GLM(y, X, family=sm.families.Binomial()).fit(maxiter=1)
    with pytest.raises(NotStationary, match="standard errors"):
        smx.diagnostics(results)
    with pytest.raises(NotStationary, match="away from the minimum"):
        smx.task(results)
