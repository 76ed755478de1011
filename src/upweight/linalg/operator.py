"""A : ℝᵖ → ℝʳ, known by what it does to vectors.

    mv(v)[…, :] = A v[…, :]

A vector lies along the last axis; every leading axis is a batch of vectors. Nothing here knows
where A comes from: a matrix, a sum over a data set, or a product of Jacobians.

Operators form an algebra, `A + B`, `2.0 * A`, `-A`, `A @ B`, `A.T`, and what is *known* about an
operator, its tags, follows through it: a sum of positive semi-definite operators is positive
semi-definite, a difference is only symmetric, and a product is neither.

                  symmetric if              positive semi-definite if
    Sum           every term is             every term is
    Scaled        A is                      A is and c ≥ 0
    Product       never known               never known

Operators are immutable. A solver reads the tags, so a wrong tag gives a wrong choice of solver:
`upweight.testing.check_operator` holds an operator to its tags.
"""

import abc
import enum
import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DtypeError, NonFinite, ShapeError


class Tag(enum.Enum):
    """What is known about a square operator."""

    SYMMETRIC = "A = Aᵀ"
    PSD = "A = Aᵀ and vᵀAv ≥ 0 for every v"


SYMMETRIC = frozenset({Tag.SYMMETRIC})
PSD = frozenset({Tag.SYMMETRIC, Tag.PSD})


# Unit vectors handed to `mv` at once when an operator is written out. Bounds the memory of an
# operator whose `mv` keeps activations for every vector of the batch.
UNIT_VECTORS = 256


class LinearOperator(abc.ABC):
    """A : ℝᵖ → ℝʳ, acting on the last axis; leading axes are a batch of vectors.

    A subclass defines `shape`, `tags`, `mv` and `transpose`, and either `like` or both `dtype` and
    `device`. One that knows its matrix also overrides `add_to` (write the matrix into memory the
    caller owns), from which `dense` follows.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(r, p)."""

    @property
    def like(self) -> "Tensor | LinearOperator":
        """A tensor or operator of the same dtype, in the same place."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors it takes and gives."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where those vectors are."""
        return self.like.device

    @property
    @abc.abstractmethod
    def tags(self) -> frozenset[Tag]:
        """What is known about A: declared, not discovered."""

    @abc.abstractmethod
    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        """A v for each vector v. The result shares no memory with `v`."""

    @abc.abstractmethod
    def transpose(self) -> "LinearOperator":
        """Aᵀ : ℝʳ → ℝᵖ."""

    notes: tuple[str, ...] = ()
    """What was chosen when it was made."""

    @property
    def T(self) -> "LinearOperator":
        """Aᵀ."""
        return self.transpose()

    @property
    def is_symmetric(self) -> bool:
        """Whether A = Aᵀ is known."""
        return Tag.SYMMETRIC in self.tags or Tag.PSD in self.tags

    @property
    def is_psd(self) -> bool:
        """Whether A is known to be positive semi-definite."""
        return Tag.PSD in self.tags

    def add_to(self, out: Float[Tensor, "r p"], scale: float = 1.0) -> None:
        """Add scale · A to a matrix in place, in the dtype of `out`: out ← out + scale · A.

        The way to build a p × p matrix without temporaries of that size.

        Cost: p products with A, `UNIT_VECTORS` at a time, unless A knows its matrix.
        """
        if type(self).dense is not LinearOperator.dense:  # it writes its matrix out by itself
            out.add_(self.dense(), alpha=scale)
            return
        for start, rows in self._transposed_rows():
            out[:, start : start + len(rows)].add_(rows.mT, alpha=scale)

    def dense(self) -> Float[Tensor, "r p"]:
        """A as a matrix. It may be A's own memory: read it, do not write to it."""
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        self.add_to(out)
        return out

    def diagonal(self) -> Float[Tensor, " p"]:
        """Aⱼⱼ for each j. Costs p products with A unless A knows better."""
        square(self, "diagonal")
        out = torch.empty(self.shape[1], dtype=self.dtype, device=self.device)
        for start, rows in self._transposed_rows():
            out[start : start + len(rows)] = rows[:, start:].diagonal()
        return out

    def trace(self) -> Float[Tensor, ""]:
        """Σⱼ Aⱼⱼ, exactly: `trace_products` products with A."""
        return self.diagonal().sum()

    @property
    def trace_products(self) -> int:
        """What `trace()` costs, in products with A: p, or 0 where A knows its diagonal."""
        kind = type(self)
        is_known = (
            kind.diagonal is not LinearOperator.diagonal or kind.trace is not LinearOperator.trace
        )
        return 0 if is_known else self.shape[1]

    def check(self, v: Tensor) -> None:
        """Refuse a vector that A cannot take. Every `mv` calls this first.

        Raises:
            ShapeError: The last axis of `v` is not p.
            DtypeError: `v` has another dtype than A.
        """
        if v.ndim == 0 or v.shape[-1] != self.shape[1]:
            raise ShapeError(
                f"{self!r} acts on vectors of {self.shape[1]} entries along the last axis.",
                f"a tensor of shape {tuple(v.shape)}.",
                "vectors stored as columns, or a vector laid out for other parameters.",
                "put the vectors along the last axis: v.mT turns columns into rows.",
            )
        if v.dtype != self.dtype:
            raise DtypeError(
                f"{self!r} acts on vectors of its own dtype, {self.dtype}.",
                f"a tensor of dtype {v.dtype} and shape {tuple(v.shape)}.",
                "a model in one precision and data or vectors in another.",
                f"convert the vector, v.to({self.dtype}), or build the operator in {v.dtype}.",
            )

    def _transposed_rows(self) -> Iterator[tuple[int, Tensor]]:
        """Rows start… of Aᵀ, that is A eⱼ for consecutive j, in blocks [b, r]."""
        p = self.shape[1]
        for start in range(0, p, UNIT_VECTORS):
            stop = min(start + UNIT_VECTORS, p)
            units = torch.zeros(stop - start, p, dtype=self.dtype, device=self.device)
            units[:, start:stop].fill_diagonal_(1.0)
            yield start, self.mv(units)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return Sum((self, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scale: float) -> "LinearOperator":
        if isinstance(scale, LinearOperator | Tensor):
            return NotImplemented
        return Scaled(float(scale), self)

    def __rmul__(self, scale: float) -> "LinearOperator":
        return self.__mul__(scale)

    def __neg__(self) -> "LinearOperator":
        return -1.0 * self

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: "LinearOperator") -> "LinearOperator": ...
    def __matmul__(self, other: "Tensor | LinearOperator") -> "Tensor | LinearOperator":
        """`A @ B` composes operators; `A @ v` is `A.mv(v)`, along the last axis of v."""
        if isinstance(other, Tensor):
            return self.mv(other)
        return Product(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __repr__(self) -> str:
        tags = "".join(f", {tag.name}" for tag in Tag if tag in self.tags)
        r, p = self.shape
        return f"{type(self).__name__}({r}×{p}, {str(self.dtype).removeprefix('torch.')}{tags})"


class SymmetricOperator(LinearOperator):
    """A = Aᵀ, whatever A is made of."""

    def transpose(self) -> LinearOperator:
        return self


def square(A: LinearOperator, what: str) -> int:
    """The p of a p × p operator; a ShapeError where A is not square."""
    r, p = A.shape
    if r != p:
        raise ShapeError(
            f"{what} needs a square operator.",
            f"{A!r}, of shape ({r}, {p}).",
            "a Jacobian or a projection where a curvature was meant.",
            "form the square operator first: A.T @ A, or P @ A @ P.T for a projection P.",
        )
    return p


def closed(tags: frozenset[Tag]) -> frozenset[Tag]:
    """Tags with what they imply: positive semi-definite implies symmetric."""
    return tags | SYMMETRIC if Tag.PSD in tags else tags


@dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearOperator):
    """Σⱼ Aⱼ over a few operators of one shape and dtype. Sums of sums are flattened."""

    terms: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        flat: list[LinearOperator] = []
        for term in self.terms:
            flat.extend(term.terms if isinstance(term, Sum) else (term,))
        if not flat:
            raise ShapeError(
                "A sum needs at least one operator.",
                "none.",
                "an empty list of terms.",
                "use 0.0 * Identity(p) for a zero operator.",
            )
        for term in flat[1:]:
            agree(flat[0], term, "A sum")
        object.__setattr__(self, "terms", tuple(flat))

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @property
    def like(self) -> LinearOperator:
        return self.terms[0]

    @property
    def tags(self) -> frozenset[Tag]:
        return frozenset.intersection(*(closed(term.tags) for term in self.terms))

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        self.check(v)
        return functools.reduce(operator.add, (term.mv(v) for term in self.terms))

    def transpose(self) -> LinearOperator:
        return Sum(tuple(term.transpose() for term in self.terms))

    def add_to(self, out: Float[Tensor, "r p"], scale: float = 1.0) -> None:
        for term in self.terms:
            term.add_to(out, scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)

    def trace(self) -> Float[Tensor, ""]:
        return torch.stack([term.trace() for term in self.terms]).sum()

    @property
    def trace_products(self) -> int:
        return sum(term.trace_products for term in self.terms)


def terms_of(A: LinearOperator) -> tuple[LinearOperator, ...]:
    """The terms of a sum; of another operator itself."""
    return A.terms if isinstance(A, Sum) else (A,)


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(LinearOperator):
    """c A."""

    scale: float
    operator: LinearOperator

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise NonFinite(
                "An operator is scaled by a finite number.",
                f"{self.scale} * {self.operator!r}.",
                "a division by zero, or a loss that diverged.",
                "find where the scale was computed and check its inputs.",
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    @property
    def like(self) -> LinearOperator:
        return self.operator

    @property
    def tags(self) -> frozenset[Tag]:
        tags = closed(self.operator.tags)
        return tags if self.scale >= 0 else tags - {Tag.PSD}

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        return self.scale * self.operator.mv(v)

    def transpose(self) -> LinearOperator:
        return Scaled(self.scale, self.operator.transpose())

    def add_to(self, out: Float[Tensor, "r p"], scale: float = 1.0) -> None:
        self.operator.add_to(out, scale * self.scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        return self.scale * self.operator.diagonal()

    def trace(self) -> Float[Tensor, ""]:
        return self.scale * self.operator.trace()

    @property
    def trace_products(self) -> int:
        return self.operator.trace_products


@dataclass(frozen=True, eq=False, repr=False)
class Product(LinearOperator):
    """A B : v ↦ A (B v)."""

    left: LinearOperator
    right: LinearOperator

    tags = frozenset()

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ShapeError(
                "A product A @ B needs as many columns in A as rows in B.",
                f"{self.left!r} @ {self.right!r}.",
                "factors in the wrong order, or one that should be transposed.",
                "swap them, or use .T on one of them.",
            )
        if self.left.dtype != self.right.dtype:
            agree(self.left, self.right, "A product")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def like(self) -> LinearOperator:
        return self.right

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        self.check(v)
        return self.left.mv(self.right.mv(v))

    def transpose(self) -> LinearOperator:
        return Product(self.right.transpose(), self.left.transpose())


def agree(first: LinearOperator, other: LinearOperator, what: str) -> None:
    """Refuse, by a ShapeError or DtypeError, to combine operators of two shapes or dtypes."""
    given = f"{first!r} and {other!r}."
    if first.dtype != other.dtype:
        raise DtypeError(
            f"{what} needs operators of one dtype.",
            given,
            "a float64 penalty or damping added to a float32 curvature.",
            f"build both in one dtype, for example {first.dtype}.",
        )
    if first.shape != other.shape:
        raise ShapeError(
            f"{what} needs operators of one shape.",
            given,
            "operators built for different parameters of the model.",
            "choose the same parameters for both.",
        )
