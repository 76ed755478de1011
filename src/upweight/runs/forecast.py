"""What would a run take? Counted from the model, and timed on a few examples; nothing is written.

    seconds(n) = seconds(m) + (n − m) · (seconds(m) − seconds(m/2)) / (m/2)

Every stage is linear in the number of training examples beyond a constant: the passes are, the
decompositions are the constant. m doubles until both together take long enough to be timed.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from upweight.errors import (
    AssumptionWarning,
    NotConverged,
    NotOffered,
    NotPositiveDefinite,
)
from upweight.gradients.uses import layer_uses
from upweight.index.index import SAMPLE, Index
from upweight.linalg.damping import Absolute
from upweight.methods.fitted import Fitted
from upweight.methods.method import Method
from upweight.runs.question import Question
from upweight.runtime.resources import Resources
from upweight.task.data import Data
from upweight.task.task import Task

FEWEST = 32
LONG_ENOUGH = 1.0
"""Seconds that tell a pass over a few examples from what each call costs."""

MOST_QUERIES = 256
"""Timed with at most; more are taken to cost in proportion."""

DAMPING = 1e6
"""λ for the timing where a few examples leave the curvature singular; costs do not depend on it."""


@dataclass(frozen=True)
class Forecast:
    """What a run would take.

    Args:
        layers: How gradients are obtained; empty for methods that are not by layer.
        notes: What falls back, and why.
        batch: Examples at once in a pass; None where the method does not say.
        batch_bytes: Memory of such a batch.
        passes: Over the training data, in words.
        seconds: Expected, by stage.
        scores_bytes: On disk.
        factors_bytes: On disk, about.
        operator_bytes: Memory of a curvature that is formed as a matrix; 0 if it is not.
    """

    layers: list[dict[str, Any]]
    notes: tuple[str, ...]
    batch: int | None
    batch_bytes: int
    passes: str
    seconds: dict[str, float]
    scores_bytes: int
    factors_bytes: int
    operator_bytes: int


def forecast(question: Question, memory_bytes: int | None) -> Forecast:
    """Plan a run and time a few examples of it.

    Raises:
        UpweightError: The model cannot be attributed; says why.
        NotOffered: The method looks at training, which a few examples say nothing of.

    Cost: a few seconds, or several hundred examples' worth of each stage.
    """
    if question.history is not None:
        raise NotOffered(
            "A run is planned by timing its method on a few of the examples.",
            f"{question.method!r}, which looks at how the model was trained on all of them.",
            "a method that needs a recipe.",
            "its page in the docs says its cost in trainings; `upweight attribute` runs it, and "
            "resumes where it was interrupted.",
        )
    task, train, queries = question.task, question.train, question.queries
    n, q = len(train), len(queries)
    asked = queries.subset(range(min(q, MOST_QUERIES)))
    itemsize = torch.promote_types(task.layout.dtype, torch.float32).itemsize
    method: Any = question.method
    resources = Resources(memory_bytes=memory_bytes)

    def stages(m: int) -> tuple[Fitted, float, float]:
        started = time.perf_counter()
        with warnings.catch_warnings():
            # A model is at no minimum of some of its data; of all of them it may well be.
            warnings.simplefilter("ignore", AssumptionWarning)
            fitted = method.fit(task, train.subset(range(m)), resources=resources)
            between = time.perf_counter()
            fitted.attribute(asked, question.measure)
        return fitted, between - started, time.perf_counter() - between

    few = min(n, FEWEST)
    try:
        small, *_ = stages(few)  # what is done once is done, and not timed
    except (NotPositiveDefinite, NotConverged):
        if not hasattr(method, "damping"):
            raise
        method = replace(method, damping=Absolute(DAMPING))
        small, *_ = stages(few)
    (fit_seconds, attribute_seconds), _ = _expected(lambda m: stages(m)[1:], few, n, (n, n))
    work = small.scorer.work(q, memory_bytes)
    return Forecast(
        [] if work.plan is None else list(layer_uses(work.plan)),
        () if work.plan is None else work.plan.notes,
        work.batch,
        work.batch_bytes,
        work.passes,
        {"fit": fit_seconds, "attribute": attribute_seconds * q / len(asked)},
        n * q * itemsize,
        work.kept_bytes,
        work.operator_bytes,
    )


@dataclass(frozen=True)
class IndexForecast:
    """What an index would take.

    Args:
        n: Its examples.
        numbers: Coordinates of a row.
        bytes_per_example: Of the codes of a row.
        rows_bytes: On disk.
        factors_bytes: On disk, about: of the fit and of the coordinates' bases.
        seconds: Expected, by stage: "fit", "coordinates", "rows".
        timed: From how many examples.
    """

    n: int
    numbers: int
    bytes_per_example: int
    rows_bytes: int
    factors_bytes: int
    seconds: dict[str, float]
    timed: int


def index_forecast(
    task: Task, train: Data, method: Method, bytes_per_example: int, bits: int
) -> IndexForecast:
    """Build an index of a few examples in a temporary folder, and count.

    Raises:
        UpweightError: The model cannot be attributed, or the method has no rows; says why.

    Cost: a second or two, or a few hundred examples' worth of each stage.
    """
    n, last = len(train), list[tuple[Index, int]]()

    def stages(m: int) -> tuple[float, ...]:
        started = time.perf_counter()
        fitted = method.fit(task, train.subset(range(m)))
        fit = time.perf_counter() - started
        with tempfile.TemporaryDirectory(prefix="upweight-") as folder:
            index = Index.build(fitted, None, folder, bytes_per_example, bits=bits)
            last[:] = [(index, fitted.scorer.work(1, None).kept_bytes)]
        return fit, index.seconds["coordinates"], index.seconds["rows"]

    stages(min(n, FEWEST))  # what is done once is done, and not timed
    seconds, timed = _expected(stages, min(n, FEWEST), n, (n, min(n, SAMPLE), n))
    ((index, kept),) = last
    return IndexForecast(
        n,
        index.numbers,
        index.bytes_per_example,
        n * index.bytes_per_example,
        2 * kept,
        dict(zip(("fit", "coordinates", "rows"), seconds, strict=True)),
        timed,
    )


def _expected(
    stages: Callable[[int], Sequence[float]], few: int, n: int, counts: Sequence[int]
) -> tuple[list[float], int]:
    """Seconds of each stage for its count of examples, from few and then twice as many; how many.

    Args:
        stages: Seconds of each stage for so many examples.
        few: How many at first.
        n: How many there are.
        counts: For how many examples each stage is done.
    """
    m, before, taken = few, None, stages(few)
    while m < n and (before is None or sum(taken) < LONG_ENOUGH):
        m, before = min(n, 2 * m), taken
        taken = stages(m)
    if m == n or before is None:
        return list(taken), m
    pairs = zip(before, taken, counts, strict=True)
    return [
        now + max(0.0, now - then) / (m / 2) * max(0, count - m) for then, now, count in pairs
    ], m
