"""⟨V_q, gᵢ⟩ of one block for all queries: the ways to multiply it out.

    Explicit     V_q in full; gᵢ formed, then one matrix product           (q + t)·o·i per example
                 or, where t = 1, δᵢᵀ (V_q aᵢ)                             q·o·i
    Separable    V_q = Σ_r Σ_τ (d_qrτ ⊗ a_qrτ), Gram products over pairs
                 of the query's s positions with the example's t           q·r·s·t·(o + i)
    OfVector     V_q and gᵢ are vectors                                    q·d

V_q = (H + λ)⁻¹ ∇m_q is in θ's own coordinates: the bases are multiplied into the queries, once, so
that the training set is never rotated.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from upweight.gradients.factored import Factors, Formed, Lookups, Rows, Tokens, stacked

CHUNK_BYTES = 32 * 2**20
"""Memory for gradients [b, o, i] formed at once; more would leave the processor's cache."""

ROW_BYTES = 4 * 2**20
"""The same for V_q aᵢ, [q, o, b]."""


class Kernel(abc.ABC):
    """One block's share of the scores, up to the factor −1/n."""

    @abc.abstractmethod
    def add_to(self, scores: Float[Tensor, "q b"], factors: Factors) -> None:
        """scores[q, i] += ⟨V_q, gᵢ⟩."""

    def add_all(self, scores: Float[Tensor, "q b"], parts: Sequence[Factors]) -> None:
        """The same for several batches of examples, one after the other."""
        start = 0
        for part in parts:
            self.add_to(scores[:, start : start + len(part)], part)
            start += len(part)

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Memory that the queries take in this form."""


@dataclass(frozen=True, eq=False)
class Explicit(Kernel):
    """V_q in full, in the precision of the product.

    Args:
        vectors: V_q, or its part for the weight.
        bias: Its last column, which is the bias's, where `vectors` is the weight's.
    """

    vectors: Float[Tensor, "q o i"]
    bias: Float[Tensor, "q o"] | None = None

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def add_to(self, scores: Float[Tensor, "q b"], factors: Factors) -> None:
        self.add_all(scores, [factors])

    def add_all(self, scores: Float[Tensor, "q b"], parts: Sequence[Factors]) -> None:
        # V_q is read from memory once per product: small batches are multiplied together.
        _, o, i = self.vectors.shape
        if parts and all(self._goes_by_rows(part) for part in parts):
            self._add_by_rows(scores, stacked(parts))
            return
        flat = self.vectors.flatten(1)
        most = max(1, CHUNK_BYTES // (flat.shape[1] * flat.element_size()))
        room = flat.new_empty(min(most, sum(len(part) for part in parts)), o, i)
        ends = None if self.bias is None else room.new_empty(len(room), o)
        first = stop = 0

        def multiply() -> None:
            held = stop - first
            scores[:, first:stop] += flat @ room[:held].flatten(1).mT
            if self.bias is not None and ends is not None:
                scores[:, first:stop] += self.bias @ ends[:held].mT

        for factors in parts:
            assert isinstance(factors, Tokens)
            for k in range(0, len(factors), most):
                part = factors.take(slice(k, k + most)).rounded(flat.dtype)
                if stop - first + len(part) > len(room):
                    multiply()
                    first = stop
                rows = slice(stop - first, stop - first + len(part))
                part.form(room[rows], None if ends is None else ends[rows])
                stop += len(part)
        multiply()

    def _goes_by_rows(self, part: Factors) -> bool:
        """Whether V_q aᵢ takes less memory than gᵢ, which then need not be formed.

        28 ms in place of 50 with 100 vectors, and a fifth less time with more than i of them (512
        examples, 64 × 784, in float32). Not with vectors in a shorter dtype: V_q aᵢ would be
        rounded to it once more.
        """
        q, _, i = self.vectors.shape
        if not isinstance(part, Tokens) or isinstance(part, Lookups | Formed):
            return False
        return part.positions == 1 and part.dtype == self.vectors.dtype and q <= 2 * i

    def _add_by_rows(self, scores: Float[Tensor, "q b"], part: Factors) -> None:
        """δᵢᵀ (V_q aᵢ), for some queries and examples at a time."""
        assert isinstance(part, Tokens)
        q, o, i = self.vectors.shape
        room = ROW_BYTES if scores.device.type == "cpu" else CHUNK_BYTES
        each = o * self.vectors.element_size()
        most = max(1, CHUNK_BYTES // max(1, each))
        lefts, rights = part.left[:, 0], part.right[:, 0]
        for first in range(0, len(part), most):
            columns = slice(first, min(first + most, len(part)))
            left, right = lefts[columns].mT, rights[columns].mT  # [o, b], [i, b]
            if self.bias is not None:
                right = right[:-1]
            size = max(1, room // max(1, each * left.shape[1]))
            for start in range(0, q, size):
                rows = slice(start, min(start + size, q))
                flat = self.vectors[rows].reshape((rows.stop - start) * o, i) @ right
                products = flat.reshape(rows.stop - start, *left.shape)
                if self.bias is not None:
                    products += self.bias[rows, :, None]
                scores[rows, columns] += products.mul_(left).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Separable(Kernel):
    """V_q = Σ_r Σ_τ d_qrτ ⊗ a_qrτ: the score is Σ_r Σ_τt (d_qrτ · δᵢₜ)(a_qrτ · aᵢₜ).

    Args:
        full: (d, a), the terms in full precision: [r, q, s, o] and [r, q, s, i].
        short: The terms in bfloat16.
        bases: What training factors are projected on first, [o, j] and [i, k]; d and a are then in
            its coordinates.
    """

    full: tuple[Float[Tensor, "r q s o"], Float[Tensor, "r q s i"]]
    short: tuple[Float[Tensor, "k q s o"], Float[Tensor, "k q s i"]]
    bases: tuple[Float[Tensor, "O o"], Float[Tensor, "I i"]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.full, *self.short, *(self.bases or ())))

    def add_to(self, scores: Float[Tensor, "q b"], factors: Factors) -> None:
        assert isinstance(factors, Tokens)
        if self.bases is not None:
            factors = factors.projected(*self.bases)
        for lefts, rights in (self.full, self.short):
            if len(lefts) == 0:
                continue
            some = factors.to(lefts.dtype)
            for d, a in zip(lefts, rights, strict=True):
                add_pairs(scores, Tokens(d, a), some)


def add_pairs(scores: Float[Tensor, "q b"], queries: Tokens, factors: Tokens) -> None:
    """scores[q, i] += Σ_τt (d_qτ · δᵢₜ)(a_qτ · aᵢₜ), elementwise products of two Gram matrices."""
    q, s, t = len(queries), queries.positions, factors.positions
    d, a = queries.left.flatten(0, 1), queries.right.flatten(0, 1)
    if s == t == 1:
        left, right = factors.left[:, 0].mT, factors.right[:, 0].mT
        scores.addcmul_(d @ left, a @ right)
        return
    size = max(1, CHUNK_BYTES // (q * s * t * scores.element_size()))
    for start in range(0, len(factors), size):
        part = factors.take(slice(start, start + size))
        pairs = (d @ part.left.flatten(0, 1).mT).to(scores.dtype)
        pairs *= a @ part.right.flatten(0, 1).mT
        scores[:, start : start + size] += pairs.reshape(q, s, -1, t).sum(dim=(1, 3))


@dataclass(frozen=True, eq=False)
class OfVector(Kernel):
    """V_q and gᵢ as vectors."""

    vectors: Float[Tensor, "q d"]

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def add_to(self, scores: Float[Tensor, "q b"], factors: Factors) -> None:
        assert isinstance(factors, Rows)
        scores += self.vectors @ factors.values.to(self.vectors.dtype).mT
