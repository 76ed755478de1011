"""Curvature: a recipe for H ≈ ∇²J, made into an operator by a task and its data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import message
from upweight.linalg.finite_sum import FiniteSum
from upweight.linalg.operator import SYMMETRIC, LinearOperator, SymmetricOperator, Tag
from upweight.task.data import Data
from upweight.task.task import Task


@runtime_checkable
class Curvature(Protocol):
    """Which H, estimated how. Implementations are frozen specs without data."""

    def fit(
        self, task: Task, data: Data, theta: Float[Tensor, " p"], *, n: int | None = None
    ) -> LinearOperator:
        """H at θ as an operator on flat vectors.

        Args:
            task: What was trained.
            data: The examples to sum over.
            theta: θ.
            n: What to divide the sum by; `len(data)` unless the data are what is left of a larger
                training set whose objective keeps its 1/n (group removal sets this).
        """
        ...


@dataclass(frozen=True, eq=False, repr=False)
class BatchTerm(SymmetricOperator):
    """A_b: the curvature at θ *summed* over the examples of a batch."""

    task: Task
    theta: Float[Tensor, " p"]
    tags: frozenset[Tag] = field(default=SYMMETRIC, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.task.layout.size, self.task.layout.size)

    @property
    def like(self) -> Tensor:
        return self.theta


@dataclass(frozen=True)
class BatchTerms(Sequence[LinearOperator]):
    """The terms A_b of a finite sum, each made when it is asked for and then forgotten.

    Args:
        task: What was trained.
        data: The examples.
        size: Of them in a batch at most.
        make: (where the examples of a batch are in the whole data, the batch) ↦ A_b.
    """

    task: Task
    data: Data
    size: int
    make: Callable[[Int[Tensor, " b"], Batch], LinearOperator]
    first: LinearOperator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.data.together(self.size))
        # The first term answers for shape and dtype; kept, so that asking costs no batch.
        object.__setattr__(self, "first", self._term(0))

    def __len__(self) -> int:
        return -(-len(self.data) // self.size)

    def __getitem__(self, index: int) -> LinearOperator:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.first if index == 0 else self._term(index)

    def _term(self, index: int) -> LinearOperator:
        start = index * self.size
        stop = min(start + self.size, len(self.data))
        batch = self.task.to_device(self.data.batch(start, stop))
        return self.make(self.data.places(start, stop), batch)

    @property
    def examples(self) -> int:
        """How many there are in all batches."""
        return len(self.data)

    def some(self, indices: Int[Tensor, " m"]) -> "BatchTerms":
        """The terms of these examples alone."""
        return BatchTerms(self.task, self.data.subset(indices.tolist()), self.size, self.make)

    def __iter__(self) -> Iterator[LinearOperator]:
        return (self[index] for index in range(len(self)))


def mean_plus_penalty(
    task: Task,
    theta: Float[Tensor, " p"],
    terms: Sequence[LinearOperator],
    n: int,
    tags: frozenset[Tag],
    notes: tuple[str, ...] = (),
) -> LinearOperator:
    """(1/n) Σ_b A_b + ∇²R(θ), with notes of how it was made."""
    mean = FiniteSum(terms, n, tags)
    penalty = task.penalty.curvature(theta, task.layout)
    total = mean if penalty is None else mean + penalty
    if notes:
        object.__setattr__(total, "notes", notes)
    return total


def no_second_derivative(reason: str, way_out: str) -> str:
    """The message for a model with an operation that cannot be differentiated twice."""
    return message(
        "This curvature needs second derivatives of every operation.",
        f"a model or loss without them. {reason}",
        "an operation whose backward pass PyTorch cannot differentiate (CTC, EmbeddingBag, "
        "Hardsigmoid), or an autograd function marked once_differentiable.",
        way_out,
    )
