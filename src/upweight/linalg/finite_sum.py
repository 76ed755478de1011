"""A = (1/n) Σ_b A_b: the curvature of a mean loss, as a sum over batches of examples.

    A v = (1/n) Σ_b A_b v        A_b = Σ_{i ∈ b} Aᵢ, the *sum* over the examples of batch b

This is one of the two places of the library that divide by n: A_b is never an average, so batches
of different sizes need no weights, and any partition of the examples gives the same A.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import ShapeError
from upweight.linalg.operator import LinearOperator, Scaled, Sum, Tag, agree, closed, terms_of


def mean_of(total: Tensor, n: int | float) -> Tensor:
    """(1/n) Σ for a sum over examples that was taken term by term."""
    return total / n


@dataclass(frozen=True, eq=False, repr=False)
class FiniteSum(LinearOperator):
    """A = (1/n) Σ_b A_b.

    Args:
        terms: A_b, one for each batch, each the sum over its examples. Any sequence: one that
            builds its terms on demand is read in order, a term at a time, and never copied to a
            list.
        n: Number of examples in all batches together; positive.
        declared: What is known of every term. By default, the tags that all terms share, for which
            each term is read once here.

    Cost: one pass over the terms for each call of `mv`, whatever the number of vectors; one term at
    construction.
    """

    terms: Sequence[LinearOperator]
    n: int
    declared: frozenset[Tag] | None = None
    _first: LinearOperator = field(init=False)

    def __post_init__(self) -> None:
        if len(self.terms) == 0 or self.n < 1:
            raise ShapeError(
                "A mean over examples needs at least one term and n ≥ 1.",
                f"{len(self.terms)} terms and n = {self.n}.",
                "an empty data set, or a filter that kept no example.",
                "check the data that the terms were built from.",
            )
        # Kept, because asking a lazy sequence for its first term may cost a batch.
        first = self.terms[0]
        object.__setattr__(self, "_first", first)
        tags = self.declared
        if tags is None:
            tags = frozenset(Tag)
            for term in self.terms:
                agree(first, term, "A finite sum")
                tags &= closed(term.tags)
        object.__setattr__(self, "declared", closed(frozenset(tags)))

    @property
    def shape(self) -> tuple[int, int]:
        return self._first.shape

    @property
    def like(self) -> LinearOperator:
        return self._first

    @property
    def tags(self) -> frozenset[Tag]:
        return self.declared or frozenset()

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        self.check(v)
        return functools.reduce(operator.add, (term.mv(v) for term in self.terms)) / self.n

    @property
    def examples(self) -> int:
        """How many examples can be told apart: terms, where they are all that is known."""
        of = self._of_examples
        return len(self.terms) if of is None else of.examples

    def minibatch(self, size: int, generator: torch.Generator) -> LinearOperator:
        """(N/m)(1/n) Σ_{i ∈ m} Aᵢ for m = `size` of all N examples, drawn without replacement."""
        count = self.examples
        if size >= count:
            return self
        chosen = torch.randperm(count, generator=generator)[:size]
        of = self._of_examples
        part: Any = [self.terms[int(k)] for k in chosen] if of is None else of.some(chosen)
        terms = part if isinstance(part, Sequence) else (part,)
        return Scaled(count / size, FiniteSum(terms, self.n, self.declared))

    @property
    def _of_examples(self) -> "OfExamples | None":
        if isinstance(self.terms, OfExamples):
            return self.terms
        first = self.terms[0] if len(self.terms) == 1 else None
        return first if isinstance(first, OfExamples) else None

    def transpose(self) -> LinearOperator:
        if self.is_symmetric:
            return self
        return FiniteSum(_Transposed(self.terms), self.n, self.declared)

    def add_to(self, out: Float[Tensor, "r p"], scale: float = 1.0) -> None:
        for term in self.terms:
            term.add_to(out, scale / self.n)

    def diagonal(self) -> Float[Tensor, " p"]:
        return functools.reduce(operator.add, (term.diagonal() for term in self.terms)) / self.n

    @property
    def trace_products(self) -> int:
        # A product with the sum is one with every term.
        return self._first.trace_products


@runtime_checkable
class OfExamples(Protocol):
    """Terms, or one term, that can be had of some of the examples."""

    @property
    def examples(self) -> int:
        """How many there are."""
        ...

    def some(self, indices: Int[Tensor, " m"]) -> Any:
        """The same of these examples alone: terms of terms, a term of a term."""
        ...


def examples_of(A: LinearOperator) -> int:
    """How many examples minibatches of A are drawn from; 0 where A is no sum over any."""
    return max((t.examples for t in terms_of(A) if isinstance(t, FiniteSum)), default=0)


def minibatch(A: LinearOperator, size: int, generator: torch.Generator) -> LinearOperator:
    """Â with E[Â] = A: the means over examples by those over `size` of them, drawn at random.

    Without replacement. Terms of A that are no mean over examples, as damping and penalties, stay.
    """
    return Sum(
        tuple(t.minibatch(size, generator) if isinstance(t, FiniteSum) else t for t in terms_of(A))
    )


class _Transposed(Sequence[LinearOperator]):
    """A_bᵀ on demand, so that a lazy sequence of terms stays lazy."""

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        self._terms = terms

    def __len__(self) -> int:
        return len(self._terms)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._terms[index].transpose()
