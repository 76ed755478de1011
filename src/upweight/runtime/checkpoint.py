"""Checkpoint: the state of a long computation on disk, as named tensors in one file.

    directory/state.safetensors      tensors, and in the header what they belong to

A kill at any instant leaves the state of before. The header holds the hash of the tensors and of a
description; state of another description is refused, never overwritten.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from upweight._typing import Folder
from upweight.errors import StaleStore
from upweight.runtime.fingerprint import digest
from upweight.runtime.tensors import read_tensors, write_tensors
from upweight.runtime.whole import make_folder, remove_left_over

SCHEMA = "2"

WAY_OUT = "give another folder, or delete this one; it is then computed anew."

EVERY_SECONDS = 30.0
"""How much work an interruption may cost; writing takes a small share of it."""


@dataclass(frozen=True)
class Checkpoint:
    """One state in one folder. Made by `Checkpoint.open`.

    Args:
        directory: The folder.
        description: The hash of what the state belongs to.
        clock: When it was last written, shared by all copies.
    """

    directory: Path
    description: str
    clock: dict[str, float] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, directory: Folder, *parts: Tensor | str) -> "Checkpoint":
        """The state in a folder that belongs to these tensors and texts; none yet for a new folder.

        Raises:
            NotWritten: The folder cannot be made.
        """
        folder = Path(directory)
        make_folder(folder)
        remove_left_over(folder)
        return cls(folder, digest(*parts), {"written": time.monotonic()})

    @property
    def file(self) -> Path:
        """Where the state is."""
        return self.directory / "state.safetensors"

    def read(self) -> dict[str, Tensor] | None:
        """The state, or None where none was written yet.

        Raises:
            StaleStore: It belongs to something else, or is damaged.
        """
        if not self.file.exists():
            return None
        tensors, about = read_tensors(self.file, WAY_OUT)
        if about != self._about:
            raise StaleStore(
                "What is kept in a folder must belong to this model, these data and these "
                "settings.",
                f"{self.file} with the state of other parameters, data or settings.",
                "training went on, the data changed, or another method used the same folder.",
                WAY_OUT,
            )
        return tensors

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self.clock["written"] >= EVERY_SECONDS

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state in place of the one before.

        Raises:
            NotWritten: The disk is full or not writable. The state of before stays readable.
        """
        write_tensors(self.file, tensors, self._about)
        self.clock["written"] = time.monotonic()

    @property
    def _about(self) -> dict[str, str]:
        return {"schema": SCHEMA, "description": self.description}
