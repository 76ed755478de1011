"""run.toml: what a run asks, of what, with which settings.

Enough to repeat it, and to refuse another. Objects of the user's are named, not kept: fingerprints
say whether they are still the same.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from upweight.errors import StaleStore
from upweight.runtime.atomic import write_whole
from upweight.runtime.headers import read_toml

SCHEMA = 1

WAY_OUT = (
    "correct the file, or take it from a copy of the run; or start a new run: `upweight attribute` "
    "with another --out."
)


@dataclass(frozen=True)
class Record:
    """What run.toml holds.

    Args:
        directory: Where names of files count from; relative to the run.
        task, train, queries: The user's objects, as `file.py:name`.
        method, measure: Specs as text, or objects as `file.py:name`. Their seeds are in the text.
        memory_bytes: What a batch may take; 0: the method's own choice.
        threads: Of PyTorch. Fixed, because sums round by how they are shared out.
        n, q, p: Training examples, queries, parameters.
        fingerprints: Hashes of the model, the task, the data, the method and the measure.
        sources: Hashes of the user's files.
        versions: Of the libraries.
        environment: Libraries and machine that the bits depend on; empty in runs of upweight 0.1.0.
        files: Hashes, or sizes, of the files of weights and data that the user's files read.
        show: What the page shows beside the data, as `file.py:name`; empty: nothing.
        recipe: How the model was trained, for a method that looks at it: a spec, or a recipe or a
            trajectory as `file.py:name`; empty: the method was told nothing.
        notes: Why the method was chosen, and what could not be used; empty where it was given.
    """

    directory: str
    task: str
    train: str
    queries: str
    method: str
    measure: str
    memory_bytes: int
    threads: int
    n: int
    q: int
    p: int
    fingerprints: Mapping[str, str]
    sources: Mapping[str, str]
    versions: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    show: str = ""
    recipe: str = ""
    notes: tuple[str, ...] = ()

    @property
    def asked(self) -> dict[str, list[str]]:
        """The files and modules that it names, each with the objects in it."""
        found: dict[str, list[str]] = {}
        others = filter(is_reference, (self.method, self.measure, self.recipe, self.show))
        for text in (self.task, self.train, self.queries, *others):
            source, _, name = text.rpartition(":")
            found.setdefault(source, []).append(name)
        return found

    @property
    def begun(self) -> dict[str, Any]:
        """With what it is computed, as the manifest of its scores has it too."""
        names = ("memory_bytes", "threads", "versions", "environment")
        return {name: asdict(self)[name] for name in names}

    def write(self, path: Path) -> None:
        """Whole or not at all; an OSError where the disk is full or not writable."""
        text = tomli_w.dumps({"schema": SCHEMA, **asdict(self)})
        write_whole(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> "Record":
        """What `write` wrote.

        Raises:
            FileNotFoundError: There is none.
            StaleStore: It is not what `write` writes.
        """
        record = read_toml(path, SCHEMA, cls, WAY_OUT)
        for name, (words, fits) in RANGES.items():
            if not fits(getattr(record, name)):
                raise StaleStore(
                    f"`{name}` in run.toml must be {words}.",
                    f"{path}, where it is {getattr(record, name)!r:.80}.",
                    "a file edited by hand.",
                    WAY_OUT,
                )
        return record

    def differences(self, other: "Record") -> list[str]:
        """How another record differs in what the scores depend on, in words.

        Names of files and objects may differ; what they hold may not.
        """
        found, seen = [], set()
        for name in ("method", "recipe", "measure", "memory_bytes"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                seen.add(name)
                found.append(f"{name} is {theirs or 'none'}\n      and was {mine or 'none'}")
        return found + self.changed(other.fingerprints, seen)

    def changed(self, fingerprints: Mapping[str, str], but: Collection[str] = ()) -> list[str]:
        """Which of the objects are no longer those of the record, in words."""
        return [
            f"{words} not what it was"
            for name, words in CONTENTS.items()
            if name not in but and self.fingerprints.get(name) != fingerprints.get(name)
        ]


def is_reference(text: str) -> bool:
    """Whether a text names an object of the user's: specs have no colon outside of quotes."""
    source, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and not set(source) & set("()'\"")


def is_path(text: str) -> bool:
    """Whether a text could be the path of a file: systems take no longer names, nor a NUL."""
    parts = text.replace("\\", "/").encode().split(b"/")
    return "\0" not in text and len(text) < 2000 and max(map(len, parts)) < 256


def relative_to(path: Path, folder: Path) -> str:
    """A path as seen from a folder; the whole path where there is no way from one to the other."""
    try:
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:  # another drive
        return str(path.absolute())


def _source(text: str) -> str:
    return text.rpartition(":")[0] if is_reference(text) else ""


RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("n", "q", "p"), ("1 or more", lambda count: count >= 1)),
    "threads": ("from 1 to 4096", lambda count: 1 <= count <= 4096),
    "memory_bytes": ("0 or more", lambda size: size >= 0),
    "directory": ("the path of a folder", lambda text: text != "" and is_path(text)),
    **dict.fromkeys(
        ("task", "train", "queries"), ("an object by name", lambda text: is_path(_source(text)))
    ),
    **dict.fromkeys(
        ("method", "measure", "recipe", "show"),
        ("a spec, or an object by name", lambda text: is_path(_source(text))),
    ),
}
"""What run.toml may say beyond its types, in words and as a test."""

CONTENTS = {
    "model": "the model's state is",
    "task": "the task (loss, penalty, forward, choice of parameters) is",
    "train": "the training set is",
    "queries": "the set of queries is",
    "method": "the method is",
    "measure": "the measure is",
    "history": "what is known of training is",
}
"""What is fingerprinted, and how to say that it changed."""
