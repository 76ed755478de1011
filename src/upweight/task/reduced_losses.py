"""Is one number for a batch the mean, or the sum, of the losses of its examples?

A training script returns a scalar: L(f, y) of a batch of b. Where

    L(f, y) = (1/b) Σᵢ L(fᵢ, yᵢ)    or    L(f, y) = Σᵢ L(fᵢ, yᵢ)

on some examples, L of one example alone is its loss, ℓᵢ. Neither holds for a loss that divides by
a number counted in the batch, or compares examples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from upweight.errors import ScalarLoss, UpweightError
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, CrossEntropy, CustomLoss, Loss, same_losses
from upweight.task.probe import evenly_spaced
from upweight.task.task import Task

COMPARED = 256
"""Examples on which the number of a batch is held against those of its examples."""

PAIRS = 64
"""Batches of two examples on which the same is asked: of one batch it may be true by chance."""

NAMES = {CrossEntropy: "torch.nn.CrossEntropyLoss()", Bernoulli: "torch.nn.BCEWithLogitsLoss()"}
"""Of losses that such a function often is."""

ROUNDING = 100
"""Roundings of the dtype that the two may differ by, relative to their size."""

COMPLAINTS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError)
"""What a loss may raise for outputs or targets that it does not take."""


@dataclass(frozen=True)
class OneByOne(Loss):
    """ℓᵢ = L(fᵢ, yᵢ): a function of a batch that returns one number, asked of each example alone.

    Args:
        function: L.
        at_once: Whether `torch.func.vmap` can do so for a whole batch.
    """

    function: Callable[[Tensor, Any], Tensor]
    at_once: bool = True

    def __call__(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        if self.at_once and len(outputs):
            return torch.func.vmap(self._one)(outputs, targets)
        found = [
            self.function(outputs[i : i + 1], tree_map(lambda y, i=i: y[i : i + 1], targets))
            for i in range(len(outputs))
        ]
        return torch.stack(found) if found else outputs.new_zeros(0)

    def _one(self, output: Tensor, target: Any) -> Tensor:
        return self.function(output[None], tree_map(lambda y: y[None], target))


def by_example(task: Task, data: Data) -> tuple[Loss, str]:
    """The loss of a task by example, where the task's returns one number; and a note of it.

    Args:
        task: With the loss as the user has it.
        data: Training data.

    Returns:
        The task's own loss and no note, where it returns one value per example or cannot be asked.

    Raises:
        ScalarLoss: The number is neither the mean nor the sum over examples.

    Cost: a forward pass over `COMPARED` examples, and L of each.
    """
    loss = task.loss
    if not isinstance(loss, CustomLoss) or not len(data):
        return loss, ""
    at = evenly_spaced(len(data), COMPARED)
    try:
        with torch.no_grad():
            outputs, targets = task.call(task.held_theta(), task.to_device(data.take(at)))
            whole = loss(outputs, targets)
            if not isinstance(whole, Tensor) or whole.ndim or len(outputs) != len(at):
                return loss, ""
            if torch.finfo(outputs.dtype).bits < 32:  # too coarse to tell
                outputs = outputs.float()
            alone = OneByOne(loss.function, at_once=False)(outputs, targets)
            finite = alone.isfinite()  # the others are named where the data are checked
            outputs, targets = tree_map(lambda x: x[finite], (outputs, targets))
            alone = alone[finite]
            if alone.ndim != 1 or not len(alone):
                return loss, ""
            unlike = {
                how: _unlike(loss.function, outputs, targets, alone, how) for how in ("mean", "sum")
            }
    except (UpweightError, *COMPLAINTS):  # said with its cause where the data are checked
        return loss, ""
    if all(unlike.values()):
        raise ScalarLoss(
            "A loss that returns one number for a batch must be the mean or the sum of those of "
            "its examples.",
            f"{loss!r}, which gives {unlike['mean']}.",
            "class weights or ignored targets, by which the mean of a batch is divided; or a loss "
            "that compares the examples of a batch.",
            "pass the loss of torch.nn itself, such as nn.CrossEntropyLoss(weight=w); or a "
            "function that returns one value per example: reduction='none' in it, and no .mean().",
        )
    found = OneByOne(loss.function, _runs_at_once(loss.function, outputs, targets, alone))
    how = "sum" if unlike["mean"] else "mean"  # of one example both are true
    note = (
        f"the loss returns one number for a batch, which is the {how} over its examples (seen on "
        f"{len(alone)}): ℓᵢ is what it returns for example i alone"
    )
    same = same_losses(found, outputs, targets)
    if same is not None and type(same) in NAMES:
        note += (
            f"; its values are those of {NAMES[type(same)]}: pass that, and more is known of the "
            "model than its gradients"
        )
    if how == "sum":
        note += (
            "; J here is the mean over the n examples, yours their sum: a weight decay λ beside "
            "it is L2(λ/b) for batches of b examples, a learning rate η of SGD in a recipe ηb, and "
            "a recorded loop has factors=b"
        )
    return found, note


def _unlike(
    function: Callable[[Tensor, Any], Tensor],
    outputs: Tensor,
    targets: Any,
    alone: Tensor,
    how: str,
) -> str:
    """Where a batch has another number than its examples, in words; empty where none was found."""
    n = len(alone)
    pairs = [[i, i + 1] for i in evenly_spaced(n - 1, PAIRS)]
    for at in ([*range(n)], *pairs):
        batch = tree_map(lambda x, at=at: x[at], (outputs, targets))
        expected = getattr(alone[at], how)()
        size = getattr(alone[at].abs(), how)()
        whole = function(*batch)
        if (whole - expected).abs() > ROUNDING * torch.finfo(alone.dtype).eps * size:
            return (
                f"{float(whole):.6g} for {len(at)} examples whose own values have the {how} "
                f"{float(expected):.6g}"
            )
    return ""


def _runs_at_once(
    function: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Any, alone: Tensor
) -> bool:
    """Whether `vmap` gives the same; what branches on values, or draws, it refuses."""
    try:
        with torch.no_grad():
            found = OneByOne(function)(outputs, targets)
    except Exception:
        return False
    return found.shape == alone.shape and torch.allclose(found, alone, rtol=1e-4)
