"""Curvature a block at a time: H ≈ ⊕ₗ Hₗ, each block with its eigendecomposition.

    LayerwiseCurvature.fit      stream the data past one estimator per block (K-FAC, EK-FAC, …)
    BlockCurvature              what came of it: blocks, their eigenvalues and bases

Sums are taken over blocks of a fixed number of examples, and these are added in order: several
processes (`upweight.runtime.ranks`), each with some of the blocks, come to the same bits as one.

Nothing of size p × p is formed, and nothing of size p per example where a weight is used once per
example. The penalty's own curvature is added to the eigenvalues: exactly where it is a multiple of
the identity on a block (`L2`), else its diagonal in the block's basis.
"""

import abc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.estimators import TRIAL, Estimator, named, restore_named
from upweight.curvature.kept import Kept, Parts
from upweight.curvature.labels import Head, Labels
from upweight.errors import DataError, listed
from upweight.gradients import planning
from upweight.gradients.blocks import Block, MatrixBlock, Plan
from upweight.gradients.cost import Cost, cost
from upweight.gradients.factored import Factors
from upweight.gradients.passes import GradientPass
from upweight.linalg.blockdiag import BlockDiagonal
from upweight.linalg.damping import Damping
from upweight.linalg.eigen import Eigen
from upweight.linalg.gram import BATCHES, WHEN_CLOSED, LongSum
from upweight.linalg.matrices import DiagonalMatrix
from upweight.linalg.operator import LinearOperator
from upweight.runtime.memory import examples_within, kept_bytes, working_bytes
from upweight.runtime.progress import progress
from upweight.runtime.ranks import ALONE, Ranks, owners
from upweight.runtime.resources import Checkpoint
from upweight.runtime.selection import spaced
from upweight.task.data import Data
from upweight.task.task import Task

MOST_EXAMPLES = 512
"""Examples in a batch at most; larger batches gain no speed and leave the processor's cache."""

Look = Callable[[int, int, Batch, Tensor, Any], None]
"""Is shown the first and last place of some training examples, their batch, the model's outputs
for them and their targets."""


@dataclass(frozen=True, eq=False)
class FittedBlock:
    """One block of θ with its curvature.

    Args:
        block: Which parameters.
        eigen: Q Λ Qᵀ, the penalty's curvature included.
        damping: λ of this block.
        mean_error: Standard error of the mean eigenvalue from having seen only some examples,
            relative to it; 0 when all were seen.
    """

    block: Block
    eigen: Eigen
    damping: float = 0.0
    mean_error: float = 0.0

    @property
    def name(self) -> str:
        """What the block is called."""
        return self.block.name

    @property
    def weight(self) -> str:
        """Its weight, or its parameters."""
        return self.block.weight if isinstance(self.block, MatrixBlock) else self.block.name

    @property
    def bias(self) -> str | None:
        """The bias that is the weight's last column, if one is."""
        return self.block.bias if isinstance(self.block, MatrixBlock) else None

    @property
    def left(self) -> Tensor | None:
        """Q_G [o, o], or the one basis of a vector; None where it is the identity."""
        return self.eigen.bases[0]

    @property
    def right(self) -> Tensor | None:
        """Q_A [i, i]; None where it is the identity."""
        return self.eigen.bases[-1]

    @property
    def eigenvalues(self) -> Tensor:
        """Λ, [o, i] or [d]."""
        return self.eigen.values

    def inverse(self) -> Eigen:
        """Q (Λ + λ)⁻¹ Qᵀ.

        Raises:
            NotPositiveDefinite: Some eigenvalue and λ do not add up to more than 0.
        """
        return self.eigen.inverse(self.damping)


@dataclass(frozen=True, eq=False)
class BlockCurvature:
    """⊕ₗ Qₗ Λₗ Qₗᵀ. Made by `fit` of a layerwise spec."""

    plan: Plan
    theta: Float[Tensor, " p"]
    cost: Cost
    blocks: tuple[FittedBlock, ...]
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def operator(self) -> LinearOperator:
        """The same as an operator on flat vectors."""
        layout = self.plan.task.layout
        indices = tuple(b.block.index(layout).to(layout.device) for b in self.blocks)
        return BlockDiagonal(tuple(b.eigen for b in self.blocks), indices)


def examples_at_once(spent: Cost, device: torch.device, memory_bytes: int | None) -> int:
    """Examples whose gradients are taken together."""
    allowed = working_bytes(device, memory_bytes)
    return examples_within(allowed, spent.bytes_per_example, MOST_EXAMPLES)


class LayerwiseCurvature(abc.ABC):
    """A spec that makes one estimator per block: `KFAC`, `EKFAC`, `Diagonal`, `Blockwise`."""

    labels: Labels
    """Whose labels the gradients are taken with."""

    examples: int | None
    """How many training examples to learn from; None: all of them."""

    @abc.abstractmethod
    def estimator(self, block: Block, dtype: torch.dtype, device: torch.device) -> Estimator:
        """What learns this block."""

    def fit(
        self, task: Task, data: Data, theta: Float[Tensor, " p"], *, n: int | None = None
    ) -> LinearOperator:
        """H at θ on flat vectors; see `Curvature.fit`."""
        return self.fit_blocks(task, data, theta, n=n).operator()

    def fit_blocks(
        self,
        task: Task,
        data: Data,
        theta: Float[Tensor, " p"],
        *,
        n: int | None = None,
        damping: Damping | None = None,
        memory_bytes: int | None = None,
        checkpoint: Checkpoint | None = None,
        watch: Look | None = None,
        plan: Plan | None = None,
        others: Sequence[Float[Tensor, " p"]] = (),
        ranks: Ranks = ALONE,
    ) -> BlockCurvature:
        """H at θ, block by block; with `others` the mean over all these θ.

        Args:
            task: What was trained.
            data: The training data.
            theta: θ.
            n: What sums are divided by; see `Curvature.fit`.
            damping: What the inverse will be damped with, where that is known: products whose
                rounding it drowns, by measurement, are taken in bfloat16.
            memory_bytes: What a batch may take, and the gradients that are kept for the second pass
                where they fit; None: a share of what is free.
            checkpoint: Where to keep the sums while they grow, and to go on from.
            watch: Called with (start, stop, batch, outputs, targets) of every batch of the first
                pass, before anything is made of them.
            plan: That of an earlier fit of the same task at another θ; None: made here.
            others: Further θ, to take the mean of factors and eigenvalues over.
            ranks: The processes that make this call together, each on some of the examples; each
                block is decomposed by one of them. `watch` sees this process's examples only.

        Raises:
            SpecError: The ranks find other states in the folder.
            UnsupportedModel: The labels cannot be drawn, or a gradient cannot be had.
            NonFinite: A gradient is NaN or infinite.

        Cost: a forward pass and a backward pass through the activations per pass of the estimators
        (K-FAC one, EK-FAC two) and per label, and their products. Where gradients can be kept, the
        second pass has no forward pass, and with labels that are not drawn no backward pass.
        """
        made = planning.plan(task, theta, data) if plan is None else plan
        spent = cost(made, theta, data)
        at, notes = self.places(len(data)), tuple[str, ...]()
        seen = data if at is None else data.subset(at)
        if at is not None:
            some = f"{len(at)} of {len(data)} training examples"
            notes = (f"curvature from {some}, evenly spaced",)
        estimators = [
            self.estimator(block, made.dtype, task.layout.device) for block in made.blocks
        ]
        for estimator in estimators:
            estimator.damping = damping
        batch = ranks.least(
            data.together(examples_at_once(spent, task.layout.device, memory_bytes))
        )
        spread = _Spread(len(estimators))
        place = _Place(0, 0, batch)
        if checkpoint is not None and (state := checkpoint.read()) is not None:
            place = _restore(state, estimators, spread)
            notes = (*notes, "curvature: went on from what an earlier run had kept")
        bits = [estimator.may_round for estimator in estimators]
        ranks.require_same((place.stage, place.example, place.batch), "how far a fit has come")
        ranks.require_same(bits, "how they multiply")
        used = place.batch * spent.bytes_per_example
        points = (*others, theta)
        kept = Kept(
            estimators,
            -(-len(seen) * len(points) // ranks.size),
            kept_bytes(task.layout.device, memory_bytes, used),
        )
        if place != _Place(0, 0, place.batch):
            kept.clear()
        is_part = len(seen) < len(data)
        passes = _Passes(
            made,
            points,
            self.labels,
            seen,
            is_part,
            estimators,
            spread,
            kept,
            place,
            checkpoint,
            watch,
            ranks,
        )
        seconds = passes.run()
        size = len(seen) if n is None else len(seen) * n / len(data)
        count = size * self.labels.per_example * len(points)
        eigens = passes.results(count)
        eigens, penalty_notes = _with_penalty(made, points, eigens)
        errors = spread.relative_errors(len(data) * len(points), ranks)
        blocks = tuple(
            FittedBlock(block, eigen, mean_error=error)
            for block, eigen, error in zip(made.blocks, eigens, errors, strict=True)
        )
        every = (*made.notes, *notes, *_rounding_notes(estimators), *penalty_notes)
        return BlockCurvature(made, theta, spent, blocks, every, seconds)

    def places(self, n: int) -> list[int] | None:
        """Which of n examples it learns from, evenly spaced; None: all.

        Raises:
            DataError: `examples` is no number of examples.
        """
        m = self.examples
        if m is None:
            return None
        if not isinstance(m, Integral) or m < 1:
            raise DataError(
                "A curvature needs at least one example.",
                f"examples={m}.",
                "a fraction where a number of examples is meant.",
                "give a number of examples, or None for all.",
            )
        return spaced(n, m) if m < n else None


@dataclass(frozen=True)
class _Place:
    """How far a fit has come: the pass, the example in it, and the size of its batches."""

    stage: int
    example: int
    batch: int


@dataclass(frozen=True)
class _Round:
    """How many blocks of examples end together, and the example behind them."""

    blocks: int
    stop: int


@dataclass(eq=False)
class _Passes:
    """The passes of one fit over the data, from where an earlier run left off.

    At several points a pass goes over the data at one after the other, and counts on.
    """

    plan: Plan
    points: Sequence[Float[Tensor, " p"]]
    labels: Labels
    data: Data
    is_part: bool
    estimators: list[Estimator]
    spread: "_Spread"
    kept: Kept
    place: _Place
    checkpoint: Checkpoint | None
    watch: Look | None
    ranks: Ranks

    @cached_property
    def owners(self) -> list[int]:
        """The rank that has the totals of each block and decomposes it, at a cost of d³."""
        costs = [float(sum(d**3 for d in block.shape)) for block in self.plan.blocks]
        return owners(costs, self.ranks.size)

    def run(self) -> dict[str, float]:
        """Every pass that is left; how long each took."""
        seconds = {}
        stages = max(e.passes for e in self.estimators)
        for stage in range(self.place.stage, stages):
            started = time.perf_counter()
            self._pass(stage, f"curvature, pass {stage + 1} of {stages}")
            seconds[f"pass {stage + 1}"] = time.perf_counter() - started
        return seconds

    def _pass(self, stage: int, what: str) -> None:
        learning = {k: e for k, e in enumerate(self.estimators) if stage < e.passes}
        first, size, n = self.place.example, self.place.batch, len(self.data)
        if self.ranks.rank > 0:
            self._follow(stage, learning)
        for number, theta in enumerate(self.points):
            if first >= (number + 1) * n:
                continue
            begin = number * n
            with GradientPass(self.plan, theta, clears=True) as passes:
                at = range(max(first, begin), begin + n, size)
                steps = self._steps(max(first, begin), begin, begin + n)
                for start, stop, ends in progress(steps, len(self.points) * n, what, at.start):
                    if start < stop:
                        for parts in self._learned_from(passes, stage, start, stop):
                            for k, estimator in learning.items():
                                estimator.see(stage, parts[k])
                            if stage == 0 and self.is_part:
                                self.spread.see(parts.values())
                        self.spread.close()
                    if ends is not None:
                        self._move(learning, ends.blocks)
                    place = stop if ends is None else ends.stop
                    self.place = _Place(stage, place, size)
                    if ends is not None or self.ranks.size == 1:
                        self._keep(only_if_due=True)
        for k, estimator in learning.items():
            if self.owners[k] == self.ranks.rank:
                estimator.finish(stage)
        for k, estimator in learning.items():
            is_mine = self.owners[k] == self.ranks.rank
            learned = self._told(k, estimator.learned(stage) if is_mine else None)
            if not is_mine:
                estimator.adopt(stage, learned)
        self.place = _Place(stage + 1, 0, size)
        self._keep()

    def _follow(self, stage: int, learning: Mapping[int, Estimator]) -> None:
        """Try what rank 0 tries on its first examples, and forget all sums that are its own."""
        first, size, n = self.place.example, self.place.batch, len(self.data)
        trying = {k: e for k, e in learning.items() if stage > 0 and e.is_trying}
        if trying:
            begin = first // n * n
            with GradientPass(self.plan, self.points[first // n], clears=True) as passes:
                for start in range(first, begin + n, size):
                    stop = min(start + size, begin + n)
                    for parts in self._taken(passes, stage, start, stop, (stage,)):
                        for k, estimator in trying.items():
                            estimator.see(stage, parts[k])
                    if not any(e.is_trying for e in trying.values()):
                        break
        for total in (self.spread.sums, *(s for e in self.estimators for s in e.sums.values())):
            total.drop()

    def _steps(
        self, first: int, begin: int, end: int
    ) -> Iterator[tuple[int, int, "_Round | None"]]:
        """This rank's batches of the examples first … end − 1, of those from `begin` on.

        Each rank takes one block of a round; the last batch of it ends the round, or an empty one.
        """
        size, ranks = self.place.batch, self.ranks
        # Rounding is tried within a block: another process may have the next.
        batches = max(BATCHES // self.labels.per_example, -(-TRIAL // size))
        examples = batches * size
        blocks = [
            range(max(start, first), min(start + examples, end), size)
            for start in range(begin, end, examples)
            if start + examples > first
        ]
        for k in range(0, len(blocks), ranks.size):
            together = blocks[k : k + ranks.size]
            ends = _Round(len(together), together[-1].stop)
            if ranks.rank >= len(together):
                yield ends.stop, ends.stop, ends
                continue
            mine = together[ranks.rank]
            for start in mine:
                stop = min(start + size, mine.stop)
                yield start, stop, ends if stop == mine.stop else None

    def _move(self, learning: Mapping[int, Estimator], blocks: int) -> None:
        """Add to the totals what the ranks have summed, each over a block."""
        self.spread.sums.close(self.ranks, 0, blocks)
        for k, estimator in learning.items():
            for total in estimator.sums.values():
                total.close(self.ranks, self.owners[k], blocks)

    def _keep(self, only_if_due: bool = False) -> None:
        """Write what is known so far to the folder, if there is one."""
        if self.checkpoint is None:
            return
        if only_if_due and not self.ranks.number(self.checkpoint.is_due()):
            return
        for k, estimator in enumerate(self.estimators):
            for total in estimator.sums.values():
                total.fetch(self.ranks, self.owners[k])
        if self.ranks.rank == 0:
            self.checkpoint.write(_state(self.place, self.estimators, self.spread))

    def _told(self, k: int, tensors: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        dtype, device = self.plan.dtype, self.plan.task.layout.device
        return self.ranks.told(tensors, self.owners[k], dtype, device)

    def results(self, count: int | float) -> list[Eigen]:
        """What came of it, block by block."""
        mine = {
            k: estimator.result(count)
            for k, estimator in enumerate(self.estimators)
            if self.owners[k] == self.ranks.rank
        }
        if self.ranks.size == 1:
            return list(mine.values())
        found = []
        for k in range(len(self.estimators)):
            own = mine.get(k)
            bases = None if own is None else [q for q in own.bases if q is not None]
            values, *rest = self._told(k, None if own is None else [own.values, *(bases or ())])
            found.append(Eigen(tuple(rest) or (None,) * values.ndim, values))
        return found

    def _learned_from(
        self, passes: GradientPass, stage: int, start: int, stop: int
    ) -> Iterator[Parts]:
        """A batch's gradients under each of its labels; those of the next pass are kept."""
        if stage > 0 and (kept := self.kept.take(start)) is not None:
            yield from kept
            return
        anew = self.labels.draws_anew
        # On the forward pass of the first labels those of the next pass cost a backward pass.
        ahead = stage == 0 and anew and self.kept.is_open
        streams = (0, 1) if ahead else (stage,)
        for number, parts in enumerate(self._taken(passes, stage, start, stop, streams)):
            is_next = ahead and number >= self.labels.per_example
            if stage == 0 and is_next == anew:
                self.kept.add(start, parts)
            if not is_next:
                yield parts

    def _taken(
        self, passes: GradientPass, stage: int, start: int, stop: int, streams: Sequence[int]
    ) -> Iterator[Parts]:
        task, size = self.plan.task, stop - start
        start %= len(self.data)
        stop = start + size
        batch = task.to_device(self.data.batch(start, stop))
        places = self.data.places(start, stop)
        self.kept.spare(batch)

        def heads(outputs: Tensor, targets: Any) -> Iterator[Head]:
            if stage == 0 and self.watch is not None:
                self.watch(start, stop, batch, outputs, targets)
            for stream in streams:
                yield from self.labels.heads(task.loss, outputs, targets, places, stream)

        for factors in passes.of_heads(batch, size, heads):
            yield dict(enumerate(factors))


def _state(place: _Place, estimators: list[Estimator], spread: "_Spread") -> dict[str, Tensor]:
    """All that a fit knows so far: going on from it gives the same numbers, bit for bit."""
    state = {
        "place": torch.tensor([place.stage, place.example, place.batch]),
        **named("spread", spread.sums),
    }
    for k, estimator in enumerate(estimators):
        state |= {f"{k}.{name}": value for name, value in estimator.tensors().items()}
    return state


def _restore(kept: Mapping[str, Tensor], estimators: list[Estimator], spread: "_Spread") -> _Place:
    for k, estimator in enumerate(estimators):
        prefix = f"{k}."
        device = estimator.device
        # Copied: products round by where their operands start in memory, and a file's tensors start
        # anywhere.
        own = {
            name.removeprefix(prefix): value.to(device, copy=True)
            for name, value in kept.items()
            if name.startswith(prefix)
        }
        estimator.restore(own)
    restore_named("spread", spread.sums, kept)
    return _Place(*kept["place"].tolist())


class _Spread:
    """How much Σ ‖gᵢ‖², over an example's labels, varies over the examples, block by block."""

    def __init__(self, blocks: int) -> None:
        self.sums = LongSum((blocks, 3), torch.float64, torch.device("cpu"), WHEN_CLOSED)
        """Of each block the number of examples, Σ ‖gᵢ‖² and Σ ‖gᵢ‖⁴."""
        self._open: list[Tensor] = []

    def see(self, factors: Iterable[Factors]) -> None:
        """The gradients of a batch with one label each."""
        norms = [part.squared_norm().double() for part in factors]
        self._open = [a + b for a, b in zip(self._open, norms, strict=False)] or norms

    def close(self) -> None:
        """All labels of the batch have been seen."""
        if self._open:
            rows = [(len(x), float(x.sum()), float(x.square().sum())) for x in self._open]
            self.sums.add(torch.tensor(rows, dtype=torch.float64))
        self._open = []

    def relative_errors(self, n: int, ranks: Ranks) -> list[float]:
        """Standard error of the mean of ‖gᵢ‖², over it: what having seen m of n leaves open."""
        errors = []
        self.sums.fetch(ranks, 0)
        for m, first, second in self.sums.total.tolist():
            if m < 2 or first == 0:
                errors.append(0.0)
                continue
            mean = first / m
            variance = max(0.0, second / m - mean**2) / (m - 1)
            errors.append((variance * max(0.0, 1 - m / n)) ** 0.5 / mean)
        return errors


def _with_penalty(
    made: Plan, points: Sequence[Float[Tensor, " p"]], eigens: list[Eigen]
) -> tuple[list[Eigen], tuple[str, ...]]:
    """Λₗ + the penalty's curvature on the block, in the block's basis."""
    task = made.task
    penalties: list[Any] = [
        task.penalty.curvature(task.whole(theta), task.layout) for theta in points
    ]
    if penalties[0] is None:
        return eigens, ()
    diagonal = torch.stack([penalty.diagonal() for penalty in penalties]).mean(dim=0)
    exact = all(isinstance(penalty, DiagonalMatrix) for penalty in penalties)
    added, approximate = [], []
    for block, eigen in zip(made.blocks, eigens, strict=True):
        entries = diagonal[block.index(task.layout).to(diagonal.device)].reshape(eigen.values.shape)
        entries = entries.to(eigen.values)
        uniform = bool((entries == entries.flatten()[0]).all())
        if exact and (uniform or all(basis is None for basis in eigen.bases)):
            share = entries
        else:
            share = diagonal_in_basis(eigen, entries)
            approximate.append(block.name)
        added.append(Eigen(eigen.bases, eigen.values + share))
    if not approximate:
        return added, ()
    note = (
        f"the penalty's curvature enters through its diagonal in the basis: {listed(approximate)}"
    )
    return added, (note,)


def _rounding_notes(estimators: Sequence[Estimator]) -> tuple[str, ...]:
    """Which blocks have their second moments in bfloat16, and what that does."""
    rounded = {e.name: e.rounding for e in estimators if e.rounding is not None}
    if not rounded:
        return ()
    worst = max(rounded.values())
    return (
        f"second moments in bfloat16, which was measured to change scores by up to {worst:.0e}: "
        f"{listed([*rounded])}",
    )


def diagonal_in_basis(eigen: Eigen, entries: Tensor) -> Tensor:
    """diag(Qᵀ D Q) for D = diag(entries): Σ_k Q²_{kj} D_k along each axis."""
    squared = Eigen(tuple(None if q is None else q.square() for q in eigen.bases), eigen.values)
    return squared.rotated(entries)
