"""scikit-learn's X, y and sample_weight as the tensors that a translated task takes."""

import inspect
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from upweight.adapters.sklearn_objectives import Encoding, Objective, final_step, has_steps
from upweight.adapters.support import numbers
from upweight.errors import DataError, ShapeError
from upweight.runtime.memory import require_bytes


def features(estimator: Any, X: Any) -> Float[Tensor, "n i"]:
    """X after the earlier steps of a Pipeline, as the final estimator takes it, dense.

    Raises:
        SpecError: It is sparse, and dense memory cannot hold it.
        DataError, ShapeError: It is not what the estimator was fitted on.
    """
    final = final_step(estimator)
    if has_steps(estimator):
        # A ColumnTransformer picks columns by name; other steps may go by place without a word.
        if not isinstance(estimator.steps[0][1], ColumnTransformer):
            _require_columns(estimator, X)
        try:
            X = estimator[:-1].transform(X)
        except (ValueError, TypeError) as error:
            shape = tuple(np.shape(X))
            width, after = getattr(estimator, "n_features_in_", None), final.n_features_in_
            cause = "columns missing, renamed or of another kind."
            if len(shape) != 2:
                cause = "a single row without its first axis: X[None], or frame[i : i + 1]."
            elif shape[1] == after != width:
                cause = f"X that was transformed already: {after} is its width after the steps."
            raise DataError(
                "X must be what the Pipeline was fitted on, before its transformations.",
                f"{type(X).__name__} of shape {shape}. scikit-learn says: {error}",
                cause,
                "pass rows as they were given to fit.",
            ) from error
    else:
        _require_columns(final, X)
    if hasattr(X, "toarray"):
        require_bytes(
            8 * X.shape[0] * X.shape[1],
            f"a sparse {type(X).__name__} of shape {X.shape} as a dense array",
            torch.device("cpu"),
            "fewer columns (max_features= of a vectorizer, min_frequency= of an encoder), or "
            "fewer rows; or method=upweight.SubsampledInfluence(100), which fits sparse rows.",
        )
        X = X.toarray()
    Z = numbers(
        X,
        "X must be numbers.",
        "columns of text or categories.",
        "encode them in the Pipeline that is fitted.",
    )
    if Z.ndim != 2 or Z.shape[1] != final.n_features_in_:
        raise ShapeError(
            f"X must be [n, {final.n_features_in_}], as the estimator was fitted.",
            f"shape {Z.shape}.",
            "one example without its leading axis, or features of another preprocessing.",
            "reshape a single example with X[None], or pass the features of training.",
        )
    return torch.from_numpy(Z)


def _require_columns(final: Any, X: Any) -> None:
    names = getattr(final, "feature_names_in_", None)
    if names is not None and hasattr(X, "columns") and list(X.columns) != list(names):
        raise DataError(
            "The columns of X must be those of training, in their order.",
            f"{list(X.columns)[:5]}…, trained on {list(names)[:5]}….",
            "columns dropped, renamed or reordered since.",
            "pass X[estimator.feature_names_in_].",
        )


def encoded(estimator: Any, objective: Objective, y: Any) -> Tensor:
    """y as the loss takes it."""
    final = final_step(estimator)
    outputs = final.n_outputs_ if hasattr(final, "coefs_") else len(np.atleast_2d(final.coef_))
    if objective.encoding is Encoding.REAL:
        return real_targets(type(final).__name__, y, outputs)
    index = indices(final.classes_, y)
    if objective.encoding is Encoding.INDEX:
        return torch.from_numpy(index)
    hot = index[:, None] if outputs == 1 else index[:, None] == np.arange(outputs)
    ones = torch.from_numpy(hot.astype(np.float64))
    return ones if objective.encoding is Encoding.ZERO_ONE else 2 * ones - 1


def real_targets(name: str, y: Any, outputs: int) -> Float[Tensor, "n c"]:
    """y of a regression, with a column for each output."""
    real = numbers(
        y,
        f"The targets of {name} must be numbers.",
        "labels given to a regression.",
        "pass the y that it was fitted on.",
    )
    real = real[:, None] if real.ndim == 1 else real
    if real.shape[1:] != (outputs,):
        raise ShapeError(
            f"y must be [n, {outputs}], as the estimator was fitted.",
            f"shape {np.shape(y)}.",
            "targets of another model.",
            "pass the y that it was fitted on.",
        )
    return torch.from_numpy(real)


def class_index(objective: Objective, target: Tensor) -> int:
    """Which class an encoded target of one example is of."""
    if objective.encoding is Encoding.INDEX:
        return int(target)
    return int(target.argmax()) if len(target) > 1 else int(target > 0)


def indices(classes: Any, y: Any) -> Any:
    """The place of each label among the classes.

    Raises:
        DataError: A label is none of them.
    """
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    place = {label: index for index, label in enumerate(classes.tolist())}
    if labels.ndim == 0:
        raise DataError(
            "Labels are one for each row.",
            f"{labels.item()!r} by itself.",
            "the label of a single row, as y.iloc[0].",
            "pass a list of one, or y[:1].",
        )
    listed = np.atleast_1d(labels).tolist()
    known = labels.ndim == 1 and place.keys() >= set(listed)
    unknown = [] if known else [label for label in listed if _key(label) not in place]
    if labels.ndim != 1 or unknown:
        raise DataError(
            f"Labels must be among the estimator's classes {classes.tolist()[:10]}.",
            f"shape {labels.shape}, with {len(unknown)} others such as {unknown[:3]}.",
            "labels encoded in another way than in training, or a class it has never seen.",
            "pass labels as they were given to fit.",
        )
    return np.array([place[label] for label in labels.tolist()], dtype=np.int64)


def _key(label: Any) -> Any:
    return None if isinstance(label, list) else label


def require_rows(Z: Tensor, targets: Tensor) -> None:
    """Refuse inputs and targets of different lengths."""
    if len(Z) != len(targets):
        raise ShapeError(
            "X and y must have the same number of examples.",
            f"X {tuple(Z.shape)}, y {tuple(targets.shape)}.",
            "X and y of different splits.",
            "pass the pair that belongs together.",
        )


def weights_of(sample_weight: Any, n: int) -> Float[Tensor, " n"]:
    """Sample weights as a vector, finite and at least 0."""
    weights = np.array(sample_weight, dtype=np.float64)
    weights = np.full(n, weights) if weights.ndim == 0 else weights
    if weights.shape != (n,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError(
            f"sample_weight must be {n} numbers of at least 0.",
            f"shape {weights.shape}, smallest {weights.min(initial=np.inf)}.",
            "weights of another split, or NaN.",
            "pass the weights that were given to fit.",
        )
    return torch.from_numpy(weights)


def example_weights(
    final: Any, y: Any, sample_weight: Any, n: int
) -> tuple[Float[Tensor, " n"] | None, Float[Tensor, " c"] | None]:
    """v = sample weight × class weight, and the weight of each class; None where all are 1."""
    given = None if sample_weight is None else weights_of(sample_weight, n)
    if given is not None and not bool(given.any()):
        raise DataError(
            "Weights of the training rows must not sum to 0.",
            f"{n} weights that are all 0.",
            "a mask that leaves nothing, or weights that were rounded or filtered away.",
            "pass the weights that were given to fit, or leave sample_weight out.",
        )
    if getattr(final, "class_weight", None) is None:
        return given, None
    labels = np.asarray(y).reshape(n)
    options = {}
    # "balanced" counts by sample weight where the estimator does, in the versions that do.
    counted = type(final) in (LogisticRegression, LinearSVC) and (
        "sample_weight" in inspect.signature(compute_class_weight).parameters
    )
    if counted and given is not None:
        options["sample_weight"] = given.numpy()
    by_class = compute_class_weight(final.class_weight, classes=final.classes_, y=labels, **options)
    weights = torch.from_numpy(np.array(by_class, np.float64))
    each = weights[torch.from_numpy(indices(final.classes_, y))]
    return each if given is None else each * given, weights
