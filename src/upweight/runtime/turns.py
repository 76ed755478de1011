"""Turns: what is next, where processes of a group must act together but are not at one place?

A weight that is split over processes is gathered by all of them (a collective), whoever needs it.
Processes that each work on other examples need other weights at other times. So before each
collective all say which step they need, and all processes then do the step with the smallest
number. One that needs nothing takes part until the others have come where it is.

    turns.take(k)       until step k was done
    turns.meet()        until all are here
    turns.help()        once, while waiting for something else
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")


class Turns(Generic[_T]):
    """Steps 0 … n − 1, each of which all processes of a group do together.

    Args:
        group: The processes.
        device: Where the group's backend can send from.
        steps: n.
        do: What a step is: called by all processes, returns what it gives to this one.

    Cost: an `all_reduce` of two numbers before each step.
    """

    def __init__(
        self,
        group: "ProcessGroup",
        device: torch.device,
        steps: int,
        do: Callable[[int], _T],
    ) -> None:
        self._group, self._device, self._do = group, device, do
        self._meeting, self._idle = steps, steps + 1

    def take(self, step: int) -> _T:
        """What a step gives, once it is its turn."""
        while True:
            least, _ = self._agreed(step)
            if least == step:
                return self._do(least)
            self._do(least)

    def meet(self) -> None:
        """Take part in the steps of the others until all of them are here."""
        while True:
            least, most = self._agreed(self._meeting)
            if least < self._meeting:
                self._do(least)
            elif most == self._meeting:
                return

    def help(self) -> None:
        """Take part in one step of the others, if some of them needs one."""
        least, _ = self._agreed(self._idle)
        if least < self._meeting:
            self._do(least)

    def _agreed(self, wanted: int) -> tuple[int, int]:
        """The least and the greatest of what the processes want."""
        import torch.distributed as dist

        both = torch.tensor([wanted, -wanted], device=self._device)
        dist.all_reduce(both, op=dist.ReduceOp.MIN, group=self._group)
        least, most = both.tolist()
        return least, -most
