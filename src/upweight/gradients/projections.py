"""P gᵢ, of a few hundred numbers per layer or a few thousand in all, without a p × d matrix.

    TwoSided    Q_oᵀ gᵢ Q_i of every layer        P has orthonormal rows
    Sketch      d numbers of all of θ             E⟨Pa, Pb⟩ = ⟨a, b⟩

Both act on factors: where a weight is used once per example, gᵢ = δ ⊗ a is never formed. What is
drawn depends on a seed, the name of a layer and its shape, so that P is the same for every batch,
process and point θ.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.gradients.blocks import Block, MatrixBlock, Plan
from upweight.gradients.factored import Factors, Formed, Lookups, Rows, Tokens
from upweight.runtime.fingerprint import digest


class Projection(abc.ABC):
    """P, a linear map of gradients that are given as factors."""

    plan: Plan

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """d, how many numbers P g has."""

    @abc.abstractmethod
    def __call__(self, factors: Sequence[Factors]) -> Float[Tensor, "b d"]:
        """P gᵢ of each example."""

    @abc.abstractmethod
    def bytes_per_example(self, positions: Sequence[int]) -> int:
        """What is held while it is taken, besides the factors.

        Args:
            positions: At how many each block's weight is used; 0 for vectors.
        """

    def of_vectors(self, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k d"]:
        """P v of flat vectors."""
        layout, factors = self.plan.task.layout, list[Factors]()
        for block in self.plan.blocks:
            part = vectors[:, block.index(layout).to(vectors.device)].to(self.plan.dtype)
            is_matrix = isinstance(block, MatrixBlock)
            factors.append(Formed(part.reshape(-1, *block.shape)) if is_matrix else Rows(part))
        return self(factors)


@dataclass(frozen=True, eq=False)
class Buckets:
    """(B v)_k = Σ_{j: place[j] = k} weight[j] v_j: each entry is added to one place.

    With random places and signs it is a count sketch (Charikar, Chen & Farach-Colton 2002), for
    which E⟨Ba, Bb⟩ = ⟨a, b⟩; divided by the roots of the buckets' sizes its rows are orthonormal.
    """

    place: Int[Tensor, " j"]
    weight: Float[Tensor, " j"]
    width: int

    def __call__(self, x: Float[Tensor, "*b j"]) -> Float[Tensor, "*b k"]:
        out = x.new_zeros(*x.shape[:-1], self.width)
        return out.index_add_(x.ndim - 1, self.place, x * self.weight)

    def adjoint(self, y: Float[Tensor, "*b k"]) -> Float[Tensor, "*b j"]:
        """Bᵀ y."""
        return y[..., self.place] * self.weight

    def squared(self, entries: Float[Tensor, " j"]) -> Float[Tensor, " k"]:
        """diag(B D Bᵀ) for D = diag(entries); no other entry is filled."""
        squares = Buckets(self.place, self.weight.to(entries).square(), self.width)
        return squares(entries)


# -- two sides of each layer ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sides:
    """V ↦ leftᵀ V right."""

    left: Float[Tensor, "o k"]
    right: Float[Tensor, "i l"]


@dataclass(frozen=True, eq=False)
class TwoSided(Projection):
    """Each layer's gradient between two bases, side by side. Made by `two_sided`.

    Choe et al. (2024), §3.1: (Q_o ⊗ Q_i)ᵀ vec(δ ⊗ a) = Q_oᵀ δ ⊗ Q_iᵀ a, so that a position takes
    o·k + i·l products.

    Args:
        plan: Whose blocks.
        maps: Of each block; None is the identity.
        shapes: Of each block's share of P g.
    """

    plan: Plan
    maps: tuple[Sides | Buckets | None, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def parts(self) -> tuple[slice, ...]:
        """Where the share of each block lies in P g."""
        found, start = list[slice](), 0
        for shape in self.shapes:
            found.append(slice(start, start + math.prod(shape)))
            start = found[-1].stop
        return tuple(found)

    @property
    def width(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def __call__(self, factors: Sequence[Factors]) -> Float[Tensor, "b d"]:
        return torch.cat(
            [_between(part, m).flatten(1) for part, m in zip(factors, self.maps, strict=True)],
            dim=1,
        )

    def bytes_per_example(self, positions: Sequence[int]) -> int:
        sides = [t * sum(shape) for t, shape in zip(positions, self.shapes, strict=True)]
        return self.plan.dtype.itemsize * (2 * self.width + max(sides))

    def adjoint(self, y: Float[Tensor, "k d"]) -> Float[Tensor, "k p"]:
        """Pᵀ y, flat."""
        layout = self.plan.task.layout
        out = y.new_empty(len(y), layout.size)
        every = zip(self.plan.blocks, self.maps, self.shapes, self.parts, strict=True)
        for block, m, shape, part in every:
            v = y[:, part].reshape(-1, *shape)
            if isinstance(m, Buckets):
                v = m.adjoint(v)
            elif m is not None:
                v = m.left.to(v) @ v @ m.right.to(v).mT
            out[:, block.index(layout).to(out.device)] = v.flatten(1)
        return out


def _between(part: Factors, m: Sides | Buckets | None) -> Tensor:
    if isinstance(part, Rows):
        assert not isinstance(m, Sides)
        return part.values if m is None else m(part.values)
    assert not isinstance(m, Buckets)
    return part.matrices() if m is None else part.projected(m.left, m.right).matrices()


def two_sided(
    plan: Plan,
    rank: int | None,
    seed: int = 0,
    bases: Sequence[Sequence[Tensor | None]] | None = None,
) -> TwoSided:
    """P = Q_oᵀ ⊗ Q_iᵀ of each layer, with at most `rank` columns on each side.

    A side no longer than the rank is kept as it is. Biases on their own, gains, and what has no
    rule are vectors: of those longer than rank² as many sums of entries with random signs are kept.
    P Pᵀ = I, so that λ keeps its unit; with random bases E⟨Pa, Pb⟩ = (k l / o i) ⟨a, b⟩.

    Args:
        plan: Whose blocks.
        rank: The columns; None: P = I.
        seed: Of the draws.
        bases: Per block the vectors of each side, best first, in columns; None: random ones,
            uniform over the orthogonal matrices.
    """
    layout = plan.task.layout
    maps, shapes = list[Sides | Buckets | None](), list[tuple[int, ...]]()
    for k, block in enumerate(plan.blocks):
        draws = _draws(seed, block)
        is_matrix = isinstance(block, MatrixBlock)
        most = layout.size if rank is None else rank if is_matrix else rank**2
        kept = tuple(min(size, most) for size in block.shape)
        shapes.append(kept)
        if kept == block.shape:
            maps.append(None)
        elif not is_matrix:
            place = torch.randperm(block.shape[0], generator=draws) % kept[0]
            weight = _signs(block.shape[0], draws) / place.bincount()[place].sqrt()
            maps.append(
                Buckets(place.to(layout.device), weight.to(layout.device, plan.dtype), kept[0])
            )
        else:
            sides = []
            for axis, (size, few) in enumerate(zip(block.shape, kept, strict=True)):
                basis = None if bases is None else bases[k][axis]
                if few == size:
                    basis = torch.eye(size)
                elif basis is None:
                    drawn = torch.randn(size, few, generator=draws, dtype=torch.float64)
                    basis = torch.linalg.qr(drawn).Q
                sides.append(basis[:, :few].to(layout.device, plan.dtype))
            maps.append(Sides(*sides))
    return TwoSided(plan, tuple(maps), tuple(shapes))


# -- a sketch of all of θ -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TensorSketch:
    """A count sketch of V [o, i] whose places and signs are those of a row and a column together.

        place[o, i] = left.place[o] + right.place[i] mod d
        sign[o, i] = left.sign[o] right.sign[i]

    Pham & Pagh (2013): that of an outer product is the circular convolution of the sketches of its
    sides, o + i + d log d operations. E⟨Pa, Pb⟩ = ⟨a, b⟩, with a variance of at most 8 ‖a‖²‖b‖²/d:
    up to four times that of independent signs.
    """

    left: Buckets
    right: Buckets

    def __call__(self, part: Tokens) -> Float[Tensor, "b d"]:
        d = self.left.width
        if isinstance(part, Lookups):
            place = (self.left.place[part.index][..., None] + self.right.place) % d
            values = self.left.weight[part.index][..., None] * (part.right * self.right.weight)
            out = part.right.new_zeros(len(part), d)
            return out.scatter_add_(1, place.flatten(1), values.flatten(1))
        o, i = len(self.left.place), len(self.right.place)
        # Where the transforms hold less than gᵢ would, they are faster as well.
        if not isinstance(part, Formed) and part.positions * d < o * i:
            sides = (torch.fft.rfft(self.left(part.left)), torch.fft.rfft(self.right(part.right)))
            return torch.fft.irfft((sides[0] * sides[1]).sum(dim=1), n=d)
        place = ((self.left.place[:, None] + self.right.place) % d).flatten()
        values = part.matrices() * (self.left.weight[:, None] * self.right.weight)
        out = values.new_zeros(len(part), d)
        return out.index_add_(1, place, values.flatten(1))


@dataclass(frozen=True, eq=False)
class Sketch(Projection):
    """P g = Σ over the layers of their sketches, d numbers in all. Made by `sketch`."""

    plan: Plan
    maps: tuple[TensorSketch | Buckets, ...]
    dim: int

    @property
    def width(self) -> int:
        return self.dim

    def bytes_per_example(self, positions: Sequence[int]) -> int:
        every = zip(positions, self.plan.blocks, strict=True)
        held = [min(8 * t * self.dim, 3 * math.prod(block.shape)) for t, block in every]
        return self.plan.dtype.itemsize * (4 * self.dim + max(held))

    def __call__(self, factors: Sequence[Factors]) -> Float[Tensor, "b d"]:
        parts = [
            m(part.values if isinstance(part, Rows) else part)  # type: ignore[arg-type]
            for part, m in zip(factors, self.maps, strict=True)
        ]
        return reduce(Tensor.add_, parts)


def sketch(plan: Plan, dim: int | None, seed: int = 0) -> Projection:
    """A sketch of all of θ in `dim` numbers; P = I where that is no fewer than p, or None."""
    layout = plan.task.layout
    if dim is None or dim >= layout.size:
        return two_sided(plan, None)
    maps = list[TensorSketch | Buckets]()
    for block in plan.blocks:
        draws = _draws(seed, block)
        sides = [
            Buckets(
                torch.randint(dim, (size,), generator=draws).to(layout.device),
                _signs(size, draws).to(layout.device, plan.dtype),
                dim,
            )
            for size in block.shape
        ]
        maps.append(TensorSketch(*sides) if isinstance(block, MatrixBlock) else sides[0])
    return Sketch(plan, tuple(maps), dim)


def _signs(size: int, draws: torch.Generator) -> Float[Tensor, " j"]:
    return 1.0 - 2.0 * torch.randint(2, (size,), generator=draws).double()


def _draws(seed: int, block: Block) -> torch.Generator:
    """A generator for a layer, by its name and no other's."""
    return torch.Generator().manual_seed(int(digest(f"{seed} {block.name}")[:15], 16))
