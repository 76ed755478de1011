"""Operators that are matrices: M, diag(d), I and U Uᵀ.

The leaves of the algebra, and the exact references that other operators are tested against.
`materialize` turns any operator into the first of them.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, ShapeError
from upweight.linalg.operator import (
    PSD,
    SYMMETRIC,
    LinearOperator,
    SymmetricOperator,
    Tag,
    closed,
    square,
)

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False, repr=False)
class Dense(LinearOperator):
    """A matrix M [r p] that is kept, not copied. Tags are what the caller knows about it."""

    matrix: Tensor  # [r p], checked below: a user's matrix deserves a message
    tags: frozenset[Tag] = frozenset()

    def __post_init__(self) -> None:
        _axes(self.matrix, 2, "Dense")
        object.__setattr__(self, "tags", closed(frozenset(self.tags)))
        if self.tags:
            square(self, "A tag")

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def like(self) -> Tensor:
        return self.matrix

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        self.check(v)
        return v @ self.matrix.mT

    def transpose(self) -> LinearOperator:
        return self if self.is_symmetric else Dense(self.matrix.mT, self.tags)

    def add_to(self, out: Float[Tensor, "r p"], scale: float = 1.0) -> None:
        out.add_(self.matrix, alpha=scale)

    def dense(self) -> Float[Tensor, "r p"]:
        return self.matrix

    def diagonal(self) -> Float[Tensor, " p"]:
        square(self, "diagonal")
        return self.matrix.diagonal().clone()


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalMatrix(SymmetricOperator):
    """diag(d). Symmetric; positive semi-definite where every entry of d is ≥ 0, which is checked.

    Raises:
        NonFinite: d has a NaN or an infinity, whose sign would decide the tags.
    """

    entries: Tensor  # [p]
    _is_psd: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        _axes(self.entries, 1, "DiagonalMatrix")
        bad = (~self.entries.isfinite()).nonzero().flatten()
        if len(bad):
            raise NonFinite(
                "DiagonalMatrix needs finite entries.",
                f"{len(bad)} of {len(self.entries)} are not; the first is "
                f"entries[{int(bad[0])}] = {float(self.entries[bad[0]])}.",
                "a loss that overflowed, or a division by zero.",
                "look at the parameter or example that this entry belongs to.",
            )
        object.__setattr__(self, "_is_psd", bool((self.entries >= 0).all()))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.entries), len(self.entries)

    @property
    def like(self) -> Tensor:
        return self.entries

    @property
    def tags(self) -> frozenset[Tag]:
        return PSD if self._is_psd else SYMMETRIC

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        return self.entries * v

    def add_to(self, out: Float[Tensor, "p p"], scale: float = 1.0) -> None:
        out.diagonal().add_(self.entries, alpha=scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        return self.entries.clone()


@dataclass(frozen=True, eq=False, repr=False)
class Identity(SymmetricOperator):
    """I, for p parameters."""

    p: int
    dtype: torch.dtype = torch.float64
    device: torch.device = CPU

    tags = PSD

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))

    @property
    def shape(self) -> tuple[int, int]:
        return self.p, self.p

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        return v.clone()

    def add_to(self, out: Float[Tensor, "p p"], scale: float = 1.0) -> None:
        out.diagonal().add_(scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        return torch.ones(self.p, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(SymmetricOperator):
    """U Uᵀ for U [p k]: positive semi-definite, of rank at most k. O(p k) per vector."""

    factor: Tensor  # [p k]

    tags = PSD

    def __post_init__(self) -> None:
        _axes(self.factor, 2, "LowRank")

    @property
    def shape(self) -> tuple[int, int]:
        return self.factor.shape[0], self.factor.shape[0]

    @property
    def like(self) -> Tensor:
        return self.factor

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        return (v @ self.factor) @ self.factor.mT

    def add_to(self, out: Float[Tensor, "p p"], scale: float = 1.0) -> None:
        factor = self.factor.to(out.dtype)
        out.addmm_(factor, factor.mT, alpha=scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        return self.factor.square().sum(1)


def materialize(A: LinearOperator) -> Dense:
    """A as a matrix [r p], with its tags.

    Worth it where A is expensive to apply and will be applied more than p times: a curvature that
    reads the data set at every product, solved for many right-hand sides.

    Cost: p products with A, and r·p numbers.
    """
    return Dense(A.dense(), A.tags)


def _axes(tensor: Tensor, axes: int, name: str) -> None:
    """Refuse a tensor with another number of axes."""
    if tensor.ndim != axes:
        raise ShapeError(
            f"{name} needs a tensor with {axes} {'axes' if axes > 1 else 'axis'}.",
            f"shape {tuple(tensor.shape)}.",
            "a batch of matrices, or a matrix where its diagonal was meant.",
            "index the batch, or take .diagonal() of the matrix.",
        )
