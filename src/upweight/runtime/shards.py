"""ScoreShards: scores of many training examples on disk, a file per range of them.

    directory/manifest.json           what the scores belong to
    directory/scores-….safetensors    values [b, q] of a range of queries and a range of examples
    directory/finished.json           how they came about, and the hash of every file; there once
                                      all of them are

Examples come first, so that a pass over the training set appends. Every file is whole or not there,
and an interrupted pass goes on behind it. Files are memory-mapped when they are read. Each says
what it belongs to and carries the hash of that and of its numbers; it is compared before the first
of them is used, and again after the file has changed.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import ShapeError, StaleStore, message
from upweight.runtime.cover import Shard, covering, gaps, reach
from upweight.runtime.headers import own_digest, read_json, write_json
from upweight.runtime.memory import require_room
from upweight.runtime.tensors import UNREADABLE, stale, tensors_digest, write_tensors
from upweight.runtime.whole import make_folder, remove_left_over

SCHEMA = 2

NAME = re.compile(r"scores-(\d{10,19})-(\d{10,19})-(\d{10,19})-(\d{10,19})\.safetensors")

RERUN = "of a run `upweight rerun RUN --project FILE.py`"
AGAIN = f"the same write(…), or {RERUN}"


@dataclass(frozen=True)
class _Manifest:
    """What manifest.json holds."""

    n: int
    q: int
    description: Mapping[str, str]
    settings: Mapping[str, int]


@dataclass(frozen=True)
class ScoreShards:
    """Values [n, q] in a folder. Made by `ScoreShards.open`.

    Args:
        directory: The folder.
        n: Training examples.
        q: Queries.
        description: What the scores depend on.
        settings: How the pass over them was begun.
        known: What was read, by the name and the state of its file.
    """

    directory: Path
    n: int
    q: int
    description: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, int] = field(default_factory=dict)
    known: dict[str, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

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
            NotWritten: The folder cannot be written.
        """
        manifest = Path(directory) / "manifest.json"
        make_folder(manifest.parent)
        remove_left_over(manifest.parent)
        require_one_kind(manifest.parent, "scores.json")
        if not manifest.exists():
            asked = {"n": n, "q": q, "description": dict(description)}
            write_json(manifest, SCHEMA, {**asked, "settings": dict(settings or {})})
        shards = cls.load(directory)
        if (shards.n, shards.q, shards.description) != (n, q, dict(description)):
            raise StaleStore(
                "A folder of scores belongs to one model, data set, method and question.",
                f"{manifest}, which describes others.",
                "training went on, or other queries were asked about, with the same folder.",
                "give another folder, or delete this one.",
            )
        return shards

    @classmethod
    def load(cls, directory: Folder) -> "ScoreShards":
        """The shards that `open` began, for reading.

        Raises:
            FileNotFoundError: There are none.
            StaleStore: What they belong to cannot be read.
        """
        folder = Path(directory)
        way_out = f"delete the folder {folder} and ask again: {AGAIN}."
        found = read_json(folder / "manifest.json", SCHEMA, _Manifest, way_out)
        if found.n < 1 or found.q < 1:
            given = f"n = {found.n} and q = {found.q}"
            raise StaleStore(stale(folder / "manifest.json", given, way_out))
        return cls(folder, found.n, found.q, found.description, found.settings)

    def done(self, first: int, last: int) -> int:
        """How many examples, from the first on, have scores with queries `first` to `last` − 1."""
        return reach(covering(self._shards(), first, last))

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of examples whose scores with queries `first` to `last` − 1 are not there."""
        return gaps(self._shards(), first, last, self.n)

    @property
    def is_whole(self) -> bool:
        """Whether every query has its scores with every example, by the names of the files."""
        shards = self._shards()
        # Between two of these, all queries are in the same files.
        firsts = {0, *(s.first for s in shards), *(s.last for s in shards)} - {self.q}
        return all(reach(covering(shards, k, k + 1)) == self.n for k in firsts)

    def append(self, first: int, start: int, values: Float[Tensor, "b q"]) -> None:
        """Keep scores of the queries from `first` on with the examples from `start` on.

        The folder is then not finished, if it was.

        Raises:
            NotWritten: The disk is full or not writable. What was kept before stays readable.
        """
        (self.directory / "finished.json").unlink(missing_ok=True)  # it knows other hashes
        places = (first, first + values.shape[1], start, start + len(values))
        name = "-".join(f"{place:010}" for place in places)
        path = self.directory / f"scores-{name}.safetensors"
        write_tensors(path, {"values": values}, self._about(path))

    def finish(self, header: Mapping[str, Any]) -> None:
        """Say how the scores came about, once all of them are kept.

        Args:
            header: JSON.

        Raises:
            StaleStore: A file is damaged.
            NotWritten: The disk is full or not writable.
        """
        digests = {shard.path.name: self._verified(shard) for shard in self._shards()}
        write_json(
            self.directory / "finished.json", SCHEMA, {"shards": digests, "header": dict(header)}
        )

    @property
    def header(self) -> dict[str, Any] | None:
        """What `finish` was told; None where scores are missing.

        Raises:
            StaleStore: It cannot be read.
        """
        finished = self._finished
        if finished is None or not all((self.directory / s).exists() for s in finished.shards):
            return None
        return dict(finished.header)

    def verify(self) -> None:
        """See that every file is what was written.

        Raises:
            StaleStore: One is not.

        Cost: reads all of them, but for those that were read before and have not changed.
        """
        for shard in self._shards():
            self._verified(shard)

    def digests(self) -> dict[str, str]:
        """The hash of every file that is read, by its name.

        Raises:
            StaleStore: One is not what was written.
        """
        finished = self._finished
        if finished is not None:
            return dict(finished.shards)
        return {shard.path.name: self._verified(shard) for shard in self._shards()}

    def pieces(self) -> Iterator[tuple[int, int, Float[Tensor, "b q"]]]:
        """Every score once: the first query, the first example, and the scores from there.

        Raises:
            ShapeError: The pass did not finish.
            StaleStore: A file is damaged.
        """
        shards, query = self._shards(), 0
        while query < self.q:
            ends = sorted({s.last for s in shards if s.first <= query < s.last})
            whole = [last for last in ends if reach(covering(shards, query, last)) == self.n]
            if not whole:
                raise ShapeError(self._unfinished(f"query {query} without all of its scores"))
            for shard, start in covering(shards, query, whole[-1]):
                first, last = query - shard.first, whole[-1] - shard.first
                yield query, start, self._part(shard, first, last, start - shard.start)
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
        """The scores of one query with every training example.

        Raises:
            ShapeError: There is no such query, or the pass did not finish.
            StaleStore: A file is damaged.

        Cost: reads its own column of each file, and the first time all of them.
        """
        found = covering(self._shards(), query, query + 1)
        reached = reach(found)
        if not 0 <= query < self.q or reached < self.n:
            given = f"query={query}, with the scores of {reached} examples"
            raise ShapeError(self._unfinished(given))
        columns = []
        for shard, start in found:
            k = query - shard.first
            columns.append(self._part(shard, k, k + 1, start - shard.start)[:, 0])
        return torch.cat(columns)

    # -- files ------------------------------------------------------------------------------------

    @property
    def _finished(self) -> "_Finished | None":
        path = self.directory / "finished.json"
        way_out = f"delete the file {path} and ask again: {AGAIN}; no scores are computed again."
        try:
            return self._once(path, lambda: read_json(path, SCHEMA, _Finished, way_out))
        except FileNotFoundError:
            return None

    def _shards(self) -> list[Shard]:
        """The files of scores; of a folder that is finished, those that finished.json names."""
        finished, found = self._finished, []
        named = None if finished is None or self.header is None else finished.shards
        for path in sorted(self.directory.glob("scores-*.safetensors")):
            match = NAME.fullmatch(path.name)
            first, last, start, stop = map(int, match.groups()) if match else (0, 0, 0, 0)
            if not (first < last <= self.q and start < stop <= self.n):
                given = f"a name that is none for {self.q} queries and {self.n} examples"
                way_out = "remove it: it is not one of the files that were written here."
                raise StaleStore(stale(path, given, way_out))
            if named is None or path.name in named:
                found.append(Shard(first, last, start, stop, path))
        return found

    def _about(self, path: Path) -> dict[str, str]:
        """What a file says of itself: of which scores it is, and which of them."""
        of = own_digest({"n": self.n, "q": self.q, "description": dict(self.description)})
        return {"schema": str(SCHEMA), "of": of, "place": path.stem}

    def _part(self, shard: Shard, first: int, last: int, begin: int) -> Float[Tensor, "b q"]:
        """The scores of some of its queries, with its examples from `begin` on."""
        self._verified(shard)

        def part(file: Any) -> Tensor:
            chosen: Tensor = file.get_slice("values")[begin:, first:last]
            return chosen.clone()

        return _opened(shard.path, part)

    def _verified(self, shard: Shard) -> str:
        """The hash of a file that holds what was written."""
        path = shard.path
        found: str = self._once(path, lambda: _opened(path, lambda f: self._digest(shard, f)))
        finished = self._finished
        if finished is not None and self.header is not None:
            if finished.shards.get(shard.path.name, found) != found:
                raise StaleStore(_stale(shard.path, "other scores than finished.json names"))
        return found

    def _digest(self, shard: Shard, file: Any) -> str:
        shape, about = [shard.stop - shard.start, shard.last - shard.first], file.metadata() or {}
        if list(file.keys()) != ["values"] or file.get_slice("values").get_shape() != shape:
            raise StaleStore(_stale(shard.path, f"another shape than {shape}"))
        if "digest" not in about:
            raise StaleStore(_stale(shard.path, "no hash of its numbers"))
        told = about.pop("digest")
        if about != self._about(shard.path):
            raise StaleStore(_stale(shard.path, "the scores of something else"))
        values = file.get_tensor("values")
        if not values.is_floating_point() or told != tensors_digest({"values": values}, about):
            raise StaleStore(_stale(shard.path, "altered numbers"))
        return str(told)

    def _once(self, path: Path, read: Callable[[], Any]) -> Any:
        """What a file says, read again only where it has changed."""
        state = path.stat()
        stamp = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
        if self.known.get(path.name, (None, None))[0] != stamp:
            self.known[path.name] = (stamp, read())
        return self.known[path.name][1]

    def _unfinished(self, given: str) -> str:
        return message(
            f"A row is one of {self.q} queries over all {self.n} training examples.",
            f"{given} on disk.",
            "a pass that was interrupted, or an index into another data set.",
            f"call {AGAIN}, again to finish it.",
        )


@dataclass(frozen=True)
class _Finished:
    """What finished.json holds: the hash of every file, and what `finish` was told."""

    shards: Mapping[str, str]
    header: Mapping[str, Any]


def require_one_kind(folder: Path, other: str) -> None:
    """Refuse to keep shards beside scores that were saved whole, or the reverse.

    Args:
        folder: Where.
        other: The file that says that the other kind is there.

    Raises:
        StaleStore: It is.
    """
    if (folder / other).exists():
        raise StaleStore(
            "A folder holds scores of one kind: in shards, or saved whole.",
            f"{folder}, which holds {other} of the other kind.",
            "the same folder for write(…) and for scores.save(…).",
            "give another folder, or remove the kind that is not wanted.",
        )


def _opened(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except StaleStore:
        raise
    except UNREADABLE as error:
        raise StaleStore(_stale(path, f"unreadable bytes: {error}")) from error


def _stale(path: Path, given: str) -> str:
    way_out = f"delete the file and ask again: {AGAIN}; only its scores are computed again."
    return stale(path, given, way_out)
