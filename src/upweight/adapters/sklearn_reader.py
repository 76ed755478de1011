"""How the task of an estimator reads rows and labels: as the estimator's own methods do.

(X, y)     before a Pipeline's transformations, classes by name
X, (X,)    without labels: those that the estimator predicts
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.pipeline import Pipeline
from torch import Tensor

from upweight._typing import Batch
from upweight.adapters.sklearn_arrays import (
    class_index,
    encoded,
    features,
    require_rows,
    weights_of,
)
from upweight.adapters.sklearn_objectives import Objective, final_step, has_steps
from upweight.adapters.sklearn_rules import objective_of
from upweight.adapters.support import AdapterReader, TranslatedData, require_same_index
from upweight.errors import DataError, UnsupportedModel
from upweight.runtime.fingerprint import digest
from upweight.task.data import Data
from upweight.task.identity import described
from upweight.task.rows import Rows, row_name

UNLABELED = "queries without labels: the class that the estimator predicts stands for each"


def translated(
    estimator: Any, X: Any, y: Any = None, sample_weight: Any = None, objective: Any = None
) -> TranslatedData:
    """Examples for the task of a supported estimator; see `upweight.adapters.sklearn.data`."""
    Z, labels = features(estimator, X), y
    notes: tuple[str, ...] = ()
    if y is None:
        rows = rows_of(estimator, X)
        y, notes = _predicted(estimator, X, Z, rows), (UNLABELED,)
    else:
        require_same_index(X, y, "X", "y")
    targets = encoded(estimator, objective or objective_of(estimator), y)
    require_rows(Z, targets)
    arrays: Any = (Z, targets)
    if sample_weight is not None:
        require_same_index(X, sample_weight, "X", "sample_weight")
        arrays = (Z, (targets, weights_of(sample_weight, len(Z))))
    return TranslatedData(arrays, notes, rows_of(estimator, X, labels), origin_of(estimator))


def rows_of(estimator: Any, X: Any, y: Any = None) -> Rows | None:
    """What X and y call the rows and columns; of an array what the estimator calls its columns."""
    found = Rows.of(X, y, getattr(estimator, "feature_names_in_", None))
    texts = texts_in(X)
    if texts is None:
        return found
    return Rows(None if found is None else found.ids, texts=texts)


def texts_in(X: Any) -> list[str] | None:
    """The rows where each is a text, as a vectorizer takes them; None where they are no texts."""
    if not (isinstance(X, list) or (hasattr(X, "__array__") and len(X.shape) == 1)):
        return None
    rows = X if isinstance(X, list) else np.asarray(X, dtype=object).tolist()
    return [*rows] if rows and all(isinstance(row, str) for row in rows) else None


def origin_of(estimator: Any) -> str:
    """A hash of what the steps are, were told and have learned, as far as it can be read."""
    steps = (
        [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    )
    return digest(*map(_learned, steps))


def _learned(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return _learned(value.tolist()) if value.dtype.kind in "OUS" else described(value)
    if hasattr(value, "get_params"):
        # By convention what was learned ends in _; the rest may be a step's notes to itself.
        kept = {k: v for k, v in vars(value).items() if k.endswith("_") and not k.startswith("_")}
        told = value.get_params(deep=False)
        return f"{type(value).__module__}.{type(value).__qualname__} {_learned(told | kept)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_learned(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_learned, value)) + ")"
    plain = isinstance(value, str | int | float | np.generic)
    return repr(value) if plain else type(value).__qualname__


@dataclass(frozen=True, eq=False)
class Reader(AdapterReader):
    """Reads by a copy of the fitted estimator. Made by `Reader.of`.

    Args:
        estimator: As it was when the task was made.
        objective: Says how labels are encoded.
        by_class: The weight of each class in the objective, or None where all are 1.
    """

    estimator: Any
    objective: Objective
    by_class: Any

    @staticmethod
    def of(
        estimator: Any, objective: Objective, arrays: Any, by_class: Any, rows: Rows | None = None
    ) -> "Reader":
        """The reader of a task with these training arrays; its Pipeline must be one to copy."""
        try:
            own = copy.deepcopy(estimator)
        except Exception as error:  # whatever a step of the user's raises
            raise UnsupportedModel(
                "A Pipeline must be one that can be copied: its task reads data by its own "
                "copy, whatever becomes of it.",
                f"copy.deepcopy says: {error}",
                "a step that holds a connection, a lock or a generator.",
                "transform X by the earlier steps yourself, and pass the last step: "
                "sk.task(pipeline[-1], pipeline[:-1].transform(X), y).",
            ) from error
        train = TranslatedData(arrays, (), rows, origin_of(own))
        return Reader(train, "sk.data(estimator, X, y)", own, objective, by_class)

    @property
    def classes(self) -> tuple[Any, ...] | None:
        """Those of a classifier."""
        final = final_step(self.estimator)
        return tuple(final.classes_.tolist()) if is_classifier(final) else None

    @property
    def coefficients(self) -> Mapping[str, tuple[str, int]]:
        """By the features that reach the last step, as scikit-learn names them."""
        names = _feature_names(self.estimator)
        return {name: ("weight", k) for k, name in enumerate(names) if names.count(name) == 1}

    def label(self, target: Tensor) -> Any:
        """The class of a target, by name; of a regression None."""
        names = self.classes
        return None if names is None else names[class_index(self.objective, target)]

    def translate(self, given: Any) -> TranslatedData:
        X, y = _parts(given)
        through = has_steps(self.estimator)
        if through and isinstance(X, Tensor):
            raise DataError(
                "Data for the task of a Pipeline are rows before its transformations.",
                f"a torch.Tensor {tuple(X.shape)}, which may hold rows before or after them.",
                "features taken from the translated data, or rows converted to tensors.",
                "pass rows as they were given to fit, a data frame or an array (X.numpy()); "
                f"or {self.call}.",
            )
        return translated(self.estimator, X, y, None, self.objective)

    def training(self, given: Any) -> Data:
        """As `AdapterReader.training`; training data have labels."""
        if not isinstance(given, Data) and _parts(given)[1] is None:
            raise DataError(
                "Training data need their labels.",
                "X alone.",
                "the y that was left out.",
                "pass (X, y) as they were given to fit, or the `train` that came with the task.",
            )
        return super().training(given)

    def relabeled(self, example: Batch, label: Any) -> Batch:
        """Another label, as the estimator knows it, with the class weight that it has."""
        assert isinstance(example, tuple)
        X, old = example
        given = np.asarray(label)
        new = encoded(self.estimator, self.objective, given[None])
        require_rows(X, new)
        if isinstance(old, Tensor):
            return X, new.to(old)
        y, v = old
        if self.by_class is None:
            return X, (new.to(y), v)
        before, after = (self.by_class[class_index(self.objective, t)] for t in (y[0], new[0]))
        if before == 0:
            raise DataError(
                "An example that is given another label must count before and after.",
                "a class whose weight is 0: its examples are not part of the objective.",
                "class_weight with a 0.",
                "leave those examples out of the training data and fit again.",
            )
        return X, (new.to(y), v * (after / before))


def _feature_names(estimator: Any) -> list[str]:
    """Of what reaches the last step; none where the data had no names, or a step tells none."""
    if not hasattr(estimator, "feature_names_in_"):
        return []
    if has_steps(estimator):
        try:
            return [str(name) for name in estimator[:-1].get_feature_names_out()]
        except (AttributeError, ValueError):  # a step without names of its own
            return []
    return [str(name) for name in estimator.feature_names_in_]


def _parts(given: Any) -> tuple[Any, Any]:
    """X and y, where the latter may be None."""
    if texts_in(given) is not None:
        return given, None
    pair = isinstance(given, tuple) or (
        isinstance(given, list) and bool(given) and all(hasattr(v, "__array__") for v in given)
    )
    if pair and 1 <= len(given) <= 2:
        return given[0], given[1] if len(given) == 2 else None
    is_matrix = hasattr(given, "__array__") or hasattr(given, "tocsr")
    if is_matrix and len(given.shape) == 2:
        return given, None
    cause = "a Dataset, DataLoader or dict; or sample weights beside X and y."
    way_out = "pass (X, y); with weights sk.data(estimator, X, y, sample_weight)."
    if isinstance(given, str | dict) or (is_matrix and len(given.shape) == 1):
        cause, way_out = "one row in place of several.", _one_row(given)
    raise DataError(
        "Data for the task of an estimator are (X, y) as they were given to fit, or X alone.",
        f"a {type(given).__name__}{f' of {len(given)}' if pair else ''}.",
        cause,
        way_out,
    )


def _one_row(given: Any) -> str:
    """How one row is given as rows."""
    if isinstance(given, str):
        return "pass a list of one text, [text]."
    if isinstance(given, dict):
        return "pass a frame of one row, pandas.DataFrame([row])."
    if hasattr(given, "iloc"):
        return "pass a frame of one row, X.iloc[[3]] in place of X.iloc[3]."
    return "pass an array of one row, X[3:4] in place of X[3]."


def require_classes(estimator: Any) -> None:
    """Refuse, by a DataError, queries without targets of what predicts no classes."""
    if not is_classifier(final := final_step(estimator)):
        raise DataError(
            f"The loss of {type(final).__name__} needs the target of each query.",
            "X without y.",
            "predictions for which no target is known yet.",
            "to ask about the predictions themselves, give any y, such as zeros, and "
            "measure=upweight.Logit(0), which does not look at it.",
        )


def _predicted(estimator: Any, X: Any, Z: Tensor, rows: Rows | None) -> Any:
    """The class of each row, by the estimator. A regression's loss at its own has no gradient."""
    require_classes(estimator)
    bad = (~Z.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(bad):
        raise DataError(
            "Every query must be finite where the estimator sees it.",
            f"{len(bad)} of {len(Z)} rows with NaN or infinity, first "
            f"{row_name(rows, int(bad[0]))}.",
            "missing values in the data.",
            "impute them as in training, or leave these rows out: X.dropna().",
        )
    return estimator.predict(X)
