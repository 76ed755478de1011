"""Training data of two classes in which some rows have the other label."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
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


@dataclass(frozen=True, eq=False)
class Relabeled(Data):
    """Data of two classes, in which some rows have the other one."""

    data: Data
    rows: frozenset[int]

    def __len__(self) -> int:
        return len(self.data)

    def take(self, indices: Any) -> Batch:
        at = [int(i) for i in indices]
        batch = self.data.take(at)
        place, targets = _targets(batch)
        y = targets[0] if isinstance(targets, tuple | list) else targets
        chosen = torch.tensor([i in self.rows for i in at], device=y.device)
        # −1 and +1, or 0 and 1: which, the whole data say, not one batch.
        other = -y if self.is_signed else 1 - y
        new = torch.where(chosen.reshape(-1, *[1] * (y.ndim - 1)), other, y)
        changed = (new, *targets[1:]) if isinstance(targets, tuple | list) else new
        if isinstance(batch, dict):
            return {**batch, place: changed}
        assert isinstance(batch, tuple)
        return (*batch[:place], changed)

    @cached_property
    def is_signed(self) -> bool:
        for _, _, batch in self.data.batches(AT_ONCE):
            targets = _targets(batch)[1]
            y = targets[0] if isinstance(targets, tuple | list) else targets
            if bool((y < 0).any()):
                return True
        return False


def relabel_factor(task: Task, theta: Tensor, train: Data) -> Float[Tensor, " n"]:
    """δ(other label)/δ(label) − 1: with one degree of freedom in the outputs g ∝ δ = ∂ℓ/∂f.

    S(relabeled) − S = S · factor then is the relabel influence, for any model.
    """
    signed = Relabeled(train, frozenset()).is_signed
    parts = []
    for _, _, batch in train.batches(AT_ONCE):
        moved = task.to_device(batch)
        with torch.no_grad():
            outputs, targets = task.outputs(theta, moved)
        y = targets[0] if isinstance(targets, tuple | list) else targets
        if outputs.numel() not in (len(outputs), 2 * len(outputs)):
            raise UnsupportedModel(
                "A change of labels is from one of two classes to the other.",
                f"outputs {tuple(outputs.shape)}.",
                "a classifier of several classes.",
                'use how="weights" or how="remove".',
            )
        other = -y if signed else 1 - y
        weighted = isinstance(targets, tuple | list)
        new = (other, *targets[1:]) if weighted else other
        before = task.loss.gradient(outputs, targets)[:, 0]
        after = task.loss.gradient(outputs, new)[:, 0]
        parts.append((after / before - 1).cpu().double())
    return torch.cat(parts)
