"""Sums, multiples and products of operators, with what is known about them.

    A + B + …    c A    A B

                  symmetric if              positive semi-definite if
    Sum           every term is             every term is
    Scaled        A is                      A is and c ≥ 0
    Product       never known               never known
    Declared      said so by the user       said so by the user

Written as `A + B`, `c * A` and `A @ B`; the classes are named for those who match on them.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DtypeError, NonFinite, ShapeError
from upweight.linalg.operator import LinearOperator, Tag, closed, square


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
    def dtype(self) -> torch.dtype:
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        return self.terms[0].device

    @property
    def tags(self) -> frozenset[Tag]:
        return frozenset.intersection(*(closed(term.tags) for term in self.terms))

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        self.check(v)
        out = self.terms[0].mv(v)
        for term in self.terms[1:]:
            out = out + term.mv(v)
        return out

    def transpose(self) -> LinearOperator:
        return Sum(tuple(term.transpose() for term in self.terms))

    def add_to(self, out: Float[Tensor, "r p"], scale: float = 1.0) -> None:
        for term in self.terms:
            term.add_to(out, scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)

    def trace(self) -> Float[Tensor, ""]:
        return torch.stack([term.trace() for term in self.terms]).sum()


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
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

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


@dataclass(frozen=True, eq=False, repr=False)
class Product(LinearOperator):
    """A B : v ↦ A (B v)."""

    left: LinearOperator
    right: LinearOperator

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
    def dtype(self) -> torch.dtype:
        return self.right.dtype

    @property
    def device(self) -> torch.device:
        return self.right.device

    @property
    def tags(self) -> frozenset[Tag]:
        return frozenset()

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        self.check(v)
        return self.left.mv(self.right.mv(v))

    def transpose(self) -> LinearOperator:
        return Product(self.right.transpose(), self.left.transpose())


@dataclass(frozen=True, eq=False, repr=False)
class Declared(LinearOperator):
    """A, with tags that the user vouches for.

    For what the algebra cannot see, as in `Declared(P @ H @ P.T, frozenset({Tag.PSD}))`. A wrong
    declaration is a wrong answer or a late error; solvers report negative curvature when they meet
    it all the same.
    """

    operator: LinearOperator
    declared: frozenset[Tag]

    def __post_init__(self) -> None:
        square(self.operator, "A tag")
        object.__setattr__(self, "declared", closed(frozenset(self.declared)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

    @property
    def tags(self) -> frozenset[Tag]:
        return closed(self.operator.tags) | self.declared

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        return self.operator.mv(v)

    def transpose(self) -> LinearOperator:
        return self if self.is_symmetric else Declared(self.operator.transpose(), self.declared)

    def add_to(self, out: Float[Tensor, "r p"], scale: float = 1.0) -> None:
        self.operator.add_to(out, scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        return self.operator.diagonal()

    def trace(self) -> Float[Tensor, ""]:
        return self.operator.trace()


def agree(first: LinearOperator, other: LinearOperator, what: str) -> None:
    """Refuse to combine operators of two shapes or two dtypes.

    Raises:
        ShapeError: The shapes differ.
        DtypeError: The dtypes differ.
    """
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
