"""Refit: an estimator's own `fit` as a learning algorithm w ↦ θ(w).

    θ(w) = argmin_θ (1/n) Σᵢ wᵢ vᵢ ℓᵢ(θ) + R(θ),    fitted with sample_weight = w v

The clone is fitted by scikit-learn alone: what it confirms does not rest on this library's own
optimizer. An example with wᵢ = 0 stays in the array and counts nothing.
"""

import numbers
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import clone, is_classifier
from sklearn.linear_model import (
    LogisticRegression,
    PoissonRegressor,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.svm import LinearSVC
from torch import Tensor

from upweight.adapters import sklearn_networks as networks
from upweight.adapters.sklearn_objectives import coefficients
from upweight.adapters.sklearn_rules import objective_of
from upweight.adapters.support import RefitTrainer
from upweight.errors import UnsupportedModel
from upweight.task.data import Data
from upweight.task.task import Task
from upweight.training.objective import weighted_objective

TIGHTEST = {"sag": 1e-10, "saga": 1e-10, "liblinear": 1e-10}
"""`tol` by solver, 1e-12 elsewhere: beyond it rounding would stop them, at their last iteration."""

ITERATIONS = 10_000
EPOCHS = 1000
"""Passes of SGD over the data, all of them: its own stopping rule gives up at the first noise."""

NEWTON_FEATURES = 2000
"""Where PoissonRegressor's Newton solver, which forms the Hessian, costs no more than L-BFGS."""


@dataclass(frozen=True)
class Refit:
    """Fit a clone of the estimator for each row of weights, on the data of `task`.

    Tolerances are tightened as far as the solver allows, iterations raised to match, and a missing
    random_state is set to 0, so that the same weights give the same model. L-BFGS, which cannot
    reach the last digits, gives way to Newton's method on the same objective. Class weights and
    sample weights are those of the task's data: "balanced" is not balanced anew.

    A network is left as it is told to train: its rows of weight 0 stay in their batches.

    LinearSVC(loss="hinge") is refitted with the hinge itself, as Koh & Liang do; its gradient norm
    is NaN. SGD keeps its noise, the same in every fit; `upweight.training.Newton()` retrains the
    same objective without.

    Args:
        estimator: Unfitted; the last step of a Pipeline.

    Exact when: the solver is (closed form, Newton). A solver that stops early leaves its error in
    the difference of two fits: `gradient_norms` says how much.
    """

    estimator: Any

    def __eq__(self, other: object) -> bool:
        """Estimators have no equality of their own: the same class with the same parameters."""
        return isinstance(other, Refit) and _spelled(self.estimator) == _spelled(other.estimator)

    def __hash__(self) -> int:
        return hash(_spelled(self.estimator))

    def prepare(self, task: Task, train: Data) -> RefitTrainer:
        """Take the arrays out of the data.

        Raises:
            UnsupportedModel: The data are not those of `task(estimator, ...)`.
        """
        batch = train.batch(0, len(train))
        if not (isinstance(batch, tuple) and len(batch) == 2):
            raise UnsupportedModel(
                "Refitting an estimator needs the task and data of its own translation.",
                f"a batch of type {type(batch).__name__}.",
                "scores of a task that was not made from this estimator.",
                "use task, train = sk.task(estimator, X, y).",
            )
        X, targets = batch
        weighted = not isinstance(targets, Tensor)
        y, v = targets if weighted else (targets, torch.ones(len(X), dtype=X.dtype))
        hinge = type(self.estimator) is LinearSVC and self.estimator.loss == "hinge"
        labels = _labels(y) if is_classifier(self.estimator) else _squeezed(y)
        unfitted = tightened(self.estimator, X.shape[1])

        def fit(w: Float[Tensor, " n"]) -> tuple[Float[Tensor, " p"] | None, str]:
            return _fitted(unfitted, task, X.numpy(), labels, w * v, float(v.sum()))

        return RefitTrainer(task, fit, None if hinge else weighted_objective(task, train))


def _fitted(
    estimator: Any, task: Task, X: Any, y: Any, weights: Float[Tensor, " n"], total: float
) -> tuple[Float[Tensor, " p"] | None, str]:
    """θ by a clone of the estimator, or what scikit-learn says where there is none."""
    fresh = clone(estimator)
    try:
        with warnings.catch_warnings():
            # Deprecations were the user's to see at their own fit; convergence is judged by
            # the gradient norm that is reported.
            warnings.simplefilter("ignore")
            if type(fresh) is PoissonRegressor:
                # Its mean is over Σwv; J's is over n, whatever the weights.
                fresh.set_params(alpha=fresh.alpha * total / float(weights.sum()))
            fresh.fit(X, y, sample_weight=weights.numpy())
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        return None, f"{type(fresh).__name__} says: {error}"
    if isinstance(fresh, networks.NETWORKS):
        params = networks.parameters(fresh)
    else:
        weight, bias = coefficients(fresh, objective_of(fresh))
        params = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    named = [*task.model.named_parameters()]
    if not all(params[k].shape == v.shape for k, v in named):
        shape = tuple(params[named[-1][0]].shape)
        return None, f"coefficients of shape {shape}: a class is missing"
    theta = task.layout.flatten(params)
    return (theta, "") if bool(theta.isfinite().all()) else (None, "coefficients not finite")


def _spelled(estimator: Any) -> tuple[type, str]:
    """What tells two unfitted estimators apart; their own repr is cut short where it is long."""
    return type(estimator), repr(sorted(estimator.get_params().items()))


def tightened(estimator: Any, features: int) -> Any:
    """A clone that stops later, repeats itself, and takes its class weights from the data."""
    fresh = clone(estimator)
    params = fresh.get_params()
    changes: dict[str, Any] = {}
    if params.get("tol") is not None:
        changes["tol"] = min(params["tol"], TIGHTEST.get(params.get("solver", ""), 1e-12))
    if params.get("max_iter") is not None:
        changes["max_iter"] = max(params["max_iter"], ITERATIONS)
    if not isinstance(params.get("random_state", 0), numbers.Integral):
        changes["random_state"] = 0
    if isinstance(fresh, networks.NETWORKS):
        # What it is depends on when it stopped; the same weights give the same steps.
        changes.pop("tol"), changes.pop("max_iter")
    if "class_weight" in params:
        changes["class_weight"] = None
    if type(fresh) in (SGDClassifier, SGDRegressor):
        changes |= {"tol": None, "max_iter": max(params["max_iter"], EPOCHS)}
    # L-BFGS ends where J no longer falls in double precision: ‖∇J‖ near 1e-8, no smaller whatever
    # tol says, and the effect of one example can be as small. Newton goes on, on the same J.
    if type(fresh) is LogisticRegression and fresh.solver == "lbfgs":
        changes["solver"] = "newton-cg"
    if type(fresh) is PoissonRegressor and fresh.solver == "lbfgs" and features <= NEWTON_FEATURES:
        changes["solver"] = "newton-cholesky"
    return fresh.set_params(**changes)


def _labels(targets: Tensor) -> Any:
    """Class indices again, from whichever encoding."""
    if targets.ndim == 1:
        return targets.numpy()
    index = targets[:, 0] > 0 if targets.shape[1] == 1 else targets.argmax(dim=1)
    return index.long().numpy()


def _squeezed(targets: Tensor) -> Any:
    return (targets[:, 0] if targets.shape[1] == 1 else targets).numpy()
