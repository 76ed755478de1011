"""Σ xxᵀ over very many rows: fast products in float32, a total in float64.

Adding a small product to a large float32 total loses the product's last digits, each time; over
millions of rows the loss is a drift. Products of a few batches are therefore added in float32 and
then moved to a float64 total.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.runtime.ranks import ALONE, Ranks

PANEL = 64
"""Columns per product. A Gram matrix is symmetric: only panels on or above its diagonal are
multiplied, which saves up to half, and products this wide still run at full speed: of 145 columns
it takes a sixth less time than with 128, of 1 569 as much."""

BATCHES = 16
"""Products added in float32 before they move to the total."""

WHEN_CLOSED = 2**62
"""Of a sum that moves what was added by `close` only."""


class LongSum:
    """Σ of many matrices of one shape, totalled in float64.

    Args:
        every: Terms that are added in `dtype` before they move to the total; WHEN_CLOSED: those up
            to a `close`, which may then move other processes' terms of the same size as well.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        every: int = BATCHES,
    ) -> None:
        self._every = every
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._recent = torch.zeros(shape, dtype=dtype, device=device)
        self._count = 0
        self.dtype = dtype

    def add_product(self, x: Float[Tensor, "m r"], y: Float[Tensor, "m c"]) -> None:
        """Add xᵀ y."""
        self._recent.addmm_(x.mT, y)
        self._moved()

    def add_gram(self, x: Float[Tensor, "m d"]) -> None:
        """Add xᵀ x: the panels on and above the diagonal; `total` mirrors them."""
        for start in range(0, x.shape[1], PANEL):
            stop = min(start + PANEL, x.shape[1])
            self._recent[start:stop, start:].addmm_(x[:, start:stop].mT, x[:, start:])
        self._moved()

    def add(self, term: Tensor) -> None:
        """Add a term as it is."""
        self._recent.add_(term)
        self._moved()

    def _moved(self) -> None:
        self._count += 1
        if self._count == self._every:
            self._move()

    def _move(self) -> None:
        self._total += self._recent
        self.drop()

    def drop(self) -> None:
        """Forget what was added since the last move."""
        self._recent.zero_()
        self._count = 0

    def close(self, ranks: Ranks = ALONE, owner: int = 0, count: int = 1) -> None:
        """Move to the owner's total what ranks 0 … count − 1 added since, in that order."""
        ranks.collect(self._recent, owner, count, self._total.add_)
        self.drop()

    def fetch(self, ranks: Ranks, owner: int) -> None:
        """Let everybody have the owner's total."""
        ranks.broadcast(self._total, owner)

    @property
    def total(self) -> Float[Tensor, "..."]:
        """The sum so far, in float64."""
        self._move()
        return self._total

    @property
    def now(self) -> Float[Tensor, "..."]:
        """The same, without moving anything."""
        return self._total + self._recent

    @property
    def gram(self) -> Float[Tensor, "d d"]:
        """The total of `add_gram`, mirrored."""
        upper = self.total.triu()
        return upper + upper.triu(1).mT

    def tensors(self) -> dict[str, Tensor]:
        """What was added so far, as it is: going on from it rounds as if nothing had happened."""
        count = torch.tensor(self._count)
        return {"total": self._total, "recent": self._recent, "count": count}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._total.copy_(tensors["total"])
        self._recent.copy_(tensors["recent"])
        self._count = int(tensors["count"])
