"""What the model says of each query: its measurement and its prediction."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NotOffered, ShapeError, message
from upweight.scores import Scores
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, CrossEntropy, Weighted
from upweight.task.task import Task

_NOUNS = {"Loss": "loss", "Margin": "margin", "LogProb": "log-probability", "Logit": "logit"}


@dataclass(frozen=True)
class QueryFacts:
    """One value per query, or None where it is not known.

    Args:
        values: m_q as trained.
        predictions: The class predicted for each query.
    """

    values: tuple[float, ...] | None
    predictions: tuple[int | str, ...] | None


@dataclass(frozen=True, eq=False)
class TrainFacts:
    """One number per training example, or None where it is not known.

    Args:
        losses: ℓᵢ as trained.
        self_influence: −S[i, i]: what its own loss is predicted to gain when it is removed.
    """

    losses: NDArray[np.float64] | None = None
    self_influence: NDArray[np.float64] | None = None


def train_facts(
    scores: Scores, losses: Sequence[float] | None, self_influence: Sequence[float] | None
) -> TrainFacts:
    """What was given, completed from the live model and method where the scores still carry them.

    Raises:
        ShapeError: There is not one number per training example.

    Cost: one forward pass over the training data, and `fitted.self_influence()`.
    """
    if scores.columns is not None:  # the numbers are of examples, the columns are groups
        return TrainFacts()
    n = scores.values.shape[1]
    known = {"train_losses": losses, "self_influence": self_influence}
    for name, given in known.items():
        if given is not None and len(given) not in (0, n):
            raise ShapeError(
                message(
                    f"{name} must have one number per training example: {n}.",
                    f"{len(given)} numbers.",
                    "numbers of another split.",
                    "pass those of the training set, in its order, or () to leave them out.",
                )
            )
    context = scores.context
    if losses is None and context is not None:
        losses = _train_losses(context.task, context.train)
    if self_influence is None and context is not None and context.fitted is not None:
        with contextlib.suppress(NotOffered):
            self_influence = context.fitted.self_influence().tolist()
    return TrainFacts(_numbers(losses), _numbers(self_influence, -1.0))


def _numbers(given: Sequence[float] | None, sign: float = 1.0) -> NDArray[np.float64] | None:
    if given is None or not len(given):
        return None
    values = sign * np.asarray([float(v) for v in given])
    return values if np.isfinite(values).all() else None


@torch.no_grad()
def _train_losses(task: Task, train: Data) -> list[float]:
    theta = task.theta()
    values: list[float] = []
    for _, _, batch in train.batches(256):
        values += task.losses(theta, task.to_device(batch)).tolist()
    return values


def noun_of(scores: Scores) -> str:
    """What was measured, in a word: "loss", "margin", …; "measurement" for a user's function."""
    return _NOUNS.get(scores.provenance.measure.split("(")[0], "measurement")


def query_facts(
    scores: Scores, values: Sequence[float] | None, predictions: Sequence[Any] | None
) -> QueryFacts:
    """What was given, completed from the live model where the scores still carry it.

    Raises:
        ShapeError: There is not one value or prediction per query.

    Cost: one forward pass over the queries, if something is missing and there is a context.
    """
    for name, given in (("values", values), ("predictions", predictions)):
        if given is not None and len(given) != len(scores.values):
            raise ShapeError(
                message(
                    f"{name} must have one entry per query: {len(scores.values)}.",
                    f"{len(given)} entries.",
                    f"{name} of the whole test set where only some of it was attributed.",
                    "pass those of the attributed queries, in their order.",
                )
            )
    given_values = None if values is None else tuple(float(v) for v in values)
    given_classes = None if predictions is None else tuple(_plain(p) for p in predictions)
    if scores.context is not None and (given_values is None or given_classes is None):
        live = _from_model(scores)
        given_values = live.values if given_values is None else given_values
        given_classes = live.predictions if given_classes is None else given_classes
    return QueryFacts(given_values, given_classes)


def _plain(value: Any) -> int | str:
    return value if isinstance(value, str) else int(value)


@torch.no_grad()
def _from_model(scores: Scores) -> QueryFacts:
    context = scores.require_context()
    task = context.task
    loss = task.loss.base if isinstance(task.loss, Weighted) else task.loss
    theta = task.theta()
    values: list[float] = []
    classes: list[int] = []
    for _, _, batch in context.queries.batches(256):
        batch = task.to_device(batch)
        values += context.measure(task, theta, batch).tolist()
        if isinstance(loss, CrossEntropy | Bernoulli):
            outputs: Tensor = task.outputs(theta, batch)[0]
            classes += _classes(loss, outputs)
    return QueryFacts(tuple(values), tuple(classes) if classes else None)


def _classes(loss: CrossEntropy | Bernoulli, outputs: Tensor) -> list[int]:
    """The class with the largest output, or yes for a positive logit; none for several answers."""
    if isinstance(loss, CrossEntropy):
        return outputs.argmax(dim=1).tolist() if outputs.ndim == 2 else []
    return (outputs.flatten() > 0).long().tolist() if outputs.numel() == len(outputs) else []
