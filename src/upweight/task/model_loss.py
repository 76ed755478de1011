"""Is ℓ the loss that the model itself computes?

Models of `transformers` take their labels and return a loss. Where a batch is a dict that could be
passed to the model whole, that loss of a few examples is compared with the task's: a language model
that shifts its labels inside is otherwise scored for predicting the token that it has just read.
"""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight._typing import Batch
from upweight.errors import SpecError, message
from upweight.task.arrays import TARGET_KEYS
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, CrossEntropy, SquaredError
from upweight.task.task import Task, call_model, next_token

EXAMPLES = 4
CLOSE = 1e-2
"""Relative difference that rounding of models in half precision may make."""


def loss_notes(
    task: Task,
    theta: Float[Tensor, " p"],
    data: Data,
    at: Sequence[int],
    losses: Float[Tensor, " k"],
) -> tuple[str, ...]:
    """A note where the model's own loss is another and `forward` is the user's.

    Args:
        task: What was trained.
        theta: θ̂.
        data: The examples.
        at: Some of them.
        losses: ℓᵢ of those.

    Raises:
        SpecError: The model's own loss is another, and nobody said how to call the model.
    """
    if not isinstance(task.loss, CrossEntropy | SquaredError | Bernoulli):
        return ()
    found = []
    for i, loss in zip(at[:EXAMPLES], losses.tolist(), strict=False):
        batch = task.to_device(data.batch(i, i + 1))
        own = _own_loss(task, theta, batch)
        if own is None:
            return ()
        _, targets = task.call(theta, batch)
        found.append((i, loss, own, _count(task, targets)))
    # A loss of 0, or NaN where every label is ignored, compares with nothing.
    found = [row for row in found if 0 < row[2] < float("inf")]
    halves = 2.0 if isinstance(task.loss, SquaredError) else 1.0
    ways = (
        [halves * loss / own for _, loss, own, _ in found],
        [halves * loss / count / own for _, loss, own, count in found],
    )
    if any(all(abs(ratio - 1) < CLOSE for ratio in ratios) for ratios in ways):
        return ()
    i, loss, own, count = found[0]
    seen = (
        f"example {i}: {own:.6g} is {type(task.model).__name__}'s own loss, the task's is "
        f"{loss:.6g}{f' over {count} targets' if count > 1 else ''}"
    )
    if task.forward is not call_model:
        return (f"the model's own loss is another than the task's ({seen})",)
    shifted = Task(task.model, task.loss, task.penalty, task.params, next_token)
    raise SpecError(_unlike(seen, own, _mean(shifted, theta, data, i)))


def _own_loss(task: Task, theta: Float[Tensor, " p"], batch: Batch) -> float | None:
    """What the model says when it is given its labels; None where it takes or says nothing."""
    if not isinstance(batch, dict):
        return None
    keys = [key for key in TARGET_KEYS if key in batch]
    named = inspect.signature(task.model.forward).parameters
    if len(keys) != 1 or "labels" not in named:
        return None
    whole = {key: value for key, value in batch.items() if key != keys[0]}
    whole["labels"] = batch[keys[0]]
    asked = Task(
        task.model, task.loss, task.penalty, task.params, lambda model, b: (model(**dict(b)), None)
    )
    try:
        with torch.no_grad():
            output, _ = asked.call(theta, whole)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError):
        return None  # a model that wants its labels otherwise says nothing of ours
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    return float(loss.detach())


def _count(task: Task, targets: object) -> int:
    """Over how many targets a mean would be taken."""
    first = next(x for x in tree_leaves(targets) if isinstance(x, Tensor))
    if isinstance(task.loss, CrossEntropy):
        if first.is_floating_point():
            return max(1, first[..., 0].numel())
        return max(1, int((first.long() != task.loss.ignore_index).sum()))
    return max(1, first.numel())


def _mean(task: Task, theta: Float[Tensor, " p"], data: Data, i: int) -> float | None:
    """The mean of a task's loss over the targets of an example, if it can be had."""
    try:
        outputs, targets = task.call(theta, task.to_device(data.batch(i, i + 1)))
        task.loss.check(outputs, targets)
        return float(task.losses_of(outputs, targets).detach()[0]) / _count(task, targets)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _unlike(seen: str, own: float, shifted: float | None) -> str:
    required = "The task's loss must be the one that the model was trained with."
    if shifted is not None and abs(shifted / own - 1) < CLOSE:
        return message(
            required,
            f"{seen}; with labels moved by one position it is {shifted:.6g} per target.",
            "a causal language model that takes labels = input_ids and shifts them inside.",
            "say so: Task(..., forward=uw.next_token), which holds the outputs at position t "
            "against the label at t + 1.",
        )
    return message(
        required,
        f"{seen}.",
        "a model that weights, smooths or shifts its labels inside, or adds terms of its own.",
        "choose the loss that was trained with; or, if this one is meant, say how to call the "
        "model: Task(..., forward=lambda model, batch: (outputs, targets)).",
    )
