"""Fit and attribute inside a run directory, resuming from wherever an earlier process got to.

What a method keeps of its fit is in `factors/`; scores are written in shards as they are computed.
"""

from dataclasses import replace

from upweight.methods.fitted import Fitted
from upweight.runs.directory import Run
from upweight.runs.question import Question
from upweight.runs.record import Record
from upweight.runtime.hardware import threads
from upweight.runtime.lock import claimed
from upweight.runtime.ranks import ALL, ALONE, Ranks
from upweight.runtime.resources import Resources
from upweight.shards import Shards


def attribute(
    run: Run,
    record: Record,
    question: Question,
    ranks: Ranks = ALONE,
    shards: str = "1/1",
) -> Fitted:
    """Write the scores into the run, resuming from what is there.

    Args:
        run: Where to.
        record: With which settings.
        question: What.
        ranks: The processes that make this call together.
        shards: "i/m": this process's part of the files, of m that do not talk to each other. One
            of them fits, and the others read what it keeps.

    Raises:
        UpweightError: From the method.
        OSError: The disk is full or not writable; what was written stays readable.
    """
    with threads(record.threads):
        if shards == ALL:
            fitted = refit(run, record, question, ranks)
        else:
            with claimed(run.path, "fit", wait=True):
                fitted = refit(run, record, question, ranks)
        into = Shards(run.scores, record.begun, shards)
        fitted.attribute(question.queries, question.measure, into=into)
    return fitted


def refit(run: Run, record: Record, question: Question, ranks: Ranks = ALONE) -> Fitted:
    """The fitted method, from what the run has kept of it.

    Cost: of a curvature that is kept, a forward pass over the training data, which are checked.
    """
    resources = Resources(
        memory_bytes=record.memory_bytes or None, folder=run.factors, group=ranks.group
    )
    fitted = question.method.fit(
        question.task, question.train, history=question.history, resources=resources
    )
    return replace(fitted, notes=(*record.notes, *fitted.notes))
