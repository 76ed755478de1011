"""Fit and attribute inside a run directory, from wherever an earlier process got to.

Curvatures by layer keep their sums in `factors/` and write their scores in shards, and go on behind
what is there. Other methods hold their scores in memory, and start over.
"""

import contextlib
from collections.abc import Iterator

import torch

from upweight.methods.influence import Influence
from upweight.runs.directory import Run
from upweight.runs.question import Question
from upweight.runs.record import Record


def attribute(run: Run, record: Record, question: Question) -> None:
    """Write the scores into the run, going on from what is there.

    Raises:
        UpweightError: From the method.
        OSError: The disk is full or not writable; what was written stays readable.
    """
    task, train, method = question.task, question.train, question.method
    queries, measure = question.queries, question.measure
    with _threads(record.threads):
        if question.is_resumable:
            assert isinstance(method, Influence)
            fitted = method.fit(
                task, train, memory_bytes=record.memory_bytes or None, store=run.factors
            )
            fitted.write(queries, run.scores, measure, tolerance=record.tolerance)
        else:
            method.fit(task, train).attribute(queries, measure=measure).save(run.scores)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the run began with: sums round by how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
