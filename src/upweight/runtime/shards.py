"""ScoreShards: scores of many training examples on disk, a file per range of them.

    directory/manifest.json           what the scores belong to
    directory/scores-….safetensors    values [b, q] of a range of queries and a range of examples
    directory/finished.json           how they came about; there once all of them are

Examples come first, so that a pass over the training set appends. Every file is written beside its
place and then renamed: what is there is whole, and an interrupted pass goes on behind it. Files are
memory-mapped when they are read; no pickle.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import ShapeError, StaleStore, message
from upweight.runtime.memory import require_room
from upweight.runtime.whole import write_whole

SCHEMA = "1"


@dataclass(frozen=True)
class ScoreShards:
    """Values [n, q] in a folder. Made by `ScoreShards.open`.

    Args:
        directory: The folder.
        n: Training examples.
        q: Queries.
        settings: How the pass over them was begun.
    """

    directory: Path
    n: int
    q: int
    settings: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        directory: Folder,
        n: int,
        q: int,
        description: Mapping[str, str],
        settings: Mapping[str, int] | None = None,
    ) -> "ScoreShards":
        """The shards of a folder that belong to a description; none yet in a new folder.

        Args:
            directory: The folder.
            n: Training examples.
            q: Queries.
            description: What the scores depend on.
            settings: What a pass may choose, such as the size of its batches. A pass that goes on
                must go on with those it was begun with: they come back in the result.

        Raises:
            StaleStore: The folder holds scores of something else.
            OSError: The folder cannot be written.
        """
        manifest = Path(directory) / "manifest.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        header = {"schema": SCHEMA, "n": n, "q": q, **description}
        if not manifest.exists():
            text = json.dumps({**header, "settings": dict(settings or {})}, indent=1)
            write_whole(manifest, text.encode())
        shards = cls.load(directory)
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if {key: value for key, value in found.items() if key != "settings"} != header:
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
        return cls(Path(directory), header["n"], header["q"], header.get("settings", {}))

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

    def finish(self, header: Mapping[str, Any]) -> None:
        """Say how the scores came about, once all of them are kept.

        Args:
            header: JSON.

        Raises:
            OSError: The disk is full or not writable.
        """
        text = json.dumps({"schema": SCHEMA, **header}, indent=1, ensure_ascii=False)
        write_whole(self.directory / "finished.json", text.encode())

    @property
    def header(self) -> dict[str, Any] | None:
        """What `finish` was told; None where scores are missing."""
        path = self.directory / "finished.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def pieces(self) -> Iterator[tuple[int, int, Float[Tensor, "b q"]]]:
        """Every score once: the first query, the first example, and the scores from there.

        Raises:
            ShapeError: The pass did not finish.
            StaleStore: A file is damaged.
        """
        shards, query = self._shards(), 0
        while query < self.q:
            ends = sorted({s.last for s in shards if s.first <= query < s.last})
            whole = [last for last in ends if _reached(_cover(shards, query, last)) == self.n]
            if not whole:
                raise ShapeError(self._unfinished(f"query {query} without all of its scores"))
            for shard, start in _cover(shards, query, whole[-1]):
                first, last = query - shard.first, whole[-1] - shard.first
                yield query, start, shard.part(first, last, start - shard.start)
            query = whole[-1]

    def values(self) -> Float[Tensor, "q n"]:
        """All scores at once.

        Raises:
            SpecError: They do not fit into memory.
            ShapeError: The pass did not finish.
            StaleStore: A file is damaged.
        """
        found = torch.empty(0)
        for first, start, part in self.pieces():
            if not len(found):
                require_room(
                    self.q,
                    self.n,
                    part.dtype,
                    found.device,
                    "read one query at a time: ScoreShards.load(folder).row(query).",
                )
                found = torch.empty(self.q, self.n, dtype=part.dtype)
            found[first : first + part.shape[1], start : start + len(part)] = part.mT
        return found

    def row(self, query: int) -> Float[Tensor, " n"]:
        """The scores of one query with every training example; only its own column is read.

        Raises:
            ShapeError: There is no such query, or the pass did not finish.
            StaleStore: A file is damaged.
        """
        cover = _cover(self._shards(), query, query + 1)
        reached = _reached(cover)
        if not 0 <= query < self.q or reached < self.n:
            given = f"query={query}, with the scores of {reached} examples"
            raise ShapeError(self._unfinished(given))
        return torch.cat([s.column(query - s.first, start - s.start) for s, start in cover])

    def _unfinished(self, given: str) -> str:
        return message(
            f"A row is one of {self.q} queries over all {self.n} training examples.",
            f"{given} on disk.",
            "a pass that was interrupted, or an index into another data set.",
            "call the same write(...) again to finish it.",
        )

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
        return self._read(lambda values: values[begin:, query])

    def part(self, first: int, last: int, begin: int) -> Float[Tensor, "b q"]:
        """The same of several of its queries."""
        return self._read(lambda values: values[begin:, first:last])

    def _read(self, chosen: Callable[[Any], Tensor]) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                return chosen(file.get_slice("values")).clone()
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
