"""Rows on disk, in shards of a fixed number of examples: made by one process or by several.

    folder/transform.safetensors      T
    folder/rows-<start>-<stop>        the rows of examples start … stop − 1 in codes, and a checksum
                                      of each example

A shard is whole or not there, and a process that makes one claims it, so that several may build one
index and what a killed one left undone is made by another. Rows appended go into new shards. One
that was not full is written anew with the rows that it had in front of the new ones, so that the
files are those of a build in one go; who reads the index sees the old ones until the new are named.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NonFinite, StaleStore
from upweight.gradients.passes import GradientPass
from upweight.index.codes import Codes
from upweight.index.transform import Transform
from upweight.runtime.lock import CLAIM, claimed
from upweight.runtime.memory import kept_bytes
from upweight.runtime.progress import progress
from upweight.runtime.store import Store
from upweight.scoring.stream import training_loss
from upweight.task.data import Data, Subset

TRANSFORM, INDEX = "transform", "index"

SUMS = "checksums"

NAME = re.compile(r"rows-(\d{10,19})-(\d{10,19})")

MULTIPLE = 64
"""Numbers of a row: a multiple, for what packs several into a byte or scales them together."""


@dataclass(frozen=True, order=True)
class Shard:
    """The rows start … stop − 1."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"rows-{self.start:010}-{self.stop:010}"


@dataclass(frozen=True, eq=False)
class Rows:
    """The shards of a folder, of `size` rows each, made from batches of `at_once` examples.

    `memory_bytes` is what the user allows; None: a share of what is free.
    """

    store: Store
    codes: Codes
    size: int
    at_once: int
    memory_bytes: int | None = None

    def read(self, shard: Shard, hold: bool | None = None) -> Mapping[str, Tensor]:
        """Codes and checksums, memory-mapped; to `hold` where the next question reads them too."""
        return self.store.mapped(shard.name, hold)

    def fit(self, n: int, numbers: int) -> bool:
        """Whether n rows of so many numbers may all stay mapped from one question to the next."""
        room = kept_bytes(torch.device("cpu"), self.memory_bytes, 0)
        return n * self.codes.bytes(numbers) <= room

    def shards(self, n: int, start: int = 0, stop: int | None = None) -> list[Shard]:
        """Those of an index of n rows that hold its rows start … stop − 1; None: all from start."""
        firsts = range(start // self.size * self.size, n if stop is None else stop, self.size)
        return [Shard(first, min(first + self.size, n)) for first in firsts]

    def holding(self, examples: Sequence[int], n: int) -> Iterator[tuple[Shard, Int[Tensor, " k"]]]:
        """Each shard of an index of n rows that has some of these, in order, and which."""
        at = torch.tensor(examples)
        for k in sorted({i // self.size for i in examples}):
            yield Shard(k * self.size, min((k + 1) * self.size, n)), at[at // self.size == k]

    # -- making them ------------------------------------------------------------------------------

    def fill(self, transform: Transform, data: Data, offset: int, share: tuple[int, int]) -> None:
        """Make the rows from `offset` on, those of `data`, that are not there yet.

        Args:
            transform: T.
            data: The examples offset, offset + 1, ….
            offset: Rows before them, which are there.
            share: (i, m): shards i, i + m, i + 2m, … are this process's.

        Raises:
            StaleStore: A shard that is there is of other examples, or damaged.
            NonFinite: A gradient is not finite; the shards before it are kept.
            NotWritten: The disk is full or not writable; the shards before it are kept.
        """
        first, of = share
        every = self.shards(offset + len(data), offset)
        wanted = [shard for shard in every if shard.start // self.size % of == first]
        for shard in wanted:
            self._require_same(self._longest(shard), data, offset)
        passes = GradientPass(transform.plan, transform.theta)
        # First what nobody makes; then what others make, or were making when they were killed.
        for wait in (False, True):
            for shard in wanted:
                if self._exists(shard):
                    continue
                claim = claimed(
                    self.store.directory, shard.name, wait=wait, meanwhile=transform.meanwhile
                )
                with claim as is_mine:
                    if is_mine and not self._exists(shard):
                        self._make(shard, transform, passes, data, offset)

    def require_same(self, data: Data, offset: int) -> None:
        """Refuse, by a StaleStore, other examples than those whose rows begin at `offset`."""
        for shard in self.shards(offset + len(data), offset):
            self._require_same(shard, data, offset)

    def finish(self, n: int, facts: Mapping[str, Any]) -> None:
        """Name the shards of n rows, if all are there, and remove what they replace."""
        names = [TRANSFORM, *(shard.name for shard in self.shards(n))]
        if not all(self.store.path(name).exists() for name in names):
            return
        folder = self.store.directory
        with claimed(folder, INDEX, wait=True):
            told = self.store.facts
            if told is None or told["n"] < n:
                self.store.finish(facts, names)
                for name in self.store.unnamed():
                    match = NAME.fullmatch(name)
                    if match and int(match[2]) <= n:  # not one of rows that are being appended
                        self.store.path(name).unlink(missing_ok=True)
            for path in folder.glob(f".rows-*{CLAIM}"):
                path.unlink(missing_ok=True)

    def _make(
        self, shard: Shard, transform: Transform, passes: GradientPass, data: Data, offset: int
    ) -> None:
        before = self._longest(shard)
        parts: list[Mapping[str, Tensor]] = []
        if before.stop > before.start:
            parts.append(self.store.mapped(before.name))
        steps = ((a, min(a + self.at_once, shard.stop), None) for a in range(
            before.stop // self.at_once * self.at_once, shard.stop, self.at_once
        ))  # fmt: skip
        done, total = max(before.stop, shard.start), offset + len(data)
        for start, stop, _ in progress(steps, total, "index", done):
            first = max(start, before.stop)
            rows = self._rows(
                transform, passes, data, start - offset, first - offset, stop - offset
            )
            _require_finite(rows, first)
            sums = checksums(data, range(first - offset, stop - offset))
            parts.append({**self.codes.encode(filled(rows.cpu())), SUMS: sums})
        self.store.add(shard.name, {key: torch.cat([p[key] for p in parts]) for key in parts[-1]})

    def _rows(
        self, transform: Transform, passes: GradientPass, data: Data, start: int, first: int,
        stop: int,
    ) -> Float[Tensor, "b K"]:  # fmt: skip
        """T gᵢ of the examples first … stop − 1, at their places in batches from `start` on.

        What is missing before and behind them is filled up: products round by the size of their
        operands, and by the place of a row in them. So a row does not depend on where a build
        began or ended.
        """
        task, size = transform.plan.task, data.together(self.at_once)
        found = []
        with passes:
            for low in range(start, stop, size):
                if low + size <= first:
                    continue
                at = [min(max(i, first), stop - 1) for i in range(low, low + size)]
                batch = task.to_device(data.take(at))
                rows = transform.of_example(passes.of(training_loss(task), batch, size))
                found.append(rows[max(0, first - low) : stop - low])
        return torch.cat(found)

    # -- what is there ----------------------------------------------------------------------------

    def _exists(self, shard: Shard) -> bool:
        return self.store.path(shard.name).exists()

    def _longest(self, shard: Shard) -> Shard:
        """What is there of its rows, from the first on; an empty one if nothing is."""
        paths = self.store.directory.glob(f"rows-{shard.start:010}-*.safetensors")
        matches = [match for path in paths if (match := NAME.fullmatch(path.stem))]
        stops = [stop for match in matches if (stop := int(match[2])) <= shard.stop]
        return Shard(shard.start, max(stops, default=shard.start))

    def _require_same(self, shard: Shard, data: Data, offset: int) -> None:
        """That the rows of a shard are those of these examples, as far as they are among them."""
        first = max(shard.start, offset)
        if first >= shard.stop:
            return
        kept = self.store.mapped(shard.name)[SUMS][first - shard.start :]
        for low in range(first, shard.stop, self.at_once):
            local = range(low - offset, min(low + self.at_once, shard.stop) - offset)
            data.take(local)
            require_same(kept[low - first : low - first + len(local)], data, local, offset, self)


def require_same(
    kept: Int[Tensor, " b"], data: Data, local: Sequence[int], offset: int, rows: Rows
) -> None:
    """Refuse, by a StaleStore, examples just read that are not those that the rows were made of."""
    now = checksums(data, local)
    other = ((kept != now) & (kept != 0) & (now != 0)).nonzero()
    if len(other):
        example = local[int(other[0])] + offset
        raise StaleStore(
            "The rows of an index are of the examples that it is used with.",
            f"{rows.store.directory}, in which example {example} was another"
            + (f", and {len(other) - 1} more of its batch were." if len(other) > 1 else "."),
            "data that changed since the index was built, or are in another order.",
            "give the data that it was built on, or build it in another folder.",
        )


def checksums(data: Data, places: Sequence[int]) -> Int[Tensor, " b"]:
    """A number for each example of data that watch themselves and were just read there.

    0 where nothing is known of them: data of a class of the user's own.
    """
    at = list(places)
    while isinstance(data, Subset):
        at, data = [data.indices[i] for i in at], data.data
    if data.seen is None:
        return torch.zeros(len(at), dtype=torch.int64)
    return data.seen.sums[torch.tensor(at, dtype=torch.int64)]


def filled(rows: Float[Tensor, "b K"]) -> Float[Tensor, "b k"]:
    """With zeros behind, up to a multiple of `MULTIPLE` numbers."""
    return F.pad(rows, (0, -rows.shape[1] % MULTIPLE))


def _require_finite(rows: Float[Tensor, "b K"], start: int) -> None:
    bad = ~rows.isfinite().all(dim=1)
    if bool(bad.any()):
        raise NonFinite(
            "Rows of an index must be finite.",
            f"NaN or infinity in the row of example {start + int(bad.nonzero()[0])}.",
            "a loss or a gradient that overflows in this dtype, or an input that is not finite.",
            "leave that example out, or use a float64 model; the shards before it are kept.",
        )
