"""statsmodels results as upweight tasks, and their classical diagnostics.

    results                                   loss                 weights v
    OLS, WLS, GLM Gaussian (identity)         SquaredError         prior weights
    Logit, GLM Binomial (logit)               Bernoulli            trials × prior weights
    Poisson, GLM Poisson (log)                Poisson              prior weights

The intercept is a column of exog, as statsmodels keeps it; nothing is penalized. H is that of
the mean loss: the covariance that statsmodels reports is φ/n times its inverse.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from upweight.adapters.stationarity import judged
from upweight.adapters.support import Support
from upweight.curvature.newton import Newton
from upweight.errors import UnsupportedModel, message
from upweight.methods import classical
from upweight.methods.classical import Diagnostics, Family, glm_diagnostics
from upweight.task.data import Data, as_data
from upweight.task.losses import Bernoulli, Loss, Poisson, SquaredError, Weighted
from upweight.task.recipe import Trainer
from upweight.task.task import Task

LOSSES: dict[type[Family], Loss] = {
    classical.Gaussian: SquaredError(),
    classical.Binomial: Bernoulli(),
    classical.Poisson: Poisson(),
}


@dataclass(frozen=True, eq=False)
class _Regression:
    """The arrays of a fitted regression, in statsmodels' own order of rows and columns."""

    X: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    beta: np.ndarray
    family: Family
    names: tuple[str, ...]


def supports(results: Any) -> Support:
    """Whether a results object can be translated, with the reason.

    Example:
        >>> supports(sm.NegativeBinomial(y, X).fit()).reason
    """
    model = getattr(results, "model", None)
    kind = type(model).__name__
    if model is None or not hasattr(results, "params"):
        return Support(
            False, f"{type(results).__name__} is not a fitted statsmodels results object"
        )
    if "Regularized" in type(getattr(results, "_results", results)).__name__:
        return Support(False, "the fit was penalized; statsmodels does not keep the penalty")
    for name in ("offset", "exposure"):
        value = getattr(model, name, None)
        if value is not None and np.any(np.asarray(value) != 0):
            return Support(False, f"the model has an {name}, which one linear map cannot hold")
    if kind in ("OLS", "WLS", "Logit", "Poisson"):
        return Support(True, f"{kind} is a generalized linear model with its canonical link")
    if kind != "GLM":
        return Support(
            False, f"{kind} is not among OLS, WLS, Logit, Poisson and GLM with canonical link"
        )
    family, link = type(model.family).__name__, type(model.family.link).__name__
    if (family, link) in (("Gaussian", "Identity"), ("Binomial", "Logit"), ("Poisson", "Log")):
        return Support(True, f"{family} with its canonical link {link}")
    return Support(False, f"{family} with link {link}: only Gaussian/Identity, Binomial/Logit and "
                   "Poisson/Log are supported")  # fmt: skip


def diagnostics(results: Any) -> Diagnostics:
    """Leverage, Cook's distance, DFBETAS, DFFITS, the influence curve and more, for each row.

    Args:
        results: Fitted results, wrapped or not; see `supports`.

    Raises:
        UnsupportedModel: `supports` says no, with its reason.
        UpweightError: See `upweight.methods.classical.glm_diagnostics`.
    """
    found = _regression(results)
    return glm_diagnostics(found.X, found.y, found.beta, found.family, found.weights, found.names)


def task(results: Any, *, tolerance: float = 1.0) -> tuple[Task, Data]:
    """The fitted model as a task, with its training data.

    Args:
        results: Fitted results; see `supports`.
        tolerance: How far the estimate may be from its minimum, in typical removals of one row.

    Raises:
        UnsupportedModel: `supports` says no, with its reason.
        NotStationary: The estimate is farther from the minimum than `tolerance`.
    """
    found = _regression(results)
    model = nn.Linear(found.X.shape[1], 1, bias=False, dtype=torch.float64).eval()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(found.beta)[None])
    train = _data(found.X, found.y, found.weights)
    translated = Task(model, Weighted(LOSSES[type(found.family)]))
    judged(translated, train, tolerance, f"this {type(results.model).__name__} fit")
    return translated, train


def data(results: Any, exog: Any, endog: Any) -> Data:
    """Queries for the task of `results`: rows of exog (with the constant) and their responses."""
    X = np.array(exog, dtype=np.float64)
    y = np.array(endog, dtype=np.float64)
    if y.ndim == 2:  # successes and failures
        trials = y.sum(axis=1)
        return _data(X, y[:, 0] / trials, trials)
    return _data(X, y, np.ones(len(y)))


@dataclass(frozen=True)
class Refit:
    """Maximum likelihood with the data weights, by Newton's method on the same likelihood.

    statsmodels takes weights in some of its models only, so the refit minimizes the translated
    objective; that its minimum is statsmodels' own estimate is what `task` checked.
    """

    tol: float = 1e-10

    def prepare(self, task: Task, train: Data) -> Trainer:
        """See `Recipe.prepare`."""
        return Newton(tol=self.tol).prepare(task, train)


def recipe(results: Any) -> Refit:
    """How to fit `results` again under other data weights.

    Raises:
        UnsupportedModel: `supports` says no, with its reason.
    """
    _require_support(results)
    return Refit()


def _data(X: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Data:
    return as_data((X, (y[:, None], weights)))


def _require_support(results: Any) -> None:
    found = supports(results)
    if not found:
        raise UnsupportedModel(
            message(
                "The results must be of OLS, WLS, Logit, Poisson, or a GLM with canonical link.",
                f"{type(results).__name__}: {found.reason}.",
                "a model that is not linear in its parameters, or keeps what one linear map "
                "cannot hold.",
                "write its likelihood as a PyTorch model and loss, and use Task directly.",
            )
        )


def _regression(results: Any) -> _Regression:
    _require_support(results)
    model = results.model
    X = np.array(model.exog, dtype=np.float64)
    y = np.array(model.endog, dtype=np.float64).reshape(-1)
    weights = np.ones(len(y))
    kind = type(model).__name__
    family: Family = {
        "OLS": classical.Gaussian(),
        "WLS": classical.Gaussian(),
        "Logit": classical.Binomial(),
        "Poisson": classical.Poisson(),
    }.get(kind) or getattr(classical, type(model.family).__name__)()
    if kind == "WLS":
        weights = np.array(model.weights, dtype=np.float64).reshape(-1)
    if kind == "GLM":
        weights = np.array(model.iweights, dtype=np.float64).reshape(-1)
        if isinstance(family, classical.Binomial):
            weights = weights * np.array(model.n_trials, dtype=np.float64)
    beta = np.array(results.params, dtype=np.float64).reshape(-1)
    return _Regression(X, y, weights, beta, family, tuple(map(str, model.exog_names)))


__all__ = ["Refit", "Support", "data", "diagnostics", "recipe", "supports", "task"]
