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

from upweight.contraction.stream import queries_at_once
from upweight.curvature.layerwise import LayerwiseCurvature, examples_at_once
from upweight.errors import NotConverged, NotPositiveDefinite
from upweight.gradients.cost import cost
from upweight.gradients.planning import plan
from upweight.gradients.uses import layer_uses
from upweight.linalg.damping import Absolute
from upweight.methods.influence import Influence
from upweight.runs.question import Question

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


def forecast(question: Question, tolerance: float, memory_bytes: int | None) -> Forecast:
    """Plan a run and time a few examples of it.

    Raises:
        UpweightError: The model cannot be attributed; says why.

    Cost: a few seconds, or several hundred examples' worth of each stage.
    """
    task, train, queries = question.task, question.train, question.queries
    n, q = len(train), len(queries)
    asked = queries.subset(range(min(q, MOST_QUERIES)))
    itemsize = torch.promote_types(task.layout.dtype, torch.float32).itemsize
    method: Any = question.method
    fit_options: dict[str, Any] = {}
    attribute_options: dict[str, Any] = {}
    if question.is_resumable:
        fit_options["memory_bytes"] = memory_bytes
        attribute_options["tolerance"] = tolerance

    def stages(m: int) -> tuple[Any, float, float]:
        started = time.perf_counter()
        fitted = method.fit(task, train.subset(range(m)), **fit_options)
        between = time.perf_counter()
        fitted.attribute(asked, question.measure, **attribute_options)
        return fitted, between - started, time.perf_counter() - between

    few = min(n, FEWEST)
    try:
        small, *_ = stages(few)  # what is done once is done, and not timed
    except (NotPositiveDefinite, NotConverged):
        if not isinstance(method, Influence):
            raise
        method = replace(method, damping=Absolute(DAMPING))
        small, *_ = stages(few)
    fit_seconds, attribute_seconds = _expected(lambda m: stages(m)[1:], few, n)
    scoring = attribute_seconds * q / len(asked)
    seconds = {"fit": fit_seconds, "attribute": scoring}
    if not question.is_resumable:
        size = task.layout.size
        return Forecast(
            [], (), None, 0, "one or more for the curvature, one for the scores", seconds,
            n * q * task.layout.dtype.itemsize, 0, size**2 * task.layout.dtype.itemsize,
        )  # fmt: skip
    assert isinstance(method.curvature, LayerwiseCurvature)
    made, device = plan(task, train), task.layout.device
    spent = cost(made, train)
    batch = min(n, examples_at_once(spent, device, memory_bytes))
    learning = max(method.curvature.estimator(b, made.dtype, device).passes for b in made.blocks)
    groups = -(-q // queries_at_once(small.curvature, memory_bytes))
    kept = [
        tensor
        for block in small.curvature.blocks
        for tensor in (*block.eigen.bases, block.eigen.values)
        if tensor is not None
    ]
    return Forecast(
        layer_uses(made),
        made.notes,
        batch,
        batch * spent.bytes_per_example,
        f"{learning} for the curvature, {groups} for the scores",
        seconds,
        n * q * itemsize,
        2 * sum(tensor.nbytes for tensor in kept),  # sums are kept in two parts
        0,
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
