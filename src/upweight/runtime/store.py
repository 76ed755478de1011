"""Store: named tensors on disk, with what they belong to and a hash of all. The one format here.

    directory/manifest.json        what the numbers depend on, their shape, and how they were begun
    directory/NAME.safetensors     a shard: named tensors; its header says what it belongs to, which
                                   shard it is, and the hash of that and of every name, dtype, shape
                                   and byte
    directory/finished.json        the hash of every shard and what was said of them; there once
                                   all of them are

Shards are added, each whole or not there: a kill at any instant leaves what was there before, and
whoever comes next goes on behind it, also beside another. A shard is compared with its hash before
the first of its numbers is used, and again after its file has changed. It is memory-mapped. No
pickle.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import ShapeError, StaleStore
from upweight.runtime.atomic import ELSEWHERE, make_folder, remove_left_over, replacing
from upweight.runtime.fingerprint import digest
from upweight.runtime.headers import own_digest, read_json, write_json

SCHEMA = 3

MANIFEST, FINISHED, SUFFIX = "manifest.json", "finished.json", ".safetensors"

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError)
"""What safetensors and PyTorch raise for hostile bytes, RuntimeError for 2⁴⁰ × 0 numbers."""


@dataclass(frozen=True)
class _Manifest:
    """What manifest.json holds."""

    description: Mapping[str, str]
    shape: tuple[int, ...]
    begun: Mapping[str, Any]


@dataclass(frozen=True)
class _Finished:
    """What finished.json holds: the hash of every shard, and what `finish` was told."""

    shards: Mapping[str, str]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Store:
    """Shards in a folder. Made by `open`, `load` or `replace`.

    Args:
        directory: The folder.
        description: What the numbers depend on. Another description is refused, never overwritten.
        shape: Of the matrix that the shards are tiles of; empty where they are none.
        begun: How the work was begun, where that may differ from one process to the next. One that
            goes on must go on with it.
        again: How its numbers are made again, for messages.
        known: What was compared, by the name and the state of its file.
    """

    directory: Path
    description: Mapping[str, str]
    shape: tuple[int, ...] = ()
    begun: Mapping[str, Any] = field(default_factory=dict)
    again: str = field(default="what wrote it", compare=False)
    known: dict[str, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(
        cls,
        directory: Folder,
        description: Mapping[str, str],
        *,
        shape: tuple[int, ...] = (),
        begun: Mapping[str, Any] | None = None,
        again: str = "what wrote it",
    ) -> Self:
        """The store of a folder that belongs to a description; an empty one in a new folder.

        Raises:
            StaleStore: The folder holds something else.
            NotWritten: The folder cannot be written.
        """
        folder = Path(directory)
        make_folder(folder)
        remove_left_over(folder)
        begins = not (folder / MANIFEST).exists()
        if not begins and not any(folder.glob(f"*{SUFFIX}")):
            # A question that failed before any work may be mended.
            begins = bool(cls.load(folder, again)._others(description, shape))
        if begins:
            cls(folder, description, shape, begun or {})._begin()
        found = cls.load(folder, again)
        found.require(description, shape)
        return found

    @classmethod
    def load(cls, directory: Folder, again: str = "what wrote it") -> Self:
        """The store that a folder holds, for reading.

        Raises:
            FileNotFoundError: There is none.
            StaleStore: What it belongs to cannot be read.
        """
        folder = Path(directory)
        way_out = f"delete the folder {folder} and ask again: {again}; or give another folder."
        found = read_json(folder / MANIFEST, SCHEMA, _Manifest, way_out)
        return cls(folder, found.description, found.shape, found.begun, again)

    @classmethod
    def replace(
        cls,
        directory: Folder,
        description: Mapping[str, str],
        shards: Mapping[str, Mapping[str, Tensor]],
        facts: Mapping[str, Any],
        *,
        shape: tuple[int, ...] = (),
        way_out: str = ELSEWHERE,
    ) -> Self:
        """Write a finished store in place of the one in a folder.

        An interruption leaves the old one, or none that can be read.

        Raises:
            NotWritten: The disk is full or not writable.
        """
        made = cls(Path(directory), description, shape)
        make_folder(made.directory, way_out)
        remove_left_over(made.directory)
        try:
            old = set(cls.load(directory).names())
        except (FileNotFoundError, StaleStore):
            old = set()
        told = {name: made.add(name, tensors, way_out) for name, tensors in shards.items()}
        made._begin()
        made._finish(told, facts)
        for name in old - set(told):
            made.path(name).unlink(missing_ok=True)
        return made

    def require(self, description: Mapping[str, str], shape: tuple[int, ...] = ()) -> None:
        """Refuse a store of something else.

        Raises:
            StaleStore: It is, and says of what.
        """
        if others := self._others(description, shape):
            raise StaleStore(
                "A folder belongs to one model, data set, method and question.",
                f"{self.directory / MANIFEST}, which is of another {', '.join(others)}.",
                "training went on, the data changed, or something else was asked with the same "
                "folder.",
                f"give another folder, or delete this one and ask again: {self.again}.",
            )

    def path(self, name: str) -> Path:
        """The file of a shard."""
        return self.directory / f"{name}{SUFFIX}"

    def names(self) -> list[str]:
        """Of all shards; of a store that is finished, those that finished.json names."""
        finished = self._finished
        if finished is not None and self.facts is not None:
            return sorted(finished.shards)
        return sorted(path.stem for path in self.directory.glob(f"*{SUFFIX}"))

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Add a shard, or put one in the place of that of its name.

        The store is then not finished, if it was. The tensors are not copied.

        Raises:
            NotWritten: The disk is full or not writable. What was there before stays readable.
        """
        (self.directory / FINISHED).unlink(missing_ok=True)  # it knows other hashes
        self.add(name, tensors)

    def add(self, name: str, tensors: Mapping[str, Tensor], way_out: str = ELSEWHERE) -> str:
        """Add a shard of a new name to a store that may be finished; its hash.

        Whoever reads it sees what was finished before, until `finish` names the new shard as well.

        Raises:
            NotWritten: The disk is full or not writable. What was there before stays readable.
        """
        about = self._about(name)
        whole = {key: each.detach().cpu().contiguous() for key, each in tensors.items()}
        told = _digest(whole, about)
        # The format wants every tensor aligned: those of wide numbers first.
        order = sorted(whole, key=lambda key: (-whole[key].element_size(), key))
        fields: dict[str, Any] = {"__metadata__": {**about, "digest": told}}
        end = 0
        for key in order:
            each = whole[key]
            begin, end = end, end + each.nbytes
            place = {"shape": list(each.shape), "data_offsets": [begin, end]}
            fields[key] = {"dtype": DTYPES[each.dtype], **place}
        header = json.dumps(fields, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with replacing(self.path(name), way_out) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for key in order:
                file.write(whole[key].reshape(-1).view(torch.uint8).numpy().data)
        return told

    def unnamed(self) -> list[str]:
        """Shards that were added since the store was finished, in order of their names."""
        every = {path.stem for path in self.directory.glob(f"*{SUFFIX}")}
        return sorted(every - set(self.names()))

    def mapped(self, name: str, hold: bool | None = None) -> Mapping[str, Tensor]:
        """The tensors of a shard, memory-mapped: for one reading after the other.

        Compared with its hash the first time, and again where its file has changed.

        Args:
            name: Of the shard.
            hold: Whether they stay mapped for the next reading, which then is three times as fast
                where the system has the file in memory; None: where they are by now.

        Raises:
            StaleStore: It is not what was written.
        """
        path, seen = self.path(name), f"compared {name}"
        held, tensors = False, None
        if not path.is_file():
            raise self._altered(path, "no file in its place")
        if self.known.get(seen, (None,))[0] == (stamp := _stamp(path)):
            _, tensors = self.known[seen]
            held = tensors is not None
            if tensors is None:
                with safe_open(path, framework="pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}
        else:
            _, tensors = self._compared(name)
            stamp, _ = self.known.pop(path.name)
        stays = held if hold is None else hold
        self.known[seen] = (stamp, tensors if stays else None)
        return tensors

    def read(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a shard, memory-mapped: what is changed in them is changed in no file.

        Raises:
            FileNotFoundError: There is no such shard.
            StaleStore: It is not what was written.
        """
        _, tensors = self._compared(name)
        del self.known[self.path(name).name]  # theirs now, who may change them
        return tensors

    def finish(self, facts: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
        """Say how the numbers came about, as JSON, once all of them are there.

        Args:
            facts: What to say.
            names: Of which shards; None: of all that are there. Those that an earlier
                `finished.json` names are not read again, since their hash is known.

        Raises:
            StaleStore: A shard is damaged.
            NotWritten: The disk is full or not writable.
        """
        if names is None:
            self._finish({name: self._compared(name)[0] for name in self.names()}, facts)
            return
        told = {} if self._finished is None else self._finished.shards
        self._finish({n: told[n] if n in told else self._compared(n)[0] for n in names}, facts)

    @property
    def facts(self) -> dict[str, Any] | None:
        """What `finish` was told; None where it was not, or a shard is no longer there.

        Raises:
            StaleStore: It cannot be read.
        """
        finished = self._finished
        if finished is None or not all(self.path(name).exists() for name in finished.shards):
            return None
        return dict(finished.facts)

    def require_finished(self) -> dict[str, Any]:
        """What `finish` was told.

        Raises:
            ShapeError: It was not, or a shard is no longer there.
        """
        if (facts := self.facts) is None:
            raise ShapeError(
                "What is read is all there, with how it came about.",
                f"{self.directory}, where some of it is missing.",
                "a pass that was interrupted, or files that were removed.",
                f"ask again to finish it: {self.again}.",
            )
        return facts

    def verify(self) -> None:
        """See that every shard is what was written.

        Raises:
            StaleStore: One is not.

        Cost: reads all of them, but for those that were read before and have not changed.
        """
        for name in self.names():
            self._compared(name)

    @property
    def digest(self) -> str:
        """The hash of a finished store, as its header tells it."""
        self.require_finished()
        assert self._finished is not None
        return own_digest(self._finished.shards)

    # -- files ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": {}}  # maps of files stay in their process

    def _others(self, description: Mapping[str, str], shape: tuple[int, ...]) -> list[str]:
        """What is another in a description."""
        names = sorted({*description, *self.description})
        found = [k for k in names if description.get(k) != self.description.get(k)]
        return found + (["shape"] if shape != self.shape else [])

    def _about(self, name: str) -> dict[str, str]:
        """What a shard says of itself: of what it is, and which."""
        of = own_digest({"description": dict(self.description), "shape": list(self.shape)})
        return {"schema": str(SCHEMA), "of": of, "place": name}

    def _begin(self) -> None:
        about = {"description": dict(self.description), "shape": list(self.shape)}
        write_json(self.directory / MANIFEST, SCHEMA, {**about, "begun": dict(self.begun)})

    def _finish(self, shards: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        told = {"shards": dict(shards), "facts": dict(facts)}
        write_json(self.directory / FINISHED, SCHEMA, told)

    @property
    def _finished(self) -> _Finished | None:
        path = self.directory / FINISHED
        way_out = f"delete the file {path} and ask again: {self.again}; nothing is computed again."
        try:
            found: _Finished = self._once(path, lambda: read_json(path, SCHEMA, _Finished, way_out))
        except FileNotFoundError:
            return None
        return found

    def _compared(self, name: str) -> tuple[str, Mapping[str, Tensor]]:
        """The hash and the tensors of a shard that is what was written."""
        path = self.path(name)
        found: tuple[str, Mapping[str, Tensor]] = self._once(path, lambda: self._opened(name))
        finished = self._finished
        if finished is not None and finished.shards.get(name, found[0]) != found[0]:
            raise self._altered(path, f"other numbers than {FINISHED} names")
        return found

    def _opened(self, name: str) -> tuple[str, Mapping[str, Tensor]]:
        path = self.path(name)
        if not path.is_file():  # a pipe would be waited for
            raise self._altered(path, "no file in its place")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                about = dict(file.metadata() or {})
        except UNREADABLE as error:
            raise self._altered(path, f"unreadable bytes: {error}") from error
        told = about.pop("digest", "no hash")
        if about != self._about(name):
            raise self._altered(path, "the numbers of something else")
        if told != _digest(tensors, about):
            raise self._altered(path, "altered numbers")
        return told, tensors

    def _altered(self, path: Path, given: str) -> StaleStore:
        return stale(path, given, f"delete the file and ask again: {self.again}.")

    def _once(self, path: Path, read: Callable[[], Any]) -> Any:
        """What a file says, read again only where it has changed."""
        stamp = _stamp(path)
        if self.known.get(path.name, (None, None))[0] != stamp:
            self.known[path.name] = (stamp, read())
        return self.known[path.name][1]


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes where a file does."""
    state = path.stat()
    return (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


def stale(path: Path, given: str, way_out: str) -> StaleStore:
    """The error about a file that is not what was written."""
    required = "A file of numbers must be what was written."
    cause = "a file edited, copied from elsewhere, or damaged by the disk or on its way."
    return StaleStore(required, f"{path} with {given}.", cause, way_out)


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """The hash of tensors and of what they are about."""
    parts = [part for name in sorted(tensors) for part in (name, tensors[name])]
    return digest(json.dumps(dict(about), sort_keys=True), *parts)
