"""What would a run take? Counted from the model, and timed on a few examples; nothing is written.

    seconds(n) = seconds(m) + (n − m) · (seconds(m) − seconds(m/2)) / (m/2)

Every stage is linear in the number of training examples beyond a constant: the passes are, the
decompositions are the constant. m doubles until both together take long enough to be timed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from upweight.errors import NotConverged, NotOffered, NotPositiveDefinite
from upweight.gradients.uses import layer_uses
from upweight.linalg.damping import Absolute
from upweight.methods.fitted import Fitted
from upweight.runs.question import Question
from upweight.runtime.resources import Resources

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
            "goes on where it was interrupted.",
        )
    task, train, queries = question.task, question.train, question.queries
    n, q = len(train), len(queries)
    asked = queries.subset(range(min(q, MOST_QUERIES)))
    itemsize = torch.promote_types(task.layout.dtype, torch.float32).itemsize
    method: Any = question.method
    resources = Resources(memory_bytes=memory_bytes)

    def stages(m: int) -> tuple[Fitted, float, float]:
        started = time.perf_counter()
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
    fit_seconds, attribute_seconds = _expected(lambda m: stages(m)[1:], few, n)
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


def _expected(stages: Callable[[int], tuple[float, float]], few: int, n: int) -> list[float]:
    """Seconds of each stage for n examples, from few and then twice as many."""
    m, before, taken = few, (0.0, 0.0), stages(few)
    while m < n and (before == (0.0, 0.0) or sum(taken) < LONG_ENOUGH):
        m, before = min(n, 2 * m), taken
        taken = stages(m)
    if m == n:
        return list(taken)
    pairs = zip(before, taken, strict=True)
    return [now + max(0.0, now - then) / (m / 2) * (n - m) for then, now in pairs]
