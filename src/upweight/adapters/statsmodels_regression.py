"""Which statsmodels results have a translation, and the arrays of one.

η = X β + o        o = offset + log exposure, where the fit had them
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.adapters.support import Support
from upweight.errors import UnsupportedModel
from upweight.task.losses import Bernoulli, Loss, Poisson, SquaredError

FAMILIES: dict[tuple[str, str], Loss] = {
    ("Gaussian", "Identity"): SquaredError(),
    ("Binomial", "Logit"): Bernoulli(),
    ("Poisson", "Log"): Poisson(),
}

KINDS: dict[str, Loss] = {
    "OLS": SquaredError(),
    "WLS": SquaredError(),
    "Logit": Bernoulli(),
    "Poisson": Poisson(),
}


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
        return Support(False, "the fit was penalized; statsmodels does not keep the penalty")
    if getattr(model, "exog", None) is None or getattr(model, "endog", None) is None:
        return Support(False, "the results no longer hold their data (remove_data); fit again")
    if getattr(results, "constraints", None) is not None:
        return Support(False, "the fit was constrained: its estimate does not minimize the loss")
    if kind in KINDS:
        return Support(True, f"{kind} is a generalized linear model with its canonical link")
    if kind != "GLM":
        return Support(
            False, f"{kind} is not among OLS, WLS, Logit, Poisson and GLM with canonical link"
        )
    family, link = type(model.family).__name__, type(model.family.link).__name__
    if (family, link) in FAMILIES:
        return Support(True, f"{family} with its canonical link {link}")
    return Support(False, f"{family} with link {link}: only Gaussian/Identity, Binomial/Logit and "
                   "Poisson/Log are supported")  # fmt: skip


def loss_of(results: Any) -> Loss:
    """The loss of supported results, or the reason for a no as an error."""
    found = supports(results)
    if not found:
        raise UnsupportedModel(
            "The results must be of OLS, WLS, Logit, Poisson, or a GLM with canonical link.",
            f"{type(results).__name__}: {found.reason}.",
            "a model that is not linear in its parameters, or keeps what one linear map "
            "cannot hold.",
            "write its likelihood as a PyTorch model and loss, and use Task directly.",
        )
    model = results.model
    if type(model).__name__ in KINDS:
        return KINDS[type(model).__name__]
    return FAMILIES[type(model.family).__name__, type(model.family.link).__name__]


def regression_of(results: Any) -> Regression:
    """The arrays of supported results."""
    loss = loss_of(results)
    model = results.model
    X = np.array(model.exog, dtype=np.float64)
    y = np.array(model.endog, dtype=np.float64).reshape(-1)
    weights, scale, repeated = np.ones(len(y)), None, False
    if type(model).__name__ == "WLS":
        weights = np.array(model.weights, dtype=np.float64).reshape(-1)
    if type(model).__name__ == "GLM":
        weights = np.array(model.iweights, dtype=np.float64).reshape(-1)
        repeated = bool(np.any(np.asarray(model.freq_weights) != 1))
        if loss == Bernoulli():
            weights = weights * np.array(model.n_trials, dtype=np.float64)
        # A residual variance is estimated anew without each row; any other scale stays as it is.
        estimated = np.isclose(results.scale, results.pearson_chi2 / results.df_resid, rtol=1e-9)
        scale = None if loss == SquaredError() and estimated else float(results.scale)
    beta = np.array(results.params, dtype=np.float64).reshape(-1)
    names = tuple(map(str, model.exog_names))
    shifts = offsets_of(model)
    offset = np.sum(list(shifts.values()), axis=0) if shifts else None
    return Regression(X, y, weights, beta, loss, names, rows_of(model), scale, repeated, offset)


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
