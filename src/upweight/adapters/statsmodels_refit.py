"""Refit: statsmodels' own fit as a learning algorithm w ↦ β̂(w)."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import statsmodels.api as sm
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.adapters.statsmodels_regression import BINOMIAL_LINKS, KINDS, LINKS, POWERS
from upweight.adapters.support import RefitTrainer
from upweight.applications.regression import ASTRAY
from upweight.errors import UnsupportedModel
from upweight.task.data import Data
from upweight.task.likelihoods import DispersedCounts, Likelihood
from upweight.task.losses import Bernoulli, Loss, SquaredError
from upweight.task.task import Task
from upweight.training.objective import weighted_objective

REFIT_TOLERANCE = 1e-8
"""Largest Newton step that a refit may leave, in standard errors."""

SEPARATED = (
    "no finite estimate: without these rows a hyperplane separates the classes, or a group has no "
    "events"
)


@dataclass(frozen=True)
class Refit:
    """statsmodels' own fit under other data weights, so that it confirms independently.

        β̂(w) = argmin Σᵢ wᵢ vᵢ ℓᵢ(β)

    by WLS, or by GLM with var_weights = w v from β̂ on; with another link than the canonical one by
    Newton steps of statsmodels' own score and Hessian after that. `NegativeBinomial` takes no
    weights: whole numbers of copies only. A row of weight zero is really left out of
    the arrays. No unit of the columns enters: exog need not be scaled.

    Args:
        max_steps: Steps of iteratively reweighted least squares.

    Exact when: always, to rounding; a fit that is not at its maximum is reported as a failure.
    """

    max_steps: int = 100

    def prepare(self, task: Task, train: Data) -> RefitTrainer:
        """Take the arrays out of the data.

        Raises:
            UnsupportedModel: The task is not a translation of statsmodels results.
        """
        batch: Any = train.batch(0, len(train))
        loss: Any = getattr(task.loss, "base", None)
        known = loss in KINDS.values() or isinstance(loss, Likelihood)
        ours = isinstance(batch, tuple) and len(batch) in (2, 3) and len(batch[-1]) == 2
        if not known or not ours:
            raise UnsupportedModel(
                "Refitting statsmodels results needs the task and data of their translation.",
                f"loss {task.loss!r} and a batch of type {type(batch).__name__}.",
                "scores of a task that was not made by this adapter.",
                "use task, train = upweight.adapters.statsmodels.task(results).",
            )
        X, *shift, (y, v) = batch
        offset = shift[0] if shift else torch.zeros_like(v)
        X, y, offset = X.numpy(), y[:, 0].numpy(), offset.numpy()

        def fit(w: Float[Tensor, " n"]) -> tuple[Float[Tensor, " p"] | None, str]:
            beta, reason = self._fitted(loss, X, y, (w * v).numpy(), offset, task.theta().numpy())
            return (None if beta is None else torch.from_numpy(beta)), reason

        return RefitTrainer(task, fit, weighted_objective(task, train))

    def _fitted(
        self,
        loss: Loss,
        X: np.ndarray,
        y: np.ndarray,
        weights: np.ndarray,
        offset: np.ndarray,
        start: np.ndarray,
    ) -> tuple[np.ndarray | None, str]:
        if np.any(weights < 0):
            return None, "statsmodels takes no negative weights"
        kept = weights > 0
        X, y, weights, offset = X[kept], y[kept], weights[kept], offset[kept]
        # statsmodels would go on with a pseudo-inverse.
        if np.linalg.matrix_rank(X) < X.shape[1]:
            return None, "the columns that are left depend on each other"
        try:
            with warnings.catch_warnings():
                # Convergence is judged below, and separation by it.
                warnings.simplefilter("ignore")
                if loss == SquaredError():
                    return np.array(sm.WLS(y - offset, X, weights=weights).fit().params), ""
                if isinstance(loss, DispersedCounts):
                    return _dispersed(X, y, weights, offset, start)
                model = sm.GLM(y, X, family=family_of(loss), var_weights=weights, offset=offset)
                if isinstance(loss, Likelihood):
                    # Scoring alone converges slowly near the maximum.
                    near = model.fit(start_params=start, maxiter=self.max_steps, tol=1e-10)
                    return _polished(model, np.array(near.params), {"scale": 1.0})
                near = model.fit(start_params=start, maxiter=self.max_steps)
                # The deviance no longer falls where the step is √ε; two more square that twice.
                last = model.fit(start_params=near.params, maxiter=2, tol=0.0)
                step = last.normalized_cov_params @ model.score(last.params, scale=1.0)
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            return None, f"statsmodels says: {error}"
        errors = np.abs(step) / np.sqrt(last.normalized_cov_params.diagonal())
        if float(errors.max()) <= REFIT_TOLERANCE:
            return np.array(last.params), ""
        if not float(np.abs(X @ step).max()) <= ASTRAY:
            return None, SEPARATED
        return None, f"a step of {float(errors.max()):.1e} standard errors remains"


def family_of(loss: Loss) -> Any:
    """The family and link of statsmodels whose likelihood a loss is."""
    families, links = sm.families, sm.families.links
    if not isinstance(loss, Likelihood):
        return families.Binomial() if loss == Bernoulli() else families.Poisson()
    named = {ours: theirs for theirs, ours in (LINKS | BINOMIAL_LINKS).items()}
    link = getattr(links, named[loss.link])()
    if loss.variance == "binomial":
        return families.Binomial(link)
    if loss.variance == "negative binomial":
        return families.NegativeBinomial(link, alpha=loss.parameter)
    for family, power in POWERS.items():
        if loss.parameter == power:
            return getattr(families, family)(link)
    return families.Tweedie(link, var_power=loss.parameter)


def _dispersed(
    X: np.ndarray, y: np.ndarray, weights: np.ndarray, offset: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray | None, str]:
    copies = np.round(weights).astype(int)
    if np.any(copies != weights):
        return None, "statsmodels fits a negative binomial with estimated α without weights"
    X, y, offset = (np.repeat(part, copies, axis=0) for part in (X, y, offset))
    model = sm.NegativeBinomial(y, X, offset=offset)
    near = model.fit(start_params=start, method="bfgs", maxiter=200, disp=0)
    return _polished(model, np.array(near.params), {})


def _polished(
    model: Any, params: np.ndarray, scaled: dict[str, float]
) -> tuple[np.ndarray | None, str]:
    largest, far = np.inf, 0.0
    for _ in range(10):
        inverse = np.linalg.inv(-model.hessian(params, **scaled))
        step = inverse @ model.score(params, **scaled)
        largest = float(np.max(np.abs(step) / np.sqrt(inverse.diagonal())))
        if not np.isfinite(largest):
            break
        params = params + step
        if largest <= REFIT_TOLERANCE:
            return params, ""
        far = float(np.abs(model.exog @ step[: model.exog.shape[1]]).max())
    if not far <= ASTRAY:
        return None, SEPARATED
    return None, f"a step of {largest:.1e} standard errors remains"
