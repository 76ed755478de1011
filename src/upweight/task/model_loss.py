"""Is ℓ the loss that the model itself computes?

Models of `transformers` take their labels and return a loss. Where a batch is a dict that could be
passed to the model whole, that loss of a few examples is compared with the task's: a language model
that shifts its labels inside is otherwise scored for predicting the token that it has just read.
"""

import inspect
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight._typing import Batch
from upweight.errors import SpecError
from upweight.task.arrays import TARGET_KEYS
from upweight.task.batches import tensors
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, CrossEntropy, Loss, SquaredError
from upweight.task.task import Task, call_model, next_token, shifts_labels, without_cache

EXAMPLES = 4
TRAINED_WITH = "The task's loss must be the one that the model was trained with."
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

    Raises:
        SpecError: The model's own loss is another, and nobody said how to call the model, or an
            adapter did.
    """
    found = []
    for i, loss in zip(at[:EXAMPLES], losses.tolist(), strict=False):
        batch = task.to_device(data.batch(i, i + 1))
        own = _own_loss(task, theta, batch)
        _, targets = task.call(theta, batch)
        found.append((i, loss, own, targets_in(task.loss, targets)))
    # A loss of 0, or NaN where every label is ignored, compares with nothing.
    told = [(i, loss, own, count) for i, loss, own, count in found if own and 0 < own < math.inf]
    if not told:
        return _copied_notes(task, theta, data, at)
    own_loss = task.reads is not None and task.reads.has_own_loss
    is_ours = own_loss or isinstance(task.loss, CrossEntropy | SquaredError | Bernoulli)
    halves = 2.0 if isinstance(task.loss, SquaredError) else 1.0
    ways = (
        [halves * loss / own for _, loss, own, _ in told],
        [halves * loss / count / own for _, loss, own, count in told],
    )
    if any(all(abs(ratio - 1) < CLOSE for ratio in ratios) for ratios in ways):
        return ()
    i, loss, own, count = told[0]
    seen = (
        f"example {i}: {own:.6g} is {type(task.model).__name__}'s own loss, the task's is "
        f"{loss:.6g}{f' over {count} targets' if count > 1 else ''}"
    )
    moved = _means(task.called(next_token), theta, data, [i for i, *_ in told])
    owns = [own for _, _, own, _ in told]
    is_shift = moved is not None and all(
        abs(mean / own - 1) < CLOSE for mean, own in zip(moved, owns, strict=True)
    )
    # A loss of the user's may be scaled as they like; labels that are off by one are no scale.
    if not is_ours and not is_shift:
        return ()
    if task.forward is not call_model and not own_loss:
        return (f"the model's own loss is another than the task's ({seen})",)
    if is_shift and moved:
        raise SpecError(
            TRAINED_WITH,
            f"{seen}; with labels moved by one position it is {moved[0]:.6g} per target.",
            "a causal language model that takes labels = input_ids and shifts them inside.",
            "say so: Task(..., forward=uw.next_token), which holds the outputs at position t "
            "against the label at t + 1.",
        )
    raise SpecError(
        TRAINED_WITH,
        f"{seen}.",
        "a model that weights, smooths or shifts its labels inside, or adds terms of its own.",
        "choose the loss that was trained with; or, if this one is meant, say how to call the "
        "model: Task(..., forward=lambda model, batch: (outputs, targets)).",
    )


def _copied_notes(
    task: Task, theta: Float[Tensor, " p"], data: Data, at: Sequence[int]
) -> tuple[str, ...]:
    """A note where targets are their own inputs; a SpecError where the next token is predicted."""
    for i in at[:EXAMPLES]:
        batch = task.to_device(data.batch(i, i + 1))
        outputs, targets = task.call(theta, batch)
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.ndim < 2:
            return ()
        if outputs.shape[:-1] != targets.shape or len(set(targets.flatten().tolist())) < 3:
            return ()
        kept = targets.long() != -100
        same = [
            x
            for x in tensors(batch)
            if x.shape == targets.shape and torch.equal(x[kept].long(), targets[kept].long())
        ]
        if len(same) < 2:  # the targets themselves are one
            return ()
    given = "targets that are the inputs themselves, position by position"
    if task.forward is call_model and shifts_labels(task.model):
        raise SpecError(
            "A causal language model must be scored for the token that follows.",
            f"{given}, for {type(task.model).__name__}.",
            "input_ids given as labels, which the model shifts only where it is given them.",
            "Task(..., forward=uw.next_token).",
        )
    return (
        f"{given}: a model that predicts the next one is scored for what it has just read; "
        "forward=uw.next_token holds the outputs at t against the targets at t + 1",
    )


def _own_loss(task: Task, theta: Float[Tensor, " p"], batch: Batch) -> float | None:
    """What the model says when it is given its labels; None where it takes or says nothing."""
    if not isinstance(batch, dict):
        return None
    keys = [key for key in TARGET_KEYS if key in batch]
    named = inspect.signature(task.model.forward).parameters
    takes = "labels" in named or any(p.kind is p.VAR_KEYWORD for p in named.values())
    if len(keys) != 1 or not takes:
        return None
    whole = {key: value for key, value in batch.items() if key != keys[0]}
    whole = without_cache(task.model, whole)
    whole["labels"] = batch[keys[0]]
    asked = task.called(lambda model, b: (model(**dict(b)), None))
    settings = getattr(task.model, "config", None)
    before = dict(vars(settings)) if hasattr(settings, "__dict__") else {}
    try:
        with torch.no_grad():
            output, _ = asked.call(theta, whole)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError):
        return None  # a model that wants its labels otherwise says nothing of ours
    finally:
        # Classifiers of transformers write into it what kind of labels they have seen.
        for name, value in before.items():
            if getattr(settings, name, value) is not value:
                setattr(settings, name, value)
    # As an attribute, or as the one number among what is returned.
    parts = output if isinstance(output, tuple | list) else (getattr(output, "loss", output),)
    numbers = [x for x in parts if isinstance(x, Tensor) and x.ndim == 0]
    return float(numbers[0].detach()) if len(numbers) == 1 else None


def targets_in(loss: Loss, targets: object) -> int:
    """Over how many targets a mean would be taken."""
    first = next((x for x in tree_leaves(targets) if isinstance(x, Tensor)), None)
    if first is None:
        return 1  # a loss of the outputs alone, such as one of triplets
    if isinstance(loss, CrossEntropy) and first.is_floating_point():
        return max(1, first[..., 0].numel())
    if not first.is_floating_point():
        return max(1, int((first.long() != getattr(loss, "ignore_index", -100)).sum()))
    return max(1, first.numel())


def _means(
    task: Task, theta: Float[Tensor, " p"], data: Data, at: Sequence[int]
) -> list[float] | None:
    """The means of a task's loss over the targets of some examples, if they can be had."""
    found = []
    try:
        for i in at:
            outputs, targets = task.call(theta, task.to_device(data.batch(i, i + 1)))
            task.loss.check(outputs, targets)
            loss = float(task.losses_of(outputs, targets).detach()[0])
            found.append(loss / targets_in(task.loss, targets))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    return found
