"""Leaf influence: what a training row does to a tree ensemble whose splits stay as they are.

Trees that average, or that fit residuals by least squares, predict weighted means of training
labels. With the splits held that is all there is to know of them. Boosted classifiers take Newton
steps in their leaves, which are followed as they are; see `upweight.methods.leaves`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import is_classifier
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor

from upweight.adapters.sklearn_objectives import final_step, has_steps
from upweight.adapters.sklearn_outputs import FORESTS, EstimatorRefit, outputs
from upweight.errors import SpecError, UnsupportedModel
from upweight.methods.fitting import Fitting
from upweight.methods.health import warned
from upweight.methods.leaves import BoostedClasses, Leaves
from upweight.methods.method import Method
from upweight.methods.scorer import BlockScorer, Scorer
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import as_measure

TREES = (DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier, ExtraTreeRegressor)
CLASSIFIERS = (GradientBoostingClassifier, HistGradientBoostingClassifier)
"""Boosted, by the log loss."""

AGREES = 1e-5
"""Relative difference between a prediction and its sum over leaves that is rounding: histogram
boosting keeps its sums in float32."""

ROUNDING = 1e-12
"""Of Σ_c |∂m/∂f_c · f_c|, what is no score of a query: no leaf of it has rows of two labels."""


@dataclass(frozen=True)
class LeafInfluence(Method):
    """S[q, i] = ∂m_q/∂wᵢ of a tree ensemble with its splits held.

        S[q, i] = Σ_c ∂m_q/∂f_c(x_q) · ∂f_c(x_q)/∂wᵢ,      f(x) = Σᵢ Wᵢ(x) yᵢ

    A row that gains weight pulls the means of its leaves; where a tree splits does not change. For
    boosting with squared error this is LeafInfluence of Sharchilev et al. (2018, "AllPoints"),
    which follows the residuals through all later trees; for forests W are the weights of Lin & Jeon
    (2006) and Meinshausen (2006, Eq. 4). See `leaf_weights` for W itself. Of boosted classifiers
    the values of leaves are Newton steps of the log loss, in no W: the derivative goes back through
    all of them.

    Trees and forests of scikit-learn (a classifier's outputs are the shares of its leaves' labels),
    `GradientBoostingRegressor` and `HistGradientBoostingRegressor` with squared error,
    `GradientBoostingClassifier` and `HistGradientBoostingClassifier` with the log loss.

    Needs: `history=` the recipe of `sk.outputs`, which `uw.attribute` hands on.

    Raises:
        SpecError: The history is another one.
        UnsupportedModel: Its predictions are not those of its leaves: another loss, rows drawn at
            random while boosting, a validation set held back; or no tree ensemble.

    Of a query all of whose leaves are pure, as of a forest grown to the end, scores are 0, with a
    warning: their rounding is no ranking.

    Exact when: splits do not change; held against refits with weights 1 ± ε. Known failure: a refit
    chooses its splits anew, and for single rows that is most of what it does.
    Cost: T q n; boosting T n (n + q) and n² numbers of memory; of classifiers T (n + q) for each
    query.
    """

    takes_history = True
    unit = Unit.DERIVATIVE

    def prepare(self, fitting: Fitting) -> Scorer:
        recipe = fitting.history
        if not isinstance(recipe, EstimatorRefit):
            raise SpecError(
                "Leaf influence is of a fitted tree ensemble.",
                f"history={type(recipe).__name__}.",
                "a task that was not made of an estimator.",
                "uw.attribute(forest, (X, y), (X_test, y_test), method=sk.LeafInfluence()).",
            )
        leaves: Leaves | BoostedClasses
        if isinstance(final_step(recipe.estimator), CLASSIFIERS):
            leaves, y = _checked_classes(recipe, fitting.theta)
        else:
            leaves, y = _checked_leaves(recipe, fitting.theta)
        held: list[Any] = [None, None]

        def score(queries: Data, measure: Any, start: int, stop: int) -> Tensor:
            if held[0] is not queries:
                rows, slopes, scale = _slopes(fitting, queries, as_measure(measure))
                made = leaves.weight_derivatives(rows, y, slopes)
                held[:] = [queries, _without_rounding(made, scale)]
            return held[1][:, start:stop]

        return BlockScorer(score, notes=("the splits of the trees are held as they are",))


def leaf_weights(estimator: Any, X: Any, y: Any, queries: Any) -> Float[Tensor, "q n"]:
    """W with f(x_q) = Σᵢ W[q, i] yᵢ: how much of each training label is in each prediction.

    ∂f(x_q)/∂yᵢ with the splits held. Rows sum to 1 for trees and forests; of a classifier the same
    weights make up each probability, Σᵢ W[q, i] 1[yᵢ = c].

    Args:
        estimator: As for `LeafInfluence`.
        X: What it was fitted on.
        y: Its targets.
        queries: Rows.

    Raises:
        UnsupportedModel: As for `LeafInfluence`; or a boosted classifier.
    """
    if isinstance(final_step(estimator), CLASSIFIERS):
        raise UnsupportedModel(
            "Predictions must be the means of training labels by leaf.",
            f"{type(final_step(estimator)).__name__}.",
            "a boosted classifier, whose probabilities are no sum over labels.",
            "uw.attribute(estimator, (X, y), queries, method=sk.LeafInfluence()), which is the "
            "derivative in the weight of a row.",
        )
    first = np.asarray(y)[:1]
    asked = (queries, np.repeat(first, len(queries), axis=0))
    found = outputs(estimator, (X, y), asked)
    leaves, _ = _checked_leaves(found.recipe, found.task.theta())
    rows: Tensor = found.queries.arrays[0]
    return leaves.label_weights(rows)


def _slopes(
    fitting: Fitting, queries: Data, measure: Callable[..., Tensor]
) -> tuple[Int[Tensor, " q"], Float[Tensor, "q c"], Float[Tensor, " q"]]:
    """The rows of the table that are asked about, ∂m_q/∂f(x_q), and Σ_c |∂m_q/∂f_c · f_c|."""
    rows, targets = queries.batch(0, len(queries))  # type: ignore[misc]
    table = fitting.task.named(fitting.theta)["outputs"][rows].detach().requires_grad_()
    # Each query at a row of its own, so that a row that is asked twice counts for each alone.
    values = measure(fitting.task, {"outputs": table}, (torch.arange(len(rows)), targets))
    (slopes,) = torch.autograd.grad(values.sum(), table)
    return rows, slopes, (slopes * table.detach()).abs().sum(dim=1)


def _without_rounding(found: Float[Tensor, "q n"], scale: Float[Tensor, " q"]) -> Tensor:
    """The scores, 0 for queries of which all are rounding; they are warned of."""
    sizes = found.abs().amax(dim=1)
    none = (sizes > 0) & (sizes < ROUNDING * scale)
    count = int(none.sum())
    if not count:
        return found
    warned([
        f"the scores of {count} of {len(found)} queries are rounding, below {ROUNDING:g} of their "
        "outputs, and are given as 0: with the splits held no row moves a leaf whose rows all have "
        "one label. Leave method= out, and the estimator is fitted again without rows"
    ])  # fmt: skip
    return found.masked_fill(none[:, None], 0.0)


def _checked_leaves(
    recipe: EstimatorRefit, theta: Float[Tensor, " p"]
) -> tuple[Leaves, Float[Tensor, "n c"]]:
    """Leaves and targets, after asking that their sums are the predictions."""
    final, parts, b, y = _read(recipe)
    name, n = type(final).__name__, len(y)
    table = theta.reshape(-1, y.shape[1])
    some = torch.linspace(0, len(table) - 1, min(len(table), 64)).long()
    allowed = AGREES * float(y.abs().max())
    far = torch.inf
    # Forests draw their rows by their weights or multiply by them, as the version of scikit-learn.
    for weights in (b, np.ones(n)) if isinstance(final, FORESTS) else (b,):
        leaves = _leaves(final, parts, weights)
        far = min(far, float((leaves.label_weights(some) @ y - table[some]).abs().max()))
        if far <= allowed:
            return leaves, y
    raise UnsupportedModel(*_refusal(name, f"they differ by up to {far:.2g}"))


def _checked_classes(
    recipe: EstimatorRefit, theta: Float[Tensor, " p"]
) -> tuple[BoostedClasses, Float[Tensor, "n c"]]:
    """The same of a boosted classifier, after boosting it again with its leaves."""
    final, parts, b, y = _read(recipe)
    name, weight, n = type(final).__name__, torch.from_numpy(b), len(b)
    if final.loss != "log_loss":
        raise UnsupportedModel(*_refusal(name, f"loss={final.loss!r}"))
    several, rate = y.shape[1] > 2, float(final.learning_rate)
    if isinstance(final, HistGradientBoostingClassifier):
        ridge = float(final.l2_regularization)
        leaves = BoostedClasses(_histogram_leaves(final, parts), weight, rate, ridge=ridge)
    elif final.init in (None, "zero"):
        factor = (y.shape[1] - 1) / y.shape[1] if several else 1.0
        places = [[_numbered(k) for k in t.T] for t in _applied(final, parts).swapaxes(0, 1)]
        centred = final.init is None
        leaves = BoostedClasses(places, weight, rate, factor, centred=centred)
    else:
        raise UnsupportedModel(*_refusal(name, f"init={final.init!r}"))
    table = theta.reshape(-1, y.shape[1])
    found = leaves.outputs(torch.arange(len(table)), y, torch.ones(n, dtype=y.dtype))
    far = float((found - table).abs().max())
    if not far <= AGREES:
        raise UnsupportedModel(*_refusal(name, f"they differ by up to {far:.2g}"))
    return leaves, y


def _read(recipe: EstimatorRefit) -> tuple[Any, list[Any], Any, Float[Tensor, "n c"]]:
    """The last step, its rows and queries, the weights of rows, and targets or labels as 0 or 1."""
    estimator, final = recipe.estimator, final_step(recipe.estimator)
    steps = estimator[:-1] if has_steps(estimator) else None
    parts = [
        steps.transform(rows) if steps is not None else rows for rows in (recipe.X, recipe.rows)
    ]
    n = len(recipe.y)
    b = np.ones(n) if recipe.sample_weight is None else np.asarray(recipe.sample_weight, float)
    if getattr(final, "class_weight", None) is not None:
        b = b * compute_sample_weight(final.class_weight, recipe.y)
    if is_classifier(final):
        classes = np.asarray(final.classes_)
        y = torch.from_numpy((np.asarray(recipe.y).reshape(n, 1) == classes).astype(np.float64))
    else:
        y = torch.from_numpy(np.asarray(recipe.y, np.float64).reshape(n, -1).copy())
    return final, parts, b, y


def _refusal(name: str, given: str) -> tuple[str, str, str, str]:
    return (
        "Predictions must be the means of training labels by leaf, or of a boosted classifier its "
        "Newton steps by leaf.",
        f"{name}: {given}.",
        "a loss other than the squared error (of classes than the log loss), subsample below 1, "
        "early stopping on rows held back, class weights balanced by bootstrap, or no tree "
        "ensemble.",
        "leave method= out, and it is fitted again without rows.",
    )


def _leaves(final: Any, parts: list[Any], b: Any) -> Leaves:
    name, n = type(final).__name__, len(b)
    weight = torch.from_numpy(b)
    if isinstance(final, TREES):
        return Leaves([_numbered(_applied(final, parts))], [weight])
    if isinstance(final, FORESTS):
        places = _applied(final, parts)
        drawn = [weight] * places.shape[1]
        if final.bootstrap:
            drawn = [
                weight * torch.from_numpy(np.bincount(rows, minlength=n).astype(np.float64))
                for rows in final.estimators_samples_
            ]
        return Leaves([_numbered(column) for column in places.T], drawn)
    squares = getattr(final, "loss", None) == "squared_error"
    if isinstance(final, GradientBoostingRegressor) and squares and final.init in (None, "zero"):
        columns = [_numbered(column) for column in _applied(final, parts).T]
        return Leaves(
            columns, [weight] * len(columns), final.learning_rate, centred=final.init is None
        )
    if isinstance(final, HistGradientBoostingRegressor) and squares:
        columns = [column for (column,) in _histogram_leaves(final, parts)]
        ridge = float(final.l2_regularization)
        return Leaves(columns, [weight] * len(columns), final.learning_rate, ridge)
    raise UnsupportedModel(*_refusal(name, "no sums over leaves are known of it"))


def _applied(final: Any, parts: list[Any]) -> Any:
    """The leaf of each row in each tree, by scikit-learn's own numbers."""
    with warnings.catch_warnings():
        # Trees of an ensemble were fitted without the names of its columns.
        warnings.filterwarnings("ignore", message="X has feature names")
        found = np.concatenate([np.asarray(final.apply(part)) for part in parts])
    return found.astype(np.int64)


def _numbered(column: Any) -> Int[Tensor, " r"]:
    return torch.from_numpy(np.unique(column, return_inverse=True)[1].reshape(-1).astype(np.int64))


def _histogram_leaves(final: Any, parts: list[Any]) -> list[list[Int[Tensor, " r"]]]:
    """Histogram boosting has no `apply`: its trees predict the number of the node in its place.

    By iteration and class.
    """
    try:
        bitsets, preprocess = final._bin_mapper.make_known_categories_bitsets, final._preprocess_X
        rounds = [
            [(type(t), t.nodes, t.binned_left_cat_bitsets, t.raw_left_cat_bitsets) for t in trees]
            for trees in final._predictors
        ]
    except AttributeError as error:
        raise UnsupportedModel(*_refusal(type(final).__name__, f"{error}")) from error
    known, index = bitsets()
    read = [np.ascontiguousarray(preprocess(X, reset=False), dtype=np.float64) for X in parts]

    def column(kind: Any, nodes: Any, binned: Any, raw: Any) -> Int[Tensor, " r"]:
        nodes = nodes.copy()
        nodes["value"] = np.arange(len(nodes))
        numbered = kind(nodes, binned, raw)
        return _numbered(np.concatenate([numbered.predict(X, known, index, 1) for X in read]))

    return [[column(*tree) for tree in trees] for trees in rounds]
