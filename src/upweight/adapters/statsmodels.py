"""statsmodels results as upweight tasks, and their classical diagnostics.

    results                                   loss                 weights v
    OLS, WLS, GLM Gaussian (identity)         SquaredError         prior weights
    Logit, GLM Binomial (logit)               Bernoulli            trials × prior weights
    Poisson, GLM Poisson (log)                Poisson              prior weights

The intercept is a column of exog, as statsmodels keeps it; nothing is penalized. H is that of
the mean loss: the covariance that statsmodels reports is φ/n times its inverse.

A row is an example, however many observations its trials or freq_weights say it stands for.
"""

import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import statsmodels.api as sm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.adapters.stationarity import judged
from upweight.adapters.support import Support, TranslatedData
from upweight.curvature.objective import WeightedObjective, weighted_objective
from upweight.errors import DataError, ShapeError, UnsupportedModel, message
from upweight.methods import classical
from upweight.methods.classical import Diagnostics, Family, glm_diagnostics
from upweight.task.data import ArrayData, Data, as_data
from upweight.task.losses import Bernoulli, Loss, Poisson, SquaredError, Weighted
from upweight.task.recipe import Trained
from upweight.task.task import Task

__all__ = ["Refit", "Support", "data", "diagnostics", "recipe", "supports", "task"]

LOSSES: dict[type[Family], Loss] = {
    classical.Gaussian: SquaredError(),
    classical.Binomial: Bernoulli(),
    classical.Poisson: Poisson(),
}

FAMILIES = {
    ("Gaussian", "Identity"): classical.Gaussian(),
    ("Binomial", "Logit"): classical.Binomial(),
    ("Poisson", "Log"): classical.Poisson(),
}

KINDS: dict[str, Family] = {
    "OLS": classical.Gaussian(),
    "WLS": classical.Gaussian(),
    "Logit": classical.Binomial(),
    "Poisson": classical.Poisson(),
}

REFIT_TOLERANCE = 1e-8
"""Largest Newton step that a refit may leave, in standard errors."""


@dataclass(frozen=True, eq=False)
class _Regression:
    """The arrays of a fitted regression, in statsmodels' own order of rows and columns."""

    X: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    beta: np.ndarray
    family: Family
    names: tuple[str, ...]
    rows: tuple[Hashable, ...]
    scale: float | None
    repeated: bool


def supports(results: Any) -> Support:
    """Whether a results object can be translated, with the reason.

    Example:
        >>> supports(sm.NegativeBinomial(y, X).fit()).reason
    """
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
    for name in ("offset", "exposure"):
        value = getattr(model, name, None)
        if value is not None and np.any(np.asarray(value) != 0):
            return Support(False, f"the model has an {name}, which one linear map cannot hold")
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


def diagnostics(results: Any) -> Diagnostics:
    """Leverage, Cook's distance, DFBETAS, DFFITS, the influence curve and more, for each row.

    Rows are labeled as in the data frame that was fitted, or by their position in the arrays,
    before statsmodels left out those with missing values. The scale is that of the fit: estimated
    for least squares, 1 for the others, or what `fit(scale=...)` made of it.

    Args:
        results: Fitted results, wrapped or not; see `supports`.

    Raises:
        UnsupportedModel: `supports` says no, with its reason; or the fit had freq_weights.
        UpweightError: See `upweight.methods.classical.glm_diagnostics`.
    """
    found = _regression(results)
    if found.repeated:
        raise UnsupportedModel(
            message(
                "Diagnostics of single observations need one row for each of them.",
                "a GLM with freq_weights, whose rows stand for several observations.",
                "a table of counts of equal rows.",
                "repeat the rows and fit again; or use var_weights if that is what was meant; or "
                "task(results), for which removing a row removes all it stands for.",
            )
        )
    return glm_diagnostics(
        found.X,
        found.y,
        found.beta,
        found.family,
        found.weights,
        found.names,
        found.scale,
        found.rows,
    )


def task(results: Any, *, tolerance: float = 1.0) -> tuple[Task, Data]:
    """The fitted model as a task, with its training data.

    Args:
        results: Fitted results; see `supports`.
        tolerance: How far the estimate may be from its minimum, in typical removals of one row. A
            tenth of it is passed over in silence; between the two there is a warning and a note in
            the provenance.

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
    notes = judged(translated, train, tolerance, f"this {type(results.model).__name__} fit")
    dropped = _dropped(results.model)
    if dropped:
        notes.append(
            f"statsmodels left out {len(dropped)} rows with missing values: example i is the i-th "
            "row of model.exog"
        )
    if found.repeated:
        notes.append("a row with freq_weights is one example: removing it removes all its copies")
    return translated, _data(found.X, found.y, found.weights, tuple(notes))


def data(results: Any, exog: Any, endog: Any) -> Data:
    """Queries for the task of `results`: rows of exog (with the constant) and their responses.

    A query weighs 1, or its number of trials where endog has two columns.

    Args:
        results: Fitted results; see `supports`.
        exog: `[q, p]`, columns as in the fit.
        endog: `[q]`; for a binomial GLM also `[q, 2]`, successes and failures.

    Raises:
        UnsupportedModel: `supports` says no, with its reason.
        ShapeError: Other columns than those of the fit, or as many responses as rows.
        DataError: A row of successes and failures without any trial.
    """
    family, p = _family(results), np.size(results.params)
    X = np.array(exog, dtype=np.float64)
    y = np.array(endog, dtype=np.float64)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    counted = y.ndim == 2 and y.shape[1] == 2 and isinstance(family, classical.Binomial)
    if X.ndim != 2 or X.shape[1] != p or len(y) != len(X) or not (counted or y.ndim == 1):
        raise ShapeError(
            message(
                f"Queries need exog [q, {p}] and endog [q] (binomial counts: [q, 2]).",
                f"exog {X.shape}, endog {y.shape}.",
                "a constant that was not added, or a single row without its first axis.",
                f"give the columns of the fit: {', '.join(map(str, results.model.exog_names))}.",
            )
        )
    if not counted:
        return _data(X, y, np.ones(len(y)))
    trials = y.sum(axis=1)
    if not np.all(trials > 0):
        raise DataError(
            message(
                "A query of successes and failures needs at least one trial.",
                f"{trials[~(trials > 0)][0]} trials at row {int(np.argmin(trials > 0))}.",
                "empty groups.",
                "leave them out.",
            )
        )
    return _data(X, y[:, 0] / trials, trials)


@dataclass(frozen=True)
class Refit:
    """statsmodels' own fit under other data weights, so that it confirms independently.

        β̂(w) = argmin Σᵢ wᵢ vᵢ ℓᵢ(β)

    by WLS, or by GLM with var_weights = w v from β̂ on. A row of weight zero is really left out of
    the arrays. No unit of the columns enters: exog need not be scaled.

    Args:
        max_steps: Steps of iteratively reweighted least squares.

    Exact when: always, to rounding; a fit that is not at its maximum is reported as a failure.
    """

    max_steps: int = 100

    def prepare(self, task: Task, train: Data) -> "RefitTrainer":
        """Take the arrays out of the data.

        Raises:
            UnsupportedModel: The task is not a translation of statsmodels results.
        """
        batch = train.batch(0, len(train))
        loss: Any = getattr(task.loss, "base", None)
        if loss not in LOSSES.values() or not isinstance(batch, tuple) or len(batch[-1]) != 2:
            raise UnsupportedModel(
                message(
                    "Refitting statsmodels results needs the task and data of their translation.",
                    f"loss {task.loss!r} and a batch of type {type(batch).__name__}.",
                    "scores of a task that was not made by this adapter.",
                    "use task, train = upweight.adapters.statsmodels.task(results).",
                )
            )
        X, (y, v) = batch
        arrays = (X.numpy(), y[:, 0].numpy(), v.numpy())
        return RefitTrainer(self, task, loss, *arrays, weighted_objective(task, train))


@dataclass(frozen=True, eq=False)
class RefitTrainer:
    """w ↦ β̂(w) by statsmodels. Made by `Refit.prepare`.

    Args:
        spec: Limits.
        task: Lays out θ, and says where fits start.
        loss: ℓ without its weights.
        X, y, v: The training arrays and the weights of the objective.
        objective: ∇J(θ, w).
    """

    spec: Refit
    task: Task
    loss: Loss
    X: np.ndarray
    y: np.ndarray
    v: np.ndarray
    objective: WeightedObjective
    at_once: int = 1

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """β̂(w) for each row, with the reason where there is none."""
        theta = self.task.theta().expand(len(weights), -1).clone()
        norms, failures = torch.full((len(weights),), torch.nan, dtype=torch.float64), {}
        for row, w in enumerate(weights.to(theta)):
            beta, reason = self._fitted(w.numpy() * self.v)
            if beta is None:
                failures[row] = reason
                continue
            theta[row] = torch.from_numpy(beta)
            norms[row] = self.objective(theta[row : row + 1], w[None])[1].norm()
        return Trained(theta, norms, failures)

    def _fitted(self, weights: np.ndarray) -> tuple[np.ndarray | None, str]:
        if np.any(weights < 0):
            return None, "statsmodels takes no negative weights"
        kept = weights > 0
        X, y, weights = self.X[kept], self.y[kept], weights[kept]
        # statsmodels would go on with a pseudo-inverse.
        if np.linalg.matrix_rank(X) < X.shape[1]:
            return None, "the columns that are left depend on each other"
        try:
            with warnings.catch_warnings():
                # Convergence is judged below, and separation by it.
                warnings.simplefilter("ignore")
                if self.loss == SquaredError():
                    return np.array(sm.WLS(y, X, weights=weights).fit().params), ""
                return self._reweighted(X, y, weights)
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            return None, f"statsmodels says: {error}"

    def _reweighted(
        self, X: np.ndarray, y: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray | None, str]:
        binomial = self.loss == Bernoulli()
        family = sm.families.Binomial() if binomial else sm.families.Poisson()
        model = sm.GLM(y, X, family=family, var_weights=weights)
        near = model.fit(start_params=self.task.theta().numpy(), maxiter=self.spec.max_steps)
        # The deviance no longer falls where the step is √ε; two more steps square that twice.
        last = model.fit(start_params=near.params, maxiter=2, tol=0.0)
        step = last.normalized_cov_params @ model.score(last.params, scale=1.0)
        errors = np.abs(step) / np.sqrt(last.normalized_cov_params.diagonal())
        if float(errors.max()) <= REFIT_TOLERANCE:
            return np.array(last.params), ""
        return None, f"a step of {float(errors.max()):.1e} standard errors remains"


def recipe(results: Any) -> Refit:
    """How to fit `results` again under other data weights.

    Raises:
        UnsupportedModel: `supports` says no, with its reason.
    """
    _family(results)
    return Refit()


def _data(X: np.ndarray, y: np.ndarray, weights: np.ndarray, notes: tuple[str, ...] = ()) -> Data:
    arrays = as_data((X, (y[:, None], weights)))
    assert isinstance(arrays, ArrayData)
    return TranslatedData(arrays.arrays, notes)


def _family(results: Any) -> Family:
    """The family of supported results, or the reason for a no as an error."""
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
    model = results.model
    if type(model).__name__ in KINDS:
        return KINDS[type(model).__name__]
    return FAMILIES[type(model.family).__name__, type(model.family.link).__name__]


def _regression(results: Any) -> _Regression:
    family = _family(results)
    model = results.model
    X = np.array(model.exog, dtype=np.float64)
    y = np.array(model.endog, dtype=np.float64).reshape(-1)
    weights, scale, repeated = np.ones(len(y)), None, False
    if type(model).__name__ == "WLS":
        weights = np.array(model.weights, dtype=np.float64).reshape(-1)
    if type(model).__name__ == "GLM":
        weights = np.array(model.iweights, dtype=np.float64).reshape(-1)
        repeated = bool(np.any(np.asarray(model.freq_weights) != 1))
        if isinstance(family, classical.Binomial):
            weights = weights * np.array(model.n_trials, dtype=np.float64)
        # A residual variance is estimated anew without each row; any other scale stays as it is.
        estimated = np.isclose(results.scale, results.pearson_chi2 / results.df_resid, rtol=1e-9)
        scale = None if family.estimates_scale and estimated else float(results.scale)
    beta = np.array(results.params, dtype=np.float64).reshape(-1)
    names = tuple(map(str, model.exog_names))
    return _Regression(X, y, weights, beta, family, names, _rows(model), scale, repeated)


def _dropped(model: Any) -> list[int]:
    """Positions of the rows that were left out for missing values."""
    found = getattr(model.data, "missing_row_idx", None)
    return [] if found is None else [int(i) for i in found]


def _rows(model: Any) -> tuple[Hashable, ...]:
    """Labels of the rows that were fitted; positions where arrays were given."""
    n, labels = len(model.exog), model.data.row_labels
    if labels is not None and len(labels) == n:
        return tuple(labels)
    dropped = set(_dropped(model))
    return tuple(i for i in range(n + len(dropped)) if i not in dropped)
