"""Resources: where a method works and with what. None of it changes an answer but by rounding."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from upweight._typing import Folder
from upweight.errors import SpecError
from upweight.runtime.group import Group, SingleProcess
from upweight.runtime.store import Store

EVERY_SECONDS = 30.0
"""How much work an interruption may cost; writing takes a small share of it."""


@dataclass(eq=False)
class Checkpoint:
    """The state of a long computation in a folder: a kill at any instant leaves that of before."""

    store: Store
    written: float = field(default_factory=time.monotonic)

    def read(self) -> Mapping[str, Tensor] | None:
        """The state, or None where none was written yet.

        Raises:
            StaleStore: It is damaged.
        """
        return self.store.read("state") if self.store.names() else None

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self.written >= EVERY_SECONDS

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state in place of the one before.

        Raises:
            NotWritten: The disk is full or not writable. The state of before stays readable.
        """
        self.store.write("state", tensors)
        self.written = time.monotonic()


@dataclass(frozen=True)
class Resources:
    """What a computation may use.

    Args:
        memory_bytes: What one batch may take, and solved queries as much again; None: a share of
            what is free.
        jobs: Processes for retraining, in `fitted.check`; None: this one.
        folder: Where to keep what takes long to fit (a curvature while it grows), so that an
            interrupted fit resumes from it; None: nowhere.
        group: The processes that share the work: one, for now.
        progress: Whether retraining, in `fitted.check`, draws a progress bar.

    Raises:
        SpecError: The group has several processes.
    """

    memory_bytes: int | None = None
    jobs: int | None = None
    folder: Folder | None = None
    group: Group = field(default_factory=SingleProcess)
    progress: bool = True

    def __post_init__(self) -> None:
        if self.group.size != 1:
            raise SpecError(
                "Scores are computed by one process.",
                f"a group of {self.group.size}.",
                "a group of several processes, which no method shares its work with yet.",
                "leave the group out; or let each process ask about some of the queries, "
                "as_data(queries).subset(...).",
            )

    def checkpoint(self, description: Callable[[], Mapping[str, str]]) -> Checkpoint | None:
        """Where to keep the state of what is described; None where there is no folder.

        Args:
            description: () -> what the state depends on.

        Raises:
            StaleStore: The folder holds that of something else.
            NotWritten: The folder cannot be written.
        """
        if self.folder is None:
            return None
        return Checkpoint(Store.open(self.folder, description(), again="the same fit"))
