"""Resources: where a method works and with what. None of it changes an answer but by rounding."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from upweight._typing import Folder
from upweight.errors import SpecError
from upweight.runtime.group import Group, SingleProcess


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
        group: The processes that share the work: one, for now.
        progress: Whether retraining draws a progress bar on stderr, where that is a terminal.

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

    def within(self, name: str) -> "Resources":
        """The same, with a folder of its own in the folder."""
        return self if self.folder is None else replace(self, folder=Path(self.folder) / name)
