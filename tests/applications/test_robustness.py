"""Small sets that carry a conclusion: derivatives, brute force, refits by statsmodels, refusals."""

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import upweight as uw
from tests.applications.outcomes import holds
from upweight.adapters import statsmodels as smx
from upweight.adapters.statsmodels_inference import inference_of
from upweight.applications import robustness
from upweight.applications.robustness import amip, table
from upweight.applications.smallest_set import Search
from upweight.errors import (
    DataError,
    NotStationary,
    ShapeError,
    SpecError,
    UnsupportedModel,
)

sm = pytest.importorskip("statsmodels.api")
smf = pytest.importorskip("statsmodels.formula.api")

N = 80
DRAW = np.random.default_rng(0)
X = sm.add_constant(pd.DataFrame(DRAW.normal(size=(N, 3)), columns=list("abc")))
ETA = X.to_numpy() @ [0.2, 0.5, -0.3, 0.1]
Y = {
    "Gaussian": ETA + DRAW.normal(size=N),
    "Binomial": (DRAW.uniform(size=N) < 1 / (1 + np.exp(-ETA))).astype(float),
    "Poisson": DRAW.poisson(np.exp(ETA)).astype(float),
}
SHIFT, PRIOR = 0.2 * DRAW.normal(size=N), DRAW.uniform(0.5, 2, size=N)
TRIALS = DRAW.integers(2, 6, size=N)
SUCCESSES = DRAW.binomial(TRIALS, 0.5)
VILLAGE, YEAR = np.arange(N) % 13, np.arange(N) // 10
COVARIANCES = {
    "nonrobust": ("nonrobust", {}),
    "HC0": ("HC0", {}),
    "HC1": ("HC1", {}),
    "HC2": ("HC2", {}),
    "HC3": ("HC3", {}),
    "cluster": ("cluster", {"groups": VILLAGE}),
    "plain cluster": (
        "cluster",
        {"groups": VILLAGE, "use_correction": False, "df_correction": False},
    ),
    "two-way": ("cluster", {"groups": np.stack([VILLAGE, YEAR], axis=1)}),
}
FAMILIES = {name: getattr(sm.families, name) for name in Y}


def models():
    quiet = {"disp": 0}
    binomial, poisson = sm.families.Binomial(), sm.families.Poisson()
    counts = np.stack([SUCCESSES, TRIALS - SUCCESSES], axis=1)
    return {
        "OLS": (sm.OLS(Y["Gaussian"], X), {}),
        "WLS": (sm.WLS(Y["Gaussian"], X, weights=PRIOR), {}),
        "Logit": (sm.Logit(Y["Binomial"], X, offset=SHIFT), quiet),
        "Poisson": (sm.Poisson(Y["Poisson"], X, exposure=np.exp(SHIFT)), quiet),
        "Gaussian": (sm.GLM(Y["Gaussian"], X, var_weights=PRIOR, offset=SHIFT), {}),
        "counts": (sm.GLM(counts, X, family=binomial), {}),
        "quasi-Poisson": (sm.GLM(Y["Poisson"], X, family=poisson), {"scale": "X2"}),
    }


MODELS = models()


def given(asked):
    return {"cov_kwds": dict(asked)} if asked else {}


def least_squares(n=60, **fit):
    return sm.OLS(Y["Gaussian"][:n], X[:n]).fit(**fit)


# -- what is reported, as a function of weights ---------------------------------------------------


@pytest.mark.filterwarnings("ignore:cov_type not fully supported with var_weights")
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("name", MODELS)
def test_the_reported_interval_without_rows_is_that_of_statsmodels(name, covariance):
    model, fit = MODELS[name]
    kind, asked = COVARIANCES[covariance]
    for use_t in (None, True):
        results = model.fit(cov_type=kind, use_t=use_t, **given(asked), **fit)
        before = results.params.copy()
        found = inference_of(results, "a", 0.9)
        keep = np.arange(N) > 6
        refit = found.refit(keep)
        assert not refit.reason
        w = torch.from_numpy(keep.astype(float))[None]
        gamma = found.inference.coordinates(torch.tensor(np.asarray(results.params)))
        ours = found.inference.reported(found.inference.solved(w, gamma[None]), w)
        ends = [float(ours.end(side)) for side in (-1, 0, 1)]
        np.testing.assert_allclose(ends, [refit.low, refit.value, refit.high], atol=1e-7)
        assert before.equals(results.params)
        assert len(model.fit(**fit).params) == 4  # the user's model is as it was


@pytest.mark.parametrize("kind", ["nonrobust", "HC0", "plain cluster"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_parts_of_the_derivative_are_those_of_small_changes_of_weights(family, kind):
    """A GLM with fractional freq_weights is statsmodels' own fit under other data weights."""
    covariance, asked = COVARIANCES[kind]

    def reported(w):
        model = sm.GLM(Y[family], X, family=FAMILIES[family](), freq_weights=w)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that freq_weights and clusters are experimental
            fit = model.fit(cov_type=covariance, cov_kwds=asked or None, tol=1e-14)
        return np.array([fit.params["a"] + side * 1.959963984540054 * fit.bse["a"] for side in S])

    S = (-1, 0, 1)
    model = sm.GLM(Y[family], X, family=FAMILIES[family]())
    results = model.fit(cov_type=covariance, cov_kwds=asked or None, tol=1e-14)
    inference = inference_of(results, "a", 0.95).inference
    gamma = inference.coordinates(torch.tensor(np.asarray(results.params)))
    ones = torch.ones(N, dtype=torch.float64)
    moves, _ = inference.movements(gamma, ones)
    for i in (0, 41):
        step = 1e-4 * (np.arange(N) == i)
        numeric = (reported(1 + step) - reported(1 - step)) / 2e-4
        ours = []
        for side in S:
            by_gamma, by_w = inference.derivatives(gamma, ones, side)
            ours.append(float(moves[i] @ by_gamma + by_w[i]))
        np.testing.assert_allclose(ours, numeric, rtol=1e-3, atol=1e-7)


def test_one_linearization_is_the_formula_by_hand():
    results = least_squares()
    found = amip(results, "a", value=0.4, search="one-shot")
    design = np.asarray(results.model.exog)
    psi = np.linalg.inv(design.T @ design)[1] @ design.T * results.resid.to_numpy()
    order = np.argsort(-psi)
    past = results.params["a"] - np.cumsum(psi[order]) < 0.4
    assert past.any()
    k = int(np.argmax(past)) + 1
    assert found.predicted == k
    assert set(found.left_out) <= set(order[:k])
    reached = results.params["a"] - psi[order[:k]].sum()
    assert found.path.predicted[-1, 0] == pytest.approx(reached)


def test_one_linearization_has_the_part_of_the_standard_error_too():
    from scipy import stats

    results = least_squares()
    found = amip(results, "a", target="significance", search="one-shot")
    design, y = np.asarray(results.model.exog), results.model.endog

    def low(w):
        inverse = np.linalg.inv(design.T * w @ design)
        beta = inverse @ design.T @ (w * y)
        freedom = w.sum() - 4
        error = np.sqrt((w * (y - design @ beta) ** 2).sum() / freedom * inverse[1, 1])
        return beta[1] - stats.t.ppf(0.975, freedom) * error

    assert found.asked == "lose significance"
    numeric = [low(1 + 1e-5 * e) - low(1 - 1e-5 * e) for e in np.eye(60)]
    psi = np.array(numeric) / 2e-5
    order = np.argsort(-psi)
    assert found.left_out == tuple(order[: len(found.left_out)])
    path = found.start.low - np.r_[0, np.cumsum(psi[order])]
    assert found.predicted == int(np.argmax(path < 0))
    np.testing.assert_allclose(found.path.predicted[:, 1], path[: found.predicted + 1], rtol=1e-5)


# -- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sign", "significance", "both"])
def test_no_smaller_set_exists_where_all_can_be_tried(target):
    n, draw = 18, np.random.default_rng(33)
    x = draw.normal(size=n)
    y, design = 0.25 * x + draw.normal(size=n), pd.DataFrame({"const": 1.0, "a": x})
    results = sm.OLS(y, design).fit()
    found = holds(amip(results, "a", target=target), figure=False)
    assert found.k is not None and found.k <= 4
    smallest = None
    for k in range(1, found.k + 1):
        for gone in itertools.combinations(range(n), k):
            keep = np.setdiff1d(np.arange(n), gone)
            if happened(found.asked, results, refitted(design, y, keep)):
                smallest = k
                break
        if smallest is not None:
            break
    assert found.k == smallest


def refitted(design, y, keep):
    design, y = design.to_numpy()[keep], y[keep]
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ y
    freedom = len(keep) - 2
    error = np.sqrt(((y - design @ beta) ** 2).sum() / freedom * inverse[1, 1])
    from scipy import stats

    reach = stats.t.ppf(0.975, freedom) * error
    return beta[1], beta[1] - reach, beta[1] + reach


def happened(asked, results, after):
    value, low, high = after
    same = value * results.params["a"] > 0
    significant = low > 0 or high < 0
    return {
        "sign": not same,
        "lose significance": not significant,
        "gain significance": significant and same,
        "both": significant and not same,
    }[asked]


@pytest.mark.parametrize("name", ["OLS", "Logit", "Poisson", "counts"])
@pytest.mark.parametrize("covariance", ["nonrobust", "HC3", "cluster"])
def test_every_claim_holds_when_statsmodels_fits_from_nothing(name, covariance):
    model, fit = MODELS[name]
    kind, asked = COVARIANCES[covariance]
    results = model.fit(cov_type=kind, **given(asked), **fit)
    for target in ("sign", "significance", "both"):
        found = holds(amip(results, "b", target=target, most=40), figure=False)
        if found.k is None:
            continue
        keep = np.setdiff1d(np.arange(N), list(found.rows))
        end = inference_of(results, "b", 0.95).refit(np.isin(np.arange(N), keep))
        assert happened(found.asked, Parameters(results), (end.value, end.low, end.high))
        assert found.end.value == pytest.approx(end.value)
        assert found.path.refitted[-1] == pytest.approx([end.value, end.low, end.high], abs=1e-6)
        assert found.path.refitted[0] == pytest.approx(
            [results.params["b"], *results.conf_int().loc["b"]], abs=1e-6
        )
        before = found.before
        if before is not None:
            ends = (before.value, before.low, before.high)
            assert not happened(found.asked, Parameters(results), ends)


class Parameters:
    def __init__(self, results):
        self.params = {"a": results.params["b"]}


def test_the_adaptive_set_is_never_larger_than_the_one_shot_set():
    results = MODELS["Logit"][0].fit(disp=0)
    for target in ("sign", "significance"):
        one = amip(results, "a", target=target, search="one-shot")
        found = amip(results, "a", target=target)
        assert found.k <= one.one_shot.k if one.is_confirmed else found.k is not None
        assert found.one_shot.fewest is None or found.k <= found.one_shot.fewest


def test_rows_are_named_as_in_the_frame_and_missing_ones_are_left_out():
    frame = X.assign(y=Y["Gaussian"], village=[f"v{v}" for v in VILLAGE])
    frame.index = [f"household {i}" for i in range(N)]
    frame.iloc[[3, 7], 1] = np.nan
    results = smf.ols("y ~ a + b + c", frame).fit()
    found = amip(results, "a", target="significance")
    assert set(found.rows) <= set(frame.index) - {"household 3", "household 7"}
    assert any("missing" in note for note in found.notes)
    again = smf.ols("y ~ a + b + c", frame.drop(list(found.rows))).fit()
    assert again.pvalues["a"] > 0.05 > results.pvalues["a"]
    by_village = amip(results, "a", target="significance", groups="village")
    assert by_village.unit == "group" and set(by_village.left_out) <= set(frame.village)
    gone = frame.village.isin(by_village.left_out)
    assert set(by_village.rows) == set(frame.index[gone]) - {"household 3", "household 7"}
    assert smf.ols("y ~ a + b + c", frame[~gone]).fit().pvalues["a"] > 0.05
    series = amip(results, "a", target="significance", groups=frame.village)
    assert series.left_out == by_village.left_out


def test_rows_that_share_a_label_are_named_by_their_place():
    design = X.set_index(np.arange(N) % 40)
    results = sm.OLS(pd.Series(Y["Gaussian"], design.index), design).fit()
    found = amip(results, "b")
    assert found.rows == amip(sm.OLS(Y["Gaussian"], X).fit(), "b").rows
    assert any("same label" in note for note in found.notes)


def test_what_separates_the_classes_is_set_aside_and_said():
    x = np.r_[np.linspace(-2, -0.5, 12), np.linspace(0.5, 2, 12), -0.4, 0.4]
    y = np.r_[np.zeros(12), np.ones(12), 1, 0]
    results = sm.Logit(y, sm.add_constant(x)).fit(disp=0)
    assert inference_of(results, 1, 0.95).refit(np.arange(26) < 24).reason.count("hyperplane")
    found = [holds(amip(results, 1, target=target)) for target in ("sign", "significance", "both")]
    for one in found:
        keep = np.setdiff1d(np.arange(26), list(one.rows))
        assert one.k is None or x[keep][y[keep] == 0].max() > x[keep][y[keep] == 1].min()
    assert any("hyperplane" in note for one in found for note in one.notes)


def test_nothing_found_is_never_nothing_there():
    found = holds(amip(least_squares(), "a", most=1))
    assert found.k is None and found.share is None and not found.is_confirmed
    assert "does not show that none exists" in found.verdict and found.tried == 1


def test_a_search_that_is_stopped_keeps_its_best_set(monkeypatch):
    results = MODELS["Logit"][0].fit(disp=0)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "adaptive", interrupted)
    found = holds(amip(results, "a", target="sign"), figure=False)
    assert found.is_confirmed and found.k <= found.one_shot.k
    assert any("interrupted" in note for note in found.notes)
    monkeypatch.undo()
    short = holds(amip(results, "a", target="sign", budget=1e-9), figure=False)
    assert any("budget" in note for note in short.notes)


def test_another_value_and_level_are_asked_about():
    results = least_squares()
    found = holds(amip(results, "a", value=0.3, target="sign"), figure=False)
    assert found.k is None or found.end.value < 0.3 < found.start.value
    wide, narrow = (amip(results, "a", target="both", level=level).k for level in (0.99, 0.8))
    assert wide is None or narrow <= wide


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("sign", "it passes 0.900,"),
        ("significance", "it no longer differs significantly from 0.900 at the 5 % level,"),
        ("both", "it differs significantly from 0.900 at the 5 % level, on the other side,"),
    ],
)
def test_no_sign_is_said_to_change_where_another_value_is_passed(target, said):
    results = least_squares()
    start = results.params["a"]
    assert 0 < start < 0.9
    found = holds(amip(results, "a", target, value=0.9, most=40), figure=False)
    assert found.k and found.end.value > 0
    assert said in found.verdict and "sign changes" not in found.verdict


def test_numbers_that_are_names_are_told_from_percentages():
    one, several = (
        amip(MODELS["OLS"][0].fit(), "a", target) for target in ("significance", "sign")
    )
    for found in (one, several):
        if 0 < len(found.left_out) <= 3:
            assert f" %; row{'s' * (found.k > 1)} {found.names})" in found.verdict


def test_a_scale_that_leaves_out_the_trials_is_refused_and_shares_are_not():
    draw, trials = np.random.default_rng(1), np.arange(N) % 40 + 10
    won = draw.binomial(trials, draw.beta(2, 2, size=N))
    counts = sm.GLM(np.column_stack([won, trials - won]), X, family=sm.families.Binomial()).fit(
        scale="X2"
    )
    with pytest.raises(UnsupportedModel, match="var_weights=trials") as caught:
        amip(counts, "a")
    assert "leaves out the numbers of trials" in str(caught.value)
    shares = sm.GLM(won / trials, X, family=sm.families.Binomial(), var_weights=trials).fit(
        scale="X2"
    )
    assert shares.scale == pytest.approx(counts.pearson_chi2 / counts.df_resid)
    found = holds(amip(shares, "a", "significance", most=40), figure=False)
    kept = np.setdiff1d(np.arange(N), found.rows)
    again = sm.GLM(
        (won / trials)[kept], X.iloc[kept], family=sm.families.Binomial(), var_weights=trials[kept]
    ).fit(scale="X2")
    assert found.end.value == pytest.approx(again.params["a"], rel=1e-6)
    assert [found.end.low, found.end.high] == pytest.approx(again.conf_int().loc["a"], rel=1e-5)
    with pytest.warns(UserWarning, match="numbers of trials"):
        assert any("numbers of trials" in note for note in smx.diagnostics(counts).notes)
    robust = sm.GLM(np.column_stack([won, trials - won]), X, family=sm.families.Binomial())
    assert amip(robust.fit(scale="X2", cov_type="HC0"), "a", most=30)


def test_a_fit_that_stopped_at_the_tolerance_of_statsmodels_is_asked_about():
    """Its covariance is that of the step before the last, which differs by more than 1e-6."""
    family = sm.families.NegativeBinomial(alpha=0.7)
    results = sm.GLM(Y["Poisson"], X, family=family).fit(maxiter=4, tol=1e-3)
    tight = sm.GLM(Y["Poisson"], X, family=family).fit(tol=1e-14)
    apart = abs(results.bse["a"] / tight.bse["a"] - 1)
    assert 1e-6 < apart < 1e-3
    found = holds(amip(results, "a", "significance", most=40), figure=False)
    assert found.start.value == results.params["a"]
    kept = np.setdiff1d(np.arange(N), found.rows)
    again = sm.GLM(Y["Poisson"][kept], X.iloc[kept], family=family).fit(tol=1e-14)
    assert [found.end.low, found.end.high] == pytest.approx(again.conf_int().loc["a"], rel=1e-5)


def test_a_model_in_place_of_its_results_is_told_of():
    model = sm.OLS(Y["Gaussian"], X)
    for ask in (amip, lambda model: amip(model, "a")):
        with pytest.raises(UnsupportedModel, match=r"results = model.fit\(\)"):
            ask(model)


def test_a_table_has_a_line_for_each_question():
    results = least_squares()
    found = holds(table({"short": results, "robust": least_squares(cov_type="HC1")}, ["a", "c"]))
    frame = found.frame()
    assert len(frame) == 12 and set(frame.model) == {"short", "robust"}
    line = frame.iloc[0]
    assert line.k == amip(results, "a").k and line.share == line.k / 60
    alone = holds(table(results, targets=["sign"], most=1), figure=False)
    assert list(alone.frame().coefficient) == ["a", "b", "c"]


def test_results_without_a_formula_here_are_refused_with_a_way_out():
    with pytest.raises(UnsupportedModel, match="HC1") as caught:
        amip(least_squares(cov_type="HAC", cov_kwds={"maxlags": 2}), "a")
    assert "Way out" in str(caught.value)
    assert amip(least_squares(cov_type="HC1"), "a").k
    weighted = sm.GLM(Y["Gaussian"], X, freq_weights=TRIALS).fit()
    with pytest.raises(UnsupportedModel, match="repeat"):
        amip(weighted, "a")
    repeated = np.repeat(np.arange(N), TRIALS)
    assert amip(sm.GLM(Y["Gaussian"][repeated], X.iloc[repeated]).fit(), "a").k
    with pytest.raises(UnsupportedModel, match="alpha=") as caught:
        amip(sm.NegativeBinomial(Y["Poisson"], X).fit(disp=0), "a")
    held = sm.GLM(Y["Poisson"], X, family=sm.families.NegativeBinomial(alpha=0.1)).fit()
    assert amip(held, "a").k
    early = sm.Poisson(Y["Poisson"], X).fit(disp=0, method="newton", maxiter=1, warn_convergence=0)
    with pytest.raises((NotStationary, UnsupportedModel)):
        amip(early, "a")
    with pytest.raises(DataError, match="residuals"):
        amip(sm.OLS(X.to_numpy() @ [1, 2, 3, 4], X).fit(), "a")
    changed = least_squares()
    changed._results.cov_params_default = 2 * changed.cov_params()
    with pytest.raises(UnsupportedModel, match="reproduced"):
        amip(changed, "a")


def test_arguments_of_another_question_are_refused_with_a_way_out():
    results = least_squares()
    with pytest.raises(SpecError, match="const, a, b, c") as caught:
        amip(results, "income")
    assert "coefficient='c'" in str(caught.value) and amip(results, "c", target="sign")
    with pytest.raises(SpecError, match="coefficient='c'"):
        amip(results)
    for wrong in (
        {"target": "power"},
        {"search": "exact"},
        {"most": 0},
        {"budget": 0},
        {"level": 95},
        {"value": np.nan},
    ):
        with pytest.raises(SpecError):
            amip(results, "a", **wrong)
    with pytest.raises(DataError, match="village"):
        amip(results, "a", groups="village")
    with pytest.raises(ShapeError, match="60 rows"):
        amip(results, "a", groups=VILLAGE)
    with pytest.raises(DataError, match="no label"):
        amip(results, "a", groups=[np.nan] * 60)
    with pytest.raises(DataError, match="at least two"):
        amip(results, "a", groups=[1] * 60)
    assert amip(results, "a", groups=VILLAGE[:60], most=3).unit == "group"


def test_two_rows_that_are_one_row_twice_both_leave():
    design = sm.add_constant(np.r_[np.linspace(-1, 1, 20), 3, 3])
    y = np.r_[0.1 * np.sin(np.arange(20) * 2.0), 4, 4]
    found = holds(amip(sm.OLS(y, design).fit(), 1, target="significance"), figure=False)
    assert found.rows == (20, 21) and found.k == 2


def test_leverage_one_rows_stay():
    design = X[["const", "a"]][:30].assign(only=(np.arange(30) == 4).astype(float))
    results = sm.OLS(Y["Gaussian"][:30], design).fit()
    for target in ("sign", "significance", "both"):
        found = holds(amip(results, "a", target=target), figure=False)
        assert 4 not in found.rows
    assert holds(amip(results, "only", target="sign"), figure=False).tried


# -- fitted methods -------------------------------------------------------------------------------


def patients(n=120):
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    rows = torch.tensor(features[:, :4])
    labels = torch.tensor(labels)
    return (rows[:n], labels[:n]), (rows[n:], labels[n:])


def classifier():
    train, test = patients()
    model = torch.nn.Linear(4, 2).double()
    task = uw.Task(model, uw.CrossEntropy(), penalty=uw.L2(0.01))
    recipe = uw.training.Newton()
    theta = recipe.prepare(task, task.training(train))(torch.ones(1, len(train[1]))).theta[0]
    with torch.no_grad():
        for name, value in task.layout.unflatten(theta).items():
            model.get_parameter(name).copy_(value)
    return task, train, test, recipe


def least_sure(task, test):
    lead = robustness.Lead()(task, task.named(task.theta()), test)
    place = int(torch.where(lead > 0, lead, torch.inf).argmin())
    return test[0][place : place + 1], test[1][place : place + 1]


@pytest.mark.parametrize(
    "method",
    [
        uw.Influence(uw.Hessian(), uw.solvers.Cholesky()),
        uw.Influence(uw.EKFAC(), damping=0.01),
        uw.GradientDot(),
    ],
    ids=["exact", "by layer", "ranks"],
)
def test_a_prediction_that_is_said_to_flip_does(method):
    task, train, test, recipe = classifier()
    query = least_sure(task, test)
    fitted = method.fit(task, train)
    found = holds(amip(fitted, queries=query, recipe=recipe, most=60))
    assert found.k is not None
    assert (found.predicted is None) == isinstance(method, uw.GradientDot)
    w = torch.ones(1, 120, dtype=torch.float64)
    w[0, list(found.rows)] = 0
    theta = recipe.prepare(task, fitted.train)(w).theta[0]
    outputs, _ = task.outputs(task.named(theta), query)
    assert int(outputs[0].argmax()) != int(query[1])
    if found.before is not None:
        assert found.before.value > 0 > found.end.value
    one = holds(amip(fitted, queries=query, recipe=recipe, search="one-shot"), figure=False)
    assert one.predicted == found.predicted
    assert one.is_confirmed == (one.k is not None)


def test_a_functional_and_groups_of_a_fitted_method():
    task, train, test, recipe = classifier()
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(task, train)
    entry = uw.Coefficient("weight[0, 3]")
    now = float(task.named(task.theta())["weight"][0, 3])
    found = holds(amip(fitted, target=entry, value=now / 2, recipe=recipe), figure=False)
    assert found.k and abs(found.end.value) < abs(now / 2) and "Coefficient" in found.about
    loss = uw.Functional(lambda task, params, queries, w: task.losses(params, queries).mean())
    start = float(task.losses(task.named(task.theta()), test).mean())
    grouped = holds(
        amip(
            fitted,
            target=loss,
            queries=test,
            value=1.1 * start,
            recipe=recipe,
            groups=np.arange(120) // 6,
        ),
        figure=False,
    )
    assert grouped.k and grouped.end.value > 1.1 * start and len(grouped.rows) == 6 * grouped.k
    with pytest.raises(SpecError, match="recipe"):
        amip(fitted, target=entry)
    with pytest.raises(SpecError, match="of θ"):
        amip(fitted, target=uw.Functional(lambda t, p, q, w: (w * w).sum() * p["bias"][0]),
             recipe=recipe)  # fmt: skip
    with pytest.raises(ShapeError, match="one query"):
        amip(fitted, queries=test, recipe=recipe)
    with pytest.raises(SpecError, match="queries="):
        amip(fitted, recipe=recipe)
    with pytest.raises(SpecError, match="standard error"):
        amip(fitted, target="both", recipe=recipe)
    with pytest.raises(SpecError, match="statsmodels"):
        amip(fitted, "a", recipe=recipe)


def test_an_estimator_is_fitted_again_by_its_library():
    (rows, labels), (others, truth) = patients()
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(rows.numpy(), labels.numpy())
    sure = np.abs(model.decision_function(others.numpy()))
    right = model.predict(others.numpy()) == truth.numpy()
    place = int(np.where(right, sure, np.inf).argmin())
    query = (others.numpy()[place : place + 1], truth.numpy()[place : place + 1])
    found = holds(amip(model, queries=query, train=(rows.numpy(), labels.numpy())), figure=False)
    assert found.k
    keep = np.setdiff1d(np.arange(120), list(found.rows))
    again = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(
        rows.numpy()[keep], labels.numpy()[keep]
    )
    assert again.predict(query[0]) != query[1]


def test_a_recipe_that_leads_elsewhere_confirms_nothing():
    task, train, test, _ = classifier()
    query = least_sure(task, test)
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(task, train)
    flipped = (query[0], 1 - query[1])
    other = uw.Training(lambda: torch.nn.Linear(4, 2).double(), uw.SGD(1e-9), epochs=1, batch=60)
    for one in (query, flipped):
        found = holds(amip(fitted, queries=one, recipe=other, most=5), figure=False)
        if any("already" in note for note in found.notes):
            assert found.k is None
            return
    raise AssertionError("an untrained model is on one of the two sides")
