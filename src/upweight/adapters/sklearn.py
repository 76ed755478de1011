"""Fitted scikit-learn estimators as tasks.

    task, train = sk.task(clf, X, y)
    scores = upweight.Influence().fit(task, train).attribute((X_test, y_test))
    upweight.evaluation.loo(scores, sk.recipe(clf), examples=range(20))

The task takes rows and labels as the estimator does: `(X_test, y_test)` before a Pipeline's
transformations, classes by name, or `X_test` alone, for which the predicted class is taken.
`data` makes the same examples, once for several questions.

Which objective each estimator minimizes is in `upweight.adapters.sklearn_objectives`, which of them
have a translation in `upweight.adapters.sklearn_rules`. A fitted estimator is checked to be at the
minimum of the objective it was translated to.
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight.runtime.packages import missing

try:
    from sklearn.base import clone
    from sklearn.svm import LinearSVC
except ImportError as error:
    raise missing("A fitted estimator", "scikit-learn", "sklearn", error) from error

from upweight._typing import Batch, Params
from upweight.adapters import sklearn_networks as networks
from upweight.adapters.sklearn_arrays import encoded, example_weights, features, require_rows
from upweight.adapters.sklearn_labels import OutOfFold, out_of_fold
from upweight.adapters.sklearn_leaves import LeafInfluence, leaf_weights
from upweight.adapters.sklearn_objectives import Objective, coefficients, final_step, has_steps
from upweight.adapters.sklearn_outputs import Outputs, by_features, outputs
from upweight.adapters.sklearn_reader import Reader, rows_of, translated
from upweight.adapters.sklearn_refit import Refit
from upweight.adapters.sklearn_rules import objective_of, support
from upweight.adapters.stationarity import judged, minimized
from upweight.adapters.support import Support, linear_map
from upweight.curvature.hessian import Hessian
from upweight.errors import DataError, NotPositiveDefinite, UnsupportedModel
from upweight.linalg.cholesky import Cholesky
from upweight.methods.fitted import Fitted
from upweight.methods.influence import Influence
from upweight.task.data import Data
from upweight.task.losses import SquaredError, Weighted
from upweight.task.task import Task
from upweight.training.objective import weighted_objective

__all__ = [
    "LeafInfluence",
    "OutOfFold",
    "Outputs",
    "Refit",
    "Support",
    "by_features",
    "data",
    "leaf_weights",
    "out_of_fold",
    "outputs",
    "recipe",
    "supports",
    "task",
    "with_parameters",
]


SAME_LOSS = 1e-3
"""Relative difference of an objective from the loss that a network recorded, that is rounding."""


def supports(estimator: Any) -> Support:
    """Whether the fitted estimator can be translated: true or false, with the reason.

    Example:
        >>> supports(Lasso().fit(X, y)).reason
    """
    return support(estimator)


def task(
    estimator: Any,
    X: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    tolerance: float = 1.0,
    minimize: bool = False,
    temperature: float = 0.001,
) -> tuple[Task, Data]:
    """A fitted estimator as a task, with its training data, in float64.

        J(θ) = (1/n) Σᵢ vᵢ ℓ(W xᵢ + b, yᵢ) + R(W, b),    W = coef_, b = intercept_

    The task reads data as the estimator does, with its steps as they were fitted: a Pipeline that
    is fitted again afterwards does not change it.

    v are the sample weights times the class weights; they are part of the objective, and scores
    differentiate in a further weight w = 1. Of a Pipeline the last step is the model: examples are
    what its earlier steps, as fitted, make of X.

    The Newton step to the minimum of J is measured against what removing one example does:

        distance = √(∇Jᵀ H⁻¹ ∇J) / rmsᵢ (1/n) √(∇ℓᵢᵀ H⁻¹ ∇ℓᵢ)

    Args:
        estimator: Fitted, and supported: see `supports`.
        X: What it was fitted on, `[n, d]`, a sparse one being made dense; for a Pipeline, before
            its transformations.
        y: Labels or targets, as it was fitted on.
        sample_weight: As it was fitted with.
        tolerance: Largest distance, in typical removals. A tenth of it is passed over in
            silence; between the two there is a warning and a note in the provenance.
        minimize: Move θ to the minimum of J by Newton's method and say how far it was, in place of
            any complaint: for estimators that stop early by design (SGD).
        temperature: T of the smooth hinge that stands for the hinge of `LinearSVC(loss="hinge")`,
            whose own minimum has no second derivative (Koh & Liang 2017, §4.2). Implies `minimize`.

    Raises:
        UnsupportedModel: No translation, for the reason that `supports` gives.
        NotStationary: The estimator is farther from the minimum than `tolerance`.
        DataError, ShapeError: X or y are not what it was fitted on.

    Cost: one Hessian and its Cholesky factor (p³/3).
    """
    _require_support(estimator)
    made, reader, notes, total = _read(estimator, X, y, sample_weight, temperature)
    final, train = final_step(estimator), reader.train
    if isinstance(final, networks.NETWORKS):
        notes.append(_trained(final, made, train, total, minimize))
    elif minimize or _is_hinge(final):
        made, moved = minimized(made, train)
        notes.append(moved)
    else:
        notes += judged(made, train, tolerance, type(final).__name__)
    return _reading(made, reader, notes)


def fitted_exactly(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> Fitted | None:
    """`task`, and its exact Hessian factorized: once, for the check of the minimum and for scores.

    None of a network and of a hinge, whose θ is not looked at, or is moved first.
    """
    final = final_step(estimator)
    if isinstance(final, networks.NETWORKS) or _is_hinge(final):
        return None
    _require_support(estimator)
    made, reader, notes, _ = _read(estimator, X, y, sample_weight)
    name, method = type(final).__name__, Influence(Hessian(), Cholesky())
    try:
        found = method.fit(*_reading(made, reader, notes))
    except NotPositiveDefinite:
        judged(made, reader.train, 1.0, name)  # which may know why: there is no minimum
        raise
    told = judged(made, reader.train, 1.0, name, found)
    return method.fit(*_reading(made, reader, notes + told)) if told else found


def _reading(made: Task, reader: Reader, notes: list[str]) -> tuple[Task, Data]:
    """The task that reads as the estimator does, and its training data, with the notes."""
    reader = replace(reader, train=replace(reader.train, notes=tuple(notes)))
    task = Task(made.model, made.loss, made.penalty, made.params, made.forward, reader)
    return task, reader.train


def _is_hinge(final: Any) -> bool:
    return type(final) is LinearSVC and final.loss == "hinge"


def _read(
    estimator: Any, X: Any, y: Any, sample_weight: Any, temperature: float = 0.001
) -> tuple[Task, Reader, list[str], float]:
    """The task as the estimator left it, how data are read, notes, and Σ vᵢ; nothing is judged."""
    objective = objective_of(estimator, temperature)
    final = final_step(estimator)
    Z, targets = features(estimator, X), encoded(estimator, objective, y)
    require_rows(Z, targets)
    weights, by_class = example_weights(final, y, sample_weight, len(Z))
    model, notes = _model(final, objective), list[str]()
    n = len(Z)
    total = float(n) if weights is None else float(weights.sum())
    penalty = objective.penalty(n, total, any("bias" in k for k, _ in model.named_parameters()))
    arrays: tuple[Any, Any] = (Z, targets)
    made = Task(model, objective.loss, penalty)
    if weights is not None:
        arrays = (Z, (targets, weights))
        made = Task(model, Weighted(objective.loss), penalty, forward=unit_weights)
    reader = Reader.of(estimator, objective, arrays, by_class, rows_of(estimator, X, y))
    if has_steps(estimator):
        notes.append(
            f"the earlier steps of the Pipeline ({', '.join(k for k, _ in estimator.steps[:-1])}) "
            "stay as fitted, in scores and refits alike"
        )
    if _is_hinge(final):
        notes.append(f"the hinge was replaced by {objective.loss!r}, whose minimum θ was moved to")
    return made, reader, notes, total


def data(estimator: Any, X: Any, y: Any = None, sample_weight: Any = None) -> Data:
    """Examples as the estimator's task takes them: features transformed, labels encoded.

    Args:
        estimator: Fitted, and supported.
        X: `[q, d]`; for a Pipeline, before its transformations.
        y: Labels or targets, as the estimator predicts them. None: the classes that it predicts,
            which a note says.
        sample_weight: Weights of the examples in their own losses; None: 1 each, class weights or
            not, so that a query's loss is the plain one.

    Raises:
        UnsupportedModel: No translation, for the reason that `supports` gives.
        DataError: A label that the estimator does not know, or no targets for a regression.
        ShapeError: Another number of features, or of examples in X and y.
    """
    _require_support(estimator)
    return translated(estimator, X, y, sample_weight)


def recipe(estimator: Any) -> Refit:
    """The estimator's own `fit` as the learning algorithm for `upweight.evaluation`.

    A fresh clone is fitted with the data weights as sample weights, its tolerance tightened, for
    each model; of a Pipeline the last step, on features transformed as they were. wᵢ = 0 removes
    example i, the objective keeps its 1/n and its penalty. See `Refit`.

    Raises:
        UnsupportedModel: No translation, for the reason that `supports` gives.
    """
    _require_support(estimator)
    return Refit(clone(final_step(estimator)))


def with_parameters(estimator: Any, params: Params) -> Any:
    """A copy of the estimator with other coefficients: the way back from its translation.

    coef_ = W and intercept_ = b, in their shapes and dtypes; of a Pipeline those of its last step.
    Whatever else it keeps of its fit (scalers, paths, iterations) is copied as it is, and still
    knows every training example.

    Args:
        estimator: Fitted, and supported. It is not changed.
        params: "weight" `[c, d]`, and "bias" `[c]` where it has an intercept.

    Raises:
        UnsupportedModel: No translation, for the reason that `supports` gives.
    """
    _require_support(estimator)
    changed = copy.deepcopy(estimator)
    final = final_step(changed)
    if isinstance(final, networks.NETWORKS):
        networks.put(final, params)
        return changed
    final.coef_ = _as(params["weight"], final.coef_)
    if final.fit_intercept:
        final.intercept_ = _as(params["bias"], final.intercept_)
    return changed


def _as(values: Tensor, like: Any) -> Any:
    """An array in the shape and dtype of another; a number where that is one."""
    held = np.asarray(like)
    found = values.detach().cpu().numpy().astype(held.dtype).reshape(held.shape)
    return found if isinstance(like, np.ndarray) else held.dtype.type(found)


def unit_weights(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Outputs and targets (y, v), where v = 1 for examples that carry no weight: queries."""
    assert isinstance(batch, tuple)
    inputs, targets = batch
    outputs = model(inputs)
    if isinstance(targets, Tensor):
        targets = (targets, torch.ones(len(targets), dtype=outputs.dtype, device=outputs.device))
    return outputs, targets


def _require_support(estimator: Any) -> None:
    found = support(estimator)
    if not found:
        raise UnsupportedModel(
            "The estimator must be a fitted linear model or network with a smooth loss.",
            f"{type(estimator).__name__}.",
            found.reason + ".",
            "what the cause names; or uw.attribute(estimator, (X, y), queries), which fits any "
            "estimator again without some rows, and for labels "
            "applications.debugging.flagged_labels(estimator, (X, y)).",
        )


def _trained(final: Any, made: Task, train: Data, total: float, minimize: bool) -> str:
    """Where the training of a network ended, after asking that it was on these data."""
    if minimize:
        raise UnsupportedModel(
            "Newton's method moves θ to the minimum of a convex objective.",
            f"{type(final).__name__}, with minimize=True.",
            "a network, whose objective has many minima.",
            "leave minimize out; or train longer: a smaller tol and a larger max_iter.",
        )
    name, theta = type(final).__name__, made.theta()
    J, gradient = weighted_objective(made, train)(theta[None], theta.new_ones(1, len(train)))
    value, told = float(J) * len(train) / total, float(final.loss_)
    one = not isinstance(made.loss, SquaredError) or final.n_outputs_ == 1
    # Of lbfgs loss_ is J at its end; of the other solvers a mean over the last epoch.
    if final.solver == "lbfgs" and one and not abs(value - told) <= SAME_LOSS * abs(told):
        raise DataError(
            "The training data must be those that the network was trained on.",
            f"{name} whose objective is {value:.6g} on them, and whose loss_ is {told:.6g}.",
            "other data, labels or sample weights than it was fitted on.",
            "pass (X, y) and sample_weight as they were given to fit.",
        )
    beside = f" (its loss_: {told:.3g})" if one else ""
    return (
        f"{name} is a network, whose training ended at J = {value:.3g}{beside} with ‖∇J‖ = "
        f"{float(gradient.norm()):.2g}: how near a minimum that is depends on max_iter and tol"
    )


def _model(final: Any, objective: Objective) -> nn.Module:
    """W x + b with the estimator's coefficients, or its network."""
    if isinstance(final, networks.NETWORKS):
        return networks.network(final)
    return linear_map(*coefficients(final, objective))
