"""What a row is: T gᵢ of K numbers, and u_q of a solved query, with S[q, i] = u_q · T gᵢ.

    Coordinates   of methods by layer: T g = σ⁻¹ ∘ (Λ + λ)^−½ ∘ (Q_Gᵀ g Q_A), the K largest
    Projected     of LoGra and TRAK: T g = σ⁻¹ ∘ P g

σ is the root mean square of a number over training examples, so that all numbers of a row are of
one size when they are put into few bits, and what is lost of one weighs as it does in the score.

A score is −(1/n) ⟨V_q, gᵢ⟩ with V_q = P ∇m_q, whatever P is. So u_q is taken from V_q, which the
method has solved, and not from ∇m_q: where all coordinates are kept, the product is the score of
any P.
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NotOffered, SpecError, StaleStore
from upweight.gradients.blocks import Plan
from upweight.gradients.factored import Factors, Formed, Joined, Lookups, Tokens
from upweight.gradients.passes import GradientPass
from upweight.methods.fitted import Fitted
from upweight.methods.layered import LayeredJob, LayeredScorer
from upweight.methods.projected import ProjectedJob, ProjectedScorer
from upweight.methods.scorer import Job
from upweight.runtime.fingerprint import digest
from upweight.runtime.memory import examples_within, working_bytes
from upweight.runtime.progress import progress
from upweight.scoring.stream import training_loss, unchanged
from upweight.task.data import Data
from upweight.task.identity import described

MOST_EXAMPLES = 64
"""Examples in a batch of gradients at most."""

OFFERED = 4
"""Coordinates whose size is measured, for each one that is kept, at least."""


class Transform(abc.ABC):
    """T, and what of the model it is applied to. `tensors` is all of it that a folder must hold.

    Args:
        plan, theta: How gradients are obtained, and where.
        factor: −1/n of the training data of the fit, which is in u_q.
        at_once: Examples in a batch.
        spread: σ of each number.
    """

    kind: ClassVar[str]
    plan: Plan
    theta: Float[Tensor, " p"]
    factor: float
    at_once: int
    spread: Float[Tensor, " K"]

    @property
    def meanwhile(self) -> Callable[[], None] | None:
        """What to do while other processes make rows; None: nothing."""
        return self.plan.task.meanwhile

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """K."""

    @abc.abstractmethod
    def of_example(self, factors: Sequence[Factors]) -> Float[Tensor, "b K"]:
        """T gᵢ of each example of a batch."""

    @abc.abstractmethod
    def of_query(self, job: Job) -> Float[Tensor, "q K"]:
        """u_q of each query that a job of the method has solved.

        Raises:
            NotOffered: The measure also depends on the weights of the training data by itself.
        """

    @abc.abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """T, by name."""


# -- eigen-coordinates by layer -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockCoordinates:
    """Some coordinates of one block.

    Args:
        bases: The eigenvectors that they are of, in columns, one matrix per axis of the block; None
            is the identity.
        place: Of each coordinate, in an array with an axis per basis, flat.
        scale: (Λ + λ)^−½ of each.
        shape: Of the block's array of eigenvalues.
    """

    bases: tuple[Tensor | None, ...]
    place: Int[Tensor, " k"]
    scale: Float[Tensor, " k"]
    shape: tuple[int, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """Of the bases: numbers of an example before the choice."""
        each = zip(self.shape, self.bases, strict=True)
        return tuple(size if q is None else q.shape[1] for size, q in each)

    def some(self, which: Int[Tensor, " l"]) -> "BlockCoordinates":
        """Some of the coordinates, and of the bases the columns that they need."""
        axes = torch.unravel_index(self.place[which], self.columns)
        bases, place = list[Tensor | None](), torch.zeros_like(which)
        for basis, at, size in zip(self.bases, axes, self.columns, strict=True):
            if basis is not None:
                columns, at = torch.unique(at, return_inverse=True)
                basis, size = basis[:, columns].contiguous(), len(columns)
            bases.append(basis)
            place = place * size + at
        return BlockCoordinates(tuple(bases), place, self.scale[which], self.shape)

    def __call__(self, factors: Factors) -> Float[Tensor, "b k"]:
        """(Λ + λ)^−½ ∘ Qᵀ g."""
        return self._rotated(factors).flatten(1)[:, self.place] * self.scale

    def of_solved(self, vectors: Float[Tensor, "q d"]) -> Float[Tensor, "q k"]:
        """(Λ + λ)^½ ∘ Qᵀ V."""
        return self._along(vectors.reshape(-1, *self.shape)).flatten(1)[:, self.place] / self.scale

    def _rotated(self, factors: Factors) -> Tensor:
        if isinstance(factors, Tokens) and len(self.shape) == 2:
            (o, i), (k, m) = self.shape, self.columns
            by_position = _products(factors, k, m) + factors.positions * k * m
            in_full = factors.positions * o * i + k * o * i + k * i * m
            if not isinstance(factors, Formed) and by_position <= in_full:
                return self._turned(factors).matrices()
        values = factors.matrices() if isinstance(factors, Tokens) else factors.values
        return self._along(values.reshape(len(values), *self.shape))

    def _turned(self, factors: Tokens) -> Tokens:
        """Each position by itself: (Q_Gᵀ δ_t) ⊗ (Q_Aᵀ a_t)."""
        left, right = self.bases
        if isinstance(factors, Joined):
            return Joined([self._turned(part) for part in factors.parts])
        turned = factors.right if right is None else factors.right @ right
        if isinstance(factors, Lookups):
            if left is None:
                return Lookups(factors.index, factors.rows, turned)
            return Tokens(left[factors.index], turned)
        return Tokens(factors.left if left is None else factors.left @ left, turned)

    def _along(self, array: Tensor) -> Tensor:
        for axis, q in enumerate(self.bases):
            if q is not None:
                at = axis - len(self.bases)
                array = (array.movedim(at, -1) @ q.to(array)).movedim(-1, at)
        return array


def _products(factors: Tokens, k: int, m: int) -> int:
    """Multiply-adds of an example that turn its factors onto k and m columns."""
    if isinstance(factors, Joined):
        return sum(_products(part, k, m) for part in factors.parts)
    t, i = factors.positions, factors.right.shape[2]
    return t * i * m + (0 if isinstance(factors, Lookups) else t * factors.left.shape[2] * k)


@dataclass(frozen=True, eq=False)
class Coordinates(Transform):
    """T g = σ⁻¹ ∘ (Λ + λ)^−½ ∘ (Q_Gᵀ g Q_A), of the K coordinates of largest E|v|.

    Args:
        blocks: The coordinates of each block of the plan; None where it has none.
        order: Of the coordinates of all blocks, one block after the other, by E|v|.
    """

    plan: Plan
    theta: Float[Tensor, " p"]
    factor: float
    at_once: int
    spread: Float[Tensor, " K"]
    blocks: tuple[BlockCoordinates | None, ...]
    order: Int[Tensor, " K"]

    kind = "eigen-coordinates"

    @property
    def width(self) -> int:
        return len(self.order)

    def of_example(self, factors: Sequence[Factors]) -> Float[Tensor, "b K"]:
        every = zip(self.blocks, factors, strict=True)
        found = [block(part) for block, part in every if block is not None]
        return torch.cat(found, dim=1)[:, self.order] / self.spread

    def of_query(self, job: Job) -> Float[Tensor, "q K"]:
        if not isinstance(job, LayeredJob):
            raise _with_weights()
        every = zip(self.blocks, job.solved(), strict=True)
        found = [block.of_solved(vectors) for block, vectors in every if block is not None]
        return torch.cat(found, dim=1)[:, self.order] * (self.factor * self.spread)

    def tensors(self) -> Mapping[str, Tensor]:
        found = {"order": self.order, "spread": self.spread}
        for k, block in enumerate(self.blocks):
            if block is not None:
                found |= {f"{k}.place": block.place, f"{k}.scale": block.scale}
                bases = enumerate(block.bases)
                found |= {f"{k}.basis.{axis}": q for axis, q in bases if q is not None}
        return found


def _coordinates(fitted: Fitted, most: int, queries: Data | None, sample: int) -> Coordinates:
    """The coordinates of largest mean size E|v|, over some training examples, of those offered.

    Not by E[v²]: coordinates of rare words are large in one example and 0 in all others, and so
    say little of most scores. With `queries` by the product of the mean sizes over both.
    """
    scorer = _layered(fitted)
    offered = _offered(scorer, most)
    own, sizes = _energies(scorer, offered, scorer.train, sample)
    if queries is not None:
        sizes = sizes * _energies(scorer, offered, queries, sample)[1]
    # Of equal sizes the first: the same coordinates in every process.
    order = sizes.argsort(descending=True, stable=True)[:most]
    inside, ends = order.sort(), torch.tensor([len(block.place) for block in offered]).cumsum(0)
    blocks, start = list[BlockCoordinates | None](), 0
    for block, end in zip(offered, ends.tolist(), strict=True):
        mine = inside.values[(start <= inside.values) & (inside.values < end)] - start
        blocks.append(block.some(mine) if len(mine) else None)
        start = end
    spread = _spread(own[order])
    dtype = scorer.curvature.plan.dtype
    return _made_of(scorer, tuple(blocks), inside.indices.argsort(), spread.to(dtype))


def _offered(scorer: LayeredScorer, most: int) -> list[BlockCoordinates]:
    """Coordinates to choose `most` from: of each matrix those of some columns of its bases.

    Turning δ onto k of the columns of Q_G takes o k multiply-adds per position, and the layer
    itself o i. So there are as many columns on each side as the shorter side is long, or a multiple
    of it where that offers fewer than `OFFERED` coordinates for each one that is kept: those with
    the largest sums of Λ/(Λ + λ), which is the energy that the fit saw.
    """
    inverses = [block.inverse() for block in scorer.curvature.blocks]
    sizes = [inverse.values.shape for inverse in inverses]
    wanted, times = OFFERED * most, 1
    while times * min(map(min, sizes)) < max(map(max, sizes)):
        if sum(math.prod(min(n, times * min(size)) for n in size) for size in sizes) >= wanted:
            break
        times *= 2
    found = []
    for block, inverse, size in zip(scorer.curvature.blocks, inverses, sizes, strict=True):
        seen, kept = block.eigen.values * inverse.values, torch.ones(size, dtype=torch.bool)
        for axis, (basis, n) in enumerate(zip(inverse.bases, size, strict=True)):
            if basis is not None and times * min(size) < n:
                sums = seen.movedim(axis, 0).flatten(1).sum(dim=1)
                best = sums.argsort(descending=True, stable=True)[: times * min(size)]
                mask = torch.zeros(n, dtype=torch.bool).index_fill_(0, best.cpu(), True)
                kept &= mask.reshape([-1 if k == axis else 1 for k in range(len(size))])
        every = BlockCoordinates(
            tuple(inverse.bases),
            torch.arange(inverse.values.numel(), device=inverse.values.device),
            inverse.values.flatten().sqrt(),
            tuple(size),
        )
        found.append(every.some(kept.flatten().nonzero()[:, 0].to(every.place.device)))
    return found


def _spread(energies: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Their roots; 1 where a number is always 0."""
    return torch.where(energies > 0, energies.sqrt(), 1.0)


def _energies(
    scorer: LayeredScorer, blocks: Sequence[BlockCoordinates], data: Data, sample: int
) -> tuple[Tensor, Tensor]:
    """E[v²] and E|v| of some coordinates v of each block, over some examples."""
    task, n = scorer.task, len(data)
    count = min(n, sample)
    chosen = data.subset([k * n // count for k in range(count)])
    totals = [block.scale.new_zeros(2, len(block.scale), dtype=torch.float64) for block in blocks]
    size = _at_once(scorer, blocks)
    with GradientPass(scorer.curvature.plan, scorer.point.theta) as passes:
        for start, stop, batch in progress(chosen.batches(size), count, "energies"):
            factors = passes.of(training_loss(task), task.to_device(batch), stop - start)
            for total, block, part in zip(totals, blocks, factors, strict=True):
                values = block(part)
                total[1] += values.abs().sum(dim=0)
                total[0] += values.square_().sum(dim=0)
    energies, sizes = (torch.cat(totals, dim=1) / count).unbind()
    return energies, sizes


def _restored(fitted: Fitted, tensors: Mapping[str, Tensor]) -> Coordinates:
    scorer, blocks = _layered(fitted), list[BlockCoordinates | None]()
    device = scorer.point.theta.device
    # Copied: products round by where their operands start in memory.
    held = {name: each.to(device, copy=True) for name, each in tensors.items()}
    for k, block in enumerate(scorer.curvature.blocks):
        if f"{k}.place" not in held:
            blocks.append(None)
            continue
        shape = tuple(block.eigen.values.shape)
        bases = tuple(held.get(f"{k}.basis.{axis}") for axis in range(len(shape)))
        found = BlockCoordinates(bases, held[f"{k}.place"], held[f"{k}.scale"], shape)
        blocks.append(found)
    return _made_of(scorer, tuple(blocks), held["order"], held["spread"])


def _made_of(
    scorer: LayeredScorer,
    blocks: tuple[BlockCoordinates | None, ...],
    order: Tensor,
    spread: Tensor,
) -> Coordinates:
    some = [block for block in blocks if block is not None]
    made, size = scorer.curvature.plan, _at_once(scorer, some, len(order))
    return Coordinates(made, scorer.point.theta, scorer.factor, size, spread, blocks, order)


def _at_once(scorer: LayeredScorer, blocks: Sequence[BlockCoordinates], width: int = 0) -> int:
    """Examples whose gradients are taken and turned together."""
    # Gradients are formed in full only where that takes less than their factors do.
    largest = max((math.prod(block.columns) for block in blocks), default=0)
    each = scorer.curvature.cost.bytes_per_example
    each += (3 * largest + 2 * width) * scorer.dtype.itemsize
    allowed = working_bytes(scorer.point.theta.device, scorer.memory_bytes)
    return examples_within(allowed, each, MOST_EXAMPLES)


# -- projections ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Projected(Transform):
    """T g = σ⁻¹ ∘ P g, and u_q = −(1/n) σ ∘ (Ĝ + λI)⁻¹ P ∇m_q."""

    plan: Plan
    theta: Float[Tensor, " p"]
    factor: float
    at_once: int
    spread: Float[Tensor, " K"]
    scorer: ProjectedScorer

    kind = "projections"

    @property
    def width(self) -> int:
        return self.scorer.projection.width

    def of_example(self, factors: Sequence[Factors]) -> Float[Tensor, "b K"]:
        return self.scorer.projection(factors) / self.spread

    def of_query(self, job: Job) -> Float[Tensor, "q K"]:
        if not isinstance(job, ProjectedJob):
            raise _with_weights()
        return job.solved[0] * (self.factor * self.spread)

    def tensors(self) -> Mapping[str, Tensor]:
        """σ, and a hash: P is drawn from a seed, and made again by the same fit."""
        told = digest(described(tuple(self.scorer.projection.maps)))  # type: ignore[attr-defined]
        told_by = torch.frombuffer(bytearray.fromhex(told), dtype=torch.uint8)
        return {"hash": told_by, "spread": self.spread}


def _projecting(fitted: Fitted) -> ProjectedScorer:
    scorer = fitted.scorer
    assert isinstance(scorer, ProjectedScorer)
    if len(scorer.members) > 1 or scorer.threshold > 0:
        raise NotOffered(
            "A score from an index is a product of two rows.",
            f"{fitted.spec!r}, with {len(scorer.members)} members and a threshold of "
            f"{scorer.threshold:g}.",
            "a mean over several models, or scores that are moved towards 0 by a threshold.",
            "fit it to one model with threshold=0.0, or use attribute(..., into=Shards(folder)).",
        )
    return scorer


def _projected(fitted: Fitted, sample: int) -> Projected:
    scorer = _projecting(fitted)
    (member,) = scorer.members
    count = min(len(scorer.train), sample)
    rows = member.gradients.rows(0, count).double()
    if member.slopes is not None:
        rows = rows * member.slopes[:count, None].to(rows)
    spread = _spread(rows.square().mean(dim=0)).to(scorer.projection.plan.dtype)
    return _divided(scorer, spread)


def _divided(scorer: ProjectedScorer, spread: Float[Tensor, " K"]) -> Projected:
    (member,), at_once = scorer.members, min(scorer.at_once, MOST_EXAMPLES)
    return Projected(scorer.projection.plan, member.theta, scorer.factor, at_once, spread, scorer)


# -- which ----------------------------------------------------------------------------------------


def transform(fitted: Fitted, most: int, queries: Data | None, sample: int) -> Transform:
    """The rows of a fitted method, of `most` numbers at most.

    Raises:
        NotOffered: It has none.
        SpecError: They have more numbers.
    """
    if not isinstance(fitted.scorer, ProjectedScorer):
        return _coordinates(fitted, most, queries, sample)
    found = _projected(fitted, sample)
    if found.width > most:
        raise SpecError(
            "A row must fit into the bytes of an example.",
            f"{found.width} projected numbers, of which {most} fit.",
            "a projection on more than an index was to hold.",
            "a smaller rank= or dim= of the method, or a larger bytes_per_example=.",
        )
    return found


def restored(fitted: Fitted, tensors: Mapping[str, Tensor], folder: Any) -> Transform:
    """The transform that an index was built with, for a method that was fitted again.

    Raises:
        StaleStore: It cannot be had again.
    """
    if not isinstance(fitted.scorer, ProjectedScorer):
        return _restored(fitted, tensors)
    spread = tensors["spread"].to(fitted.theta.device, copy=True)
    found = _divided(_projecting(fitted), spread)
    if not torch.equal(found.tensors()["hash"], tensors["hash"]):
        raise StaleStore(
            "An index is asked with the projection that it was built with.",
            f"{folder}, which was built with another.",
            "directions taken from a curvature that was fitted again, with other rounding.",
            "build it again in another folder; random directions, basis=None, are the same again.",
        )
    return found


def width_of(fitted: Fitted) -> int:
    """How many numbers a row has at most.

    Raises:
        NotOffered: The method has no rows.
    """
    if isinstance(fitted.scorer, ProjectedScorer):
        return _projecting(fitted).projection.width
    return sum(block.eigen.values.numel() for block in _layered(fitted).curvature.blocks)


def _with_weights() -> NotOffered:
    return NotOffered(
        "An index knows a measure by its derivative in θ.",
        "a Functional that also depends on the weights of the training data by itself.",
        "a standard error, which reads inputs and labels besides θ.",
        "ask a measure of θ and the queries alone, such as Coefficient(0); or fitted.attribute(…).",
    )


def _layered(fitted: Fitted) -> LayeredScorer:
    scorer = fitted.scorer
    if not isinstance(scorer, LayeredScorer) or scorer.gradients is not unchanged:
        raise NotOffered(
            "An index needs a method by layer at one point, or projected gradients.",
            f"{fitted.spec!r}.",
            "a curvature of all of θ, a mean over several models, gradients divided by their "
            "norm, or a method without gradients.",
            "fit Influence(EKFAC(), damping=Relative(0.1)), LoGra(...) or TRAK(...) and build the "
            "index of that; or use attribute(..., into=Shards(folder)).",
        )
    return scorer
