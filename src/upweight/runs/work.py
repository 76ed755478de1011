"""Fit and attribute inside a run directory, from wherever an earlier process got to.

Curvatures by layer keep their sums in `factors/` and write their scores in shards, and go on behind
what is there. Other methods hold their scores in memory, and start over.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from upweight.method import Method
from upweight.methods.influence import Influence
from upweight.runs.directory import Run
from upweight.runs.record import Record
from upweight.task.data import ArrayData, Data
from upweight.task.task import Task

ALIGNMENT = 64
"""Bytes; where PyTorch puts its own tensors."""


@dataclass(frozen=True, eq=False)
class Question:
    """The live objects of a run.

    Args:
        task, train, queries, method, measure: As for `method.fit` and `attribute`.
    """

    task: Task
    train: Data
    queries: Data
    method: Method
    measure: Callable[..., Tensor]

    @property
    def is_resumable(self) -> bool:
        """Whether the method keeps what it has done on disk, and has a tolerance."""
        return isinstance(self.method, Influence) and self.method.is_by_layer


def attribute(run: Run, record: Record, question: Question) -> None:
    """Write the scores into the run, going on from what is there.

    Raises:
        UpweightError: From the method.
        OSError: The disk is full or not writable; what was written stays readable.
    """
    task, method = question.task, question.method
    train, queries = aligned(question.train), aligned(question.queries)
    with _threads(record.threads):
        if question.is_resumable:
            assert isinstance(method, Influence)
            fitted = method.fit(
                task, train, memory_bytes=record.memory_bytes or None, store=run.factors
            )
            fitted.write(queries, run.scores, question.measure, tolerance=record.tolerance)
        else:
            method.fit(task, train).attribute(queries, measure=question.measure).save(run.scores)


def aligned(data: Data) -> Data:
    """The same data, at places in memory where every process finds them alike.

    Products round by where their operands start, and NumPy's arrays start at any multiple of 16.
    """
    if not isinstance(data, ArrayData):
        return data

    def moved(x: Any) -> Any:
        is_off = isinstance(x, Tensor) and x.data_ptr() % ALIGNMENT
        return x.clone() if is_off else x

    return ArrayData(tree_map(moved, data.arrays))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the run began with: sums round by how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
