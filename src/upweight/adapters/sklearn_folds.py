"""Cross-validation by scikit-learn's own means: clones fitted on the rows that are left.

A clone of the whole estimator is fitted, a Pipeline with its earlier steps, and class weights are
balanced anew. So are the penalties: `C` multiplies the sum of the losses, which keeps the
objective's 1/n as rows leave, and `alpha` of SGD*, Lasso, ElasticNet and PoissonRegressor the mean,
which then is one over fewer rows.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.linear_model import (
    ElasticNet,
    Lasso,
    PoissonRegressor,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.pipeline import Pipeline
from torch import Tensor

from upweight.adapters import sklearn_sparse
from upweight.adapters.sklearn import fitted_exactly
from upweight.adapters.sklearn import task as smooth_task
from upweight.adapters.sklearn_arrays import features
from upweight.adapters.sklearn_objectives import coefficients, final_step, has_steps
from upweight.adapters.sklearn_outputs import rows_at, weight_name
from upweight.adapters.sklearn_refit import tightened
from upweight.adapters.sklearn_rules import objective_of
from upweight.errors import SpecError
from upweight.methods.fitted import Fitted
from upweight.task.data import Data
from upweight.task.task import Task

OF_THE_MEAN = (SGDClassifier, SGDRegressor, Lasso, ElasticNet, PoissonRegressor)
"""Estimators whose `alpha` stands beside the mean loss."""


@dataclass(frozen=True, eq=False)
class Translated:
    """A fitted estimator, ready to be cross-validated.

    Args:
        task, train: Its objective, and what it was fitted on.
        refits: Clones fitted on what is left.
        renormalizes: Whether its objective is a mean over the rows that are left.
        notes: What to know.
        holds: Of an ℓ1 penalty, whether θ without a group is a minimum with all columns.
        fitted: The exact Hessian of the task, where it was needed already.
        refits_minimize: Whether refits end at the minimum of the task's objective without the rows.
    """

    task: Task
    train: Data
    refits: "Clones"
    renormalizes: bool
    notes: tuple[str, ...] = ()
    holds: Callable[[Tensor, list[int]], bool] | None = None
    fitted: Fitted | None = None
    refits_minimize: bool = True


def translated(
    estimator: Any, X: Any, y: Any, sample_weight: Any = None, *, minimize: bool = False
) -> Translated:
    """The task of a fitted estimator, smooth or ℓ1-penalized, and its own refits.

    Args:
        estimator: Fitted; see `upweight.adapters.sklearn.task` and `sklearn_sparse.task`.
        X: As given to its `fit`.
        y: The same.
        sample_weight: The same.
        minimize: Move θ to the minimum where the fit stopped early; not of an ℓ1 penalty.
    """
    final = final_step(estimator)
    notes: list[str] = []
    holds: Callable[[Tensor, list[int]], bool] | None = None
    fitted: Fitted | None = None
    if sklearn_sparse.is_sparse(estimator):
        task, train, holds, said = sklearn_sparse.task(estimator, X, y, sample_weight)
        notes += said
        objective = sklearn_sparse.objective_of(estimator)
    else:
        fitted = None if minimize else fitted_exactly(estimator, X, y, sample_weight)
        if fitted is None:
            task, train = smooth_task(estimator, X, y, sample_weight, minimize=minimize)
        else:
            task, train = fitted.task, fitted.train
        objective = objective_of(estimator)
    if has_steps(estimator):
        names = ", ".join(name for name, _ in estimator.steps[:-1])
        notes.append(
            f"{names} stays as fitted on all rows, those left out among them: what that leaks is "
            "seen in the refits only, which fit the whole Pipeline"
        )
    renormalizes = type(final) in OF_THE_MEAN
    if renormalizes:
        notes.append(
            f"the alpha of {type(final).__name__} stands beside the mean loss, and so it does when "
            "rows leave: the mean is over what is left"
        )
    with torch.no_grad():
        outputs = int(task.outputs(task.theta(), train.batch(0, 1))[0].shape[1])
    refits = Clones(_unfitted(estimator), X, y, sample_weight, objective, outputs)
    balanced = getattr(final, "class_weight", None) == "balanced"
    same = not (has_steps(estimator) or balanced or type(final) in (SGDClassifier, SGDRegressor))
    return Translated(task, train, refits, renormalizes, tuple(notes), holds, fitted, same)


@dataclass(frozen=True, eq=False)
class Clones:
    """Outputs of some rows by a clone fitted on the others, with a tightened tolerance."""

    estimator: Any
    X: Any = field(repr=False)
    y: Any = field(repr=False)
    sample_weight: Any = field(repr=False)
    objective: Any
    outputs: int

    def __call__(self, groups: Sequence[list[int]]) -> Iterator[tuple[Tensor | None, str]]:
        """The outputs of each group; or None, and what scikit-learn says."""
        for group in groups:
            yield self._without(group)

    def _without(self, group: list[int]) -> tuple[Tensor | None, str]:
        kept = np.ones(len(np.asarray(self.y)), dtype=bool)
        kept[group] = False
        rows, fresh = np.nonzero(kept)[0], clone(self.estimator)
        weights = {}
        if self.sample_weight is not None:
            weights[weight_name(fresh)] = np.asarray(self.sample_weight)[rows]
        try:
            with warnings.catch_warnings():
                # Deprecations were the user's to see at their own fit; tolerances are far below
                # what a removal moves.
                warnings.simplefilter("ignore")
                fresh.fit(rows_at(self.X, rows), rows_at(self.y, rows), **weights)
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            return None, f"{type(final_step(fresh)).__name__} says: {error}"
        weight, bias = coefficients(final_step(fresh), self.objective)
        if len(weight) != self.outputs:
            return None, f"{len(weight)} outputs in place of {self.outputs}: a class is missing"
        found = features(fresh, rows_at(self.X, np.asarray(group))) @ weight.T
        found = found if bias is None else found + bias
        return (found, "") if bool(found.isfinite().all()) else (None, "outputs are not finite")


def along(
    estimator: Any, X: Any, y: Any, parameter: str, values: Sequence[Any], sample_weight: Any = None
) -> Iterator[tuple[Any, Any]]:
    """(value, a clone fitted with it on all rows) for each value of one parameter.

    Raises:
        SpecError: The estimator has no such parameter.
    """
    known = estimator.get_params()
    if parameter not in known:
        raise SpecError(
            "A path is along a parameter of the estimator.",
            f"{parameter!r} of {type(estimator).__name__}.",
            "the step's name is missing, as in logisticregression__C of a Pipeline.",
            f"one of {', '.join(sorted(known)[:12])}.",
        )
    for value in values:
        made = _unfitted(clone(estimator).set_params(**{parameter: value}))
        weights = {} if sample_weight is None else {weight_name(made): sample_weight}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tolerance that rounding does not reach
            made.fit(X, y, **weights)
        yield value, made


def _unfitted(estimator: Any) -> Any:
    """A clone that stops later, with the class weights that it was given."""
    fresh = clone(estimator)
    final = final_step(fresh)
    tight = tightened(final, 0)
    if "class_weight" in final.get_params():
        tight.set_params(class_weight=final.class_weight)
    if isinstance(fresh, Pipeline):
        return fresh.set_params(**{fresh.steps[-1][0]: tight})
    return tight
