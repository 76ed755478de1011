"""One process at a time in a folder.

folder/.lock       locked by the operating system, which lets go when the process ends, however
folder/.holder     who holds it, for the one that is refused
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from upweight.errors import InUse, message

FILES = (".lock", ".holder")


@contextlib.contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Hold a folder.

    Args:
        folder: Exists.
        purpose: What for, as the refused process will be told.

    Raises:
        InUse: Another process holds it.
    """
    lock, holder = FileLock(folder / FILES[0]), folder / FILES[1]
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        # The holder writes its name a moment after it has the lock.
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise InUse(
            message(
                "One process at a time works in a folder.",
                f"{folder}, held by {who}.",
                "the same command in another terminal or job.",
                "wait for it or stop it; a process that was killed holds nothing.",
            )
        ) from error
    try:
        since = datetime.now().isoformat(" ", "seconds")
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}: {purpose}"
        holder.write_text(who, encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
