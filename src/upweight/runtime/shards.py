"""ScoreShards: scores of many training examples on disk, a file per range of them.

    directory/manifest.json           what the scores belong to
    directory/scores-….safetensors    values [b, q] of a range of queries and a range of examples

Examples come first, so that a pass over the training set appends. Every file is written beside its
place and then renamed: what is there is whole, and an interrupted pass goes on behind it. Files are
memory-mapped when they are read; no pickle.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import ShapeError, StaleStore, message
from upweight.runtime.whole import write_whole

SCHEMA = "1"


@dataclass(frozen=True)
class ScoreShards:
    """Values [n, q] in a folder. Made by `ScoreShards.open`.

    Args:
        directory: The folder.
        n: Training examples.
        q: Queries.
    """

    directory: Path
    n: int
    q: int

    @classmethod
    def open(
        cls, directory: Folder, n: int, q: int, description: Mapping[str, str]
    ) -> "ScoreShards":
        """The shards of a folder that belong to a description; none yet in a new folder.

        Raises:
            StaleStore: The folder holds scores of something else.
            OSError: The folder cannot be written.
        """
        shards = cls(Path(directory), n, q)
        shards.directory.mkdir(parents=True, exist_ok=True)
        manifest = shards.directory / "manifest.json"
        text = json.dumps(
            {"schema": SCHEMA, "n": n, "q": q, **description}, indent=1, sort_keys=True
        )
        if not manifest.exists():
            write_whole(manifest, text.encode())
        elif manifest.read_text(encoding="utf-8") != text:
            raise StaleStore(
                message(
                    "A folder of scores belongs to one model, data set, method and question.",
                    f"{manifest}, which describes others.",
                    "training went on, or other queries were asked about, with the same folder.",
                    "give another folder, or delete this one.",
                )
            )
        return shards

    @classmethod
    def load(cls, directory: Folder) -> "ScoreShards":
        """The shards that `open` began, for reading.

        Raises:
            FileNotFoundError: There are none.
        """
        manifest = Path(directory) / "manifest.json"
        header: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        return cls(Path(directory), header["n"], header["q"])

    def done(self, first: int, last: int) -> int:
        """How many examples, from the first on, have scores with queries `first` to `last` − 1."""
        return _reached(_cover(self._shards(), first, last))

    @property
    def is_whole(self) -> bool:
        """Whether every query has its scores with every example."""
        shards = self._shards()
        return all(_reached(_cover(shards, k, k + 1)) == self.n for k in range(self.q))

    def append(self, first: int, start: int, values: Float[Tensor, "b q"]) -> None:
        """Keep scores of the queries from `first` on with the examples from `start` on.

        Raises:
            OSError: The disk is full or not writable. What was kept before stays readable.
        """
        places = (first, first + values.shape[1], start, start + len(values))
        name = "-".join(f"{place:010}" for place in places)
        contents = save({"values": values.detach().cpu().contiguous()}, {"schema": SCHEMA})
        write_whole(self.directory / f"scores-{name}.safetensors", contents)

    def row(self, query: int) -> Float[Tensor, " n"]:
        """The scores of one query with every training example; only its own column is read.

        Raises:
            ShapeError: There is no such query, or the pass did not finish.
            StaleStore: A file is damaged.
        """
        cover = _cover(self._shards(), query, query + 1)
        reached = _reached(cover)
        if not 0 <= query < self.q or reached < self.n:
            raise ShapeError(
                message(
                    f"A row is one of {self.q} queries over all {self.n} training examples.",
                    f"query={query}, with the scores of {reached} examples on disk.",
                    "a pass that was interrupted, or an index into another data set.",
                    "call the same write(...) again to finish it.",
                )
            )
        return torch.cat([s.column(query - s.first, start - s.start) for s, start in cover])

    def _shards(self) -> list["_Shard"]:
        found = []
        for path in sorted(self.directory.glob("scores-*.safetensors")):
            first, last, start, stop = map(int, path.stem.split("-")[1:])
            found.append(_Shard(first, last, start, stop, path))
        return found


@dataclass(frozen=True)
class _Shard:
    """One file: scores of the queries first … last − 1 with the examples start … stop − 1."""

    first: int
    last: int
    start: int
    stop: int
    path: Path

    def column(self, query: int, begin: int) -> Float[Tensor, " b"]:
        """The scores of one of its queries, with its examples from `begin` on."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_slice("values")[begin:, query].clone()
        except SafetensorError as error:
            raise StaleStore(
                message(
                    "A file of scores must be what was written.",
                    f"{self.path}: {error}",
                    "a file edited, copied from elsewhere or damaged by the disk.",
                    "delete the file; its scores are then computed again.",
                )
            ) from error


def _cover(shards: list[_Shard], first: int, last: int) -> list[tuple[_Shard, int]]:
    """Shards one behind the other that have these queries, and from which example each is needed.

    They may overlap: runs with other memory, or at the same time, cut the work in other places.
    """
    mine = [s for s in shards if s.first <= first and last <= s.last]
    found: list[tuple[_Shard, int]] = []
    while True:
        reached = _reached(found)
        further = [s for s in mine if s.start <= reached < s.stop]
        if not further:
            return found
        found.append((max(further, key=lambda s: s.stop), reached))


def _reached(cover: list[tuple[_Shard, int]]) -> int:
    """The first example that is not covered."""
    return cover[-1][0].stop if cover else 0
