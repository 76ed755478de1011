"""Stored: rows [n, d] in a folder, a file per range of them; an interrupted pass goes on behind it.

directory/manifest.json                what the rows belong to
directory/rows-<start>.safetensors     values [b, d]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import StaleStore
from upweight.runtime.headers import read_json, write_json
from upweight.runtime.progress import progress
from upweight.runtime.tensors import read_plain, read_tensors, stale, write_tensors
from upweight.runtime.whole import make_folder, remove_left_over

SCHEMA = 1

FILE_NUMBERS = 2**23
"""Numbers in a file at most, if it is not one row."""

WAY_OUT = "give another folder, or delete this one; it is then made anew."


@dataclass(frozen=True)
class _Manifest:
    n: int
    width: int
    description: Mapping[str, str]
    settings: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows of numbers by place. Made by `Stored.open`.

    Args:
        directory: The folder.
        n, width: How many rows, and numbers in each.
        settings: How the pass that makes them was begun: one that goes on must do as it did.
    """

    directory: Path
    n: int
    width: int
    settings: Mapping[str, int]
    _seen: set[int] = field(default_factory=set, repr=False)

    @classmethod
    def open(
        cls,
        directory: Folder,
        name: str,
        n: int,
        width: int,
        description: Mapping[str, str],
        settings: Mapping[str, int],
    ) -> "Stored":
        """The rows directory/name that belong to a description; none yet in a new folder.

        Raises:
            StaleStore: The folder holds rows of something else.
            NotWritten: The folder cannot be written.
        """
        folder = Path(directory) / name
        make_folder(folder)
        remove_left_over(folder)
        asked = _Manifest(n, width, dict(description), dict(settings))
        manifest = folder / "manifest.json"
        if not manifest.exists():
            write_json(manifest, SCHEMA, vars(asked))
        found = read_json(manifest, SCHEMA, _Manifest, WAY_OUT)
        if (found.n, found.width, found.description) != (n, width, asked.description):
            raise StaleStore(
                "A folder of gradients belongs to one model, data set and method.",
                f"{manifest}, which describes others.",
                "training went on, the data changed, or another method used the same folder.",
                WAY_OUT,
            )
        return cls(folder, n, width, found.settings)

    def __len__(self) -> int:
        return self.n

    @property
    def size(self) -> int:
        """Rows in a file."""
        return max(1, FILE_NUMBERS // self.width)

    def fill(self, make: Callable[[int, int], Float[Tensor, "b d"]]) -> None:
        """Make and keep the rows that are not there yet.

        Raises:
            NotWritten: The disk is full or not writable. What was kept before stays readable.
        """
        places = [
            (start, min(start + self.size, self.n), None) for start in range(0, self.n, self.size)
        ]
        missing = [place for place in places if not self._file(place[0]).exists()]
        if missing:
            for start, stop, _ in progress(iter(missing), self.n, "gradients", missing[0][0]):
                write_tensors(self._file(start), {"values": make(start, stop)}, self._about(start))

    def rows(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        """Rows from start to stop − 1.

        Raises:
            StaleStore: A file is damaged. It is compared with its hash when it is first read.
        """
        parts = []
        for first in range(start - start % self.size, stop, self.size):
            values = self._read(first)
            parts.append(values[max(start - first, 0) : stop - first])
        return torch.cat(parts)

    def _read(self, first: int) -> Tensor:
        path = self._file(first)
        tensors, about = (read_plain if first in self._seen else read_tensors)(path, WAY_OUT)
        values = tensors.get("values", torch.empty(0))
        expected = (min(self.size, self.n - first), self.width)
        if {k: v for k, v in about.items() if k != "digest"} != self._about(first):
            raise StaleStore(stale(path, "rows of something else", WAY_OUT))
        if values.shape != expected:
            raise StaleStore(stale(path, f"rows of shape {tuple(values.shape)}", WAY_OUT))
        self._seen.add(first)
        return values

    def _file(self, first: int) -> Path:
        return self.directory / f"rows-{first:010}.safetensors"

    def _about(self, first: int) -> dict[str, str]:
        return {"schema": str(SCHEMA), "first": str(first)}
