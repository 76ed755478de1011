"""Any fitted estimator as a task: θ is the table of what it puts out.

    θ[r] = f(x_r), the training rows, then the queries        θ(w) = that of a fit with weights w

Nothing is differentiated through the estimator, so trees, kernels and neighbours do. What is asked
of the table (`Loss()`, `Margin()`, `LogProb()`, `Logit(c)`, a function of outputs and targets) is
asked of the estimator, and its own `fit` is the recipe.

    predict_proba       probabilities, ℓ = 1 − p(y)
    decision_function   decision values, ℓ = −margin
    predict             numbers, ℓ = ½(f − y)²; of a classifier 0 or 1 for each class, ℓ = 1 − f_y
"""

import copy
import numbers
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import ClusterMixin, OutlierMixin, clone, is_classifier
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted, has_fit_parameter
from torch import Tensor, nn

from upweight._typing import Batch
from upweight.adapters.sklearn_arrays import indices, real_targets, weights_of
from upweight.adapters.sklearn_objectives import final_step, has_steps
from upweight.adapters.sklearn_reader import UNLABELED, require_classes, rows_of, texts_in
from upweight.adapters.sklearn_rules import chooses_penalty
from upweight.adapters.support import (
    AdapterReader,
    RefitTrainer,
    TranslatedData,
    linear_map,
    require_same_index,
)
from upweight.adapters.support import numbers as as_numbers
from upweight.errors import DataError, NotOffered, ShapeError, SpecError, UnsupportedModel
from upweight.runtime.fingerprint import digest
from upweight.task.data import Data
from upweight.task.losses import CrossEntropy, Loss, SquaredError
from upweight.task.penalties import NoPenalty
from upweight.task.task import Task

SAME = 1e-6
"""Relative difference of outputs that is rounding in a refit: threads sum in any order."""


@dataclass(frozen=True)
class ErrorProbability(Loss):
    """ℓ = 1 − p_y of outputs that are probabilities: finite where −log p_y is not."""

    convex = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return 1.0 - _of_target(outputs, targets)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _of_target(outputs, targets).log()

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        p = _of_target(outputs, targets)
        return p.log() - (1 - p).log()


@dataclass(frozen=True)
class NegativeMargin(Loss):
    """ℓ = max_{c ≠ y} f_c − f_y of decision values, −(±f) where there is one for two classes."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self.margin(outputs, targets)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        if outputs.shape[1] == 1:
            return (2 * targets - 1) * outputs[:, 0]
        others = outputs.scatter(1, targets[:, None], -torch.inf).max(dim=1).values
        return _of_target(outputs, targets) - others


def _of_target(outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
    return outputs.gather(1, targets[:, None])[:, 0]


MEANS: dict[type, str] = {
    ErrorProbability: "1 − p(y), the probability of the other classes",
    NegativeMargin: "the decision value of the other classes less that of the label",
    SquaredError: "half the squared error",
}


FORESTS = (
    RandomForestClassifier,
    RandomForestRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
)
"""Whose outputs are means over trees that are drawn alike."""


class OutputTable(nn.Module):
    """f(x_r) = θ[r]: of the training rows, then of the queries."""

    def __init__(self, outputs: Float[Tensor, "r c"]) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        return self.outputs[rows]


@dataclass(frozen=True)
class EstimatorRefit:
    """The estimator's own `fit` on the rows that are left, as a recipe for its table of outputs.

    Rows of weight 0 are taken out of the data, as whoever refits by hand does; where the other
    weights differ they are given to `fit` as `sample_weight`. A Pipeline is fitted as a whole.
    Every `random_state` of the estimator and its parts is its own number (0 where it has none) plus
    `seed`.

    Args:
        estimator: As it was fitted. It is cloned, and not changed.
        X, y, sample_weight: What it was fitted on.
        rows: Queries.
        seed: Added to every `random_state`.
    """

    estimator: Any = field(compare=False)
    X: Any = field(repr=False, compare=False)
    y: Any = field(repr=False, compare=False)
    sample_weight: Any = field(repr=False, compare=False)
    rows: Any = field(repr=False, compare=False)
    origin: str  # a hash of all of these
    seed: int = 0

    def prepare(self, task: Task, train: Data) -> RefitTrainer:
        """Bind it to its task; a SpecError where that is another one."""
        reads = task.reads
        if not isinstance(reads, TableReader) or reads.train.origin != self.origin:
            raise SpecError(
                "The refits of an estimator are of the task that was made with them.",
                f"{task!r}.",
                "the task of another estimator, or of other queries.",
                "task, train, queries, recipe = sk.outputs(estimator, (X, y), queries).",
            )

        def fit(w: Float[Tensor, " n"]) -> tuple[Float[Tensor, " p"] | None, str]:
            try:
                found = self.table(self.fitted(w.numpy()))
            except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
                return None, f"{self.name} says: {error}"
            bad = not bool(found.isfinite().all())
            return (None, "outputs that are not finite") if bad else (found.reshape(-1), "")

        return RefitTrainer(task, fit, None)

    @property
    def name(self) -> str:
        """Of the estimator, or of the last step of a Pipeline."""
        return type(final_step(self.estimator)).__name__

    def table(self, fitted: Any) -> Float[Tensor, "r c"]:
        """What an estimator puts out at the training rows and the queries."""
        parts = [outputs_of(fitted, rows, self.estimator) for rows in (self.X, self.rows)]
        return torch.cat(parts)

    def some(self, places: Any) -> Any:
        """Some of the training rows."""
        return rows_at(self.X, places)

    @property
    def trees(self) -> int:
        """Of a forest, whose outputs are means over its trees; 0: it is none."""
        final = final_step(self.estimator)
        return int(final.n_estimators) if isinstance(final, FORESTS) else 0

    def with_trees(self, count: int) -> "EstimatorRefit":
        """The same with another number of trees.

        A mean over trees that are drawn alike has the same expectation, whatever their number.
        """
        estimator = copy.deepcopy(self.estimator)
        final_step(estimator).set_params(n_estimators=count)
        return replace(self, estimator=estimator)

    def timed(self) -> float:
        """Seconds of one fit, and of its outputs."""
        started = time.perf_counter()
        self.table(self.fitted())
        return time.perf_counter() - started

    def fitted(self, weights: Any = None) -> Any:
        """The estimator, fitted again with weights of the training rows."""
        fresh = seeded(clone(self.estimator), self.seed)
        kept = slice(None) if weights is None else np.flatnonzero(weights)
        given = None if weights is None else weights[kept]
        v = None if self.sample_weight is None else self.sample_weight[kept]
        if given is not None and not np.ptp(given) == 0.0:
            v = given if v is None else given * v
        X = rows_at(self.X, kept)
        arguments = {} if v is None else {weight_name(fresh): v}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were the user's to see at the fit
            return fresh.fit(X, rows_at(self.y, kept), **arguments)


@dataclass(frozen=True, eq=False)
class TableReader(AdapterReader):
    """Reads nothing but what the table was made with."""

    names: tuple[Any, ...] | None

    @property
    def classes(self) -> tuple[Any, ...] | None:
        return self.names

    def translate(self, given: Any) -> TranslatedData:
        raise DataError(
            "The outputs of an estimator are held for the rows that were asked about.",
            f"a {type(given).__name__}.",
            "other rows than those that the scores were asked of.",
            "ask about all rows at once, uw.attribute(estimator, (X, y), queries); or pass the "
            "data that sk.outputs(estimator, (X, y), queries) returned.",
        )

    def relabeled(self, example: Batch, label: Any) -> Batch:
        raise NotOffered(
            "The effect of another label is found by a gradient.",
            "an estimator of which outputs alone are known.",
            "a question of influence functions.",
            "rows whose labels may be wrong: upweight.applications.debugging.flagged_labels("
            "estimator, (X, y)), by cross-validation; or fit with the other label, and compare.",
        )


@dataclass(frozen=True, eq=False)
class Outputs:
    """An estimator as a task, what it was fitted on, what is asked, and how it is fitted again."""

    task: Task
    train: TranslatedData
    queries: TranslatedData
    recipe: EstimatorRefit

    @property
    def says(self) -> str:
        """What its loss is, for a note."""
        return f"Loss() of {self.recipe.name} is {MEANS[type(self.task.loss)]}"

    @property
    def chosen_from(self) -> str | None:
        """Of a linear model that chose its own penalty: which model is answered without refits."""
        return chooses_penalty(final_step(self.recipe.estimator))

    @property
    def names(self) -> tuple[Any, ...] | None:
        """The classes, or None of a regression."""
        assert self.task.reads is not None
        return self.task.reads.classes

    def tried(self) -> tuple[float, float, float]:
        """Two fits, of two seeds: seconds of one, and how far outputs are apart.

        Returns:
            Seconds; the largest difference of an output between the seeds; and between the first
            and the model. Differences that are rounding are 0.

        Raises:
            DataError: A fit on the data does not give the model again, and no seed is to blame.
        """
        recipe, given = self.recipe, self.task.theta()
        values, taken = [], []
        for own in (recipe, replace(recipe, seed=recipe.seed + 1)):
            started = time.perf_counter()
            values.append(recipe.table(own.fitted()).reshape(-1))
            taken.append(time.perf_counter() - started)
        drift, noise = (_apart(values[0], each) for each in (given, values[1]))
        if drift > 0 and (noise == 0 or is_seeded(recipe.estimator)):
            raise DataError(
                "A fit on the training data must give the model again.",
                f"{recipe.name} whose outputs differ from those of a refit by up to {drift:.2g}.",
                "other data, labels or sample weights than it was fitted on, warm_start, or a fit "
                "that does not repeat itself.",
                "pass (X, y) as they were given to fit, in their order; or ask about a model that "
                "is: model = clone(estimator).fit(X, y).",
            )
        return min(taken), noise, drift


def outputs(estimator: Any, train: Any, queries: Any) -> Outputs:
    """Any fitted estimator as the table of its outputs; see the top of this file.

    Args:
        estimator: Fitted: anything with `fit` and `predict`. A Pipeline is refitted as a whole.
        train: (X, y) or (X, y, sample_weight) as it was fitted on.
        queries: (X, y); or X alone, for which the predicted class is taken.

    Returns:
        `.task`, `.train`, `.queries` and `.recipe`, for `Method.fit`, `evaluation` and `check`.

    Raises:
        UnsupportedModel: It is not fitted, chooses among estimators, or has several targets with
            classes.
        DataError, ShapeError: X or y are not what it was fitted on.
    """
    require_fitted(estimator)
    X, y, *rest = _parts(train, "Training data", least=2)
    weight = None if not rest or rest[0] is None else weights_of(rest[0], len(y)).numpy()
    asked, labels, *_ = (*_parts(queries, "Queries", least=1), None)
    require_same_index(X, y, "X", "y")
    if len(y) != _length(X):
        raise ShapeError(
            "X and y must have the same number of examples.",
            f"{_length(X)} rows and {len(y)} labels.",
            "X and y of different splits.",
            "pass the pair that belongs together.",
        )
    for rows, what in ((X, "training data"), (asked, "queries")):
        if _length(rows) == 0:
            raise DataError(
                f"There must be {what}.",
                "none.",
                "a filter that matched nothing.",
                "pass one row or more.",
            )
    notes: tuple[str, ...] = ()
    if labels is None:
        require_classes(estimator)
        labels, notes = _known(estimator, asked, estimator.predict), (UNLABELED,)
    else:
        require_same_index(asked, labels, "X", "y")
    fixed, table = (
        _known(estimator, rows, lambda some: outputs_of(estimator, some, estimator))
        for rows in (X, asked)
    )
    loss, names = _loss(estimator), _classes(estimator)
    targets, wanted = (_targets(estimator, each, fixed) for each in (y, labels))
    if len(wanted) != len(table):
        raise ShapeError(
            "Queries must have one label each.",
            f"{len(table)} rows and {len(wanted)} labels.",
            "X and y of different splits.",
            "pass the pair that belongs together.",
        )
    told = f"{type(estimator).__qualname__} {estimator.get_params(deep=True)}"
    origin = digest(told, [fixed, table, targets])
    n, q = len(fixed), len(table)
    own, rows = rows_of(estimator, X, y), rows_of(estimator, asked, labels)
    data = TranslatedData((torch.arange(n), targets), (), own, origin)
    found = TranslatedData((torch.arange(n, n + q), wanted), notes, rows, origin)
    reader = TableReader(data, "sk.outputs(estimator, (X, y), queries)", names)
    task = Task(OutputTable(torch.cat([fixed, table])).eval(), loss, NoPenalty(), reads=reader)
    kept = copy.deepcopy(estimator)  # which a later fit of the user's does not change
    recipe = EstimatorRefit(kept, X, np.asarray(y), weight, asked, origin)
    return Outputs(task, data, found, recipe)


def require_fitted(estimator: Any) -> None:
    """Refuse, by an UnsupportedModel, what is not fitted, or chooses anew at every fit."""
    final = final_step(estimator)
    name = type(final).__name__
    if hasattr(final, "best_estimator_") or name.endswith("SearchCV"):
        raise UnsupportedModel(
            "The model is an estimator, not a search for one.",
            f"{name}.",
            "a search, each fit of which tries every candidate again.",
            "pass its .best_estimator_, with the X and y that the search was fitted on.",
        )
    if not any(hasattr(final, each) for each in ("predict", "predict_proba")):
        raise UnsupportedModel(
            "An estimator must predict.",
            f"{name}, which has no predict.",
            "a transformer, or a clusterer that labels nothing else.",
            "pass the estimator or Pipeline that makes the predictions.",
        )
    if isinstance(final, ClusterMixin | OutlierMixin):
        raise UnsupportedModel(
            "An estimator must have learned from labels or targets.",
            f"{name}, which looks at none.",
            "a clusterer, or a detector of outliers.",
            "pass the classifier or regression that follows it.",
        )
    try:
        check_is_fitted(final)
    except NotFittedError as error:
        raise UnsupportedModel(
            "The estimator must be fitted.",
            f"{name}, which has learned nothing yet.",
            "a clone, or a new object.",
            "call .fit(X, y) first.",
        ) from error
    if is_classifier(estimator) and isinstance(getattr(final, "classes_", None), list):
        raise UnsupportedModel(
            "A classifier must have one label an example.",
            f"{name} with {len(final.classes_)} labels.",
            "a y with several columns.",
            "fit one classifier for each column.",
        )


def outputs_of(estimator: Any, X: Any, like: Any) -> Float[Tensor, "n c"]:
    """What an estimator puts out, in the columns of another one that may know more classes.

    Raises:
        ValueError: A class is missing, of which no decision value is known.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of feature names, which were the user's to see
        if not is_classifier(like):
            found = np.asarray(estimator.predict(X), np.float64)
            return torch.from_numpy(found.reshape(len(found), -1).copy())
        known, own = _classes(like), _classes(estimator)
        assert known is not None and own is not None
        place = [known.index(each) for each in own]
        if hasattr(like, "predict_proba"):
            found = estimator.predict_proba(X)
        elif hasattr(like, "decision_function"):
            if own != known:
                raise ValueError("a class is missing, of which there is no decision value")
            found = np.asarray(estimator.decision_function(X), np.float64)
            return torch.from_numpy(found.reshape(len(found), -1).copy())
        else:
            found = np.asarray(estimator.predict(X))[:, None] == np.array(own)
    every = torch.zeros(len(found), len(known), dtype=torch.float64)
    every[:, place] = torch.from_numpy(np.array(found, np.float64))
    return every


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; 0 where it is rounding."""
    found = float((one - other).abs().max())
    return found if found > SAME * float(other.abs().max()) else 0.0


def seeded(estimator: Any, seed: int) -> Any:
    """An estimator whose every random_state is a number: its own, or 0, plus the seed."""
    changes = {
        name: (int(value) if isinstance(value, numbers.Integral) else 0) + seed
        for name, value in _random_states(estimator).items()
    }
    return estimator.set_params(**changes)


def is_seeded(estimator: Any) -> bool:
    """Whether every random_state is a number, so that the same data give the same model."""
    return all(isinstance(each, numbers.Integral) for each in _random_states(estimator).values())


def _random_states(estimator: Any) -> dict[str, Any]:
    every = estimator.get_params(deep=True).items()
    return {k: v for k, v in every if k == "random_state" or k.endswith("__random_state")}


def by_features(estimator: Any, train: Any, queries: Any) -> Outputs:
    """The same examples by their features, for methods that look at neighbours and at no model.

    Features are what the last step of a Pipeline takes, every column about its mean in units of its
    standard deviation over the training rows. The task's own model is 0 and is not looked at.

    Raises:
        UnsupportedModel, DataError, ShapeError: As for `outputs`; or features are not numbers.
    """
    found = outputs(estimator, train, queries)
    own, known = _features(estimator, found.recipe.X), _features(estimator, found.recipe.rows)
    mean, scale = own.mean(dim=0), own.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    arrays = [
        ((X - mean) / scale, data.arrays[1])
        for X, data in ((own, found.train), (known, found.queries))
    ]
    origin = found.train.origin
    said = ("distances are Euclidean, of columns in units of their standard deviation",)
    train_data = TranslatedData(arrays[0], said, found.train.given, origin)
    asked = TranslatedData(arrays[1], found.queries.notes, found.queries.given, origin)
    width = 1 if found.task.loss == SquaredError() else len(_classes(estimator) or ())
    model = linear_map(own.new_zeros(width, own.shape[1]), own.new_zeros(width))
    loss = SquaredError() if width == 1 else CrossEntropy()
    reader = TableReader(train_data, "sk.by_features(estimator, (X, y), queries)", found.names)
    return Outputs(Task(model, loss, NoPenalty(), reads=reader), train_data, asked, found.recipe)


def _features(estimator: Any, X: Any) -> Float[Tensor, "n d"]:
    raw = estimator[:-1].transform(X) if has_steps(estimator) else X
    raw = raw.toarray() if hasattr(raw, "toarray") else raw
    found = as_numbers(
        raw,
        "Neighbours are near in features that are numbers.",
        "columns of text or categories.",
        "encode them in the Pipeline that is fitted.",
    )
    return torch.from_numpy(found)


def _loss(estimator: Any) -> Loss:
    if not is_classifier(estimator):
        return SquaredError()
    decides = hasattr(estimator, "decision_function") and not hasattr(estimator, "predict_proba")
    return NegativeMargin() if decides else ErrorProbability()


def _classes(estimator: Any) -> tuple[Any, ...] | None:
    return tuple(np.asarray(estimator.classes_).tolist()) if is_classifier(estimator) else None


def _targets(estimator: Any, y: Any, like: Tensor) -> Tensor:
    if is_classifier(estimator):
        return torch.from_numpy(indices(np.asarray(estimator.classes_), y))
    return real_targets(type(final_step(estimator)).__name__, y, like.shape[1])


def _known(estimator: Any, X: Any, predict: Callable[[Any], Any]) -> Any:
    """What it predicts, or in our words why it does not."""
    try:
        return predict(X)
    except (ValueError, TypeError, KeyError) as error:
        name = type(final_step(estimator)).__name__
        raise DataError(
            f"X must be rows as {name} was fitted on.",
            f"{type(X).__name__} of shape {np.shape(X)}. It says: {error}",
            "columns missing, renamed or reordered, or a single row without its first axis.",
            "pass rows as they were given to fit; a single one as X[None] or frame[i : i + 1].",
        ) from error


def _parts(given: Any, what: str, least: int) -> tuple[Any, ...]:
    # A list may be one of texts, which are rows.
    of_arrays = isinstance(given, list) and all(hasattr(each, "__len__") for each in given)
    of_texts = of_arrays and any(isinstance(each, str) for each in given)
    if isinstance(given, tuple) or (of_arrays and not of_texts):
        if least <= len(given) <= 3:
            return tuple(given)
    elif least == 1 and (texts_in(given) or len(getattr(given, "shape", ())) == 2):
        return (given,)
    raise SpecError(
        f"{what} of an estimator are (X, y)"
        + (", or (X, y, sample_weight)." if least == 2 else ", or X alone."),
        f"a {type(given).__name__}.",
        "X alone, a Dataset or a DataLoader.",
        "attribute(estimator, (X, y), (X_test, y_test)), as they were given to fit.",
    )


def _length(X: Any) -> int:
    shape = getattr(X, "shape", None)
    return int(shape[0]) if shape is not None else len(X)


def rows_at(X: Any, kept: Any) -> Any:
    """Some rows of an array, a frame, a sparse matrix or a list, in the order given."""
    if isinstance(kept, slice):
        return X
    if hasattr(X, "iloc"):
        return X.iloc[kept]
    return X[kept] if hasattr(X, "shape") else [X[i] for i in kept]


def weight_name(estimator: Any) -> str:
    """What its `fit` calls the sample weights; a ValueError where it takes none."""
    final = final_step(estimator)
    if not has_fit_parameter(final, "sample_weight"):
        raise ValueError("its fit takes no sample_weight, so rows can be left out but not weighed")
    is_pipeline = isinstance(estimator, Pipeline)  # which takes no bare name, whatever its length
    return f"{estimator.steps[-1][0]}__sample_weight" if is_pipeline else "sample_weight"
