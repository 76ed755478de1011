"""⟨V_q, gᵢ⟩ of one block for all queries: the ways to multiply it out.

    Explicit     V_q in full; gᵢ formed, then one matrix product           q·o·i per example
    Separable    V_q = Σ_r (d_qr ⊗ a_qr), one position per example          q·r·(o + i)
    OfVector     V_q and gᵢ are vectors                                    q·d

V_q = (H + λ)⁻¹ ∇m_q is in θ's own coordinates: the bases are multiplied into the queries, once, so
that the training set is never rotated.
"""

import abc
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from upweight.gradients.factored import Factors, Rows, Tokens

CHUNK_BYTES = 32 * 2**20
"""Memory for gradients [b, o, i] formed at once; more would leave the processor's cache."""


class Kernel(abc.ABC):
    """One block's share of the scores, up to the factor −1/n."""

    @abc.abstractmethod
    def add_to(self, scores: Float[Tensor, "q b"], factors: Factors) -> None:
        """scores[q, i] += ⟨V_q, gᵢ⟩."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Memory that the queries take in this form."""


@dataclass(frozen=True, eq=False)
class Explicit(Kernel):
    """V_q in full, in the precision of the product."""

    vectors: Float[Tensor, "q o i"]

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def add_to(self, scores: Float[Tensor, "q b"], factors: Factors) -> None:
        assert isinstance(factors, Tokens)
        flat = self.vectors.flatten(1)
        size = max(1, CHUNK_BYTES // (flat.shape[1] * flat.element_size()))
        for start in range(0, len(factors), size):
            part = factors.take(slice(start, start + size)).to(flat.dtype)
            scores[:, start : start + size] += flat @ part.matrices().flatten(1).mT


@dataclass(frozen=True, eq=False)
class Separable(Kernel):
    """V_q = Σ_r d_qr ⊗ a_qr: the score is Σ_r (d_qr · δᵢ)(a_qr · aᵢ), products of small products.

    Args:
        full: (d, a), the terms in full precision: [r, q, o] and [r, q, i].
        short: The terms in bfloat16.
    """

    full: tuple[Float[Tensor, "r q o"], Float[Tensor, "r q i"]]
    short: tuple[Float[Tensor, "s q o"], Float[Tensor, "s q i"]]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.full, *self.short))

    def add_to(self, scores: Float[Tensor, "q b"], factors: Factors) -> None:
        assert isinstance(factors, Tokens)
        t = factors.positions
        for lefts, rights in (self.full, self.short):
            if len(lefts) == 0:
                continue
            delta = factors.left.flatten(0, 1).to(lefts.dtype).mT
            a = factors.right.flatten(0, 1).to(lefts.dtype).mT
            for d, v in zip(lefts, rights, strict=True):
                if t == 1:
                    scores.addcmul_(d @ delta, v @ a)
                else:  # a longer example than the cost was measured on: a sum over its positions
                    products = (d @ delta) * (v @ a)
                    scores += products.reshape(*scores.shape, t).sum(dim=2)


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
