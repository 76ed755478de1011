"""index.toml: of which model and which data an index is, by name, for whoever asks it later.

It is data, as run.toml is: a project or the folder of a model is used only where the user names it
again. Files of texts are read where they are named, if their hash is the one here: who knows the
hash of a file has had it.

The rows themselves know more: the index refuses another model, method or example.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tomli_w

from upweight.errors import StaleStore
from upweight.runs.record import relative_to
from upweight.runtime.atomic import require_own, write_whole
from upweight.runtime.fingerprint import sha256
from upweight.runtime.headers import read_toml

NAME = "index.toml"

SCHEMA = 1

FACTORS = "factors"
"""What the method keeps of its fit, within the index."""

WAY_OUT = (
    "correct the file, or take it from a copy of the index; or build anew: `upweight index build` "
    "with another --out."
)


@dataclass(frozen=True)
class Source:
    """Some of the examples.

    Args:
        name: A file, relative to the index; or an object of the user's as `file.py:name`.
        sha256: Of the file; empty for an object.
        rows: How many examples it holds.
    """

    name: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class IndexRecord:
    """What index.toml holds.

    Args:
        method: A spec.
        bytes_per_example, bits: As for `Index.build`.
        sources: What it was built on and extended with, in order.
        task: The user's object, as `file.py:name`; empty for the folder of a model.
        model: The folder of a model of transformers, relative to the index; or empty.
        column: The entry of a row that is the text.
        length: Tokens per text at most.
        versions: Of the libraries that built it.
    """

    method: str
    bytes_per_example: int
    bits: int
    sources: tuple[Source, ...]
    task: str = ""
    model: str = ""
    column: str = "text"
    length: int = 512
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Whole or not at all; a NotWritten where the disk is full or not writable."""
        text = tomli_w.dumps({"schema": SCHEMA, **asdict(self)})
        write_whole(folder / NAME, text.encode())

    @classmethod
    def read(cls, folder: Path) -> "IndexRecord":
        """What `write` wrote.

        Raises:
            StaleStore: There is none, it is not what `write` writes, or there are links beside it.
        """
        if not (folder / NAME).is_file():
            raise StaleStore(
                f"An index that the command line asks is a folder with an {NAME} in it.",
                f"{folder}, which {'has none' if folder.exists() else 'does not exist'}.",
                "another folder, or an index that was built in Python.",
                "name the --out of an `upweight index build …`; ask the other one in Python: "
                "upweight.Index.load(folder, fitted, data).",
            )
        require_own(folder)
        return read_toml(folder / NAME, SCHEMA, cls, WAY_OUT)


def file_source(path: Path, folder: Path, rows: int) -> Source:
    """A file of texts, seen from an index."""
    return Source(relative_to(path, folder), sha256(path), rows)
