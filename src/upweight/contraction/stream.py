"""The training set past all queries: one pass, a batch of scores at a time.

    for job in contractions(curvature, train, queries, measure, tolerance, memory):
        for start, stop, values in job.stream(): ...      # Σₗ ⟨V_q, gᵢ⟩, [q, stop − start]

There is more than one job only where the solved queries of all of them do not fit into memory; then
each job takes some of the queries and passes over the training set.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.contraction.choose import (
    TRUNCATION_SHARE,
    Choice,
    choose,
    measured,
    reference_scores,
)
from upweight.contraction.kernels import Kernel
from upweight.contraction.queries import (
    BlockQueries,
    SolvedQueries,
    block_queries,
    depends_on_parameters,
)
from upweight.curvature.layerwise import MOST_EXAMPLES, BlockCurvature
from upweight.errors import NotDifferentiable, message
from upweight.gradients.factored import Factors, joined
from upweight.gradients.passes import GradientPass
from upweight.runtime.hardware import has_fast_bfloat16
from upweight.runtime.memory import examples_within, free_bytes, working_bytes
from upweight.runtime.progress import progress
from upweight.task.data import Data
from upweight.task.measures import Loss
from upweight.task.task import Task

SAMPLE = 256
"""Training examples on which kernels are chosen; half as many others check them."""

REFERENCES = 128
"""Queries compared with their untruncated scores, at most."""

REFERENCE_BYTES = 256 * 2**20
"""Memory that the reference queries may take in full precision."""

ATTEMPTS = 4
"""Choices that may fail the check before the scores are computed in full precision."""

QUERY_SHARE = 0.5
"""Of the memory that is free, how much the solved queries may take where no budget is set."""


@dataclass(frozen=True, eq=False)
class Contraction:
    """Some queries, solved and ready for the training set.

    Args:
        curvature: With the damping of each block.
        train: The training set.
        first: The place of the first of these queries among all.
        queries: By block.
        choice: The kernels, and their measured error.
        memory_bytes: What a batch may take.
    """

    curvature: BlockCurvature
    train: Data
    first: int
    queries: tuple[BlockQueries, ...]
    choice: Choice
    memory_bytes: int | None

    def __len__(self) -> int:
        return len(self.queries[0])

    def stream(self, begin: int = 0) -> Iterator[tuple[int, int, Float[Tensor, "q b"]]]:
        """Σₗ ⟨V_q, gᵢ⟩ for batches of training examples, in order, from `begin` on."""
        for start, stop, factors in self.factors(begin):
            yield start, stop, self.scores(factors, self.choice.kernels)

    def stream_blocks(self) -> Iterator[tuple[int, int, list[Float[Tensor, "q b"]]]]:
        """⟨V_q, gᵢ⟩ of each block by itself."""
        for start, stop, factors in self.factors():
            yield (
                start,
                stop,
                [
                    self.scores([part], [kernel])
                    for part, kernel in zip(factors, self.choice.kernels, strict=True)
                ],
            )

    def factors(self, begin: int = 0) -> Iterator[tuple[int, int, list[Factors]]]:
        """Training gradients, a batch at a time, from `begin` on."""
        task = self.curvature.plan.task
        # Three blocks of scores: two products and their sum.
        held = self.curvature.cost.bytes_per_example + 12 * len(self)
        size = examples_within(
            working_bytes(task.layout.device, self.memory_bytes), held, MOST_EXAMPLES
        )
        with GradientPass(self.curvature.plan) as passes:
            batches = self.train.batches(size, begin)
            for start, stop, batch in progress(batches, len(self.train), "scores", begin):
                yield start, stop, passes.of(training_loss(task), task.to_device(batch))

    def scores(self, factors: Sequence[Factors], kernels: Sequence[Kernel]) -> Tensor:
        """The sum over the given blocks."""
        plan = self.curvature.plan
        out = torch.zeros(
            len(self), len(factors[0]), dtype=plan.dtype, device=plan.task.layout.device
        )
        for kernel, part in zip(kernels, factors, strict=True):
            kernel.add_to(out, part)
        return out


def training_loss(task: Task) -> Callable[[Params, Batch], Tensor]:
    """ℓ per example, with whatever kernels PyTorch prefers for a plain gradient."""
    return lambda params, batch: task.loss(*task.call(params, batch))


def contractions(
    curvature: BlockCurvature,
    train: Data,
    queries: Data,
    measure: Callable[..., Tensor],
    tolerance: float,
    losses: Float[Tensor, " n"],
    memory_bytes: int | None = None,
) -> Iterator[Contraction]:
    """All queries in as few groups as memory allows, each solved and given its kernels.

    Args:
        curvature: With the damping of each block.
        train: The training data.
        queries: What is asked about.
        measure: m.
        tolerance: Relative error of a query's scores, root mean square over queries; 0 is exact.
        losses: ℓᵢ(θ̂) of the training examples.
        memory_bytes: What a batch may take; solved queries may take as much again.

    Raises:
        NotDifferentiable: No query's measurement depends on θ.
    """
    device = curvature.plan.task.layout.device
    allowed = memory_bytes if memory_bytes is not None else int(QUERY_SHARE * free_bytes(device))
    size = max(1, allowed // max(1, _query_bytes(curvature)))
    depends = False
    for start in range(0, len(queries), size):
        stop = min(start + size, len(queries))
        group = queries if stop - start == len(queries) else queries.subset(range(start, stop))
        job = _contraction(curvature, train, group, start, measure, tolerance, losses, memory_bytes)
        depends = depends or any(depends_on_parameters(block) for block in job.queries)
        if stop == len(queries) and not depends:
            raise NotDifferentiable(_counts(measure, len(queries)))
        yield job


def _query_bytes(curvature: BlockCurvature) -> int:
    """What one solved query takes at most: little where a weight is used at one position."""
    total, element_bytes = 0, curvature.plan.dtype.itemsize
    for block, positions in zip(curvature.blocks, curvature.cost.positions, strict=True):
        shape = block.eigen.values.shape
        # About 16 products per query are kept where the contraction is separable.
        total += 16 * sum(shape) * 4 if positions == 1 else shape.numel() * element_bytes
    return total


def _contraction(
    curvature: BlockCurvature,
    train: Data,
    queries: Data,
    first: int,
    measure: Callable[..., Tensor],
    tolerance: float,
    losses: Float[Tensor, " n"],
    memory_bytes: int | None,
) -> Contraction:
    plan, task = curvature.plan, curvature.plan.task
    factored = any(t == 1 for t in curvature.cost.positions)
    # No more than a small share of what the pass itself takes.
    most = max(16, len(train) // 25)
    draws = ((SAMPLE if factored else 1, 0.5), (SAMPLE // 2, 0.5), (SAMPLE // 2, 0.0))
    sample, *checks = (
        _sampled(curvature, train, losses, min(size, most), by_loss, seed, memory_bytes)
        for seed, (size, by_loss) in enumerate(draws if tolerance > 0 else draws[:1])
    )
    rows = _references(curvature, len(queries)).to(task.layout.device)
    moments = [block.eigen.values for block in curvature.blocks]
    short = tolerance > 0 and has_fast_bfloat16(task.layout.device)
    dtypes = [torch.bfloat16 if short else plan.dtype for _ in curvature.blocks]
    aim = tolerance
    for attempt in range(ATTEMPTS + 1):
        if attempt == ATTEMPTS:  # not to be had approximately
            aim, dtypes = 0.0, [plan.dtype for _ in dtypes]
        batches = _measured_gradients(curvature, queries, measure, memory_bytes)
        made = block_queries(
            curvature.blocks, batches, len(queries), curvature.cost.positions, rows, dtypes
        )
        reference = reference_scores(made, rows, sample)
        kernels, words = choose(made, reference, sample, moments, aim, short)
        if aim == 0:
            choice = Choice(kernels, 0.0, 0.0, words)
            break
        # On examples as they matter to ‖S_q‖, and on examples as they come: most have small losses.
        found = max(
            (
                measured(kernels, len(queries), reference_scores(made, rows, check), check)
                for check in checks
            ),
            key=lambda m: m.error,
        )
        if found.error <= tolerance:
            choice = Choice(kernels, found.error, found.worst, words)
            break
        # Solved queries whose rounding alone takes more than its part are kept in full precision;
        # if none does, other examples than those of the choice show a larger error: aim lower.
        most = tolerance * (1 - TRUNCATION_SHARE) ** 0.5 / len(dtypes) ** 0.5
        rounded = [
            dtype is torch.bfloat16 and isinstance(queries, SolvedQueries) and error > most
            for dtype, queries, error in zip(dtypes, made, found.by_block, strict=True)
        ]
        if any(rounded):
            dtypes = [plan.dtype if bad else d for d, bad in zip(dtypes, rounded, strict=True)]
        else:
            aim *= 0.9 * tolerance / found.error
    return Contraction(curvature, train, first, tuple(made), choice, memory_bytes)


def _references(curvature: BlockCurvature, q: int) -> Tensor:
    """Evenly spaced queries, as many as fit in full precision."""
    in_full = sum(
        b.eigen.values.numel()
        for b, t in zip(curvature.blocks, curvature.cost.positions, strict=True)
        if t != 1
    )
    itemsize = curvature.plan.dtype.itemsize
    most = max(8, min(REFERENCES, REFERENCE_BYTES // max(1, in_full * itemsize)))
    k = min(q, most)
    return torch.arange(k) * q // k


def _sampled(
    curvature: BlockCurvature,
    train: Data,
    losses: Float[Tensor, " n"],
    count: int,
    by_loss: float,
    seed: int,
    memory_bytes: int | None,
) -> list[Factors]:
    """Gradients of some training examples, scaled so that sums of squares estimate those of all.

    A few examples with large losses make most of ‖S_q‖; a plain sample would miss them. A share
    `by_loss` of the draws goes by loss, each example divided by the square root of its expected
    count.
    """
    task = curvature.plan.task
    sizes = losses.abs().double().cpu() + torch.finfo(torch.float64).tiny
    p = by_loss * sizes / sizes.sum() + (1 - by_loss) / len(sizes)
    generator = torch.Generator().manual_seed(seed)
    indices = p.multinomial(count, replacement=True, generator=generator)
    scales = (count * p[indices]).rsqrt().to(task.layout.device, curvature.plan.dtype)
    data = train.subset(indices.tolist())
    size = examples_within(
        working_bytes(task.layout.device, memory_bytes),
        curvature.cost.bytes_per_example,
        MOST_EXAMPLES,
    )
    with GradientPass(curvature.plan) as passes:
        parts = [
            passes.of(training_loss(task), task.to_device(batch))
            for _, _, batch in data.batches(size)
        ]
    return [joined(list(block)).scaled(scales) for block in zip(*parts, strict=True)]


def _measured_gradients(
    curvature: BlockCurvature,
    queries: Data,
    measure: Callable[..., Tensor],
    memory_bytes: int | None,
) -> Iterator[tuple[int, int, list[Factors]]]:
    """∇m_q, a batch of queries at a time."""
    task = curvature.plan.task
    solved_bytes = (
        3 * curvature.plan.dtype.itemsize * max(b.eigen.values.numel() for b in curvature.blocks)
    )
    size = examples_within(
        working_bytes(task.layout.device, memory_bytes),
        curvature.cost.bytes_per_example + solved_bytes,
        MOST_EXAMPLES,
    )

    def function(params: Params, batch: Any) -> Tensor:
        return measure(task, params, batch)

    # ∇m = ∇ℓ needs no kernels for derivatives of higher order.
    chosen = training_loss(task) if isinstance(measure, Loss) else function
    with GradientPass(curvature.plan) as passes:
        batches = queries.batches(size)
        for start, stop, batch in progress(batches, len(queries), "queries"):
            yield start, stop, passes.of(chosen, task.to_device(batch))


def _counts(measure: Callable[..., Tensor], q: int) -> str:
    return message(
        "Some measurement must depend on θ through differentiable steps.",
        f"gradients of exactly 0 for all {q} queries under {measure!r}.",
        "a measure that counts (accuracy, argmax, a threshold), or one that is saturated: its "
        "derivative is 0.",
        "use Margin(), LogProb() or Loss(), which move before the decision does.",
    )
