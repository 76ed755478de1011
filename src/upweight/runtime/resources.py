"""Resources: where a method works and with what. None of it changes an answer but by rounding."""

from dataclasses import dataclass, field

from upweight._typing import Folder
from upweight.runtime.group import Group, SingleProcess


@dataclass(frozen=True)
class Resources:
    """What a computation may use.

    Args:
        memory_bytes: What one batch may take, and solved queries as much again; None: a share of
            what is free.
        jobs: Processes for retraining; None: as many as there are cores.
        folder: Where to keep what takes long to compute (a curvature while it grows, retrained
            models), so that an interrupted run resumes from it; None: nowhere.
        group: The processes that share the work.
        progress: Whether to draw progress bars, on a terminal or in a notebook.
    """

    memory_bytes: int | None = None
    jobs: int | None = None
    folder: Folder | None = None
    group: Group = field(default_factory=SingleProcess)
    progress: bool = True
