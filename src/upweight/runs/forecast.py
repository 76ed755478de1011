"""What would a run take? Counted from the model, and timed on a few examples; nothing is written.

    seconds(n) = seconds(m) + (n − m) · (seconds(m) − seconds(m/2)) / (m/2)

Every stage is linear in the number of training examples beyond a constant: the passes are, the
decompositions are the constant. m doubles until both together take long enough to be timed.

An iterative solver takes as many products with the curvature as it needs, which is not linear in n
and which a few examples do not tell. A product is linear, and timed on its own:

    seconds(n) = the rest(n) + products(m) · seconds of a product(n)

With all examples there are rarely fewer products than with a few, so that this is called a lower
bound.
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
from upweight.methods.scorer import Scorer
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
"""λ for the timing where a few examples leave the curvature singular. What a factorization or a
product costs does not depend on it; how many products a solver takes does."""

TOGETHER = 16
"""Vectors that a product is timed with at most; more cost in proportion."""


@dataclass(frozen=True)
class Products:
    """Those with the curvature, by a solver that takes as many as it needs.

    Args:
        counted: In the expected seconds: those that a few examples took.
        most: After so many the solver gives up.
        seconds: Of one, with the curvature of all examples, for all queries at once.
    """

    counted: int
    most: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"products with the curvature that are counted: {self.counted}, of "
            f"{self.seconds:.2g} s each; the solver takes as many as it needs, up to "
            f"{self.most:,} in {self.most * self.seconds:.2g} s, and a few examples do not tell "
            "how many"
        )


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
        products: Of an iterative solver, whose seconds are a lower bound; None where they are not.
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
    products: Products | None = None


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

    def stages(m: int) -> tuple[Fitted, int, tuple[float, float, float]]:
        """What was fitted, products in sequence, seconds of the fit, of scores, of a product."""
        started = time.perf_counter()
        with warnings.catch_warnings():
            # A model is at no minimum of some of its data; of all of them it may well be.
            warnings.simplefilter("ignore", AssumptionWarning)
            fitted = method.fit(task, train.subset(range(m)), resources=resources)
            between = time.perf_counter()
            scores = fitted.attribute(asked, question.measure)
        attributed = time.perf_counter()
        fit, rest = between - started, attributed - between
        if _most_products(fitted.scorer) is None:
            return fitted, 0, (fit, rest, 0.0)
        together = min(TOGETHER, len(asked))
        fitted.scorer.operator.mv(task.theta().expand(together, -1))  # type: ignore[attr-defined]
        product = (time.perf_counter() - attributed) * len(asked) / together
        steps = scores.provenance.health["solver_steps"]
        return fitted, steps, (fit, max(0.0, rest - steps * product), product)

    few = min(n, FEWEST)
    is_damped = False
    try:
        small, *_ = stages(few)  # what is done once is done, and not timed
    except (NotPositiveDefinite, NotConverged):
        if not hasattr(method, "damping"):
            raise
        method, is_damped = replace(method, damping=Absolute(DAMPING)), True
        small, *_ = stages(few)
    steps = list[int]()

    def timed(m: int) -> tuple[float, float, float]:
        _, taken, seconds = stages(m)
        steps.append(taken)
        return seconds

    (fit_seconds, rest_seconds, product_seconds), m = _expected(timed, few, n, (n, n, n))
    attribute_seconds = rest_seconds + steps[-1] * product_seconds
    most, products = _most_products(small.scorer), None
    if most is not None and (m < n or is_damped):
        products = Products(steps[-1], most, product_seconds * q / len(asked))
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
        products,
    )


def _most_products(scorer: Scorer) -> int | None:
    """After how many the solver gives up; None where it takes a number that is known."""
    return getattr(getattr(scorer, "solver", None), "max_steps", None)


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
