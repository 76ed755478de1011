"""Resources: where a method works and with what. None of it changes an answer but by rounding."""

from dataclasses import dataclass, field

from upweight._typing import Folder
from upweight.errors import SpecError
from upweight.runtime.group import Group, SingleProcess


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
