"""May the second pass read its gradients, taken during the first, rather than run the model again?

Running the model forward and backward is most of what a pass costs. Where all gradients fit into
memory as factors, the second pass needs neither: with labels that are drawn anew its gradients take
one more backward pass of the first, with others they are those of the first. It reads bit for bit
what it would have computed:
the factors themselves or, where only half of that fits, their bfloat16 rounding, for estimators
that would have rounded them (`EKFACBlock`'s trial says whether they do).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight._typing import Batch
from upweight.curvature.estimators import TRIAL, Estimator
from upweight.gradients.factored import Factors, Tokens

Parts: TypeAlias = Mapping[int, Factors]
"""Gradients of a batch, by the number of their block."""


@dataclass
class _Batch:
    """One batch's gradients, under each of its labels."""

    is_short: bool
    size: int
    groups: list[Parts] = field(default_factory=list)


class Kept:
    """Gradients of the first pass, by the first example of their batch.

    Args:
        estimators: Who will read them; those with one pass need none.
        examples: How many examples the pass goes over.
        budget: Bytes to keep at most; more, and nothing is kept.
    """

    def __init__(self, estimators: Sequence[Estimator], examples: int, budget: int) -> None:
        self._readers = {k: e for k, e in enumerate(estimators) if e.passes > 1}
        self._examples, self._budget = examples, budget
        self._batches: dict[int, _Batch] = {}
        self._held: dict[int, int] = {}
        self._lent: set[int] = set()
        self._gradients = 0
        self.is_open = bool(self._readers)
        self._is_short = False

    def spare(self, batch: Batch) -> None:
        """What a batch is a slice of, the data, is there whether its gradients are kept or not."""
        for x in tree_leaves(batch):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.nbytes:
                self._lent.add(x.untyped_storage().data_ptr())

    def add(self, start: int, factors: Parts) -> None:
        """Gradients of the batch that starts at `start`, with one label each."""
        if not self.is_open:
            return
        if start not in self._batches and len(self._batches) == 1:
            self._choose(next(iter(self._batches.values())).size)
        if not self.is_open:
            return
        # The trial whether rounding does any harm needs the first ones as they are.
        is_short = self._is_short and self._gradients >= TRIAL
        size = len(next(iter(factors.values())))
        batch = self._batches.setdefault(start, _Batch(is_short, size))
        parts = {}
        for k in self._readers:
            part = factors[k]
            assert isinstance(part, Tokens)  # what is read twice is of matrices
            parts[k] = part.rounded(torch.bfloat16) if batch.is_short else part.compact()
        batch.groups.append(parts)
        self._gradients += len(next(iter(parts.values())))
        # By the memory behind them: what two of them are views of is held once.
        for part in parts.values():
            for x in part.tensors:
                storage = x.untyped_storage()
                if storage.data_ptr() not in self._lent:
                    self._held[storage.data_ptr()] = storage.nbytes()
        if self._bytes > self._budget:
            self.clear()

    def take(self, start: int) -> list[Parts] | None:
        """The gradients of a batch, no longer kept; None where they must be taken again."""
        batch = self._batches.pop(start, None)
        if batch is None:
            return None
        will_round = all(reader.rounding is not None for reader in self._readers.values())
        return None if batch.is_short and not will_round else batch.groups

    def clear(self) -> None:
        """Keep nothing."""
        self._batches.clear()
        self._held.clear()
        self.is_open = False

    @property
    def _bytes(self) -> int:
        return sum(self._held.values())

    def _choose(self, seen: int) -> None:
        """From the first batch: as they are, rounded, or not at all?"""
        whole = self._bytes * self._examples / seen
        if whole <= self._budget:
            return
        can_round = all(reader.may_round for reader in self._readers.values())
        if can_round and whole / 2 <= self._budget:
            self._is_short = True
        else:
            self.clear()
