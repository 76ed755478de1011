"""The standard errors that statsmodels results report, and statsmodels' own fit of fewer rows.

    cov_type                 OLS, WLS, GLS            GLM, Logit, Probit, Poisson
    nonrobust, fixed scale   φ M⁻¹                    φ M⁻¹
    HC0 … HC3                as named                 all four are HC0 in statsmodels
    cluster                  one or two groupings, with the corrections of cov_kwds

What is translated is held to what the results say: `bse` and `conf_int` of the coefficient.
"""

import copy
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from upweight.adapters.statsmodels_regression import (
    KINDS,
    LINEAR,
    Regression,
    by_expected,
    dropped,
    offsets_of,
    regression_of,
    trials_left_out,
)
from upweight.applications.inference import Covariance, Inference, Kind
from upweight.applications.regression import ASTRAY, require_full_rank
from upweight.applications.regression_result import place as place_of
from upweight.errors import (
    DataError,
    NotStationary,
    ShapeError,
    UnsupportedModel,
    message,
)

REPRODUCED = 1e-6
"""Largest relative difference between `bse` and its translation."""

UNIT_SCALE = ("Binomial", "Poisson", "NegativeBinomial")
"""Families whose scale is 1 unless asked."""

REMAINS = 1e-3
"""Largest Newton step, in standard errors, that the user's fit or a refit may leave."""


@dataclass(frozen=True)
class Estimate:
    """A coefficient and its interval, as statsmodels reports them; or why it does not."""

    value: float
    low: float
    high: float
    reason: str = ""

    @classmethod
    def none(cls, reason: str) -> "Estimate":
        """What there is where there is none."""
        return cls(np.nan, np.nan, np.nan, reason)


@dataclass(frozen=True, eq=False)
class ReportedInference:
    """A coefficient of statsmodels results, and statsmodels' own fit of some of the rows."""

    results: Any
    place: int
    name: str
    inference: Inference
    rows: tuple[Any, ...]
    estimate: Estimate
    notes: tuple[str, ...]

    def refit(self, keep: np.ndarray) -> Estimate:
        """The same model fitted by statsmodels to the rows of the mask `keep`."""
        model = self.results.model
        exog = np.asarray(model.exog, dtype=np.float64)[keep]
        if len(exog) <= exog.shape[1] or np.linalg.matrix_rank(exog) < exog.shape[1]:
            # statsmodels would go on with a pseudo-inverse.
            return Estimate.none("the columns of the rows that are left are dependent")
        try:
            with warnings.catch_warnings():
                # Convergence is judged below, and separation by it.
                warnings.simplefilter("ignore")
                found = _fitted(self.results, model, exog, keep)
                step, moved = _remaining(found)
                ends = np.asarray(found.conf_int(alpha=1 - self.inference.level))[self.place]
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            return Estimate.none(f"statsmodels says: {said[0]}")
        except Exception as error:
            if type(error).__name__ != "PerfectSeparationError":
                raise
            reason = "a hyperplane separates the classes of the rows that are left"
            return Estimate.none(reason)
        if not moved <= ASTRAY:
            reason = "no finite estimate: a hyperplane separates the rows that are left"
            return Estimate.none(reason)
        if not step <= REMAINS:
            reason = f"statsmodels' fit did not arrive: {step:.1e} standard errors remain"
            return Estimate.none(reason)
        value = float(np.asarray(found.params)[self.place])
        if not np.isfinite([value, *ends]).all():
            return Estimate.none("statsmodels reports no standard error")
        return Estimate(value, float(ends[0]), float(ends[1]))


def inference_of(results: Any, coefficient: str | int, level: float) -> ReportedInference:
    """What results report of a coefficient, as a function of the data weights.

    Args:
        results: Fitted results; see `upweight.adapters.statsmodels.supports`.
        coefficient: Its name, or its place.
        level: Of the interval.

    Raises:
        UnsupportedModel: Another model or standard error; the reason and what to use.
        SpecError: There is no such coefficient.
        NotStationary: The estimate is not at its maximum.
    """
    found = regression_of(results)
    if found.repeated:
        raise UnsupportedModel(
            "Which rows carry a finding is asked of rows that stand for one observation each.",
            "a GLM with freq_weights, whose rows stand for several.",
            "a table of counts of equal rows.",
            "repeat the rows, frame.loc[frame.index.repeat(counts)], and fit again; or use "
            "var_weights if that is what was meant.",
        )
    if found.whitened or found.alpha is not None:
        raise UnsupportedModel(
            "Which rows carry a finding is asked of rows that leave one by one, of one linear "
            "predictor.",
            "GLS with correlated rows." if found.whitened else "NegativeBinomial with α estimated.",
            "a covariance or a dispersion of all rows together.",
            "ask of sm.OLS(model.endog, model.exog).fit(cov_type='cluster', cov_kwds={'groups': "
            "...}), with groups=."
            if found.whitened
            else "ask of the same by sm.GLM(..., family=sm.families.NegativeBinomial("
            f"alpha={found.alpha:.4g})).",
        )
    place = place_of(found.names, coefficient)
    require_full_rank(found.X, found.weights)
    notes: list[str] = []
    covariance = _covariance(results, notes)
    shift = np.zeros(len(found.y)) if found.offset is None else found.offset
    X, y, v, offset = (
        torch.from_numpy(np.array(a, dtype=np.float64))
        for a in (found.X, found.y, found.weights, shift)
    )
    inference = Inference(X, y, v, offset, found.loss, place, covariance, level)
    name = found.names[place]
    estimate = _reproduced(results, inference, found, name)
    left_out = dropped(results.model)
    if left_out:
        notes.append(f"statsmodels left out {len(left_out)} rows with missing values")
    return ReportedInference(results, place, name, inference, found.rows, estimate, tuple(notes))


def labels_of(results: Any, groups: Any, rows: Sequence[Hashable]) -> list[Hashable]:
    """The group of every row of the fit.

    Args:
        results: As fitted.
        groups: A label per row; a Series, paired by its index; or a column of a formula's frame.
        rows: Labels of the rows.

    Raises:
        DataError: A label is missing, or there is no such column.
        ShapeError: There are more or fewer labels than rows.
    """
    if isinstance(groups, str):
        frame = getattr(results.model.data, "frame", None)
        if frame is None or groups not in frame.columns:
            raise DataError(
                "groups by name is a column of the data frame that the formula was given.",
                f"{groups!r}, of " + ("arrays." if frame is None else "a frame without it."),
                "a fit of arrays, or a column of another frame.",
                "pass the labels themselves: groups=frame['village'].",
            )
        groups = frame[groups]
    if hasattr(groups, "reindex") and groups.index.is_unique and set(rows) <= set(groups.index):
        groups = groups.loc[list(rows)]
    labels = [*np.asarray(groups, dtype=object).reshape(-1)]
    if len(labels) != len(rows):
        raise ShapeError(
            f"groups has a label for each of the {len(rows)} rows of the fit.",
            f"{len(labels)} labels.",
            "rows that statsmodels left out for missing values.",
            "pass a Series with the index of the data frame.",
        )
    missing = [row for row, label in zip(rows, labels, strict=True) if label != label]
    if missing or any(label is None for label in labels):
        raise DataError(
            "Every row belongs to a group.",
            f"no label at rows {missing[:5]}.",
            "missing values in the column.",
            "fill them, groups.fillna('none'), or leave these rows out of the fit.",
        )
    return [label.item() if isinstance(label, np.generic) else label for label in labels]


def _covariance(results: Any, notes: list[str]) -> Covariance:
    model = results.model
    linear = type(model).__name__ in LINEAR
    kind, given = str(results.cov_type), dict(getattr(results, "cov_kwds", None) or {})
    factor = given.get("scaling_factor")
    factor = 1.0 if factor is None else float(factor)
    t = bool(results.use_t)
    if kind in ("nonrobust", "fixed scale", "fixed_scale"):
        expected = not linear and type(model).__name__ == "GLM" and by_expected(results)
        return Covariance("model", _scale(results, linear, kind), t=t, expected=expected)
    if kind.upper() in ("HC0", "HC1", "HC2", "HC3"):
        formula: Kind = kind.upper()  # type: ignore[assignment]
        if not linear and formula != "HC0":
            notes.append(
                f"the standard errors of cov_type={kind!r} are those of HC0: statsmodels has no "
                f"correction of them for {type(model).__name__}"
            )
            formula = "HC0"
        return Covariance(formula, factor=factor, t=t)
    if kind == "cluster":
        codes = _codes(np.asarray(given["groups"]))
        corrected, by_clusters = bool(given["use_correction"]), bool(given["adjust_df"])
        return Covariance("cluster", None, codes, corrected, factor, t, by_clusters)
    raise UnsupportedModel(
        "The standard error must be nonrobust, HC0 to HC3, or cluster.",
        f"cov_type={kind!r}.",
        "time series, whose rows cannot leave one by one, or a covariance by simulation.",
        "fit again with .fit(cov_type='HC1'), or cov_type='cluster' with "
        "cov_kwds={'groups': ...} of what can leave together.",
    )


def _scale(results: Any, linear: bool, kind: str) -> float | None:
    """φ, or None where it is X²/(N − p)."""
    if linear:
        return None if kind == "nonrobust" else float(results.scale)
    if type(results.model).__name__ in KINDS:
        return 1.0
    asked = results.model.scaletype
    if isinstance(asked, str) and asked.lower() == "dev":
        if type(results.model.family).__name__ != "Gaussian":
            raise UnsupportedModel(
                "The scale must be fixed, or estimated by Pearson's X².",
                "scale='dev'.",
                "a dispersion from the deviance.",
                "fit again with .fit(scale='X2').",
            )
        return None
    if isinstance(asked, str):
        wrong = trials_left_out(results)
        if wrong:
            raise UnsupportedModel(
                "Standard errors by scale='X2' must be those of Pearson's X²/(n − p).",
                f"counts of successes and failures, and a scale of {wrong}.",
                "statsmodels' estimate of the scale leaves out the numbers of trials, so that its "
                "standard errors are too small.",
                "fit shares, successes / trials, with var_weights=trials and scale='X2'.",
            )
        return None
    if asked is not None:
        return float(asked)
    return 1.0 if type(results.model.family).__name__ in UNIT_SCALE else None


def _codes(groups: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Clusters numbered from 0; of two groupings also their intersection."""
    columns = [groups] if groups.ndim == 1 else [groups[:, 0], groups[:, 1]]
    coded = [np.unique(column, return_inverse=True)[1].reshape(-1) for column in columns]
    if len(coded) == 2:
        both = coded[0].astype(np.int64) * (int(coded[1].max()) + 1) + coded[1]
        coded.append(np.unique(both, return_inverse=True)[1].reshape(-1))
    return tuple(torch.from_numpy(part.astype(np.int64)) for part in coded)


def _reproduced(results: Any, inference: Inference, found: Regression, name: str) -> Estimate:
    """What is reported, held to its translation."""
    gamma = inference.coordinates(torch.from_numpy(found.beta))[None]
    ones = torch.ones(1, len(found.y), dtype=torch.float64)
    error = float(np.asarray(results.bse)[inference.place])
    if not (np.isfinite(error) and error > 1e-12 * np.abs(found.beta).max()):
        raise DataError(
            "A standard error needs residuals, and more rows than columns.",
            f"{error:.2g} for {name}, of {len(found.y)} rows and {len(found.beta)} columns.",
            "a response that is a linear function of the columns, or too few rows.",
            "leave out the column that holds the response, or fit fewer columns.",
        )
    ends = np.asarray(results.conf_int(alpha=1 - inference.level))[inference.place]
    apart = _apart(results, inference, found.beta)
    if REPRODUCED < apart <= REMAINS and type(results.model).__name__ == "GLM":
        # Reweighted least squares keeps the covariance of the step before its last: what stopped
        # early is held to statsmodels' own fit that went on.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            on = _fitted(results, results.model, found.X, np.ones(len(found.y), dtype=bool))
        apart = _apart(on, inference, np.asarray(on.params, dtype=np.float64))
    if not apart <= REPRODUCED:
        ours = inference.reported(gamma, ones)
        raise UnsupportedModel(
            f"The standard error of {name} must be reproduced before it is differentiated.",
            f"{error:.8g} reported with cov_type={results.cov_type!r}, {float(ours.error):.8g} by "
            "its formula.",
            "results that were changed after the fit, or a correction that is not known here.",
            "fit again, model.fit(cov_type=...), and pass what it returns as it is.",
        )
    moved = inference.solved(ones, gamma)
    step = abs(float((moved - gamma)[0] @ inference.contrast)) / error
    if not step <= REMAINS:
        raise NotStationary(
            message(
                "The estimate must be at its maximum.",
                f"{name} would still move by {step:.1e} standard errors.",
                "a fit that stopped early, or classes that a hyperplane separates.",
                "fit with a smaller tolerance: .fit(method='newton', maxiter=100).",
            )
        )
    return Estimate(float(found.beta[inference.place]), float(ends[0]), float(ends[1]))


def _apart(results: Any, inference: Inference, beta: np.ndarray) -> float:
    """How far what results report is from its formula, in standard errors."""
    gamma = inference.coordinates(torch.from_numpy(beta))[None]
    ours = inference.reported(gamma, torch.ones(1, len(inference.y), dtype=torch.float64))
    error = float(np.asarray(results.bse)[inference.place])
    ends = np.asarray(results.conf_int(alpha=1 - inference.level))[inference.place]
    of_ends = (abs(float(ours.end(s)) - e) / error for s, e in ((-1, ends[0]), (1, ends[1])))
    return max(abs(float(ours.error) / error - 1), *of_ends)


def _fitted(results: Any, model: Any, exog: np.ndarray, keep: np.ndarray) -> Any:
    """`type(model)(…)` of the rows, with all it was made with, fitted with the same cov_type."""
    n = len(keep)
    endog = np.asarray(model.data.endog)  # of a binomial GLM before counts become shares
    own = {
        key: np.asarray(value)[keep] if np.ndim(value) and len(value) == n else value
        for key, value in model._get_init_kwds().items()
        if value is not None and key not in ("missing", "hasconst", "freq_weights", "cholsigmainv")
    }
    for key in ("offset", "exposure"):
        if key not in offsets_of(model):
            own.pop(key, None)
    if "family" in own:
        own["family"] = copy.copy(own["family"])  # a binomial one keeps the trials of its model
    again = type(model)(endog[keep], exog, **own)
    given = dict(getattr(results, "cov_kwds", None) or {})
    kind = str(results.cov_type)
    asked: dict[str, Any] = {}
    if kind == "cluster":
        asked = {
            "groups": np.asarray(given["groups"])[keep],
            "use_correction": given["use_correction"],
            "df_correction": given["adjust_df"],
        }
    elif kind.startswith("fixed"):
        asked = {"scale": float(results.scale)}
    if given.get("scaling_factor") is not None:
        asked["scaling_factor"] = given["scaling_factor"]
    fit = {"cov_type": kind, "use_t": bool(results.use_t)} | ({"cov_kwds": asked} if asked else {})
    if type(model).__name__ in LINEAR:
        return again.fit(**fit)
    start = np.asarray(results.params)
    if type(model).__name__ == "GLM":
        if not by_expected(results):
            fit |= {"method": results.method, "disp": 0}
        return again.fit(start_params=start, maxiter=100, tol=1e-12, scale=model.scaletype, **fit)
    return again.fit(start_params=start, method="newton", maxiter=100, disp=0, **fit)


def _remaining(found: Any) -> tuple[float, float]:
    """The Newton step that a likelihood fit left, in standard errors, and how far it moves η."""
    model = found.model
    if type(model).__name__ in LINEAR:
        return 0.0, 0.0
    params = np.asarray(found.params)
    scaled = {"scale": 1.0} if type(model).__name__ == "GLM" else {}
    inverse = np.linalg.inv(-model.hessian(params, **scaled))
    step = inverse @ model.score(params, **scaled)
    errors = np.abs(step) / np.sqrt(inverse.diagonal())
    return float(np.max(errors)), float(np.max(np.abs(model.exog @ step)))
