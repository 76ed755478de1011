"""∇m_q of one block in the block's eigenbasis, and what it becomes under (H + λ)⁻¹."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.curvature.layerwise import FittedBlock
from upweight.gradients.factored import Factors, Lookups, Rows, Tokens, stacked
from upweight.linalg.eigen import Eigen

PAIR_OVERHEAD = 256
"""What one more product of q·s × b·t costs beside its multiply-adds, in multiply-adds per entry:
its two factors are written to memory and read again."""


def pair_cost(shape: torch.Size | tuple[int, ...], s: int, t: int) -> int:
    """Multiply-adds per query and example of one term of products over pairs of positions."""
    return s * t * (sum(shape) + PAIR_OVERHEAD)


def in_pairs(shape: torch.Size | tuple[int, ...], s: int, t: int) -> bool:
    """Whether products over pairs of s with t positions can cost less than V_q and gᵢ in full.

    One position each always may: a block then takes the memory of its factors.
    """
    if len(shape) != 2 or s * t == 0:
        return False
    return s * t == 1 or 2 * pair_cost(shape, s, t) <= shape[0] * shape[1]


@dataclass(frozen=True, eq=False)
class FactoredQueries:
    """∇m_q = Σ_τ δ_qτ ⊗ a_qτ over few positions, rotated: δ̃ [q, s, o] and ã [q, s, i]."""

    eigen: Eigen
    inverse: Float[Tensor, "o i"]
    left: Float[Tensor, "q s o"]
    right: Float[Tensor, "q s i"]

    def __len__(self) -> int:
        return len(self.left)

    def solved(self, rows: slice | Tensor) -> Float[Tensor, "k o i"]:
        """V_q = (H + λ)⁻¹ ∇m_q of some queries, in θ's own coordinates."""
        dense = Tokens(self.left[rows], self.right[rows]).matrices()
        return self.eigen.unrotated(dense * self.inverse)


def rotated(tokens: Tokens, eigen: Eigen) -> Tokens:
    """The factors in the block's eigenbases."""
    left, right = (None if q is None else q.to(tokens.dtype) for q in eigen.bases)
    if left is not None and right is not None:
        return tokens.projected(left, right)
    return Tokens(
        tokens.left if left is None else tokens.left @ left,
        tokens.right if right is None else tokens.right @ right,
    )


def in_basis(eigen: Eigen, factors: Factors) -> Float[Tensor, "b ..."]:
    """Qᵀ g of each example, [b, *eigenvalues]."""
    if isinstance(factors, Tokens) and eigen.values.ndim == 2:
        (o, i), t = eigen.values.shape, factors.positions
        if t * (o * o + i * i) <= o * i * (o + i) or isinstance(factors, Lookups):
            return rotated(factors, eigen).matrices()
        return eigen.rotated(factors.matrices())
    values = factors.values if isinstance(factors, Rows) else factors.matrices()
    return eigen.rotated(values.reshape(len(values), *eigen.values.shape))


def solved(inverse: Eigen, factors: Factors) -> Float[Tensor, "q ..."]:
    """(H + λ)⁻¹ ∇m_q in θ's own coordinates, [q, o, i] or [q, d]."""
    return inverse.unrotated(in_basis(inverse, factors) * inverse.values)


def self_products(inverse: Eigen, factors: Factors) -> Float[Tensor, " b"]:
    """⟨gᵢ, (H + λ)⁻¹ gᵢ⟩ for each example, from the inverse's eigendecomposition."""
    if isinstance(factors, Tokens) and factors.positions == 1:
        tokens = rotated(factors, inverse)
        left, right = tokens.left[:, 0].square(), tokens.right[:, 0].square()
        return ((left @ inverse.values) * right).sum(dim=1)
    squares = in_basis(inverse, factors).square_()
    return (squares * inverse.values).flatten(1).sum(dim=1)


@dataclass(frozen=True, eq=False)
class SolvedQueries:
    """V_q = (H + λ)⁻¹ ∇m_q in θ's own coordinates.

    Args:
        vectors: V_q, [q, d] or [q, o, i]; where there is a `bias`, without its column.
        reference: V_q of a few queries in full precision, whole.
        bias: The column of a bias that goes with its weight.
    """

    vectors: Float[Tensor, "q ..."]
    reference: Float[Tensor, "k ..."]
    bias: Float[Tensor, "q o"] | None = None

    @property
    def whole(self) -> Float[Tensor, "q ..."]:
        """V_q with every column."""
        if self.bias is None:
            return self.vectors
        return torch.cat([self.vectors, self.bias[..., None]], dim=-1)

    def __len__(self) -> int:
        return len(self.vectors)


BlockQueries: TypeAlias = FactoredQueries | SolvedQueries


def block_queries(
    blocks: Sequence[FittedBlock],
    batches: Iterable[tuple[int, int, list[Factors]]],
    q: int,
    positions: Sequence[int],
    reference: Int[Tensor, " k"],
    dtypes: Sequence[torch.dtype],
) -> list[BlockQueries]:
    """Every block's queries, from batches of measure gradients.

    Args:
        blocks: The curvature and damping of each block.
        batches: `(start, stop, factors)` over the queries, in order.
        q: How many queries there are.
        positions: At how many positions each block's weight is used on a training example.
        reference: Queries to keep in full precision too.
        dtypes: What each block's vectors are solved and stored in; the reference always in full
            precision.
    """
    inverses = [block.inverse() for block in blocks]
    solvers = [
        _short(inverse) if dtype is torch.bfloat16 else inverse
        for inverse, dtype in zip(inverses, dtypes, strict=True)
    ]
    factored: list[list[Tokens]] = [[] for _ in blocks]
    solved_queries: list[_Solved | None] = [None] * len(blocks)

    def keep(k: int, start: int, part: Factors) -> None:
        v = solved(solvers[k], part.to(dtypes[k]))
        room = solved_queries[k]
        if room is None:
            room = solved_queries[k] = _Solved.like(v, q, blocks[k].bias is not None)
        stop = start + len(v)
        room.put(slice(start, stop), v)
        rows = reference[(reference >= start) & (reference < stop)] - start
        room.kept.append(solved(inverses[k], part.take(rows)))

    for start, _, parts in batches:
        for k, part in enumerate(parts):
            if (
                isinstance(part, Tokens)
                and in_pairs(blocks[k].eigenvalues.shape, part.positions, positions[k])
                and solved_queries[k] is None
            ):
                factored[k].append(part)
                continue
            first = 0
            for earlier in factored[k]:  # batches of few positions, before this one of many
                keep(k, first, earlier)
                first += len(earlier)
            factored[k] = []
            keep(k, start, part)
    made: list[BlockQueries] = []
    for k, block in enumerate(blocks):
        room = solved_queries[k]
        if room is None:
            tokens = stacked([rotated(part, block.eigen) for part in factored[k]])
            assert isinstance(tokens, Tokens)
            made.append(FactoredQueries(block.eigen, inverses[k].values, tokens.left, tokens.right))
        else:
            made.append(SolvedQueries(room.vectors, torch.cat(room.kept), room.bias))
    return made


@dataclass
class _Solved:
    """Room for the V_q of one block, a batch at a time; some in full precision too."""

    vectors: Float[Tensor, "q ..."]
    bias: Float[Tensor, "q o"] | None
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def like(cls, v: Float[Tensor, "b ..."], q: int, has_bias: bool) -> "_Solved":
        """For q of them."""
        if not has_bias:
            return cls(v.new_empty(q, *v.shape[1:]), None)
        _, o, i = v.shape
        return cls(v.new_empty(q, o, i - 1), v.new_empty(q, o))

    def put(self, rows: slice, v: Float[Tensor, "b ..."]) -> None:
        """A batch."""
        if self.bias is None:
            self.vectors[rows] = v
        else:
            self.vectors[rows], self.bias[rows] = v[..., :-1], v[..., -1]


def _short(inverse: Eigen) -> Eigen:
    """The same in bfloat16."""
    bases = tuple(None if q is None else q.to(torch.bfloat16) for q in inverse.bases)
    return Eigen(bases, inverse.values.to(torch.bfloat16))


def depends_on_parameters(queries: BlockQueries) -> bool:
    """Whether some query has a gradient in this block at all."""
    if isinstance(queries, FactoredQueries):
        return bool((queries.left.any(dim=2) & queries.right.any(dim=2)).any())
    return bool(queries.vectors.any()) or (queries.bias is not None and bool(queries.bias.any()))


def inner(queries: BlockQueries, matrix: Float[Tensor, "..."]) -> Float[Tensor, " q"]:
    """⟨V_q, matrix⟩ of every query with one matrix (or vector) of the block's shape."""
    if not bool(matrix.any()):  # without a penalty; V_q in full precision would be a large copy
        return matrix.new_zeros(len(queries))
    if isinstance(queries, FactoredQueries):
        weighted = queries.inverse * queries.eigen.rotated(matrix.to(queries.inverse))
        return ((queries.left @ weighted) * queries.right).sum(dim=(1, 2))
    return queries.whole.flatten(1).to(matrix.dtype) @ matrix.flatten()
