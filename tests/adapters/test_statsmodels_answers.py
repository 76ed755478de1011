"""Figures, tables and sentences for statisticians: held to statsmodels' own numbers and refits."""

import matplotlib
import numpy as np
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw
from tests.applications.outcomes import holds
from upweight.adapters import sklearn as sk
from upweight.adapters import statsmodels as smx
from upweight.applications import robustness
from upweight.errors import SpecError

matplotlib.use("Agg")

STATES = sm.datasets.statecrime.load_pandas().data
DC = "District of Columbia"


@pytest.fixture(scope="module")
def murder():
    return smf.ols("murder ~ urban + poverty + single + hs_grad", STATES).fit()


@pytest.fixture(scope="module")
def found(murder):
    return smx.diagnostics(murder)


def heights(ax):
    return np.asarray(ax.collections[-1].get_offsets())[:, 1]


def texts(ax):
    return {text.get_text() for text in ax.texts}


def levels(ax):
    """Horizontal lines."""
    return sorted(y[0] for line in ax.lines if len(set(y := tuple(line.get_ydata()))) == 1)


def test_figures_hold_the_numbers_of_statsmodels(murder, found):
    theirs = murder.get_influence()
    n, p = 51, 5
    ax = found.plot()
    points = ax.collections[0]
    np.testing.assert_allclose(
        points.get_offsets(),
        np.stack([theirs.hat_matrix_diag, theirs.resid_studentized_external], 1),
        rtol=1e-8,
    )
    areas = points.get_sizes() - 4
    np.testing.assert_allclose(areas / areas.max(), found.cooks_distance / 4.75, atol=1e-3)
    assert DC in texts(ax) and ax.get_xlabel() == "leverage"
    t = stats.t.ppf(0.975, n - p)
    np.testing.assert_allclose(levels(ax), [-t, 0, t], atol=1e-12)
    # A contour of D is where statsmodels' formula gives it, in external residuals.
    (curve,) = [line for line in ax.lines if line.get_linestyle() == ":"][:1]
    h, out = (np.asarray(v) for v in curve.get_data())
    inner = out * np.sqrt((n - p) / (n - p - 1 + out**2))
    np.testing.assert_allclose((inner**2 * h / (1 - h) / p)[np.isfinite(out)], 0.5)

    ax = found.plot("leverage_resid2")
    other = stats.zscore(theirs.resid) ** 2
    np.testing.assert_allclose(
        ax.collections[0].get_offsets(), np.stack([other, theirs.hat_matrix_diag], 1), rtol=1e-8
    )
    expected = {
        "cooks_distance": (theirs.cooks_distance[0], [0, 4 / n, 0.5, 1]),
        "dffits": (theirs.dffits[0], [-2 * (p / n) ** 0.5, 0, 2 * (p / n) ** 0.5]),
        "leverage": (theirs.hat_matrix_diag, [0, 2 * p / n, 3 * p / n]),
        "studentized": (theirs.resid_studentized_external, [-t, 0, t]),
    }
    for kind, (values, lines) in expected.items():
        ax = found.plot(kind)
        np.testing.assert_allclose(heights(ax), values, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(levels(ax), lines, atol=1e-12)
        beyond = {str(STATES.index[i]) for i in np.argsort(-abs(values))[:2]}
        assert beyond & texts(ax)
    ax = found.plot("dfbetas", coefficient="hs_grad", label=1)
    np.testing.assert_allclose(heights(ax), theirs.dfbetas[:, 4], rtol=1e-8, atol=1e-12)
    assert texts(ax) == {DC}
    lines = {line.get_label(): line.get_ydata() for line in found.plot("dfbetas").lines}
    np.testing.assert_allclose(lines["poverty"], theirs.dfbetas[:, 2], rtol=1e-8, atol=1e-12)


def test_of_a_likelihood_they_are_those_of_its_pearson_residuals():
    y, X = (getattr(sm.datasets.spector.load_pandas(), k) for k in ("endog", "exog"))
    results = sm.GLM(y, sm.add_constant(X), family=sm.families.Binomial()).fit(tol=1e-14)
    theirs, ours = results.get_influence(), smx.diagnostics(results)
    points = ours.plot("influence").collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 1], theirs.resid_studentized, rtol=1e-8)
    across = ours.plot("leverage_resid2").collections[0].get_offsets()[:, 0]
    np.testing.assert_allclose(across, stats.zscore(theirs.resid) ** 2, rtol=1e-8)


def test_tables_and_short_forms_have_names(found):
    first = found.table(2)
    assert list(first.index) == [DC, "Mississippi"]
    assert found.table(1, by="dfbetas_poverty").columns[0] == "dfbetas_poverty"
    assert len(found.table()) == 51
    text = repr(found)
    assert len(text.splitlines()) == 7 and DC in text and "hs_grad" in text
    assert DC in found._repr_html_() and "46 rows" in found._repr_html_()
    for call, way_out in (
        (lambda: found.plot("cook"), "plot('cooks_distance')"),
        (lambda: found.plot("dfbetas", coefficient="grad"), "'hs_grad'"),
        (lambda: found.plot("leverage", coefficient="hs_grad"), "plot('dfbetas'"),
        (lambda: found.plot(label=-1), "label=5"),
        (lambda: found.table(by="cooks"), "cooks_distance"),
    ):
        with pytest.raises(SpecError) as raised:
            call()
        assert way_out in str(raised.value)


def test_one_state_carries_a_finding(murder):
    answer = holds(smx.fragile(murder, "hs_grad"))
    sign, significance, both = answer.findings
    assert sign.rows == significance.rows == (DC,) and sign.k == 1
    assert f"without 1 of 51 rows ({DC}) it goes to −0.0164" in answer.verdict
    assert f"1 of 51 rows (2.0 %; {DC})" in sign.verdict
    again = smf.ols(murder.model.formula, STATES.drop(index=DC)).fit()
    interval = [again.params["hs_grad"], *again.conf_int().loc["hs_grad"]]
    table = answer.frame()
    np.testing.assert_allclose(table.loc[1, ["estimate", "low", "high"]].astype(float), interval)
    without = smf.ols(murder.model.formula, STATES.drop(index=list(both.rows))).fit()
    assert without.params["hs_grad"] < 0 and without.pvalues["hs_grad"] < 0.05
    ax = answer.plot()
    assert f"without {DC}\n(sign)" in [label.get_text() for label in ax.get_yticklabels()]
    assert f"({DC})" in answer._repr_html_()
    none = holds(robustness.fragile(murder, "urban", targets=["significance"], most=1))
    assert not none.is_confirmed and "does not show that none" in none.verdict
    with pytest.raises(SpecError, match=r"targets=\['sign'\]"):
        smx.fragile(murder, "hs_grad", targets=[])
    (alone,) = smx.fragile(murder, "hs_grad", "sign").findings
    assert alone.rows == sign.rows


def test_the_interval_of_a_robust_fit_is_said_to_be_robust(murder):
    robust = smf.ols(murder.model.formula, STATES).fit(cov_type="HC3")
    answer = smx.fragile(robust, "hs_grad", targets=["significance"], most=5)
    assert any("cov_type='HC3'" in note for note in answer.notes)


def test_coefficients_go_by_the_names_of_columns(murder):
    scores = uw.attribute(murder, None, STATES[:2])  # a formula's frame as queries
    fitted = scores.context.fitted
    by_name = fitted.attribute(None, uw.Coefficient("hs_grad")).values
    np.testing.assert_allclose(
        by_name[0], smx.diagnostics(murder).influence_curve[:, 4] / 51, rtol=1e-6, atol=1e-12
    )
    with pytest.raises(SpecError, match=r"Coefficient\('hs_grad'\)"):
        fitted.attribute(None, uw.Coefficient("grad"))
    frame = STATES[["urban", "poverty", "single"]].rename(columns={"single": "weight"})
    label = np.where(STATES.murder > 8, "high", np.where(STATES.murder > 4, "middle", "low"))
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10)).fit(frame, label)
    three = uw.Influence().fit(*sk.task(pipeline, frame, label))
    every = three.attribute(None, uw.Coefficient("weight[1, 1]")).values
    np.testing.assert_allclose(three.attribute(None, uw.Coefficient("poverty")).values[1], every[0])
    with pytest.raises(SpecError, match=r"Coefficient\('weight\[0, 2\]'\)"):
        three.attribute(None, uw.Coefficient("weight"))
