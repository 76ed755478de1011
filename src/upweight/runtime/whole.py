"""Files that are whole or not there: a kill at any instant leaves what was there before."""

import os
from pathlib import Path


def write_whole(target: Path, contents: bytes) -> None:
    """Write a file beside its place, then rename it.

    Raises:
        OSError: The disk is full or not writable. A file that stood there before is as it was.
    """
    # Named by process: two runs that share a folder must not write into one file.
    staged = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with staged.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        os.replace(staged, target)
    except OSError as error:
        staged.unlink(missing_ok=True)
        error.add_note(f"{target} was not written; what {target.parent} held before is whole.")
        raise
