"""What does a classifier say of rows that it has not seen? Probabilities by cross-validation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import is_classifier
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from upweight.adapters.sklearn_objectives import final_step
from upweight.adapters.sklearn_outputs import outputs, outputs_of
from upweight.errors import DataError, SpecError, UnsupportedModel
from upweight.runtime.streams import stream_seed


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """p(c | xᵢ) of every row by models fitted without its fold.

    Args:
        probabilities: One row an example, one column a class.
        labels: The class of each example, as its place in `classes`.
        classes: As the user knows them.
    """

    probabilities: Float[Tensor, "n c"]
    labels: Int[Tensor, " n"]
    classes: tuple[Any, ...]


def out_of_fold(estimator: Any, train: Any, folds: int = 5, seed: int = 0) -> OutOfFold:
    """Fit the estimator on all folds but one, for each, and ask it about that one.

    Args:
        estimator: Fitted, with `predict_proba`. It is cloned; a Pipeline is fitted as a whole.
        train: (X, y) or (X, y, sample_weight) as it was fitted on.
        folds: How many, with the shares of the classes alike.
        seed: Of their draw.

    Raises:
        UnsupportedModel: It has no probabilities.
        SpecError: There are fewer than two folds.
        DataError: A class has fewer rows than there are folds.
        UpweightError: As for `outputs`.

    Cost: a fit on most of the rows for each fold.
    """
    name = type(final_step(estimator)).__name__
    if not (is_classifier(estimator) and hasattr(estimator, "predict_proba")):
        raise UnsupportedModel(
            "Wrong labels are found by the probabilities of a classifier.",
            f"{name}, which has no predict_proba.",
            "a regression, or a classifier of decision values such as SVC.",
            "of a classifier CalibratedClassifierCV(estimator).fit(X, y), which has them; of a "
            "regression look at its residuals.",
        )
    X = train[0] if isinstance(train, tuple | list) and train else train
    found = outputs(estimator, train, X)
    recipe, labels = found.recipe, found.train.arrays[1]
    counts = torch.bincount(labels)
    if folds < 2:
        raise SpecError(
            "Cross-validation needs two folds or more.",
            f"folds={folds!r}.",
            "a share of the data in place of a number.",
            "folds=5.",
        )
    if int(counts[counts > 0].min()) < folds:
        raise DataError(
            "Each class must have a row for every fold.",
            f"folds={folds}, and a class with {int(counts[counts > 0].min())} rows.",
            "a rare class.",
            f"folds={max(2, int(counts[counts > 0].min()))}, or leave out rows of classes so rare.",
        )
    classes = found.names or ()
    probabilities = torch.empty(len(labels), len(classes), dtype=torch.float64)
    splits = StratifiedKFold(folds, shuffle=True, random_state=stream_seed("folds", seed)).split(
        labels, labels
    )
    for kept, held in splits:
        weights = np.zeros(len(labels))
        weights[kept] = 1.0
        fitted = recipe.fitted(weights)
        probabilities[held] = outputs_of(fitted, recipe.some(held), recipe.estimator)
    return OutOfFold(probabilities, labels, classes)
