"""StoredMatrix: a matrix on disk in tiles, which grows by columns or by rows and is read by parts.

    directory/tile-….safetensors     values of a range of rows and a range of columns

Scores [q, n] grow by columns as the training examples stream by, gradients [n, k] by rows. Tiles
may overlap: processes with other memory, or at the same time, cut the work in other places.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError
from upweight.runtime.memory import require_room
from upweight.runtime.store import Store, stale

NAME = re.compile(r"tile-(\d{10,19})-(\d{10,19})-(\d{10,19})-(\d{10,19})")

BLOCK = 4_000_000
"""Values that are read at once where all of them are gone through."""


@dataclass(frozen=True)
class Tile:
    """The rows first … last − 1 in the columns start … stop − 1."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its shard."""
        return f"tile-{self.first:010}-{self.last:010}-{self.start:010}-{self.stop:010}"


@dataclass(frozen=True)
class StoredMatrix(Store):
    """Values [rows, columns]; `self[part]` reads a part as a tensor of its own."""

    def append(self, first: int, start: int, values: Float[Tensor, "r c"], **more: Tensor) -> None:
        """Keep the values from row `first` and column `start` on, and more of their shape.

        Raises:
            NotWritten: The disk is full or not writable. What was kept before stays readable.
        """
        tile = Tile(first, first + values.shape[0], start, start + values.shape[1])
        self.write(tile.name, {"values": values, **more})

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of columns that are not there of the rows `first` to `last` − 1."""
        tiles = [t for t in self._tiles() if t.first <= first and last <= t.last]
        return gaps(((t.start, t.stop) for t in tiles), self.shape[1])

    def missing_rows(self) -> list[tuple[int, int]]:
        """Ranges of rows that are in no tile with all of their columns."""
        whole = [t for t in self._tiles() if t.stop - t.start == self.shape[1]]
        return gaps(((t.first, t.last) for t in whole), self.shape[0])

    @property
    def is_whole(self) -> bool:
        """Whether every value is there, by the names of the files."""
        bands = _bands(self._tiles(), 0, len(self))
        return not any(self.missing(*band) for band in bands)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        """Columns."""
        return self.shape[1]

    def rows(self, start: int, stop: int) -> Float[Tensor, "r c"]:
        """The rows from start to stop − 1: gradients by place (`upweight.gradients.places`)."""
        return self[start:stop]

    def __getitem__(self, part: Any) -> Tensor:
        """Some rows, `[row]` or `[first:last]`, or some columns of them, `[rows, columns]`.

        Args:
            part: Rows are a number or a slice of step 1; columns the same, or a list.

        Raises:
            IndexError: There is no such row.
            SpecError: `[:]`, which is all of it, does not fit into memory.
            ShapeError: Some of it is not there.
            StaleStore: A file is damaged.

        Cost: reads what is asked for, and the first time all of the tiles that it is in.
        """
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        if isinstance(columns, int):
            return self[rows, [columns]][..., 0]
        if not isinstance(rows, slice):
            if not 0 <= rows < len(self):
                raise IndexError(rows)
            return self[rows : rows + 1, columns][0]
        if rows == columns == slice(None):
            return self.values()
        return self.part("values", range(*rows.indices(len(self))), columns)

    def part(self, name: str, rows: range, columns: Any = slice(None)) -> Float[Tensor, "r c"]:
        """Rows of the values, or of what was kept beside them; else as `self[rows, columns]`."""
        if isinstance(columns, slice):
            chosen = None
            low, high, _ = columns.indices(self.shape[1])
        else:
            chosen = torch.tensor(columns, dtype=torch.int64)
            low, high = (int(chosen.min()), int(chosen.max()) + 1) if len(chosen) else (0, 0)
        shape = (len(rows), high - low if chosen is None else len(chosen))
        out, tiles = torch.empty(0), self._tiles()
        for first, last in _bands(tiles, rows.start, rows.stop):
            for tile, begin, end in self._covering(tiles, first, last, low, high):
                values = self._compared(tile.name)[1][name][first - tile.first : last - tile.first]
                out = out if len(out) else torch.empty(shape, dtype=values.dtype)
                into = out[first - rows.start : last - rows.start]
                if chosen is None:
                    mine = slice(begin - tile.start, end - tile.start)
                    into[:, begin - low : end - low] = values[:, mine]
                else:
                    here = (begin <= chosen) & (chosen < end)
                    into[:, here] = values[:, chosen[here] - tile.start]
        return out.reshape(shape)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "r c"]]]:
        """Every value once: the first row, and some rows from there."""
        size = max(1, BLOCK // max(1, self.shape[1]))
        for first in range(0, len(self), size):
            yield first, self[first : first + size]

    def values(self) -> Float[Tensor, "r c"]:
        """All of them at once.

        Raises:
            SpecError: They do not fit into memory.
            ShapeError: Some are not there.
            StaleStore: A file is damaged.
        """
        (rows, columns), dtype = self.shape, self[:1, :1].dtype
        way_out = "read one row at a time: .row(query), or Scores.open(folder)."
        require_room(rows, columns, dtype, torch.device("cpu"), way_out)
        return self.part("values", range(len(self)))

    def row(self, query: int) -> Float[Tensor, " c"]:
        """One row, such as the scores of one query with every training example.

        Raises:
            ShapeError: There is no such row, or it is not all there.
            StaleStore: A file is damaged.
        """
        if not 0 <= query < len(self):
            raise self._unfinished(f"row {query}")
        return self[query]

    def _tiles(self) -> list[Tile]:
        found, (rows, columns) = [], self.shape
        for name in self.names():
            match = NAME.fullmatch(name)
            tile = Tile(*map(int, match.groups())) if match else Tile(1, 0, 1, 0)
            if not (tile.first <= tile.last <= rows and tile.start <= tile.stop <= columns):
                given = f"a name that is none for {rows} rows and {columns} columns"
                way_out = "remove it: it is not one of the files that were written here."
                raise stale(self.path(name), given, way_out)
            found.append(tile)
        return found

    def _covering(
        self, tiles: Iterable[Tile], first: int, last: int, start: int, stop: int
    ) -> Iterator[tuple[Tile, int, int]]:
        """Tiles one after the other with these rows, and the columns that each is needed for."""
        mine = [t for t in tiles if t.first <= first and last <= t.last]
        while start < stop:
            further = [t for t in mine if t.start <= start < t.stop]
            if not further:
                raise self._unfinished(f"row {first} without column {start}")
            tile = max(further, key=lambda t: t.stop)
            end = min(stop, tile.stop)
            yield tile, start, end
            start = end

    def _unfinished(self, given: str) -> ShapeError:
        rows, columns = self.shape
        return ShapeError(
            f"What is read is among {rows} rows and {columns} columns that are on disk.",
            f"{given}, in {self.directory}.",
            "a pass that was interrupted, or an index into another data set.",
            f"ask again to finish it: {self.again}.",
        )


def _bands(tiles: Iterable[Tile], first: int, last: int) -> list[tuple[int, int]]:
    """Ranges of rows, each all in or all out of every tile."""
    cuts = {place for t in tiles for place in (t.first, t.last) if first < place < last}
    return list(itertools.pairwise(sorted({first, last, *cuts})))


def gaps(ranges: Iterable[tuple[int, int]], n: int) -> list[tuple[int, int]]:
    """Ranges of 0 … n − 1 that are in none of these."""
    found, end = [], 0
    for start, stop in sorted(ranges):
        if start > end:
            found.append((end, start))
        end = max(end, stop)
    return found + ([(end, n)] if end < n else [])
