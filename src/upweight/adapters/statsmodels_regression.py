"""Which statsmodels results have a translation, and the arrays of one.

η = X β + o        o = offset + log exposure, where the fit had them
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.adapters.support import Support
from upweight.errors import UnsupportedModel
from upweight.task.likelihoods import DispersedCounts, Likelihood
from upweight.task.losses import Bernoulli, Loss, Poisson, SquaredError

CANONICAL: dict[tuple[str, str], Loss] = {
    ("Gaussian", "Identity"): SquaredError(),
    ("Binomial", "Logit"): Bernoulli(),
    ("Poisson", "Log"): Poisson(),
}

KINDS: dict[str, Loss] = {
    "OLS": SquaredError(),
    "WLS": SquaredError(),
    "GLS": SquaredError(),
    "Logit": Bernoulli(),
    "Probit": Likelihood("binomial", "probit"),
    "Poisson": Poisson(),
    "NegativeBinomial": DispersedCounts(),
}

LINEAR = ("OLS", "WLS", "GLS")

LINKS = {
    "Identity": "identity",
    "Log": "log",
    "InversePower": "inverse",
    "InverseSquared": "inverse squared",
    "Sqrt": "sqrt",
}

BINOMIAL_LINKS = {"Probit": "probit", "CLogLog": "cloglog", "Log": "log"}

POWERS = {"Gaussian": 0.0, "Poisson": 1.0, "Gamma": 2.0, "InverseGaussian": 3.0}

INSTEAD = {
    "QuantReg": (
        "the absolute loss has no curvature, and rows do not pull on an estimate smoothly",
        "leave rows out and fit again (one linear program), or ask about the mean: sm.OLS with "
        "cov_type='HC3'",
    ),
    "MixedLM": (
        "its likelihood is one of whole groups, not of rows",
        "ask of sm.OLS(...).fit(cov_type='cluster', cov_kwds={'groups': ...}) with "
        "smx.fragile(..., groups=), which leaves whole groups out, or leave groups out and fit "
        "again",
    ),
    "GEE": (
        "its working correlation couples the rows of a group",
        "ask of the GLM with cov_type='cluster', which has the same mean model",
    ),
    "RLM": (
        "its estimate is of no likelihood that is kept with it",
        "write the norm as a loss: upweight.Task(model, upweight.Huber(delta)), or ask of sm.OLS",
    ),
    "MNLogit": (
        "its classes have a column of coefficients each",
        "fit scikit-learn's LogisticRegression(C=float('inf')), which upweight.adapters.sklearn "
        "translates",
    ),
}
"""Why there is no translation, and what can be done instead, by the kind of model."""

UNKNOWN = (
    "a model that is not a likelihood of one linear predictor, or keeps what one linear map cannot "
    "hold",
    "write its likelihood as a PyTorch model and loss, and use Task directly",
)

PENALIZED = "the fit was penalized; statsmodels does not keep the penalty"

CONSTRAINED = "the fit was constrained: its estimate does not minimize the loss"

FITS = {
    PENALIZED: (
        "fit_regularized, whose estimate is not that of the likelihood alone",
        "fit without a penalty, model.fit(), or fit the same by scikit-learn (Ridge, Lasso, "
        "LogisticRegression), whose estimators keep theirs",
    ),
    CONSTRAINED: (
        "fit_constrained, whose estimate does not minimize the loss",
        "put the constraint into the columns, such as I(a + b) in place of a + b for a = b, and "
        "fit without it; or ask of model.fit()",
    ),
}
"""Why there is no translation of a fit, and what can be done instead, by the reason."""


@dataclass(frozen=True, eq=False)
class Regression:
    """The arrays of a fitted regression, in statsmodels' own order of rows and columns."""

    X: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    beta: np.ndarray
    loss: Loss
    names: tuple[str, ...]
    rows: tuple[Hashable, ...]
    scale: float | None
    repeated: bool
    offset: np.ndarray | None
    expected: bool = False
    """Whether standard errors are of the expected information."""
    alpha: float | None = None
    """The dispersion that was estimated with β, of a negative binomial."""
    whitened: bool = False
    """Whether rows are combinations of those that were given: of GLS with correlations."""


def supports(results: Any) -> Support:
    """Whether a results object can be translated, with the reason."""
    model: Any = getattr(results, "model", None)
    kind, module = type(model).__name__, type(model).__module__
    if not (hasattr(results, "params") and module.startswith("statsmodels.")):
        return Support(
            False, f"{type(results).__name__} is not a fitted statsmodels results object"
        )
    inner = type(getattr(results, "_results", results)).__name__
    if "Regularized" in inner or inner.startswith("L1"):
        return Support(False, PENALIZED)
    if getattr(model, "exog", None) is None or getattr(model, "endog", None) is None:
        return Support(False, "the results no longer hold their data (remove_data); fit again")
    if getattr(results, "constraints", None) is not None:
        return Support(False, CONSTRAINED)
    if kind == "NegativeBinomial" and model.loglike_method != "nb2":
        own = f"NegativeBinomial with loglike_method={model.loglike_method!r}"
        return Support(False, f"{own}: only nb2 is supported, whose variance is μ + α μ²")
    if kind in KINDS:
        return Support(True, f"{kind}: {KINDS[kind]!r} of a linear predictor")
    if kind != "GLM":
        instead = INSTEAD.get(kind)
        return Support(
            False,
            f"{kind} is not among {', '.join(KINDS)} and GLM"
            + ("" if instead is None else f": {'; '.join(instead)}"),
        )
    loss = _of_glm(model)
    if loss is None:
        family, link = type(model.family).__name__, type(model.family.link).__name__
        links = f"{', '.join(LINKS)}; of Binomial Logit, {', '.join(BINOMIAL_LINKS)}"
        return Support(False, f"{family} with link {link} has no formula here; links: {links}")
    return Support(True, f"{type(model.family).__name__}: {loss!r} of a linear predictor")


def _of_glm(model: Any) -> Loss | None:
    """The loss of a GLM, by its family and link; None where there is none here."""
    family, link = type(model.family).__name__, type(model.family.link).__name__
    if (family, link) in CANONICAL:
        return CANONICAL[family, link]
    if family == "Binomial":
        own = BINOMIAL_LINKS.get(link)
        return None if own is None else Likelihood("binomial", own)
    power = float(getattr(model.family.link, "power", 0.0))
    named = {1.0: "identity", -1.0: "inverse", -2.0: "inverse squared", 0.5: "sqrt"}
    plain = LINKS.get(link) if link != "Power" else named.get(power)
    if plain is None:
        return None
    if family == "NegativeBinomial":
        alpha = float(model.family.alpha)
        return Likelihood("negative binomial", plain, alpha) if alpha > 0 else None
    if family == "Tweedie":
        p = float(model.family.var_power)
        return Likelihood("power", plain, p) if p == 0 or p >= 1 else None
    return Likelihood("power", plain, POWERS[family]) if family in POWERS else None


def loss_of(results: Any) -> Loss:
    """The loss of supported results, or the reason for a no as an error."""
    found = supports(results)
    model = getattr(results, "model", None)
    if not found and hasattr(results, "exog") and not hasattr(results, "params"):
        raise UnsupportedModel(
            "What is asked about are the results of a fit.",
            f"{type(results).__name__}, a model that was not fitted.",
            "the model in place of what its fit returned.",
            "results = model.fit(), and pass results.",
        )
    if not found:
        kind = type(model).__name__
        cause, way_out = FITS.get(found.reason) or INSTEAD.get(kind, UNKNOWN)
        raise UnsupportedModel(
            f"The results must be of {', '.join(KINDS)} or GLM.",
            f"those of {kind}."
            if kind in INSTEAD
            else f"{type(results).__name__}: {found.reason}.",
            f"{cause}.",
            f"{way_out}.",
        )
    assert model is not None
    if type(model).__name__ in KINDS:
        return KINDS[type(model).__name__]
    loss = _of_glm(model)
    assert loss is not None
    return loss


def regression_of(results: Any) -> Regression:
    """The arrays of supported results."""
    loss = loss_of(results)
    model = results.model
    kind = type(model).__name__
    X = np.array(model.exog, dtype=np.float64)
    y = np.array(model.endog, dtype=np.float64).reshape(-1)
    weights, scale, repeated = np.ones(len(y)), None, False
    expected = whitened = False
    if kind == "WLS":
        weights = np.array(model.weights, dtype=np.float64).reshape(-1)
    if kind == "GLS" and model.sigma is not None:
        whitened = np.ndim(model.sigma) == 2
        if whitened:
            X, y = (np.array(part, dtype=np.float64) for part in (model.wexog, model.wendog))
        else:
            weights = 1 / np.array(model.sigma, dtype=np.float64).reshape(-1)
    if kind == "GLM":
        weights = np.array(model.iweights, dtype=np.float64).reshape(-1)
        repeated = bool(np.any(np.asarray(model.freq_weights) != 1))
        if type(model.family).__name__ == "Binomial":
            weights = weights * np.array(model.n_trials, dtype=np.float64)
        # A residual variance is estimated anew without each row; any other scale stays as it is.
        estimated = np.isclose(results.scale, results.pearson_chi2 / results.df_resid, rtol=1e-9)
        scale = None if loss == SquaredError() and estimated else float(results.scale)
        expected = by_expected(results)
    beta = np.array(results.params, dtype=np.float64).reshape(-1)
    alpha = float(beta[-1]) if isinstance(loss, DispersedCounts) else None
    beta = beta[: X.shape[1]]
    names = columns_of(model)
    shifts = offsets_of(model)
    offset = np.sum(list(shifts.values()), axis=0) if shifts else None
    return Regression(
        X, y, weights, beta, loss, names, rows_of(model), scale, repeated, offset, expected,
        alpha, whitened,
    )  # fmt: skip


def trials_left_out(results: Any) -> str:
    """What statsmodels' scale of a fit leaves out, in words; empty where it is whole.

    scale="X2"      Σ vᵢ (sᵢ − μᵢ)² / V(μᵢ) / (n − p) for shares sᵢ of counts, without the
                    numbers of trials, which X² has
    """
    model = results.model
    scale = getattr(model, "scaletype", None)
    trials = np.asarray(getattr(model, "n_trials", 1.0))
    if not (isinstance(scale, str) and scale.lower() == "x2" and np.any(trials != 1)):
        return ""
    whole = results.pearson_chi2 / results.df_resid
    return f"{float(results.scale):.4g}, where X²/(n − p) is {float(whole):.4g}"


def columns_of(model: Any) -> tuple[str, ...]:
    """Names of the columns of exog; statsmodels adds that of a dispersion."""
    return tuple(map(str, model.exog_names[: np.shape(model.exog)[1]]))


def by_expected(results: Any) -> bool:
    """Whether a GLM was fitted by iteratively reweighted least squares, or asked for EIM."""
    return str(getattr(results, "method", "IRLS")).upper() == "IRLS"


def whitened_notes(found: Regression) -> tuple[str, ...]:
    """What to say of rows that are no observations."""
    if not found.whitened:
        return ()
    return (
        "GLS with correlations: row i is the i-th whitened row, a combination of observations by "
        "the Cholesky factor of Σ⁻¹; to remove it is not to remove observation i",
    )


def offsets_of(model: Any) -> dict[str, np.ndarray]:
    """What the fit added to Xβ, by the name it was given under; an exposure as its logarithm.

    statsmodels keeps the logarithm of an exposure under that name.
    """
    found = {name: getattr(model, name, None) for name in ("offset", "exposure")}
    return {
        name: np.broadcast_to(np.asarray(value, dtype=np.float64), (len(model.exog),))
        for name, value in found.items()
        if value is not None and (np.ndim(value) > 0 or value != 0)
    }


def robust_notes(results: Any, what: str) -> tuple[str, ...]:
    """What to say of a fit whose standard errors do not trust its own variance."""
    kind = getattr(results, "cov_type", "nonrobust")
    if kind == "nonrobust":
        return ()
    rest = "clusters" if "cluster" in str(kind) else "rows"
    said = {
        "standard errors": "DFBETAS, DFFITS and Cook's distance are in units of the plain ones",
        "scores": f"scores are of the estimate, which they do not enter; what is removed are "
        f"{rest}" + (": pass the rows of one as a group" if rest == "clusters" else ""),
    }[what]
    return (f"the fit has cov_type={kind!r}, robust standard errors: {said}",)


def dropped(model: Any) -> list[int]:
    """Positions of the rows that were left out for missing values."""
    found = getattr(model.data, "missing_row_idx", None)
    return [] if found is None else [int(i) for i in found]


def rows_of(model: Any) -> tuple[Hashable, ...]:
    """Labels of the rows that were fitted; positions where arrays were given."""
    n, labels = len(model.exog), model.data.row_labels
    if labels is not None and len(labels) == n:
        return tuple(labels)
    gone = set(dropped(model))
    return tuple(i for i in range(n + len(gone)) if i not in gone)
