"""Ranks: which of several processes is this, and how do they add up what each of them has?

Sums go to the rank that owns them, in the order of the ranks: floating-point sums depend on the
order of their terms, and with a fixed order any number of ranks gives the same bits. All of it is
`torch.distributed`: gloo between CPUs, NCCL between GPUs.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.errors import SpecError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, `accelerate launch` and the like set."""

ALL = "1/1"
"""The share of a process that does all of the work, or that takes what nobody else does."""

PATIENCE = timedelta(hours=2)
"""How long ranks wait for one another, such as for the decomposition of a large layer."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

DIMENSIONS = 4
"""Of a tensor at most, where its shape is told."""


class Ranks:
    """The processes of a group that make the same calls, each on its share of the work.

    Args:
        group: As `torch.distributed` knows it; None: this process alone.
        before: Called before ranks wait for one another.
    """

    def __init__(
        self, group: "ProcessGroup | None" = None, before: Callable[[], None] = lambda: None
    ) -> None:
        self.group, self._before = group, before
        self.rank, self.size = 0, 1
        if group is not None:
            import torch.distributed as dist

            self._dist: Any = dist
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            parts = dist.get_backend_config(group).split(",")
            self._devices = [part.partition(":")[0] for part in parts]

    def collect(self, x: Tensor, owner: int, count: int, use: Callable[[Tensor], object]) -> None:
        """On the owner, call use(x of rank 0), …, use(x of rank count − 1), in that order.

        Memory: one more x on the owner.
        """
        if self.group is None:
            use(x)
            return
        self._before()
        buffer: Tensor | None = None
        for source in range(count):
            if self.rank == source == owner:
                use(x)
            elif self.rank == source:
                self._dist.send(self._sendable(x), self._global(owner), group=self.group)
            elif self.rank == owner:
                buffer = torch.empty_like(self._sendable(x)) if buffer is None else buffer
                self._dist.recv(buffer, self._global(source), group=self.group)
                use(buffer.to(x.device))

    def broadcast(self, x: Tensor, owner: int = 0) -> Tensor:
        """x of the owner, in place of everybody's."""
        if self.size == 1:
            return x
        return self._exchanged(x, self._dist.broadcast, self._global(owner))

    def told(
        self,
        tensors: Sequence[Tensor] | None,
        owner: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        """The owner's tensors, three at most, whose shapes nobody else knows; others give None."""
        if self.size == 1:
            assert tensors is not None
            return tuple(tensors)
        shapes = torch.full((3, 1 + DIMENSIONS), -1)
        for row, x in zip(shapes, tensors or (), strict=False):
            row[: 1 + x.ndim] = torch.tensor([x.ndim, *x.shape])
        found = []
        for k, (ndim, *shape) in enumerate(self.broadcast(shapes, owner).tolist()):
            if ndim >= 0:
                x = torch.empty(shape[:ndim], dtype=dtype, device=device)
                found.append(
                    self.broadcast(x if tensors is None else tensors[k].contiguous(), owner)
                )
        return tuple(found)

    def joined(self, parts: Mapping[int, Tensor], n: int, device: torch.device) -> Tensor:
        """Numbers 0 … n − 1, of which each rank has some parts, by their first; rank 0 has one."""
        if self.size == 1:
            return torch.cat([parts[start] for start in sorted(parts)])
        dtype = next(iter(parts.values())).dtype if parts else torch.float64
        dtype = FLOATS[self.number(FLOATS.index(dtype))]
        found = torch.zeros(n, dtype=torch.float64, device=device)
        for start, part in parts.items():
            found[start : start + len(part)] = part
        return self.sum(found).to(dtype)

    def number(self, value: int) -> int:
        """That of rank 0."""
        return int(self.broadcast(torch.tensor([value]))[0])

    def least(self, value: int) -> int:
        """The least of all ranks."""
        return int(-self._largest(torch.tensor([-value]))[0])

    def require_same(self, values: Sequence[int], what: str) -> None:
        """Refuse, by a SpecError, ranks that do not agree; nobody goes on before all are here."""
        mine = torch.tensor([int(value) for value in values])
        if self.size == 1 or torch.equal(self._largest(mine), -self._largest(-mine)):
            return
        raise SpecError(
            f"Ranks that share a computation agree on {what}.",
            f"{list(values)} on rank {self.rank}, and another on some rank.",
            "a folder that is another one on each machine, or another model or data on some rank.",
            "give all of them one folder that all machines see, and load one model everywhere.",
        )

    def sum(self, x: Tensor) -> Tensor:
        """Σ over the ranks in any order: exact where only one of them is not 0."""
        return x if self.size == 1 else self._exchanged(x, self._dist.all_reduce)

    def _largest(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        return self._exchanged(x.clone(), self._dist.all_reduce, self._dist.ReduceOp.MAX)

    def _exchanged(self, x: Tensor, exchange: Callable[..., object], *arguments: Any) -> Tensor:
        """x, whose numbers are now those that a collective call gives."""
        self._before()
        sent = self._sendable(x)
        exchange(sent, *arguments, group=self.group)
        return x if sent is x else x.copy_(sent)

    def _sendable(self, x: Tensor) -> Tensor:
        """x where the backend can read it: NCCL reads GPUs only."""
        return x if x.device.type in self._devices else x.to(self._devices[0])

    def _global(self, rank: int) -> int:
        return int(self._dist.get_global_rank(self.group, rank))


ALONE = Ranks()


@contextlib.contextmanager
def launched() -> Iterator[Ranks]:
    """All processes of a launcher such as torchrun; this process alone where there is none.

    A group that exists already is used and left as it is.
    """
    import torch.distributed as dist

    if not dist.is_available() or launched_as()[1] == 1:
        yield ALONE
        return
    if dist.is_initialized():
        yield Ranks(dist.group.WORLD)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group(timeout=PATIENCE)
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def launched_as() -> tuple[int, int]:
    """Which of how many processes of a launcher this is; (0, 1) where there is none."""
    if not all(name in os.environ for name in LAUNCHED):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def owners(sizes: Sequence[float], ranks: int) -> list[int]:
    """Who does which of some pieces of work, so that all have about as much to do.

    The largest first, each to the rank with the least so far.
    """
    loads, found = [0.0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        found[k] = loads.index(min(loads))
        loads[found[k]] += sizes[k]
    return found


def share_of(text: str) -> tuple[int, int]:
    """(i − 1, m) of "i/m", a process's part of work that m processes do without talking.

    Raises:
        SpecError: It is none.
    """
    first, _, of = text.partition("/") if isinstance(text, str) else ("", "", "")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise SpecError(
            'A share of the work is "i/m", with i from 1 to m.',
            f"shards={text!r}.",
            "a count from 0, or one of the two numbers alone.",
            'shards="1/4" to "4/4" for four jobs; leave it out where one folder is shared.',
        )
    return int(first) - 1, int(of)
