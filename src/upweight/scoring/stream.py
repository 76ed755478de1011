"""The training set past all queries: one pass, a batch of scores at a time.

    for job in contractions(curvature, train, queries, measure, tolerance, memory):
        with GradientPass(curvature.plan, curvature.theta) as passes:
            job.block(passes, start, stop)      # Σₗ ⟨V_q, gᵢ⟩, [q, stop − start]

There is more than one job only where the solved queries of all of them do not fit into memory; then
each job takes some of the queries and passes over the training set.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight._typing import Batch, Params
from upweight.curvature.layerwise import MOST_EXAMPLES, BlockCurvature, Look, examples_at_once
from upweight.errors import NotDifferentiable, message
from upweight.gradients.factored import Factors, Rows, stacked
from upweight.gradients.passes import GradientPass
from upweight.runtime.hardware import has_fast_bfloat16
from upweight.runtime.memory import examples_within, solved_bytes, working_bytes
from upweight.runtime.progress import progress
from upweight.scoring.choose import TRUNCATION_SHARE, Choice, choose, exact
from upweight.scoring.kernels import Explicit, Kernel, OfVector
from upweight.scoring.queries import (
    BlockQueries,
    SolvedQueries,
    block_queries,
    depends_on_parameters,
    in_pairs,
)
from upweight.scoring.reference import Sample, measured, reference_scores
from upweight.task.data import Data
from upweight.task.measures import Loss
from upweight.task.task import Task

SAMPLE = 384
"""Training examples on which kernels are chosen; as many others check them."""

BY_LOSS = 4
"""One in so many of them is drawn by loss. Of those drawn evenly it takes hundreds before ‖S_q‖
over them says anything of ‖S_q‖ over all: a few examples make most of it."""

REFERENCES = 64
"""Queries compared with their untruncated scores, at most."""

FEW = 64
"""Of the examples, where there is nothing to choose and only rounding to check; half as many
queries."""

REFERENCE_BYTES = 256 * 2**20
"""Memory that the reference queries may take in full precision."""

TOGETHER = (64, 256)
"""Examples to multiply with the queries at once, where batches are smaller: a product with fewer
reads the queries from memory for little arithmetic. A quarter as many as queries, between these
two: more would leave the processor's cache."""

ATTEMPTS = 6
"""Choices that may fail the check before the scores are computed in full precision."""

MOST_CATEGORIES = 2**24
"""Examples from which torch.multinomial draws at most."""


Gradients = Callable[[list[Factors]], list[Factors]]
"""What is done to the gradients of a batch before they are multiplied: nothing, or `normalized`."""


def unchanged(factors: list[Factors]) -> list[Factors]:
    """gᵢ itself."""
    return factors


def normalized(factors: list[Factors]) -> list[Factors]:
    """gᵢ / ‖gᵢ‖ over all blocks; 0 where gᵢ is."""
    squares = torch.stack([part.squared_norm() for part in factors]).sum(dim=0)
    scale = torch.where(squares > 0, squares.rsqrt(), 0.0)
    return [part.scaled(scale) for part in factors]


@dataclass(frozen=True, eq=False)
class Contraction:
    """Some queries, solved and ready for the training set."""

    curvature: BlockCurvature
    train: Data
    first: int
    queries: tuple[BlockQueries, ...]
    choice: Choice
    memory_bytes: int | None
    gradients: Gradients = unchanged
    look: Look | None = None

    def __len__(self) -> int:
        return len(self.queries[0])

    @cached_property
    def batch_size(self) -> int:
        """Training examples whose gradients are taken together."""
        # Three blocks of scores: two products and their sum.
        held = self.curvature.cost.bytes_per_example + 12 * len(self)
        size = examples_within(self._allowed, held, MOST_EXAMPLES)
        return self.train.together(size)

    @cached_property
    def at_once(self) -> int:
        """Training examples that are multiplied together: whole batches, as many as are wanted."""
        least, greatest = TOGETHER
        wanted = max(least, min(len(self) // 4, greatest))
        most = min(wanted, self._allowed // max(1, self.curvature.cost.factor_bytes))
        return self.batch_size * max(1, most // self.batch_size)

    @property
    def _allowed(self) -> int:
        return working_bytes(self.curvature.plan.task.layout.device, self.memory_bytes)

    def block(self, passes: GradientPass, start: int, stop: int) -> Float[Tensor, "q b"]:
        """Σₗ ⟨V_q, gᵢ⟩ for i from start to stop − 1."""
        return self.scores(list(self.factors(passes, start, stop)))

    def by_block(self, passes: GradientPass, start: int, stop: int) -> list[Float[Tensor, "q b"]]:
        """⟨V_q, gᵢ⟩ of each block by itself."""
        batches = list(self.factors(passes, start, stop))
        return [
            self.scores([[batch[k]] for batch in batches], [kernel])
            for k, kernel in enumerate(self.choice.kernels)
        ]

    def factors(self, passes: GradientPass, start: int, stop: int) -> Iterator[list[Factors]]:
        """Training gradients, a batch at a time."""
        task = self.curvature.plan.task
        for first in range(start, stop, self.batch_size):
            last = min(first + self.batch_size, stop)
            batch = task.to_device(self.train.batch(first, last))
            yield self.gradients(training_gradients(passes, task, batch, first, last, self.look))

    def scores(
        self, batches: Sequence[Sequence[Factors]], kernels: Sequence[Kernel] | None = None
    ) -> Float[Tensor, "q b"]:
        """The sum over the blocks of some kernels (None: all), of batches one after the other."""
        kernels = self.choice.kernels if kernels is None else kernels
        plan, size = self.curvature.plan, sum(len(batch[0]) for batch in batches)
        out = torch.zeros(len(self), size, dtype=plan.dtype, device=plan.task.layout.device)
        for k, kernel in enumerate(kernels):
            kernel.add_all(out, [batch[k] for batch in batches])
        return out


def of_vectors(
    curvature: BlockCurvature,
    train: Data,
    rows: Float[Tensor, "k p"],
    memory_bytes: int | None = None,
    gradients: Gradients = unchanged,
    look: Look | None = None,
) -> Contraction:
    """A contraction with given gradients in the place of the queries', exactly."""
    layout = curvature.plan.task.layout
    (whole,) = gradients([Rows(rows)])
    assert isinstance(whole, Rows)
    rows = whole.values
    queries, kernels = [], []
    for block in curvature.blocks:
        index = block.block.index(layout).to(rows.device)
        part = rows[:, index].reshape(len(rows), *block.eigen.values.shape).to(block.eigen.values)
        inverse = block.inverse()
        vectors = inverse.unrotated(inverse.rotated(part) * inverse.values).contiguous()
        queries.append(SolvedQueries(vectors, vectors[:0]))
        kernels.append(OfVector(vectors) if vectors.ndim == 2 else Explicit(vectors))
    words = ("in full",) * len(kernels)
    choice = Choice(tuple(kernels), 0.0, 0.0, words)
    return Contraction(curvature, train, 0, tuple(queries), choice, memory_bytes, gradients, look)


def training_loss(task: Task) -> Callable[[Params, Batch], Tensor]:
    """ℓ per example, with whatever kernels PyTorch prefers for a plain gradient."""
    return lambda params, batch: task.loss(*task.call(params, batch))


def training_gradients(
    passes: GradientPass, task: Task, batch: Batch, start: int, stop: int, look: Look | None
) -> list[Factors]:
    """∇ℓᵢ of the training examples from start to stop − 1, whose outputs `look` is shown first."""
    if look is None:
        return passes.of(training_loss(task), batch, stop - start)

    def heads(outputs: Tensor, targets: Any) -> Iterator[tuple[Callable[..., Tensor], None]]:
        look(start, stop, batch, outputs, targets)
        yield lambda outputs, targets, extra: task.loss(outputs, targets), None

    (found,) = passes.of_heads(batch, stop - start, heads)
    return found


def contractions(
    curvature: BlockCurvature,
    train: Data,
    queries: Data,
    measure: Callable[..., Tensor],
    tolerance: float,
    losses: Float[Tensor, " n"],
    memory_bytes: int | None = None,
    together: int | None = None,
    gradients: Gradients = unchanged,
    look: Look | None = None,
) -> Iterator[Contraction]:
    """All queries in as few groups as memory allows, each solved and given its kernels.

    Args:
        curvature: With the damping of each block.
        train: The training data.
        queries: What is asked about.
        measure: m.
        tolerance: Relative error of a query's scores, root mean square over queries; 0 is exact.
        losses: ℓᵢ(θ̂) of the training examples, by which some are drawn to measure errors on.
        memory_bytes: What a batch may take; solved queries may take as much again.
        together: Queries that share a pass; None: as many as fit.
        gradients: What is done to gradients, of queries and training examples, first.
        look: What is shown the model's outputs for training examples.

    Raises:
        NotDifferentiable: No query's measurement depends on θ.
    """
    size = queries_at_once(curvature, memory_bytes) if together is None else together
    depends = False
    for start, group in queries.groups(size):
        job = _contraction(
            curvature,
            train,
            group,
            start,
            measure,
            tolerance,
            losses,
            memory_bytes,
            gradients,
            look,
        )
        depends = depends or any(depends_on_parameters(block) for block in job.queries)
        if start + len(group) == len(queries) and not depends:
            raise NotDifferentiable(no_gradient(measure, len(queries)))
        yield job


def queries_at_once(curvature: BlockCurvature, memory_bytes: int | None) -> int:
    """How many solved queries fit into memory; all of them meet the training set in one pass.

    Args:
        curvature: What they are solved with.
        memory_bytes: What they may take; None: a share of what is free.
    """
    device = curvature.plan.task.layout.device
    return max(1, solved_bytes(device, memory_bytes) // max(1, _query_bytes(curvature)))


def _query_bytes(curvature: BlockCurvature) -> int:
    """What one solved query takes at most: little where a weight is used at few positions."""
    total, element_bytes = 0, curvature.plan.dtype.itemsize
    for block, positions in zip(curvature.blocks, curvature.cost.positions, strict=True):
        shape = block.eigen.values.shape
        # About 16 products per query are kept where the contraction is separable.
        if in_pairs(shape, positions, positions):
            total += 16 * positions * sum(shape) * 4
        else:
            total += shape.numel() * element_bytes
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
    gradients: Gradients,
    look: Look | None,
) -> Contraction:
    plan, positions = curvature.plan, curvature.cost.positions

    def solved(dtypes: Sequence[torch.dtype], rows: Tensor) -> list[BlockQueries]:
        batches = _measured_gradients(curvature, queries, measure, memory_bytes, gradients)
        return block_queries(curvature.blocks, batches, len(queries), positions, rows, dtypes)

    factored = any(
        in_pairs(b.eigenvalues.shape, t, t)
        for b, t in zip(curvature.blocks, positions, strict=True)
    )
    # Without products of pairs and without bfloat16 there is nothing to approximate with.
    if tolerance == 0 or not (factored or has_fast_bfloat16(plan.task.layout.device)):
        made = solved([plan.dtype] * len(curvature.blocks), torch.arange(0))
        choice = exact(made)
    else:
        # No more than a small share of what the pass itself takes.
        most = min(SAMPLE if factored else FEW, max(32, len(train) // 20))
        sample, check = (
            _sample(curvature, train, losses, size, seed, memory_bytes, gradients)
            for seed, size in enumerate((most if factored else 2, most))
        )
        rows = _references(curvature, len(queries), factored).to(plan.task.layout.device)
        made, choice = _chosen(
            curvature, partial(solved, rows=rows), len(queries), rows, sample, check, tolerance
        )
    return Contraction(curvature, train, first, tuple(made), choice, memory_bytes, gradients, look)


def _chosen(
    curvature: BlockCurvature,
    solved: Callable[[Sequence[torch.dtype]], list[BlockQueries]],
    q: int,
    rows: Tensor,
    sample: Sample,
    check: Sample,
    tolerance: float,
) -> tuple[list[BlockQueries], Choice]:
    """Kernels chosen on one sample that keep the tolerance on another, and their queries."""
    plan = curvature.plan
    moments = [block.eigen.values for block in curvature.blocks]
    short = has_fast_bfloat16(plan.task.layout.device)
    dtypes = [torch.bfloat16 if short else plan.dtype for _ in curvature.blocks]
    made, aim = solved(dtypes), tolerance
    # Untruncated scores do not depend on the precision of the solved queries.
    of_sample, of_check = (reference_scores(made, rows, some) for some in (sample, check))
    curves: dict[int, Any] = {}
    for _ in range(ATTEMPTS):
        kernels, words = choose(made, of_sample, sample, moments, aim, short, curves)
        found = measured(kernels, q, of_check, check)
        if found.error <= tolerance:
            return made, Choice(kernels, found.error, found.worst, words)
        rounded = _too_rounded(made, dtypes, found.by_block, tolerance)
        if any(rounded):
            dtypes = [plan.dtype if bad else d for d, bad in zip(dtypes, rounded, strict=True)]
            made = solved(dtypes)
            curves = {}
        else:  # other examples than those of the choice show a larger error: aim lower
            aim *= 0.97 * tolerance / found.error
    # No approximation met the tolerance: use exact products.
    made = solved([plan.dtype for _ in dtypes])
    return made, exact(made)


def _too_rounded(
    queries: Sequence[BlockQueries],
    dtypes: Sequence[torch.dtype],
    errors: Sequence[float],
    tolerance: float,
) -> list[bool]:
    """Blocks whose solved queries take more than their part of the tolerance by rounding alone."""
    most = tolerance * (1 - TRUNCATION_SHARE) ** 0.5 / len(dtypes) ** 0.5
    return [
        dtype is torch.bfloat16 and isinstance(block, SolvedQueries) and error > most
        for dtype, block, error in zip(dtypes, queries, errors, strict=True)
    ]


def _references(curvature: BlockCurvature, q: int, factored: bool) -> Tensor:
    """Evenly spaced queries, as many as fit in full precision."""
    in_full = sum(
        b.eigen.values.numel()
        for b, t in zip(curvature.blocks, curvature.cost.positions, strict=True)
        if not in_pairs(b.eigenvalues.shape, t, t)
    )
    itemsize = curvature.plan.dtype.itemsize
    wanted = REFERENCES if factored else FEW // 2
    most = max(8, min(wanted, REFERENCE_BYTES // max(1, in_full * itemsize)))
    k = min(q, most)
    return torch.arange(k) * q // k


def _sample(
    curvature: BlockCurvature,
    train: Data,
    losses: Float[Tensor, " n"],
    count: int,
    seed: int,
    memory_bytes: int | None,
    gradients: Gradients,
) -> Sample:
    """Two groups of examples: in the first, half are drawn by loss; the second is drawn evenly.

    Each example is divided by the square root of how often it is expected in its group.
    """
    task = curvature.plan.task
    sizes = losses.abs().double().cpu() + torch.finfo(torch.float64).tiny
    even = torch.full_like(sizes, 1 / len(sizes))
    generator = torch.Generator().manual_seed(seed)
    by_loss = max(1, count // BY_LOSS)
    drawn, weights = [], []
    for p, m in ((0.5 * sizes / sizes.sum() + 0.5 * even, by_loss), (even, count - by_loss)):
        each = _drawn(p, m, generator)
        drawn.append(each)
        weights.append((len(each) * p[each]).rsqrt())
    scales = torch.cat(weights).to(task.layout.device, curvature.plan.dtype)
    data = train.subset(torch.cat(drawn).tolist())
    size = examples_at_once(curvature.cost, task.layout.device, memory_bytes)
    with GradientPass(curvature.plan, curvature.theta) as passes:
        parts = [
            gradients(passes.of(training_loss(task), task.to_device(batch), stop - start))
            for start, stop, batch in data.batches(size)
        ]
    factors = tuple(stacked(block).scaled(scales) for block in zip(*parts, strict=True))
    return Sample(factors, (by_loss, count))


def _drawn(p: Float[Tensor, " n"], m: int, generator: torch.Generator) -> Int[Tensor, " m"]:
    """m draws from 0…n − 1 with probabilities p."""
    if len(p) <= MOST_CATEGORIES:
        return p.multinomial(m, replacement=True, generator=generator)
    cdf = p.cumsum(dim=0)
    u = torch.rand(m, generator=generator, dtype=p.dtype) * cdf[-1]
    return torch.searchsorted(cdf, u, right=True).clamp_max_(len(p) - 1)


def _measured_gradients(
    curvature: BlockCurvature,
    queries: Data,
    measure: Callable[..., Tensor],
    memory_bytes: int | None,
    gradients: Gradients,
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

    with GradientPass(curvature.plan, curvature.theta) as passes:
        batches = queries.batches(size)
        for start, stop, batch in progress(batches, len(queries), "queries"):
            with kernels_for(measure):
                factors = passes.of(measured_by(task, measure), task.to_device(batch), stop - start)
            yield start, stop, gradients(factors)


def measured_by(task: Task, measure: Callable[..., Tensor]) -> Callable[[Params, Any], Tensor]:
    """m of (θ by name, batch), for gradients; within `kernels_for(measure)`."""
    if isinstance(measure, Loss):
        return training_loss(task)
    return lambda params, batch: measure(task, params, batch)


def kernels_for(measure: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    """Where ∇m is taken.

    ∇m = ∇ℓ needs no kernels for derivatives of higher order; what a measure calls has them, and
    what a checkpoint runs again in the backward pass must find the same.
    """
    return nullcontext() if isinstance(measure, Loss) else sdpa_kernel(SDPBackend.MATH)


def no_gradient(measure: Callable[..., Tensor], q: int) -> str:
    """The message for measurements none of which moves with θ."""
    return message(
        "Some measurement must depend on θ through differentiable steps.",
        f"gradients of exactly 0 for all {q} queries under {measure!r}.",
        "a measure that counts (accuracy, argmax, a threshold), one that is saturated, or targets "
        "that the loss ignores: the derivative is 0.",
        "use Margin(), LogProb() or Loss(), which move before the decision does.",
    )
