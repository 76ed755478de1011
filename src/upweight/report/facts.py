"""What the model says of each query: its measurement and its prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.errors import ShapeError, message
from upweight.scores import Scores
from upweight.task.losses import CrossEntropy, Weighted

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
        if isinstance(loss, CrossEntropy):
            outputs: Tensor = task.outputs(theta, batch)[0]
            classes += outputs.argmax(dim=1).tolist()
    return QueryFacts(tuple(values), tuple(classes) if classes else None)
