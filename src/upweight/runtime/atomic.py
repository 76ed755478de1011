"""Files that are whole or not there: a kill at any instant leaves what was there before.

A file is made beside its place, under a random name that must not exist, and then renamed. So no
link that somebody planted is written through, and two machines never write into one file. While it
is made it is locked: what a process that was killed left behind is told from what another writes,
without asking a clock.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from upweight.errors import NotWritten, StaleStore

try:
    import fcntl
except ImportError:  # Windows, where what killed processes left behind stays
    fcntl = None  # type: ignore[assignment]

LEFT_BEHIND = re.compile(r".+\.[0-9a-f]{16}\.part")

CAUSES = {
    errno.ENOSPC: "a full disk",
    errno.EDQUOT: "a full quota",
    errno.EROFS: "a file system that is mounted for reading only",
    errno.EACCES: "a folder that another user owns",
    errno.EPERM: "a folder that another user owns",
    errno.EISDIR: "a folder of that name",
    errno.EEXIST: "a file of that name",
    errno.ENOTDIR: "a file where a folder is meant",
}

ELSEWHERE = "free space, or name a folder on another disk."


@contextlib.contextmanager
def replacing(target: Path, way_out: str = ELSEWHERE) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading; it takes its place where the block ends well.

    Raises:
        NotWritten: The disk is full or not writable. What stood there before is as it was.
    """
    staged = None
    try:
        staged, file = _made(target)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
            if fcntl is not None:  # while it is locked; elsewhere an open file cannot be renamed
                os.replace(staged, target)
        if fcntl is None:
            os.replace(staged, target)
    except BaseException as error:
        if staged is not None:
            with contextlib.suppress(OSError):  # of a disk where nothing can be removed either
                staged.unlink()
        if isinstance(error, OSError) and not isinstance(error, NotWritten):
            raise not_written(target, error, way_out) from error
        raise


def write_whole(target: Path, contents: bytes, way_out: str = ELSEWHERE) -> None:
    """Write a file, as `replacing` does.

    Raises:
        NotWritten: As there.
    """
    with replacing(target, way_out) as file:
        file.write(contents)


def make_folder(folder: Path, way_out: str = ELSEWHERE) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        NotWritten: The disk is full or not writable, or a file of that name is there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error, way_out) from error


def append(target: Path, text: str) -> None:
    """Add to the end of a text file, which is made where there is none.

    Raises:
        NotWritten: The disk is full or not writable.
        StaleStore: It is a link, or no file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _never_through_links()
    if target.is_symlink():
        raise _not_own(target, "a link")
    try:
        with open(os.open(target, flags, 0o666), "ab") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                file.write(text.encode("utf-8", "replace"))
                return
    except OSError as error:
        raise not_written(target, error, ELSEWHERE) from error
    # Under another name it may be a file of somebody else's, or of a backup made by such names.
    write_whole(target, contents(target) + text.encode("utf-8", "replace"))


def contents(path: Path) -> bytes:
    """What a file holds; a pipe or a device is not waited for.

    Raises:
        OSError: There is none, or it is no file.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "neither a file nor a folder", str(path))
        return file.read()


def remove_left_over(folder: Path) -> None:
    """Remove the files of this folder that were being made by processes that are no more."""
    if fcntl is None:
        return
    for path in folder.glob("*.part"):
        if LEFT_BEHIND.fullmatch(path.name):
            with contextlib.suppress(OSError):  # somebody writes it, or has just finished it
                with open(os.open(path, os.O_RDWR | _never_through_links()), "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def require_own(folder: Path) -> None:
    """Refuse a folder that holds anything but files and folders, at any depth.

    Whoever gave it away may have planted links in it, to be read or written through.

    Raises:
        StaleStore: It does.

    Cost: one listing.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise _not_own(path, "a link" if path.is_symlink() else "no file")


def _made(target: Path) -> tuple[Path, BinaryIO]:
    """A file beside its place that no other process has, locked until it is closed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _never_through_links()
    while True:
        staged = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
        file = open(os.open(staged, flags, 0o666), "w+b")
        if fcntl is None:
            return staged, file
        with contextlib.suppress(OSError):  # of file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # Another may have taken it for one that was left behind, before it was locked.
        if os.fstat(file.fileno()).st_nlink == 1:
            return staged, file
        file.close()


def _never_through_links() -> int:
    return sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def not_written(target: Path, error: OSError, way_out: str) -> NotWritten:
    """The error about a file that the system refused to write."""
    found = NotWritten(
        "A file must be written whole.",
        f"{target}: {error.strerror or str(error) or type(error).__name__}.",
        f"{CAUSES.get(error.errno or 0, 'a disk or folder that takes no new files')}.",
        way_out,
    )
    found.errno = error.errno
    found.add_note(f"{target} was not written; what {target.parent} held before is whole.")
    return found


def _not_own(path: Path, given: str) -> StaleStore:
    return StaleStore(
        "A folder that upweight writes holds files and folders of its own, and no links.",
        f"{path}, which is {given}.",
        "a folder received from somebody, or a part of it that was moved and linked to.",
        "remove it; or put what it points to in its place, if that is yours.",
    )
