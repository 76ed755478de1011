"""Training data of two classes in which some rows have the other label."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.applications.labels import with_targets_of
from upweight.errors import DataError, UnsupportedModel
from upweight.task.arrays import TARGET_KEYS
from upweight.task.data import Data
from upweight.task.measures import AT_ONCE
from upweight.task.task import Task


def _targets(batch: Batch) -> tuple[Any, Any]:
    """Where the targets are in a batch, and they."""
    if isinstance(batch, dict):
        key = next((k for k in TARGET_KEYS if k in batch), None)
        if key is not None:
            return key, batch[key]
    elif isinstance(batch, tuple) and len(batch) > 1:
        return len(batch) - 1, batch[-1]
    raise DataError(
        "Other labels need a batch (inputs..., targets) or a dict with known targets.",
        f"a {type(batch).__name__}.",
        "a collate function that makes an object of its own.",
        'use how="weights" or how="remove".',
    )


def with_other_labels(data: Data, rows: Iterable[int]) -> Data:
    """Data of two classes, in which some rows have the other one."""
    signed, changed = _is_signed(data), {}
    for i in rows:
        batch = data.take([i])
        key, targets = _targets(batch)
        other = _other(targets, signed)
        changed[i] = {**batch, key: other} if isinstance(batch, dict) else (*batch[:key], other)
    return with_targets_of(data, changed)


def _is_signed(data: Data) -> bool:
    # −1 and +1, or 0 and 1: which, the whole data say, not one batch.
    every = (_targets(batch)[1] for _, _, batch in data.batches(AT_ONCE))
    labels = (targets[0] if isinstance(targets, tuple | list) else targets for targets in every)
    return any(bool((y < 0).any()) for y in labels)


def _other(targets: Any, signed: bool) -> Any:
    """Targets y or (y, v) with the other one of two labels."""
    if isinstance(targets, tuple | list):
        return (_other(targets[0], signed), *targets[1:])
    return -targets if signed else 1 - targets


def relabel_factor(task: Task, theta: Tensor, train: Data) -> Float[Tensor, " n"]:
    """δ(other label)/δ(label) − 1: with one degree of freedom in the outputs g ∝ δ = ∂ℓ/∂f.

    S(relabeled) − S = S · factor then is the relabel influence, for any model.
    """
    signed = _is_signed(train)
    parts = []
    for _, _, batch in train.batches(AT_ONCE):
        moved = task.to_device(batch)
        with torch.no_grad():
            outputs, targets = task.outputs(theta, moved)
        if outputs.numel() not in (len(outputs), 2 * len(outputs)):
            raise UnsupportedModel(
                "A change of labels is from one of two classes to the other.",
                f"outputs {tuple(outputs.shape)}.",
                "a classifier of several classes.",
                'use how="weights" or how="remove".',
            )
        before = task.loss.gradient(outputs, targets)[:, 0]
        after = task.loss.gradient(outputs, _other(targets, signed))[:, 0]
        parts.append((after / before - 1).cpu().double())
    return torch.cat(parts)
