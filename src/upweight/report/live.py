"""What the model says of each query and training example: measurement, prediction, loss."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight import notation
from upweight.errors import NotOffered
from upweight.report.display import Display, require_one_each
from upweight.scores import Scores
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, CrossEntropy, Loss, Weighted
from upweight.task.measures import Functional
from upweight.task.torch_losses import Rescaled


@dataclass(frozen=True, eq=False)
class TrainFacts:
    """ℓᵢ, −S[i, i] and the predicted class of every training example; None: not known."""

    losses: NDArray[np.float64] | None = None
    self_influence: NDArray[np.float64] | None = None
    predictions: tuple[int | str, ...] | None = None


def noun_of(scores: Scores) -> str:
    """What was measured, in a word: "loss", "margin", …; "measurement" for a user's function."""
    return notation.noun_of(scores.provenance.measure)


def train_facts(scores: Scores, display: Display, ask: bool = True) -> TrainFacts:
    """What was given, completed from the live model and method where the scores still carry them.

    Raises:
        ShapeError: There is not one number per training example.

    Cost: where live ones are to be asked one forward pass, and `fitted.self_influence()`.
    """
    if scores.columns is not None:  # the numbers are of examples, the columns are groups
        return TrainFacts()
    losses, own, classes = (
        display.train_losses, display.self_influence, display.train_predictions,
    )  # fmt: skip
    named = {"train_losses": losses, "self_influence": own, "train_predictions": classes}
    for name, given in named.items():
        if given is not None and len(given):
            require_one_each(name, given, scores.values.shape[1])
    context = scores.context if ask else None
    if losses is None and context is not None:
        task = context.task

        def told(theta: Any, batch: Any) -> tuple[Tensor, Tensor]:
            outputs, targets = task.outputs(theta, batch)
            return task.losses_of(outputs, targets), _classes(task.loss, lambda: outputs)

        losses, found = _asked(scores, context.train, told)
        classes = found if classes is None else classes
    if own is None and context is not None and context.fitted is not None:
        with contextlib.suppress(NotOffered):
            own = context.fitted.self_influence().tolist()
    return TrainFacts(_numbers(losses), _numbers(own, -1.0), _named(classes))


def _numbers(given: Sequence[float] | None, sign: float = 1.0) -> NDArray[np.float64] | None:
    if given is None or not len(given):
        return None
    values = sign * np.asarray([float(v) for v in given])
    return values if np.isfinite(values).all() else None


def query_facts(
    scores: Scores, display: Display
) -> tuple[tuple[float, ...] | None, tuple[int | str, ...] | None]:
    """m of each query as trained, and its predicted class; None where they are not known.

    What was given, completed from the live model where the scores still carry it.

    Raises:
        ShapeError: There is not one value or prediction per query.

    Cost: one forward pass over the queries, if something is missing and there is a context.
    """
    values, predictions = display.values, display.predictions
    for name, given in (("values", values), ("predictions", predictions)):
        require_one_each(name, given, len(scores.values), "query")
    context = scores.context
    if context is not None and isinstance(context.measure, Functional):
        context = None  # which asks all queries together
    if context is not None and (values is None or predictions is None):
        task, measure = context.task, context.measure

        def told(theta: Any, batch: Any) -> tuple[Tensor, Tensor]:
            classes = _classes(task.loss, lambda: task.outputs(theta, batch)[0])
            return measure(task, theta, batch), classes

        found, classes = _asked(scores, context.queries, told)
        values = found if values is None else values
        predictions = (classes or None) if predictions is None else predictions
    return None if values is None else tuple(map(float, values)), _named(predictions)


def _named(classes: Sequence[Any] | None) -> tuple[int | str, ...] | None:
    """Predicted classes, by index or name; None where there are none."""
    if classes is None or not len(classes):
        return None
    return tuple(each if isinstance(each, str) else int(each) for each in classes)


@torch.no_grad()
def _asked(
    scores: Scores, data: Data, question: Callable[[Any, Any], tuple[Tensor, Tensor]]
) -> tuple[list[Any], list[Any]]:
    """What (θ, batch) → two values of each example says of all data; of no value nothing."""
    task = scores.require_context().task
    theta, found = task.theta(), (list[Any](), list[Any]())
    for _, _, batch in data.batches(256):
        for values, more in zip(found, question(theta, task.to_device(batch)), strict=True):
            values += more.tolist()
    return found


def _classes(loss: Loss, outputs: Callable[[], Tensor]) -> Tensor:
    """The class with the largest output, or yes for a positive logit; none for several answers."""
    base = loss.base if isinstance(loss, Weighted | Rescaled) else loss
    if isinstance(base, CrossEntropy) and (found := outputs()).ndim == 2:
        return found.argmax(dim=1)
    if isinstance(base, Bernoulli) and (found := outputs()).numel() == len(found):
        return (found.flatten() > 0).long()
    return torch.empty(0)
