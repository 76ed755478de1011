"""One process at a time in a folder, or at a part of the work in it.

folder/.lock           locked by the operating system, and released when it exits for any reason
folder/.holder         who holds it, for the one that is refused
folder/.NAME.claim     locked in the same way by the process that makes the part of that name
"""

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from upweight.errors import InUse, StaleStore
from upweight.runtime.atomic import contents, not_written, write_whole

FILES = (".lock", ".holder")

CLAIM = ".claim"

WAY_OUT = "free space, or copy the folder to another disk and work there."


@contextlib.contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Hold a folder.

    Raises:
        InUse: Another process holds it.
        StaleStore: What should be locked is a link, or no file.
        NotWritten: The folder is not writable.
    """
    lock, holder = FileLock(folder / FILES[0]), folder / FILES[1]
    _require_plain(folder / FILES[0])
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = "another process"
        with contextlib.suppress(OSError):  # it writes its name a moment after it has the lock
            who = contents(holder)[:300].decode("utf-8", "replace")
        raise InUse(
            "One process at a time works in a folder.",
            f"{folder}, held by {who}.",
            "the same command in another terminal or job.",
            "wait for it or stop it; a process that was killed holds nothing.",
        ) from error
    except OSError as error:
        raise not_written(folder / FILES[0], error, WAY_OUT) from error
    try:
        since = datetime.now().isoformat(" ", "seconds")
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}: {purpose}"
        write_whole(holder, who.encode(), WAY_OUT)
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that became read-only
            holder.unlink()
        lock.release()


@contextlib.contextmanager
def claimed(
    folder: Path,
    name: str,
    *,
    wait: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> Iterator[bool]:
    """Whether this process has a part of the work in a folder to itself, while in the block.

    The claim ends with the process, however that ends: what it left undone may be claimed again.
    Who has waited looks first whether it was done meanwhile.

    Args:
        folder: Where.
        name: Of the part.
        wait: Whether to wait for another process that has it, rather than be told False.
        meanwhile: What to do while waiting, again and again.

    Raises:
        StaleStore: What should be locked is a link, or no file.
        NotWritten: The folder is not writable.
    """
    path = folder / f".{name}{CLAIM}"
    _require_plain(path)
    lock, is_mine = FileLock(path), True
    try:
        while True:
            try:
                lock.acquire(timeout=-1 if wait and meanwhile is None else 0)
                break
            except Timeout:
                if not wait or meanwhile is None:
                    is_mine = False
                    break
                meanwhile()
    except OSError as error:
        raise not_written(path, error, WAY_OUT) from error
    try:
        yield is_mine
    finally:
        lock.release()


def _require_plain(lock: Path) -> None:
    """Refuse to lock what is another file under a second name: to lock it may empty it."""
    try:
        found = lock.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise StaleStore(
            "What is locked is a file of the folder's own.",
            f"{lock}, a link or no file.",
            "a folder received from somebody.",
            "remove it; it holds nothing.",
        )
