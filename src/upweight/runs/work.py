"""Fit and attribute inside a run directory, from wherever an earlier process got to.

Curvatures by layer keep their sums in `factors/` and write their scores in shards, and go on behind
what is there. Other methods hold their scores in memory, and start over.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from upweight.methods.influence import Influence
from upweight.runs.directory import Run
from upweight.runs.question import Question
from upweight.runs.record import Record


def attribute(run: Run, record: Record, question: Question) -> Any:
    """Write the scores into the run, going on from what is there.

    Returns:
        The fitted method, where it is by layer: others take long to be asked more.

    Raises:
        UpweightError: From the method.
        OSError: The disk is full or not writable; what was written stays readable.
    """
    queries, measure = question.queries, question.measure
    with _threads(record.threads):
        fitted = kept_fit(run, record, question)
        if fitted is not None:
            fitted.write(queries, run.scores, measure, tolerance=record.tolerance)
        else:
            made = question.method.fit(question.task, question.train)
            scores = made.attribute(queries, measure=measure)
            # They say of what they are, as shards do.
            told = replace(scores.provenance, fingerprints=dict(record.fingerprints))
            replace(scores, provenance=told).save(run.scores)
    return fitted


def kept_fit(run: Run, record: Record, question: Question) -> Any:
    """The fitted method, as far as the run has kept it; None for methods that keep nothing.

    Cost: of a finished one, a forward pass over the training data, which are checked.
    """
    method = question.method
    if not question.is_resumable:
        return None
    assert isinstance(method, Influence)
    memory_bytes = record.memory_bytes or None
    return method.fit(question.task, question.train, memory_bytes=memory_bytes, store=run.factors)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the run began with: sums round by how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
