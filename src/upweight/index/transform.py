"""What a row is: T gᵢ of K numbers, and u_q of a solved query, with S[q, i] = u_q · T gᵢ.

    Coordinates   of methods by layer: of v = ±(Λ + λ)^−½ ∘ (Q_Gᵀ g Q_A) the numbers of largest
                  mean size, and a random projection of the others; divided by σ
    Projected     of LoGra and TRAK: T g = σ⁻¹ ∘ P g

σ is the root mean square of a number over training examples, so that all numbers of a row are of
one size when they are put into few bits, and what is lost of one weighs as it does in the score.

A score is −(1/n) ⟨V_q, gᵢ⟩ with V_q = P ∇m_q, whatever P is. So u_q is taken from V_q, which the
method has solved, and not from ∇m_q: where all coordinates are kept, the product is the score of
any P.
"""

import abc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NotOffered, SpecError, StaleStore
from upweight.gradients.blocks import Plan
from upweight.gradients.factored import Factors, Formed, Joined, Lookups, Tokens
from upweight.gradients.passes import GradientPass
from upweight.index.codes import Codes
from upweight.methods.fitted import Fitted
from upweight.methods.layered import LayeredJob, LayeredScorer
from upweight.methods.projected import ProjectedJob, ProjectedScorer
from upweight.methods.reduce import Answer, Reducer, Sink, Sweep
from upweight.methods.scorer import Job
from upweight.runtime.fingerprint import digest
from upweight.runtime.memory import examples_within, working_bytes
from upweight.runtime.progress import progress
from upweight.scoring.stream import training_loss, unchanged
from upweight.task.data import Data
from upweight.task.identity import described

MOST_EXAMPLES = 64
"""Examples in a batch of gradients at most."""

SKETCHED = 0.9
"""Of the numbers of a row, which stand for all coordinates that are not kept one by one. With half
of them all scores are ordered better, but the first ones of a query are found less often."""

LONG = 4
"""Times as long as the other: axes up to that are turned onto eigenvectors."""


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

    @property
    def facts(self) -> Mapping[str, float]:
        """What an answer's provenance says of it."""
        return {}

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
    """v of one block, of which some numbers are kept one by one.

    Args:
        bases: Eigenvectors in columns, one matrix per axis of the block; None is the identity.
        weights: ±(Λ + λ)^−½ of each number, with signs drawn at random.
        shape: Of the block's array.
        place: Which are kept one by one.
    """

    bases: tuple[Tensor | None, ...]
    weights: Float[Tensor, " d"]
    shape: tuple[int, ...]
    place: Int[Tensor, " k"]

    def __call__(self, factors: Factors) -> Float[Tensor, "b d"]:
        """v = ±(Λ + λ)^−½ ∘ Qᵀ g."""
        return self._rotated(factors).reshape(len(factors), -1) * self.weights

    def _rotated(self, factors: Factors) -> Tensor:
        if isinstance(factors, Tokens) and not isinstance(factors, Formed):
            # Each position by itself, where that takes fewer products.
            o, i = self.shape
            sizes = [q.shape[0] ** 2 for q in self.bases if q is not None]
            in_full = [o * i * q.shape[0] for q in self.bases if q is not None]
            if factors.positions * sum(sizes) <= sum(in_full):
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

    def of_solved(self, vectors: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """±(Λ + λ)^½ ∘ Qᵀ V."""
        # Where TracIn's P is 0, the weight and V are 0, and so is the product of the two rows.
        weights = torch.where(self.weights != 0, self.weights, 1)
        return self._along(vectors.reshape(-1, *self.shape)).flatten(1) / weights

    def _along(self, array: Tensor) -> Tensor:
        for axis, q in enumerate(self.bases):
            if q is None:
                continue
            at, q = axis - len(self.bases), q.to(array)
            if at == -1:
                array = array @ q
            elif at == -2:  # nothing is copied
                array = q.mT @ array
            else:
                array = (array.movedim(at, -1) @ q).movedim(-1, at)
        return array


@dataclass(frozen=True, eq=False)
class Coordinates(Transform):
    """T g = σ⁻¹ ∘ (v of the coordinates of largest E|v|; C v of all others).

    C adds up numbers that are J places apart, J the size of the sketch, and turns the sums by a
    Hadamard matrix. The signs of v are random, so that E ⟨C u, C v⟩ = ⟨u, v⟩ with a variance of
    about ‖u‖²‖v‖²/J, as of a random projection (Ailon & Chazelle 2009; Charikar, Chen &
    Farach-Colton 2002).

    Args:
        blocks: Of the plan.
        order: Of the coordinates of all blocks that are kept one by one, one block after the other,
            by E|v|.
        gains: By what the two parts of a product are multiplied.
    """

    plan: Plan
    theta: Float[Tensor, " p"]
    factor: float
    at_once: int
    spread: Float[Tensor, " K"]
    blocks: tuple[BlockCoordinates, ...]
    order: Int[Tensor, " k"]
    gains: Float[Tensor, " two"]

    kind = "eigen-coordinates"

    @property
    def width(self) -> int:
        return len(self.spread)

    @property
    def sketched(self) -> int:
        """J: how many of the numbers are of the sketch."""
        return len(self.spread) - len(self.order)

    @property
    def facts(self) -> Mapping[str, float]:
        kept, sketch = self.gains.tolist()
        return {"sketched": self.sketched, "gain_of_kept": kept, "gain_of_sketch": sketch}

    def of_example(self, factors: Sequence[Factors]) -> Float[Tensor, "b K"]:
        every = zip(self.blocks, factors, strict=True)
        return self._rows(block(part) for block, part in every) / self.spread

    def of_query(self, job: Job) -> Float[Tensor, "q K"]:
        if not isinstance(job, LayeredJob):
            raise _with_weights()
        every = zip(self.blocks, job.solved(), strict=True)
        rows = self._rows(block.of_solved(vectors) for block, vectors in every)
        rows[:, : len(self.order)] *= self.gains[0]
        rows[:, len(self.order) :] *= self.gains[1]
        return rows * (self.factor * self.spread)

    def _rows(self, every: Iterable[Float[Tensor, "b d"]]) -> Float[Tensor, "b K"]:
        """Of v of each block in turn; changes them."""
        kept, sums, start = list[Tensor](), None, 0
        for block, values in zip(self.blocks, every, strict=True):
            kept.append(values[:, block.place])
            if self.sketched:
                part = folded(values.index_fill_(1, block.place, 0.0), start, self.sketched)
                sums = part if sums is None else sums.add_(part)
            start += len(block.weights)
        rows = torch.cat(kept, dim=1)[:, self.order]
        return rows if sums is None else torch.cat([rows, turned(sums)], dim=1)

    def tensors(self) -> Mapping[str, Tensor]:
        found = {"order": self.order, "spread": self.spread, "gains": self.gains}
        for k, block in enumerate(self.blocks):
            found |= {f"{k}.place": block.place, f"{k}.weights": block.weights}
            bases = enumerate(block.bases)
            found |= {f"{k}.basis.{axis}": q for axis, q in bases if q is not None}
        return found


def folded(values: Float[Tensor, "b d"], start: int, size: int) -> Float[Tensor, "b J"]:
    """Sums of the numbers whose places, counted from `start` on, are alike modulo `size`."""
    before = start % size
    first = min(size - before, values.shape[1])
    runs = (values.shape[1] - first) // size
    last = first + runs * size
    sums = values[:, first:last].reshape(len(values), runs, size).sum(dim=1)
    sums[:, before : before + first] += values[:, :first]
    sums[:, : values.shape[1] - last] += values[:, last:]
    return sums


def turned(rows: Float[Tensor, "b J"]) -> Float[Tensor, "b J"]:
    """By an orthonormal Hadamard matrix for each run of numbers, as long as a power of 2 divides J.

    What was large in one number is then spread over the run, as few bits need it.
    """
    size, half = rows.shape[1] & -rows.shape[1], 1
    out = rows
    while half < size:
        a, b = out.view(len(rows), -1, 2, half).unbind(dim=2)
        out = torch.stack([a + b, a - b], dim=2).view(rows.shape)
        half *= 2
    return out / math.sqrt(size)


def sketch_size(numbers: int) -> int:
    """J: about `SKETCHED` of the numbers, 4 to 7 times a power of 2."""
    wanted = int(SKETCHED * numbers)
    unit = 2 ** max(wanted.bit_length() - 3, 0)
    return wanted // unit * unit


def _coordinates(
    fitted: Fitted, most: int, queries: Data | None, sample: int, codes: Codes
) -> Coordinates:
    """The coordinates of largest mean size E|v|, over some training examples; the others sketched.

    Not by E[v²]: coordinates of rare words are large in one example and 0 in all others, and so
    say little of most scores. With `queries` by the product of the mean sizes over both.
    """
    scorer = _layered(fitted)
    every = _every(scorer)
    own, sizes = _energies(scorer, every, scorer.train, sample)
    if queries is not None:
        sizes = sizes * _energies(scorer, every, queries, sample)[1]
    size = 0 if most >= len(own) else sketch_size(most)
    # Of equal sizes the first: the same coordinates in every process.
    order = sizes.argsort(descending=True, stable=True)[: most - size]
    inside, blocks, start = order.sort(), list[BlockCoordinates](), 0
    for block in every:
        end = start + len(block.weights)
        mine = inside.values[(start <= inside.values) & (inside.values < end)] - start
        blocks.append(replace(block, place=mine))
        start = end
    kept = own[order]
    rest = (own.sum() - kept.sum()).clamp_min(0) / max(size, 1)
    spread = _spread(torch.cat([kept, rest.expand(size)])).to(scorer.curvature.plan.dtype)
    made = _made_of(scorer, tuple(blocks), inside.indices.argsort(), spread, None)
    return replace(made, gains=_gains(fitted, made, sample, codes)) if size else made


def _every(scorer: LayeredScorer) -> list[BlockCoordinates]:
    """All coordinates of each block, none of them kept.

    Turning an axis of length o takes o multiply-adds for each number of a gradient. An axis that is
    more than `LONG` times as long as the other, as the vocabulary of a language model, is left as
    it is; Λ is then the second moment of its entries, (Q ∘ Q) Λ. Any bases and positive weights
    give products that are right in the mean; those of the eigenvectors vary least.
    """
    found = []
    for k, block in enumerate(scorer.curvature.blocks):
        values, bases = block.eigen.values, list(block.eigen.bases)
        for axis, basis in enumerate(bases):
            if basis is not None and values.shape[axis] > LONG * min(values.shape):
                values = (values.movedim(axis, -1) @ basis.square().mT).movedim(-1, axis)
                bases[axis] = None
        weights = (1 / (values + block.damping)).sqrt().flatten()
        draw = torch.Generator().manual_seed(k)
        signs = torch.randint(2, (len(weights),), generator=draw).mul_(2).sub_(1).to(weights)
        none = torch.zeros(0, dtype=torch.int64, device=weights.device)
        found.append(BlockCoordinates(tuple(bases), weights * signs, tuple(values.shape), none))
    return found


def _spread(energies: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Their roots; 1 where a number is always 0."""
    return torch.where(energies > 0, energies.sqrt(), 1.0)


def _energies(
    scorer: LayeredScorer, blocks: Sequence[BlockCoordinates], data: Data, sample: int
) -> tuple[Tensor, Tensor]:
    """E[v²] and E|v| of all coordinates v of each block, over some examples."""
    task, chosen = scorer.task, data.subset(_spaced(len(data), sample))
    count = len(chosen)
    totals = [
        block.weights.new_zeros(2, len(block.weights), dtype=torch.float64) for block in blocks
    ]
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


def _spaced(n: int, most: int) -> list[int]:
    """`most` places among n, evenly spaced; or all."""
    count = min(n, most)
    return [k * n // count for k in range(count)]


# -- what the parts of a product are worth --------------------------------------------------------


def _gains(fitted: Fitted, made: Coordinates, sample: int, codes: Codes) -> Float[Tensor, " two"]:
    """a and b of Ŝ = a Ŝ_kept + b Ŝ_sketch, from some training examples asked about others.

    Ŝ_kept varies little but is too small, Ŝ_sketch is right in the mean but varies. a and b are
    those of least squares of S, both divided by Σ ŜS/Σ S² of that sum: then S is the mean of Ŝ at
    a given S, and Ŝ has its unit. 1 and 1, for which it holds too, where they are not positive.
    """
    at = _spaced(len(fitted.train), sample)
    asked, others = at[::4], [i for k, i in enumerate(at) if k % 4]
    ones = torch.ones_like(made.gains)
    if not others:
        return ones
    parts = fitted.attribute(
        fitted.train.subset(asked), into=_Parts(made, fitted.train.subset(others), codes)
    )
    S, both = parts[..., 0].double().flatten(), parts[..., 1:].double().flatten(0, 1)
    found = torch.linalg.lstsq(both.cpu(), S.cpu()[:, None], driver="gelsd").solution[:, 0]
    along = (both.cpu() @ found) @ S.cpu()
    found = found * (S.cpu() @ S.cpu() / along)
    is_usable = bool(found.isfinite().all()) and bool((found > 0).all())
    return found.to(ones) if is_usable else ones


@dataclass(frozen=True, eq=False)
class _Parts(Reducer):
    """S, Ŝ_kept and Ŝ_sketch of some examples: [q, m, 3]."""

    made: Coordinates
    examples: Data
    codes: Codes
    is_exact = True

    def begin(self, sweep: Sweep) -> Sink:
        return _Both(self)


@dataclass(eq=False)
class _Both(Sink):
    asked: _Parts
    found: list[Tensor] = field(default_factory=list)

    def missing(self, job: Job, n: int) -> list[tuple[int, int]]:
        made, codes, k = self.asked.made, self.asked.codes, len(self.asked.made.order)
        task, parts = made.plan.task, list[Tensor]()
        u = made.of_query(job).float()
        with GradientPass(made.plan, made.theta) as passes:
            for start, stop, batch in self.asked.examples.batches(made.at_once):
                batch = task.to_device(batch)
                rows = made.of_example(passes.of(training_loss(task), batch, stop - start))
                rows = rows.float()
                if rows.shape[1] * codes.bits % 8 == 0:
                    rows = codes.decode(codes.encode(rows))
                S = job.scores_of(batch, stop - start)
                each = (u[:, :k] @ rows[:, :k].mT, u[:, k:] @ rows[:, k:].mT)
                parts.append(torch.stack([S, *(x.to(S) for x in each)], dim=2))
        self.found.append(torch.cat(parts, dim=1))
        return []

    def result(self, answer: Answer) -> Tensor:
        return torch.cat(self.found)


def _restored(fitted: Fitted, tensors: Mapping[str, Tensor], folder: Any) -> Coordinates:
    scorer, blocks = _layered(fitted), list[BlockCoordinates]()
    if "gains" not in tensors:
        raise StaleStore(
            "Rows of an index are coordinates and a sketch of all others.",
            f"{folder}, which has coordinates alone.",
            "an index that was built before version 0.2.0.",
            "build it again in another folder.",
        )
    device = scorer.point.theta.device
    # Copied: products round by where their operands start in memory.
    held = {name: each.to(device, copy=True) for name, each in tensors.items()}
    for k, block in enumerate(scorer.curvature.blocks):
        shape = tuple(block.eigen.values.shape)
        bases = tuple(held.get(f"{k}.basis.{axis}") for axis in range(len(shape)))
        blocks.append(BlockCoordinates(bases, held[f"{k}.weights"], shape, held[f"{k}.place"]))
    return _made_of(scorer, tuple(blocks), held["order"], held["spread"], held["gains"])


def _made_of(
    scorer: LayeredScorer,
    blocks: tuple[BlockCoordinates, ...],
    order: Tensor,
    spread: Tensor,
    gains: Tensor | None,
) -> Coordinates:
    made, size = scorer.curvature.plan, _at_once(scorer, blocks, len(spread))
    gains = spread.new_ones(2) if gains is None else gains
    theta, factor = scorer.point.theta, scorer.factor
    return Coordinates(made, theta, factor, size, spread, blocks, order, gains)


def _at_once(scorer: LayeredScorer, blocks: Sequence[BlockCoordinates], width: int = 0) -> int:
    """Examples whose gradients are taken and turned together."""
    # Gradients are formed in full, a block at a time.
    largest = max((len(block.weights) for block in blocks), default=0)
    each = scorer.curvature.cost.bytes_per_example
    each += (4 * largest + 4 * width) * scorer.dtype.itemsize
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


def transform(
    fitted: Fitted, most: int, queries: Data | None, sample: int, codes: Codes
) -> Transform:
    """The rows of a fitted method, of `most` numbers at most, to be kept in these codes.

    Raises:
        NotOffered: It has none.
        SpecError: They have more numbers.
    """
    if not isinstance(fitted.scorer, ProjectedScorer):
        return _coordinates(fitted, most, queries, sample, codes)
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
        return _restored(fitted, tensors, folder)
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
