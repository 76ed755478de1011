"""Which estimators have a translation, why others have none, and what each minimizes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sklearn
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.svm import LinearSVC

from upweight.adapters import sklearn_networks as networks
from upweight.adapters.sklearn_objectives import Encoding, Objective, SquaredHinge, final_step
from upweight.adapters.support import Support
from upweight.task.losses import Bernoulli, CrossEntropy, Loss, Poisson, SmoothHinge, SquaredError

VERSION = tuple(int(part) for part in sklearn.__version__.split(".")[:2])

SGD_LOSSES: dict[type, dict[str, tuple[Loss, Encoding]]] = {
    SGDClassifier: {
        "log_loss": (Bernoulli(), Encoding.ZERO_ONE),
        "squared_error": (SquaredError(), Encoding.SIGN),
        "squared_hinge": (SquaredHinge(), Encoding.SIGN),
    },
    SGDRegressor: {"squared_error": (SquaredError(), Encoding.REAL)},
}


def support(estimator: Any) -> Support:
    """Whether the estimator has a translation; see `upweight.adapters.sklearn.supports`."""
    final = final_step(estimator)
    name = type(final).__name__
    if hasattr(final, "best_estimator_") or name.endswith("SearchCV"):
        return Support(False, f"{name} chooses among estimators: pass its .best_estimator_")
    chosen = chooses_penalty(final)
    if chosen is not None:
        return Support(False, chosen)
    if type(final) not in RULES:
        known = ", ".join(sorted(kind.__name__ for kind in RULES))
        return Support(
            False,
            f"{name} has no translation into a map with a smooth loss; use one of {known}, "
            "or write its model and objective as upweight.Task(model, loss, penalty)",
        )
    reason = RULES[type(final)].refusal(final)
    if reason is not None:
        return Support(False, reason)
    if not hasattr(final, "coef_") and not hasattr(final, "coefs_"):
        return Support(False, f"{name} is not fitted: call .fit(X, y) first")
    if isinstance(final, networks.NETWORKS):
        sizes = " × ".join(str(len(W)) for W in final.coefs_)
        loss = objective_of(estimator).loss
        return Support(True, f"{name} is a network of {sizes} units with loss {loss!r}")
    if not hasattr(final.coef_, "__array__"):
        return Support(False, f"{name} holds sparse coefficients: call .densify() first")
    reason = _fitted_refusal(final)
    if reason is not None:
        return Support(False, reason)
    loss = objective_of(estimator).loss
    through = " of the transformed features" if isinstance(estimator, Pipeline) else ""
    return Support(True, f"{name} is a linear map{through} with loss {loss!r}")


def chooses_penalty(final: Any) -> str | None:
    """Of a linear model that chose its own penalty what to pass in its place; None of others."""
    name = type(final).__name__
    plain = name.removesuffix("CV")
    if plain == name or plain not in (kind.__name__ for kind in RULES):
        return None
    return (
        f"{name} chooses its penalty by cross-validation: refit {plain} with the value it chose "
        "(C_ or alpha_), and pass that, which is answered without refits"
    )


def objective_of(estimator: Any, temperature: float = 0.001) -> Objective:
    """J of a supported, fitted estimator, but for the data."""
    final = final_step(estimator)
    return RULES[type(final)].objective(final, temperature)


@dataclass(frozen=True)
class Rule:
    """One class of estimators: why it may be refused, and what it minimizes."""

    refusal: Callable[[Any], str | None]
    objective: Callable[[Any, float], Objective]


def _fitted_refusal(final: Any) -> str | None:
    """What can only be told once the classes are known."""
    c = len(getattr(final, "classes_", ()))
    liblinear = type(final) is LinearSVC or getattr(final, "solver", "") == "liblinear"
    # Before 1.6 this solver fitted one model per class, and said so nowhere on the estimator.
    separate = getattr(final, "solver", "") == "newton-cholesky" and VERSION < (1, 6)
    one_vs_rest = c > 2 and (liblinear or type(final) is SGDClassifier)
    if one_vs_rest and final.class_weight is not None:
        return (
            f"{type(final).__name__} with class_weight and {c} classes weighs an example "
            "differently in each one-versus-rest problem: fit with sample_weight in its place"
        )
    multi_class = getattr(final, "multi_class", None)  # of LogisticRegression before 1.8
    each_class = liblinear or separate or multi_class == "ovr"
    if type(final) is LogisticRegression and c > 2 and each_class:
        return "one-versus-rest LogisticRegression: fit with solver='lbfgs', which is multinomial"
    if type(final) is LogisticRegression and c == 2 and multi_class == "multinomial":
        return "a softmax of two classes: fit with multi_class='auto'"
    if type(final) is RidgeClassifier:
        if str(getattr(final._label_binarizer, "y_type_", "")).startswith("multilabel"):
            return "RidgeClassifier with several labels per example: fit one per label"
    return None


def _logistic_refusal(final: Any) -> str | None:
    penalty = getattr(final, "penalty", "deprecated")
    l1_ratio = getattr(final, "l1_ratio", None) or 0.0
    if penalty == "deprecated":
        penalty = "elasticnet" if l1_ratio > 0 else "l2"
    if penalty not in ("l2", None) and not (penalty == "elasticnet" and l1_ratio == 0.0):
        way_out = "l1_ratio=0" if VERSION >= (1, 8) else "penalty='l2', or l1_ratio=0"
        return _not_smooth("LogisticRegression", "an l1 part", "penalty", way_out)
    return None


def _logistic(final: Any, _: float) -> Objective:
    free = getattr(final, "penalty", "l2") is None or math.isinf(final.C)
    softmax = len(final.classes_) > 2
    return Objective(
        loss=CrossEntropy() if softmax else Bernoulli(),
        encoding=Encoding.INDEX if softmax else Encoding.ZERO_ONE,
        strength=_by_c(math.inf if free else final.C),
        bias=_liblinear_bias(final) if final.solver == "liblinear" else 0.0,
        softmax=softmax,
    )


def _svc_refusal(final: Any) -> str | None:
    if final.penalty != "l2":
        return _not_smooth("LinearSVC", "l1", "penalty", "penalty='l2'")
    if final.multi_class != "ovr":
        return "LinearSVC with multi_class='crammer_singer': fit with multi_class='ovr'"
    return None


def _svc(final: Any, temperature: float) -> Objective:
    return Objective(
        loss=SmoothHinge(temperature) if final.loss == "hinge" else SquaredHinge(),
        encoding=Encoding.SIGN,
        strength=_by_c(final.C),
        bias=_liblinear_bias(final),
    )


def _squares_refusal(final: Any) -> str | None:
    if getattr(final, "positive", False):
        return f"{type(final).__name__} with positive=True stops at a constraint: positive=False"
    if hasattr(getattr(final, "alpha", 0.0), "__len__"):
        return f"{type(final).__name__} with one alpha per target: fit one model per target"
    return None


def _ridge(final: Any, _: float) -> Objective:
    alpha = float(getattr(final, "alpha", 0.0))  # LinearRegression has none
    encoding = Encoding.SIGN if type(final) is RidgeClassifier else Encoding.REAL
    return Objective(SquaredError(), encoding, lambda n, _: alpha / n)


def _sgd_refusal(final: Any) -> str | None:
    name = type(final).__name__
    known = " or ".join(f"loss={loss!r}" for loss in SGD_LOSSES[type(final)])
    if final.loss in ("hinge", "perceptron", "epsilon_insensitive"):
        return _not_smooth(name, f"loss={final.loss!r}", "loss", known)
    if final.loss not in SGD_LOSSES[type(final)]:
        return f"{name} with loss={final.loss!r} has no translation: fit with {known}"
    if final.penalty not in ("l2", None):
        if final.penalty != "elasticnet" or final.l1_ratio != 0:
            return _not_smooth(name, f"penalty={final.penalty!r}", "penalty", "penalty='l2'")
    if final.average:
        return f"{name} averages its path, which minimizes nothing exactly: fit with average=False"
    if final.early_stopping:
        return f"{name} stops early, away from the minimum: fit with early_stopping=False"
    return None


def _sgd(final: Any, _: float) -> Objective:
    alpha = 0.0 if final.penalty is None else float(final.alpha)
    loss, encoding = SGD_LOSSES[type(final)][final.loss]
    return Objective(loss, encoding, lambda _, __: alpha)


def _poisson(final: Any, _: float) -> Objective:
    alpha = float(final.alpha)
    return Objective(Poisson(), Encoding.REAL, lambda n, total: alpha * total / n)


def _never(_: Any) -> str | None:
    return None


def _by_c(c: float) -> Callable[[int, float], float]:
    return lambda n, _: 1.0 / (n * c)


def _liblinear_bias(final: Any) -> float:
    # b = s·β with β a weight like any other, so ½β² = ½b²/s².
    return 1.0 / float(final.intercept_scaling) ** 2


def _not_smooth(name: str, given: str, what: str, way_out: str) -> str:
    return (
        f"{name} with {given} has a {what} without second derivatives, so no influence function: "
        f"fit with {way_out}"
    )


RULES: dict[type, Rule] = {
    LinearRegression: Rule(_squares_refusal, _ridge),
    LinearSVC: Rule(_svc_refusal, _svc),
    LogisticRegression: Rule(_logistic_refusal, _logistic),
    MLPClassifier: Rule(networks.refusal, networks.objective),
    MLPRegressor: Rule(networks.refusal, networks.objective),
    PoissonRegressor: Rule(_never, _poisson),
    Ridge: Rule(_squares_refusal, _ridge),
    RidgeClassifier: Rule(_squares_refusal, _ridge),
    SGDClassifier: Rule(_sgd_refusal, _sgd),
    SGDRegressor: Rule(_sgd_refusal, _sgd),
}
