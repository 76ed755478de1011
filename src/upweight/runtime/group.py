"""Group: the processes that share a computation, each with a part of the training examples.

sum(x)      Σ over the processes of x          what a curvature or a row sum needs
gather(x)   every process's x, in order        what a matrix of scores needs
shard(n)    which of 0…n − 1 are this one's    contiguous, in order of the ranks
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Group(Protocol):
    """Processes that run the same program on shards of the same data."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Σ over the processes, the same in each of them."""
        ...

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensor of every process, in order of the ranks; their first axes may differ."""
        ...

    def shard(self, n: int) -> range:
        """This process's part of 0…n − 1."""
        ...


class SingleProcess:
    """A group of one, which holds everything."""

    rank, size = 0, 1

    def __repr__(self) -> str:
        return "SingleProcess()"

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        return [x]

    def shard(self, n: int) -> range:
        return range(n)
