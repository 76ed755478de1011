"""Checkpoint: the state of a long computation on disk, as named tensors in one file.

    directory/state.safetensors      tensors, and in the header what they belong to

Written beside its place and then renamed: a kill at any instant leaves the state of before. The
header holds the hash of a description; state of another description is refused, never overwritten.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import StaleStore, message
from upweight.runtime.fingerprint import digest
from upweight.runtime.whole import write_whole

SCHEMA = "1"

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
            OSError: The folder cannot be made.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
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
        try:
            with safe_open(self.file, framework="pt") as file:
                header = file.metadata() or {}
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise StaleStore(
                self._stale(f"bytes that are no safetensors file ({error})")
            ) from error
        if header.get("schema") != SCHEMA or header.get("description") != self.description:
            raise StaleStore(self._stale("the state of other parameters, data or settings"))
        return tensors

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self.clock["written"] >= EVERY_SECONDS

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state in place of the one before.

        Raises:
            OSError: The disk is full or not writable. The state of before stays readable.
        """
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        header = {"schema": SCHEMA, "description": self.description}
        write_whole(self.file, save(whole, header))
        self.clock["written"] = time.monotonic()

    def _stale(self, given: str) -> str:
        return message(
            "What is kept in a folder must belong to this model, these data and these settings.",
            f"{self.file} with {given}.",
            "training went on, the data changed, or another method used the same folder.",
            "give another folder, or delete this one; it is then computed anew.",
        )
