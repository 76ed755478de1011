"""Resources: where a method works and with what. None of it changes an answer but by rounding."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from upweight._typing import Folder
from upweight.runtime.matrix import StoredMatrix
from upweight.runtime.ranks import Ranks
from upweight.runtime.store import Store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        jobs: Processes for retraining, each on its share of the cores, through `joblib` and its
            current backend, −1: one per core; None: this one, which is best for recipes that train
            many models at once.
        folder: Where to keep what takes long (a curvature while it grows, retrained models), so
            that what was interrupted goes on from it; None: nowhere. No pickle.
        group: The processes that share the work, `torch.distributed.group.WORLD` under torchrun.
            All of them make the same calls, with the same model, data and folder. None: this one
            alone, also where others exist.
        progress: Whether retraining draws a progress bar on stderr, where that is a terminal.
    """

    memory_bytes: int | None = None
    jobs: int | None = None
    folder: Folder | None = None
    group: "ProcessGroup | None" = None
    progress: bool = True
    _ranks: Ranks | None = field(default=None, repr=False, compare=False)
    """Of `sharing`: an argument, so that `replace` keeps it."""

    @cached_property
    def ranks(self) -> Ranks:
        """The group, and which of it this process is."""
        own = self._ranks
        return Ranks(self.group) if own is None or own.group is not self.group else own

    def sharing(self, ranks: Ranks) -> "Resources":
        """The same, with these ranks of the group."""
        return replace(self, _ranks=ranks)

    def within(self, name: str) -> "Resources":
        """The same, with a folder of its own in the folder."""
        if self.folder is None:
            return self
        return replace(self, folder=Path(self.folder) / name)

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

    def matrix(
        self,
        name: str,
        shape: tuple[int, int],
        description: Callable[[], Mapping[str, str]],
        begun: Mapping[str, int],
    ) -> StoredMatrix | None:
        """A matrix that grows in a folder of its own in the folder; None where there is none.

        Args:
            name: Of its folder.
            shape: Of the whole.
            description: () -> what its numbers depend on.
            begun: How they are made, which whoever goes on does as well.

        Raises:
            StaleStore: The folder holds that of something else.
            NotWritten: The folder cannot be written.
        """
        if self.folder is None:
            return None
        return StoredMatrix.open(
            Path(self.folder) / name, description(), shape=shape, begun=begun, again="the same fit"
        )
