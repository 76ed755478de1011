"""What a row is: T gᵢ of K numbers, and u_q of a solved query, with S[q, i] = u_q · T gᵢ.

    Coordinates   of methods by layer: of v = (w_G ⊗ w_A) ∘ (Q_Gᵀ g Q_A) the numbers of largest
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
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.errors import NotOffered, SpecError, StaleStore
from upweight.gradients.blocks import Plan
from upweight.gradients.factored import Factors, Formed, Joined, Lookups, Rows, Tokens
from upweight.gradients.passes import GradientPass
from upweight.index.codes import Codes
from upweight.methods.fitted import Fitted
from upweight.methods.layered import LayeredJob, LayeredScorer
from upweight.methods.projected import ProjectedJob, ProjectedScorer
from upweight.methods.reduce import Asked, Reducer, Sink, Sweep
from upweight.methods.scorer import Job
from upweight.runtime.fingerprint import digest
from upweight.runtime.memory import examples_within, kept_bytes, working_bytes
from upweight.runtime.progress import progress
from upweight.runtime.selection import spaced
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

FOLDED = 8
"""Numbers of all blocks for one of the sketch: more take longer, fewer vary more."""

NARROW = 32
"""To fewer entries no axis of a block is projected."""

SWEEPS = 20
"""Of the weights of both axes, which change by less than 1e-6 in the last ones."""


@dataclass(frozen=True, eq=False)
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
    def width(self) -> int:
        """K."""
        return len(self.spread)

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
class Turned:
    """An axis of a block turned onto eigenvectors: x ↦ Cᵀ (w ∘ Qᵀ x); of queries with w⁻¹.

    C keeps some of the entries up to a sign and projects the others at random, so that
    E[C Cᵀ] = I; it is a matrix of signs where all are kept.

    Args:
        example, query: Q diag(w) C and Q diag(w⁻¹) C.
        exact: How many entries are eigen-coordinates; they are the first ones.
    """

    example: Float[Tensor, "d k"]
    query: Float[Tensor, "d k"]
    exact: int

    @property
    def size(self) -> int:
        """k."""
        return self.example.shape[1]

    @property
    def products(self) -> int:
        """Multiply-adds for a vector."""
        return self.example.numel()

    def of_example(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        """Along the last axis."""
        return x @ self.example

    def of_query(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        """The same, with the inverse weights."""
        return x @ self.query.to(x)

    def of_lookups(self, part: Lookups, right: Float[Tensor, "b t l"]) -> Float[Tensor, "b k l"]:
        """Σ_t C e(index_t) ⊗ right_t."""
        return self.example[part.index].mT @ right

    def tensors(self) -> Mapping[str, Tensor]:
        """What a folder must hold of it."""
        exact = torch.tensor(self.exact)
        return {"example": self.example, "query": self.query, "exact": exact}


@dataclass(frozen=True, eq=False)
class Folded:
    """An axis left as it is: x ↦ w ∘ x, of which entries that are k places apart are added up.

    Args:
        weights: w, with signs drawn at random; 0 where a query is 0.
        size: k; no fewer than there are entries: nothing is added up.
    """

    weights: Float[Tensor, " d"]
    size: int

    @property
    def exact(self) -> int:
        """How many entries are coordinates: all or none."""
        return self.size if self.size == len(self.weights) else 0

    @property
    def products(self) -> int:
        """Multiply-adds for a vector."""
        return len(self.weights)

    def of_example(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        """Along the last axis."""
        return self._folded(x * self.weights)

    def of_query(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        """The same, with the inverse weights."""
        # Where TracIn's P is 0, the weight and V are 0, and so is the product of the two rows.
        return self._folded(x / torch.where(self.weights != 0, self.weights, 1).to(x))

    def of_lookups(self, part: Lookups, right: Float[Tensor, "b t l"]) -> Float[Tensor, "b k l"]:
        """Σ_t C e(index_t) ⊗ right_t."""
        weighted = right * self.weights[part.index][..., None]
        return Lookups(part.index % self.size, self.size, weighted).matrices()

    def _folded(self, x: Tensor) -> Tensor:
        if self.exact:
            return x
        missing = -x.shape[-1] % self.size
        filled = F.pad(x, (0, missing)) if missing else x  # F.pad copies in any case
        return filled.reshape(*x.shape[:-1], -1, self.size).sum(dim=-2)

    def tensors(self) -> Mapping[str, Tensor]:
        """What a folder must hold of it."""
        return {"weights": self.weights, "size": torch.tensor(self.size)}


Axis: TypeAlias = Turned | Folded


@dataclass(frozen=True, eq=False)
class BlockCoordinates:
    """Numbers C_Gᵀ v C_A of one block, v its whitened gradient; some are kept one by one.

    Args:
        axes: Two, or one for all of the block's parameters.
        place: Which numbers are kept.
    """

    axes: tuple[Axis, ...]
    place: Int[Tensor, " k"]

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def exact(self) -> Bool[Tensor, " d"]:
        """Which of them are coordinates of v, and no projection."""
        first, *others = (torch.arange(axis.size) < axis.exact for axis in self.axes)
        return (first[:, None] & others[0]).flatten() if others else first

    def __call__(self, factors: Factors) -> Float[Tensor, "b d"]:
        """Of examples."""
        if len(self.axes) == 1:
            values = factors.values if isinstance(factors, Rows) else factors.matrices().flatten(1)
            return self.axes[0].of_example(values)
        assert isinstance(factors, Tokens)
        left, right = self.axes
        # Each position by itself, where that takes fewer products than forming g.
        t, (o, i) = factors.positions, (_length(axis) for axis in self.axes)
        apart = t * (left.products + right.products + left.size * right.size)
        if isinstance(factors, Formed) or apart > t * o * i + o * right.products + (
            right.size * left.products
        ):
            return left.of_example(right.of_example(factors.matrices()).mT).mT.flatten(1)
        parts = factors.parts if isinstance(factors, Joined) else (factors,)
        found = [self._of_positions(part) for part in parts]
        return reduce(Tensor.add_, found).flatten(1)

    def _of_positions(self, factors: Tokens) -> Float[Tensor, "b k l"]:
        left, right = self.axes
        turned = right.of_example(factors.right)
        if isinstance(factors, Lookups):
            return left.of_lookups(factors, turned)
        return left.of_example(factors.left).mT @ turned

    def of_solved(self, vectors: Float[Tensor, "q ..."]) -> Float[Tensor, "q d"]:
        """Of V, with the inverse weights."""
        if len(self.axes) == 1:
            return self.axes[0].of_query(vectors.flatten(1))
        left, right = self.axes
        array = vectors.reshape(len(vectors), _length(left), _length(right))
        return left.of_query(right.of_query(array).mT).mT.flatten(1)


def _length(axis: Axis) -> int:
    return len(axis.example) if isinstance(axis, Turned) else len(axis.weights)


@dataclass(frozen=True, eq=False)
class Coordinates(Transform):
    """T g = σ⁻¹ ∘ (coordinates of v of largest E|v|; C times all other numbers of all blocks).

    Each block gives some numbers C_Gᵀ v C_A (`BlockCoordinates`). C adds up those that are J places
    apart, J the size of the sketch, and turns the sums by a Hadamard matrix. All signs are random,
    so that the products of two rows are right in the mean. They vary by about ‖u‖²‖v‖²/J, as those
    of a random projection (Ailon & Chazelle 2009; Charikar, Chen & Farach-Colton 2002); for
    U, V, a block of u and of v, the projections of its axes add about
    ‖U‖²‖V‖²/(k l) + ‖U Vᵀ‖²/k + ‖Uᵀ V‖²/l.

    Args:
        blocks: Of the plan.
        order: Of the numbers of all blocks that are kept one by one, one block after the other, by
            E|v|.
        gains: By what the two parts of a product are multiplied.
    """

    blocks: tuple[BlockCoordinates, ...]
    order: Int[Tensor, " k"]
    gains: Float[Tensor, " two"]

    kind = "eigen-coordinates"

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
        """Of the numbers of each block in turn; changes them."""
        kept, sums, start = list[Tensor](), None, 0
        for block, values in zip(self.blocks, every, strict=True):
            kept.append(values[:, block.place])
            if self.sketched:
                sums = values.new_zeros(len(values), self.sketched) if sums is None else sums
                fold_into(sums, values.index_fill_(1, block.place, 0.0), start)
            start += block.size
        rows = torch.cat(kept, dim=1)[:, self.order]
        return rows if sums is None else torch.cat([rows, turned(sums)], dim=1)

    def tensors(self) -> Mapping[str, Tensor]:
        found = {"order": self.order, "spread": self.spread, "gains": self.gains}
        for k, block in enumerate(self.blocks):
            found[f"{k}.place"] = block.place
            for at, axis in enumerate(block.axes):
                found |= {f"{k}.axis.{at}.{name}": each for name, each in axis.tensors().items()}
        return found


def fold_into(sums: Float[Tensor, "b J"], values: Float[Tensor, "b d"], start: int) -> None:
    """Add numbers whose places are counted from `start` on to the sum of their place modulo J."""
    size, count = sums.shape[1], values.shape[1]
    before = start % size
    first = min(size - before, count)
    runs = (count - first) // size
    last = first + runs * size
    sums[:, before : before + first] += values[:, :first]
    if runs:
        sums += values[:, first:last].reshape(len(values), runs, size).sum(dim=1)
    sums[:, : count - last] += values[:, last:]


def turned(rows: Float[Tensor, "b J"]) -> Float[Tensor, "b J"]:
    """By an orthonormal Hadamard matrix for each run of numbers, as long as a power of 2 divides J.

    What was large in one number is then spread over the run, as few bits need it.
    """
    size = rows.shape[1] & -rows.shape[1]
    few = 2 ** ((size.bit_length() - 1) // 2)
    # That of a product is the Kronecker product: two short ones.
    array = rows.reshape(len(rows), -1, few, size // few)
    return (_hadamard(few, rows) @ array @ _hadamard(size // few, rows)).reshape(rows.shape)


def _hadamard(size: int, like: Tensor) -> Float[Tensor, "s s"]:
    two = like.new_tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    return reduce(torch.kron, [two] * (size.bit_length() - 1), like.new_ones(1, 1))


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
    size = 0 if most >= width_of(fitted) else sketch_size(most)
    every = _every(scorer, size)
    own, sizes = _energies(scorer, every, scorer.train, sample)
    if queries is not None:
        sizes = sizes * _energies(scorer, every, queries, sample)[1]
    exact = torch.cat([block.exact for block in every]).to(sizes.device)
    # Of equal sizes the first: the same coordinates in every process.
    order = torch.where(exact, sizes, -1.0).argsort(descending=True, stable=True)
    order = order[: min(most - size, int(exact.sum()))]
    inside, blocks, start = order.sort(), list[BlockCoordinates](), 0
    for block in every:
        end = start + block.size
        mine = inside.values[(start <= inside.values) & (inside.values < end)] - start
        blocks.append(replace(block, place=mine))
        start = end
    kept = own[order]
    rest = (own.sum() - kept.sum()).clamp_min(0) / max(size, 1)
    spread = _spread(torch.cat([kept, rest.expand(size)])).to(scorer.curvature.plan.dtype)
    ones = spread.new_ones(2)
    made = _made_of(scorer, tuple(blocks), inside.indices.argsort(), spread, ones)
    return replace(made, gains=_gains(fitted, made, sample, codes)) if size else made


def _every(scorer: LayeredScorer, size: int) -> list[BlockCoordinates]:
    """The numbers of each block that a sketch of `size` is made of, 0: all; none of them kept.

    A block is given `FOLDED` numbers for each of its share of the sketch, by Σ Λ/(Λ + λ), to which
    the variance of its products is about proportional.
    """
    blocks = scorer.curvature.blocks
    # Not as Λ/(Λ + λ): Λ is infinite where TracIn's P is 0.
    parts = [float((1 - b.damping / (b.eigen.values + b.damping)).sum()) for b in blocks]
    found, total, dtype = list[BlockCoordinates](), sum(parts), scorer.curvature.plan.dtype
    for k, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        values = block.eigen.values
        numbers = math.ceil(FOLDED * size * part / total) if size and total > 0 else values.numel()
        draw = torch.Generator().manual_seed(k)
        axes = axes_of(values, block.eigen.bases, block.damping, numbers, draw, dtype)
        none = torch.zeros(0, dtype=torch.int64, device=values.device)
        found.append(BlockCoordinates(axes, none))
    return found


def axes_of(
    values: Tensor,
    bases: Sequence[Tensor | None],
    damping: float,
    numbers: int,
    draw: torch.Generator,
    dtype: torch.dtype,
) -> tuple[Axis, ...]:
    """How a block is turned and whitened, and projected to about so many numbers.

    With two bases an axis that is more than `LONG` times as long as the other, as the vocabulary of
    a language model, is left as it is; Λ is then the second moment of its entries, (Q ∘ Q) Λ. The
    weights are w_G ⊗ w_A ≈ (Λ + λ)^−½. Any bases and weights give products that are right in the
    mean; those of the eigenvectors, and (Λ + λ)^−½ itself, vary least.
    """
    bases = list(bases)
    if len(bases) == 1 or all(basis is None for basis in bases):
        whole = (values + damping).rsqrt().flatten()
        signs, count = _signs(len(whole), draw).to(whole), len(whole)
        if bases[0] is None:
            return (Folded((whole * signs).to(dtype), count),)
        turn = bases[0] * signs
        return (Turned((turn * whole).to(dtype), turn / whole, count),)
    shortest = min(values.shape)
    for at, basis in enumerate(bases):
        if basis is not None and values.shape[at] > LONG * shortest:
            values = (values.movedim(at, -1) @ basis.square().mT).movedim(-1, at)
            bases[at] = None
    weights = separable(values, damping)
    least = max(math.ceil(math.sqrt(numbers)), NARROW)
    few = min(shortest, least)
    axes, shares = list[Axis](), values / (values + damping)
    for at, (d, basis, w) in enumerate(zip(values.shape, bases, weights, strict=True)):
        k = few if d == shortest else min(d, max(math.ceil(numbers / few), NARROW))
        signs = _signs(d, draw).to(w)
        if basis is None:
            axes.append(Folded((w * signs).to(dtype), math.ceil(d / (d // k))))
            continue
        order = shares.sum(dim=1 - at).argsort(descending=True, stable=True)
        basis, w = basis[:, order] * signs, w[order]
        exact = d if k == d else k // 2
        example, query = basis * w, basis / w
        if k < d:
            drawn = torch.randn(d - exact, k - exact, generator=draw, dtype=torch.float64)
            rest = torch.linalg.qr(drawn).Q * math.sqrt((d - exact) / (k - exact))
            rest = rest.to(w) * _signs(k - exact, draw).to(w)
            example = torch.cat([example[:, :exact], example[:, exact:] @ rest], dim=1)
            query = torch.cat([query[:, :exact], query[:, exact:] @ rest], dim=1)
        axes.append(Turned(example.to(dtype), query, exact))
    return tuple(axes)


def separable(
    values: Float[Tensor, "o i"], damping: float
) -> tuple[Float[Tensor, " o"], Float[Tensor, " i"]]:
    """w_G and w_A with w_G ⊗ w_A ≈ (Λ + λ)^−½, for products of the least variance.

    That of a sketch is about E‖u‖² E‖v‖²/J, with E[v²] = w² Λ and E[u²] = w⁻² Λ/(Λ + λ)². The
    product of the two sums is lowered by each axis in turn, given the other one.
    """
    whole = values.double() + damping
    # A millionth of Λ + λ, so that no sum is 0.
    own = values.double().abs() + 1e-6 * whole
    asked = own / whole.square()
    left, right = whole.new_ones(whole.shape[0]), whole.new_ones(whole.shape[1])
    for _ in range(SWEEPS):
        left = ((asked @ (1 / right)) / (own @ right)).sqrt()
        right = (((1 / left) @ asked) / (left @ own)).sqrt()
    return left.sqrt().to(values), right.sqrt().to(values)


def _signs(count: int, draw: torch.Generator) -> Int[Tensor, " k"]:
    return torch.randint(2, (count,), generator=draw).mul_(2).sub_(1)


def _spread(energies: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Their roots; 1 where a number is always 0."""
    return torch.where(energies > 0, energies.sqrt(), 1.0)


def _energies(
    scorer: LayeredScorer, blocks: Sequence[BlockCoordinates], data: Data, sample: int
) -> tuple[Tensor, Tensor]:
    """E[v²] and E|v| of all numbers v of each block, over some examples."""
    task, chosen = scorer.task, data.subset(spaced(len(data), sample))
    count, device = len(chosen), scorer.point.theta.device
    totals = [torch.zeros(2, block.size, dtype=torch.float64, device=device) for block in blocks]
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


# -- what the parts of a product are worth --------------------------------------------------------


def _gains(fitted: Fitted, made: Coordinates, sample: int, codes: Codes) -> Float[Tensor, " two"]:
    """a and b of Ŝ = a Ŝ_kept + b Ŝ_sketch, from some training examples asked about others.

    Ŝ_kept varies little but is too small, Ŝ_sketch is right in the mean but varies. a and b are
    those of least squares of S, both divided by Σ ŜS/Σ S² of that sum: then S is the mean of Ŝ at
    a given S, and Ŝ has its unit. 1 and 1, for which it holds too, where they are not positive.
    """
    at = spaced(len(fitted.train), sample)
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
    # In float32: processes that hold the weights in other places round the last bits otherwise.
    return found.float().to(ones) if is_usable else ones


@dataclass(frozen=True, eq=False)
class _Parts(Reducer):
    """S, Ŝ_kept and Ŝ_sketch of some examples: [q, m, 3]."""

    made: Coordinates
    examples: Data
    codes: Codes
    is_exact = True

    def begin(self, sweep: Sweep) -> Sink:
        return Asked(self._of, lambda parts, _: torch.cat(parts))

    def _of(self, job: Job) -> Float[Tensor, "q m three"]:
        made, codes, k = self.made, self.codes, len(self.made.order)
        task, parts = made.plan.task, list[Tensor]()
        u = made.of_query(job).float()
        with GradientPass(made.plan, made.theta) as passes:
            for start, stop, batch in self.examples.batches(made.at_once):
                batch = task.to_device(batch)
                rows = made.of_example(passes.of(training_loss(task), batch, stop - start))
                rows = rows.float()
                if rows.shape[1] * codes.bits % 8 == 0:
                    rows = codes.decode(codes.encode(rows))
                S = job.scores_of(batch, stop - start)
                each = (u[:, :k] @ rows[:, :k].mT, u[:, k:] @ rows[:, k:].mT)
                parts.append(torch.stack([S, *(x.to(S) for x in each)], dim=2))
        return torch.cat(parts, dim=1)


def _restored(fitted: Fitted, tensors: Mapping[str, Tensor], folder: Any) -> Coordinates:
    scorer, blocks = _layered(fitted), list[BlockCoordinates]()
    if not {"gains", "order", "0.place"} <= tensors.keys() or _axes_in(tensors, 0) == ():
        raise StaleStore(
            "Rows of an index are coordinates and a sketch of all others.",
            f"{folder}, which has coordinates alone, or another sketch.",
            "an index that was built before version 0.2.0.",
            "build it again in another folder.",
        )
    device = scorer.point.theta.device
    # Copied: products round by where their operands start in memory.
    held = {name: each.to(device, copy=True) for name, each in tensors.items()}
    for k in range(len(scorer.curvature.blocks)):
        blocks.append(BlockCoordinates(_axes_in(held, k), held[f"{k}.place"]))
    return _made_of(scorer, tuple(blocks), held["order"], held["spread"], held["gains"])


def _axes_in(tensors: Mapping[str, Tensor], block: int) -> tuple[Axis, ...]:
    """Of one block, as `Coordinates.tensors` names them."""
    found = list[Axis]()
    for at in (0, 1):
        name = f"{block}.axis.{at}."
        if f"{name}weights" in tensors:
            found.append(Folded(tensors[f"{name}weights"], int(tensors[f"{name}size"])))
        elif f"{name}example" in tensors:
            example, query, exact = (tensors[name + each] for each in ("example", "query", "exact"))
            found.append(Turned(example, query, int(exact)))
    return tuple(found)


def _made_of(
    scorer: LayeredScorer,
    blocks: tuple[BlockCoordinates, ...],
    order: Tensor,
    spread: Tensor,
    gains: Tensor,
) -> Coordinates:
    plan, size = scorer.curvature.plan, _at_once(scorer, blocks, len(spread))
    theta, factor = scorer.point.theta, scorer.factor
    return Coordinates(plan, theta, factor, size, spread, blocks, order, gains)


def _at_once(scorer: LayeredScorer, blocks: Sequence[BlockCoordinates], width: int = 0) -> int:
    """Examples whose gradients are taken and turned together."""
    # The numbers of a block at a time.
    largest = max((block.size for block in blocks), default=0)
    each = scorer.curvature.cost.bytes_per_example
    each += (2 * largest + 4 * width) * scorer.dtype.itemsize
    # More than for other passes: on a language model of 2 M parameters, rows of batches of 16, 32
    # and 64 passages took 1.8, 1.4 and 1.4 plain epochs.
    device, budget = scorer.point.theta.device, scorer.memory_bytes
    allowed = min(2 * working_bytes(device, budget), kept_bytes(device, budget, 0))
    return examples_within(allowed, each, MOST_EXAMPLES)


# -- projections ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Projected(Transform):
    """T g = σ⁻¹ ∘ P g, and u_q = −(1/n) σ ∘ (Ĝ + λI)⁻¹ P ∇m_q."""

    scorer: ProjectedScorer

    kind = "projections"

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
