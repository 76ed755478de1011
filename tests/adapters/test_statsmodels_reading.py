"""Offsets are part of η; columns go by name, formulas by their frame; endless fits are refused."""

import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
import torch
from torch.testing import assert_close

import upweight as uw
from upweight.adapters import statsmodels as smx
from upweight.errors import (
    DataError,
    NotPositiveDefinite,
    NotStationary,
    ShapeError,
    UnsupportedModel,
)

RNG = np.random.default_rng(0)
N = 40
x = RNG.normal(size=N)
EXPOSURE = RNG.uniform(0.5, 3.0, N)
X = sm.add_constant(x)
OFFSET = 0.5 * RNG.normal(size=N)
COUNTS = RNG.poisson(EXPOSURE * np.exp(0.3 * x + OFFSET + 0.5))
YES = (RNG.random(N) < 1 / (1 + np.exp(-(x + OFFSET)))).astype(float)
TRIALS = RNG.integers(3, 9, N)
SUCCESSES = np.stack([(s := RNG.binomial(TRIALS, 0.4)), TRIALS - s], axis=1)
V = RNG.uniform(0.5, 2.0, N)
POISSON, BINOMIAL, GAUSSIAN = sm.families.Poisson, sm.families.Binomial, sm.families.Gaussian
TIGHT = {"tol": 1e-13, "maxiter": 100}

CASES = {
    "exposure": (COUNTS, {"exposure": EXPOSURE}, POISSON),
    "exposure and offset": (COUNTS, {"exposure": EXPOSURE, "offset": OFFSET}, POISSON),
    "weighted": (COUNTS, {"exposure": EXPOSURE, "var_weights": V}, POISSON),
    "Poisson": (COUNTS, {"exposure": EXPOSURE}, sm.Poisson),
    "Poisson both": (COUNTS, {"exposure": EXPOSURE, "offset": OFFSET}, sm.Poisson),
    "binomial": (YES, {"offset": OFFSET}, BINOMIAL),
    "trials": (SUCCESSES, {"offset": OFFSET}, BINOMIAL),
    "gaussian": (YES + x, {"offset": OFFSET}, GAUSSIAN),
    "gaussian weighted": (YES + x, {"offset": OFFSET, "var_weights": V}, GAUSSIAN),
}


def fit(case, rows=slice(None)):
    y, named, family = CASES[case]
    named = {name: value[rows] for name, value in named.items()}
    if family is sm.Poisson:
        return sm.Poisson(y[rows], X[rows], **named).fit(disp=0, tol=1e-13, maxiter=100)
    return sm.GLM(y[rows], X[rows], family=family(), **named).fit(**TIGHT)


def own(case, rows):
    """What queries of a case need by name."""
    return {k: v[rows] for k, v in CASES[case][1].items() if k != "var_weights"}


@pytest.mark.parametrize("case", CASES)
def test_diagnostics_with_an_offset_are_those_of_statsmodels(case):
    results = fit(case)
    ours = smx.diagnostics(results)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = results.get_influence()
        assert_close(ours.leverage, torch.from_numpy(theirs.hat_matrix_diag))
        assert_close(ours.cooks_distance, torch.from_numpy(theirs.cooks_distance[0]))
        assert_close(ours.dfbeta, torch.from_numpy(np.asarray(theirs.d_params)))
    refit = np.stack(
        [np.asarray(results.params) - fit(case, np.arange(N) != i).params for i in range(N)]
    )
    far = np.abs(ours.dfbeta.numpy() - refit) / np.abs(refit).max(axis=0)
    if "gaussian" in case:
        assert far.max() < 1e-10
    else:  # one Newton step; observed 0.01 to 0.06 of the largest
        assert far.max() < 0.1


def test_exposure_gives_the_published_numbers():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    e = rng.uniform(0.5, 3, 40)
    design = sm.add_constant(a)
    c = rng.poisson(e * np.exp(0.3 * a))
    results = sm.GLM(c, design, family=POISSON(), exposure=e).fit(tol=1e-12)
    found = smx.diagnostics(results).dfbeta[0].numpy()
    np.testing.assert_allclose(found, [0.01837442, 0.00435875], atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_a_task_with_an_offset_measures_eta_and_removes_as_dfbeta(case):
    results = fit(case)
    task, train = smx.task(results)
    y, _, _ = CASES[case]
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(task, train)
    outputs = task.outputs(task.theta(), train.batch(0, N))[0][:, 0]
    eta = X @ np.asarray(results.params) + sum(
        np.log(v) if k == "exposure" else v for k, v in own(case, slice(None)).items()
    )
    assert_close(outputs.detach(), torch.from_numpy(eta))
    diagnostics = smx.diagnostics(results)
    for row in (0, 7, 21):
        curve = fitted.parameter_influence(row)["weight"][0]
        assert_close(curve, diagnostics.influence_curve[row], rtol=1e-8, atol=1e-10)
        step = fitted.removal_step([row])["weight"][0]
        assert_close(-step, diagnostics.dfbeta[row], rtol=1e-8, atol=1e-10)
    # Queries of their own, by name.
    rows = slice(3, 9)
    queries = smx.data(results, X[rows], y[rows], **own(case, rows))
    if "var_weights" not in CASES[case][1]:
        expected = fitted.attribute(train.subset(range(3, 9))).values
        assert_close(fitted.attribute(queries).values, expected)
    for name in own(case, rows):
        left = {k: v for k, v in own(case, rows).items() if k != name}
        with pytest.raises(DataError, match=f"{name}=") as raised:
            smx.data(results, X[rows], y[rows], **left)
        assert f"need an {name}" in str(raised.value)
    with pytest.raises(DataError, match=r"smx\.data"):
        fitted.attribute((X[rows], y[rows]))
    loo = uw.evaluation.loo(
        fitted.removal(queries, uw.Logit(0), groups=range(0, 30, 3)),
        smx.recipe(results),
        range(0, 30, 3),
    )
    error = (loo.predicted - loo.actual).norm() / loo.actual.norm()
    assert error < (1e-9 if "gaussian" in case else 0.08)


def test_offsets_that_a_fit_did_not_have_and_bad_ones_are_refused():
    plain = sm.GLM(COUNTS, X, family=POISSON()).fit()
    with pytest.raises(DataError, match="leave it out"):
        smx.data(plain, X[:3], COUNTS[:3], offset=np.ones(3))
    rated = fit("exposure")
    for bad in (np.zeros(3), -np.ones(3), [1.0, np.nan, 1.0], np.ones(4), ["a", "b", "c"]):
        with pytest.raises(DataError, match="exposure must be"):
            smx.data(rated, X[:3], COUNTS[:3], exposure=bad)
    one = smx.data(rated, X[:3], COUNTS[:3], exposure=2.0)
    assert_close(one.batch(0, 3)[1], torch.full((3,), np.log(2.0)))


FRAME = pd.DataFrame({"y": COUNTS, "a": x, "b": OFFSET, "t": EXPOSURE})
NAMED = sm.add_constant(FRAME[["a", "b"]])


def test_columns_go_by_name():
    results = sm.OLS(FRAME["y"], NAMED).fit()
    fitted = uw.Influence().fit(*smx.task(results))
    expected = fitted.attribute(smx.data(results, NAMED[:5], FRAME["y"][:5])).values
    assert torch.equal(fitted.attribute((NAMED[:5], FRAME["y"][:5])).values, expected)
    shuffled = NAMED[["b", "const", "a"]]
    for ask in (smx.data, lambda _, *pair: fitted.attribute(pair)):
        with pytest.raises(
            DataError, match=r"const, a, b(.|\n)*pass exog\[\['const', 'a', 'b'\]\]"
        ):
            ask(results, shuffled[:5], FRAME["y"][:5])
        with pytest.raises(ShapeError, match="const, a, b"):
            ask(results, NAMED.rename(columns={"a": "A"})[:5], FRAME["y"][:5])
        with pytest.raises(DataError, match=r"endog\.loc\[exog\.index\]"):
            ask(results, NAMED[:5], FRAME["y"][:5][::-1])
    back = shuffled[["const", "a", "b"]]
    assert torch.equal(fitted.attribute((back[:5], FRAME["y"][:5])).values, expected)
    # An array has no names, and a note says so.
    scores = fitted.attribute((NAMED[:5].to_numpy(), FRAME["y"][:5].to_numpy()))
    assert torch.equal(scores.values, expected)
    assert any("without names" in note for note in scores.provenance.notes)
    # Where the fit had none either there is nothing to hold names to.
    unnamed = sm.OLS(COUNTS, X).fit()
    assert smx.data(unnamed, pd.DataFrame(X, columns=["p", "q"])[:3], COUNTS[:3]).notes == ()


def test_training_data_are_read_too():
    results = sm.OLS(FRAME["y"], NAMED).fit()
    task, train = smx.task(results)
    assert uw.Influence().fit(task, (NAMED, FRAME["y"])).train.arrays is train.arrays
    with pytest.raises(DataError, match="that it was fitted on"):
        uw.Influence().fit(task, (NAMED[:-1], FRAME["y"][:-1]))
    other = sm.OLS(FRAME["y"], NAMED + 1.0 * (NAMED != 1)).fit()
    fitted = uw.Influence().fit(task, train)
    with pytest.raises(DataError, match="same fitted model"):
        fitted.attribute(smx.data(other, NAMED[:3], FRAME["y"][:3]))
    with pytest.raises(DataError, match="as it was"):
        fitted.attribute(uw.as_data((X[:3], COUNTS[:3])))
    with pytest.raises(DataError, match="data frame of"):
        fitted.attribute({"x": X, "y": COUNTS})


def test_a_formula_reads_its_frame():
    frame = FRAME.assign(kind=np.where(np.arange(N) % 3 == 0, "north", "south"))
    results = smf.glm(
        "y ~ a + C(kind) + np.exp(b)", frame, family=POISSON(), exposure=frame["t"]
    ).fit(**TIGHT)
    task, train = smx.task(results)
    fitted = uw.Influence().fit(task, train)
    expected = fitted.attribute(train.subset(range(1, 3))).values
    some = frame[1:3]  # one category alone, columns in any order, more than are needed
    for queries in (
        smx.data(results, some, exposure=some["t"]),
        smx.data(results, some[some.columns[::-1]], some["y"], exposure=some["t"]),
        smx.data(results, results.model.exog[1:3], COUNTS[1:3], exposure=some["t"]),
    ):
        assert_close(fitted.attribute(queries).values, expected)
    plain = smf.ols("y ~ a + C(kind)", frame).fit()
    fitted = uw.Influence().fit(*smx.task(plain))
    expected = fitted.attribute(fitted.train.subset(range(3))).values
    for given in (frame[:3], (frame[:3],), (frame[:3].drop(columns="y"), COUNTS[:3])):
        assert_close(fitted.attribute(given).values, expected)
    with pytest.raises(DataError, match="category that the fit did not see"):
        fitted.attribute(frame[:3].assign(kind="west"))
    with pytest.raises(DataError, match="formula reads"):
        fitted.attribute(frame[:3].drop(columns="a"))
    with pytest.raises(DataError, match=r"dropna\(\)"):
        fitted.attribute(frame[:3].assign(a=[1.0, np.nan, 2.0]))
    with pytest.raises(DataError, match=r"Logit\(0\)") as raised:
        fitted.attribute(frame[:3].drop(columns="y"))
    assert "without a column 'y'" in str(raised.value)
    asked = fitted.attribute((frame[:3].drop(columns="y"), np.zeros(3)), uw.Logit(0))
    assert_close(asked.values, fitted.attribute(frame[:3], uw.Logit(0)).values)


def test_a_left_side_that_is_transformed_is_not_taken_from_its_column():
    frame = FRAME.assign(y=FRAME["y"] + 1.0)
    results = smf.ols("np.log(y) ~ a", frame).fit()
    fitted = uw.Influence().fit(*smx.task(results))
    with pytest.raises(DataError, match=r"left side of the formula, np\.log\(y\)"):
        fitted.attribute((frame[:3], frame["y"][:3]))
    expected = fitted.attribute(fitted.train.subset(range(3))).values
    assert_close(fitted.attribute((frame[:3], np.asarray(np.log(frame["y"][:3])))).values, expected)
    assert_close(fitted.attribute(frame[:3]).values, expected)


def test_a_left_side_that_looks_at_all_rows_or_at_a_function_of_yours_is_asked_for():
    def twice(y):
        return 2 * y

    for left in ("center(y)", "twice(y)"):
        results = smf.ols(f"{left} ~ a", FRAME).fit()
        with pytest.raises(DataError, match=r"function of yours(.|\n)*pass endog"):
            uw.Influence().fit(*smx.task(results)).attribute(FRAME[:3])


def test_counts_of_successes_and_failures_are_read_from_the_frame():
    frame = FRAME.assign(no=3.0)
    results = smf.glm("y + no ~ a", frame, family=sm.families.Binomial()).fit(**TIGHT)
    fitted = uw.Influence().fit(*smx.task(results))
    expected = fitted.attribute(fitted.train.subset(range(3))).values
    assert_close(fitted.attribute(frame[:3]).values, expected)
    with pytest.raises(DataError, match=r"without a column \['y', 'no'\]"):
        fitted.attribute(frame[:3].drop(columns="no"))


def test_a_frame_of_responses_and_columns_is_read_without_a_formula():
    results = sm.OLS(FRAME["y"], NAMED).fit()
    fitted = uw.Influence().fit(*smx.task(results))
    expected = fitted.attribute(fitted.train.subset(range(3))).values
    assert_close(fitted.attribute(NAMED[:3].assign(y=FRAME["y"])).values, expected)
    with pytest.raises(ShapeError, match=r"sm\.add_constant"):
        fitted.attribute(FRAME[:3])


def test_offsets_go_by_their_rows():
    rated = sm.GLM(FRAME["y"], NAMED, family=POISSON(), exposure=FRAME["t"]).fit()
    some = (NAMED[:4], FRAME["y"][:4])
    with pytest.raises(DataError, match=r"exposure\.loc\[exog\.index\]"):
        smx.data(rated, *some, exposure=FRAME["t"][:4][::-1])
    smx.data(rated, *some, exposure=FRAME["t"][:4][::-1].loc[some[0].index])


def test_text_is_refused_and_labels_are_numbers():
    results = sm.Logit(YES, X).fit(disp=0)
    fitted = uw.Influence().fit(*smx.task(results))
    with pytest.raises(DataError, match="endog must be numbers"):
        fitted.attribute((X[:2], ["yes", "no"]))
    assert torch.equal(
        fitted.attribute((X[:5], YES[:5] == 1)).values, fitted.attribute((X[:5], YES[:5])).values
    )
    row = int(np.flatnonzero(YES)[0])
    queries = (X[:5], YES[:5])
    assert bool((fitted.relabel_influence(row, True, queries) == 0).all())
    assert bool((fitted.relabel_influence(row, 0, queries) != 0).all())
    with pytest.raises(ShapeError, match="one number"):
        fitted.relabel_influence(row, [0, 1], queries)


def separated(kind):
    group = np.arange(60) % 3
    design = np.column_stack([np.ones(60), group == 1, group == 2]).astype(float)
    coin = (np.arange(60) * 7 % 5 < 2).astype(float)
    line = sm.add_constant(np.linspace(-1, 1, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "classes":
            return sm.Logit((line[:, 1] > 0).astype(float), line).fit(disp=0)
        if kind == "group of ones":
            return sm.Logit(np.where(group == 2, 1.0, coin), design).fit(disp=0)
        counts = np.where(group == 2, 0, 1 + 2 * coin)
        if kind == "counts of 0":
            return sm.Poisson(counts, design).fit(disp=0)
        if kind == "counts of 0 with exposure":
            return sm.GLM(counts, design, family=POISSON(), exposure=1.0 + group).fit()
        shares = np.stack([np.where(group == 2, 0, 1 + coin), np.full(60, 3)], axis=1)
        return sm.GLM(shares, design, family=BINOMIAL()).fit()


@pytest.mark.parametrize(
    "kind",
    ["classes", "group of ones", "counts of 0", "counts of 0 with exposure", "no success"],
)
def test_fits_on_their_way_to_infinity_are_refused(kind):
    results = separated(kind)
    for options in ({}, {"tolerance": np.inf}):
        with pytest.raises(NotStationary, match="must have a minimum") as raised:
            smx.task(results, **options)
    if kind != "classes":
        assert "the outputs of 20 of 60 examples (first [2, 5, 8, 11, 14])" in str(raised.value)
    with pytest.raises((NotStationary, uw.errors.NonFinite)):
        smx.diagnostics(results)


def test_collinear_columns_are_refused_by_task_as_by_diagnostics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statsmodels warns too
        results = sm.OLS(COUNTS, np.column_stack([X, 2 * x - 1])).fit()
    for translate in (smx.task, smx.diagnostics):
        with pytest.raises(NotPositiveDefinite, match="column 2 depends"):
            translate(results)


@pytest.mark.parametrize("kind", ["HC3", "cluster"])
def test_robust_standard_errors_are_said_not_to_be_used(kind):
    options = {"cov_kwds": {"groups": np.arange(N) // 4}} if kind == "cluster" else {}
    plain, robust = sm.OLS(COUNTS, X).fit(), sm.OLS(COUNTS, X).fit(cov_type=kind, **options)
    with pytest.warns(UserWarning, match=f"cov_type='{kind}'"):
        ours = smx.diagnostics(robust)
    assert kind in ours.notes[0]
    expected = smx.diagnostics(plain)
    assert expected.notes == ()
    assert_close(ours.dfbetas, expected.dfbetas)
    task, train = smx.task(robust)
    assert kind in train.notes[0]
    assert ("as a group" in train.notes[0]) == (kind == "cluster")
    assert train.notes[0] in uw.Influence().fit(task, train).attribute(train).provenance.notes


def test_a_results_object_in_place_of_a_task_is_told_of():
    results = sm.OLS(COUNTS, X).fit()
    for wrong in (
        lambda: uw.Task(results, uw.SquaredError()),
        lambda: uw.Influence().fit(results, (X, COUNTS)),
    ):
        with pytest.raises(UnsupportedModel, match=r"smx\.task\(results\)"):
            wrong()
