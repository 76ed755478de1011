"""Refit: statsmodels' own fit as a learning algorithm w ↦ β̂(w)."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import statsmodels.api as sm
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.adapters.statsmodels_regression import LOSSES
from upweight.curvature.objective import WeightedObjective, weighted_objective
from upweight.errors import UnsupportedModel
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, Loss, SquaredError
from upweight.task.recipe import Trained
from upweight.task.task import Task

REFIT_TOLERANCE = 1e-8
"""Largest Newton step that a refit may leave, in standard errors."""


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
        batch: Any = train.batch(0, len(train))
        loss: Any = getattr(task.loss, "base", None)
        ours = isinstance(batch, tuple) and len(batch) in (2, 3) and len(batch[-1]) == 2
        if loss not in LOSSES.values() or not ours:
            raise UnsupportedModel(
                "Refitting statsmodels results needs the task and data of their translation.",
                f"loss {task.loss!r} and a batch of type {type(batch).__name__}.",
                "scores of a task that was not made by this adapter.",
                "use task, train = upweight.adapters.statsmodels.task(results).",
            )
        X, *shift, (y, v) = batch
        offset = shift[0] if shift else torch.zeros_like(v)
        arrays = (X.numpy(), y[:, 0].numpy(), v.numpy(), offset.numpy())
        return RefitTrainer(self, task, loss, *arrays, weighted_objective(task, train))


@dataclass(frozen=True, eq=False)
class RefitTrainer:
    """w ↦ β̂(w) by statsmodels. Made by `Refit.prepare`.

    Args:
        spec: Limits.
        task: Lays out θ, and says where fits start.
        loss: ℓ without its weights.
        X, y, v, offset: The training arrays, the weights of the objective and what is added to Xβ.
        objective: ∇J(θ, w).
    """

    spec: Refit
    task: Task
    loss: Loss
    X: np.ndarray
    y: np.ndarray
    v: np.ndarray
    offset: np.ndarray
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
        X, y, weights, offset = self.X[kept], self.y[kept], weights[kept], self.offset[kept]
        # statsmodels would go on with a pseudo-inverse.
        if np.linalg.matrix_rank(X) < X.shape[1]:
            return None, "the columns that are left depend on each other"
        try:
            with warnings.catch_warnings():
                # Convergence is judged below, and separation by it.
                warnings.simplefilter("ignore")
                if self.loss == SquaredError():
                    return np.array(sm.WLS(y - offset, X, weights=weights).fit().params), ""
                return self._reweighted(X, y, weights, offset)
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            return None, f"statsmodels says: {error}"

    def _reweighted(
        self, X: np.ndarray, y: np.ndarray, weights: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray | None, str]:
        binomial = self.loss == Bernoulli()
        family = sm.families.Binomial() if binomial else sm.families.Poisson()
        model = sm.GLM(y, X, family=family, var_weights=weights, offset=offset)
        near = model.fit(start_params=self.task.theta().numpy(), maxiter=self.spec.max_steps)
        # The deviance no longer falls where the step is √ε; two more steps square that twice.
        last = model.fit(start_params=near.params, maxiter=2, tol=0.0)
        step = last.normalized_cov_params @ model.score(last.params, scale=1.0)
        errors = np.abs(step) / np.sqrt(last.normalized_cov_params.diagonal())
        if float(errors.max()) <= REFIT_TOLERANCE:
            return np.array(last.params), ""
        return None, f"a step of {float(errors.max()):.1e} standard errors remains"
