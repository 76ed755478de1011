"""Files that are whole or not there: a kill at any instant leaves what was there before."""

import os
import time
from contextlib import suppress
from pathlib import Path

LEFT_BEHIND = 3600.0
"""Seconds without a change after which a staged file is that of a run that was killed."""


def write_whole(target: Path, contents: bytes) -> None:
    """Write a file beside its place, then rename it.

    Raises:
        OSError: The disk is full or not writable. A file that stood there before is as it was.
    """
    # Named by process: two runs that share a folder must not write into one file.
    staged = target.with_name(f"{target.name}.{os.getpid()}.part")
    with suppress(OSError):
        for other in target.parent.glob(f"{target.name}.*.part"):
            if time.time() - other.stat().st_mtime > LEFT_BEHIND:
                other.unlink()
    try:
        with staged.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        os.replace(staged, target)
    except OSError as error:
        with suppress(OSError):  # of a file that was not made, where nothing can be written
            staged.unlink()
        error.add_note(f"{target} was not written; what {target.parent} held before is whole.")
        raise
