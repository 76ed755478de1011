"""How much memory may a pass use, and how many examples fit into it?"""

import os
import re
from pathlib import Path

import psutil
import torch

from upweight.errors import SpecError

SHARE = 0.25
"""Of the memory that is free, how much a pass may take when the user sets no budget."""

QUERY_SHARE = 0.5
"""Of the memory that is free, how much solved queries may take when the user sets no budget."""

CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self")

UNLIMITED = 2**60
"""Control groups without a limit say so by a number beyond any memory."""

ENOUGH = 512 * 2**20
"""More than this made no pass faster: on two cores EK-FAC of a small language model was fitted in
3.0 plain epochs with half of it, in 2.4 with it, and in 2.5 with twice as much."""


def working_bytes(device: torch.device, budget: int | None) -> int:
    """The bytes that one pass may use for a batch.

    The budget is what the user allows; None: a quarter of what is free, and no more than is useful.

    Raises:
        SpecError: The budget is not positive.
    """
    if budget is None:
        return min(int(SHARE * free_bytes(device)), ENOUGH)
    if budget <= 0:
        raise SpecError(
            "A memory budget is a positive number of bytes.",
            f"memory_bytes={budget!r}.",
            "gigabytes given as a plain number, or a subtraction that went below zero.",
            "memory_bytes=2 * 2**30 allows 2 GiB; None takes a share of what is free.",
        )
    return budget


def solved_bytes(device: torch.device, budget: int | None) -> int:
    """The bytes that solved queries may take while the training set streams past them.

    The budget is what the user allows; None: half of what is free.
    """
    return int(QUERY_SHARE * free_bytes(device)) if budget is None else budget


def kept_bytes(device: torch.device, budget: int | None, used: int) -> int:
    """The bytes that may stay taken from one pass to the next, which themselves take `used`."""
    allowed = int(SHARE * free_bytes(device)) if budget is None else budget
    return max(0, allowed - used)


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now, on a GPU or on this machine.

    There the least of what the machine has free and what the container and the process may take.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([psutil.virtual_memory().available, *_container_bytes(), *_process_bytes()]))


def _container_bytes() -> list[int]:
    """What the control groups of this process leave, of either version and at every level."""
    free = []
    for line in _text(PROCESS / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be that of the host, and its own group is mounted at the root.
        names = [name for name in path.split("/") if name]
        for depth in range(len(names), -1, -1):
            group = os.path.join(root, *names[:depth])
            most = _text(f"{group}/{limit}").strip()
            if not most.isdigit() or int(most) >= UNLIMITED:
                continue
            taken = _text(f"{group}/{used}").strip()
            if taken.isdigit():
                # Files that were read and are not in use count as taken, and give way.
                given_back = re.search(rf"^{cache} (\d+)$", _text(f"{group}/memory.stat"), re.M)
                free.append(int(most) - int(taken) + int(given_back[1] if given_back else 0))
    return free


def _process_bytes() -> list[int]:
    """What the limits of this process leave: of its address space, and of its data."""
    if not hasattr(psutil, "RLIMIT_DATA"):  # neither Linux nor FreeBSD
        return []
    import resource  # not on Windows

    space, data = (resource.getrlimit(k)[0] for k in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if space == data == resource.RLIM_INFINITY:  # as nearly always: nothing to read
        return []
    taken = psutil.Process().memory_info()
    limits = ((space, taken.vms), (data, taken.data))
    return [limit - used for limit, used in limits if limit != resource.RLIM_INFINITY]


def _text(path: str | Path) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def examples_within(budget: int, bytes_per_example: int, most: int) -> int:
    """How many examples to take at once: a power of two, at least 1, at most `most`."""
    fit = max(1, min(most, budget // max(1, bytes_per_example)))
    return 1 << (fit.bit_length() - 1)


def require_room(q: int, n: int, dtype: torch.dtype, device: torch.device, way_out: str) -> None:
    """Refuse, before anything is computed or read, q × n scores that memory cannot hold."""
    require_bytes(q * n * dtype.itemsize, f"{q} × {n} scores", device, way_out)


def require_bytes(needed: int, what: str, device: torch.device, way_out: str) -> None:
    """Refuse, before it is asked of the system, what memory cannot hold.

    Raises:
        SpecError: It does not fit; says `what`, and the way out.
    """
    free = free_bytes(device)
    if needed > free:
        raise SpecError(
            "What is held at once must fit into memory.",
            f"{what}, {needed / 1e9:.1f} GB, with {free / 1e9:.1f} GB free.",
            "large data or a large model for a method that holds all of this, or a limit of "
            "the container or the process.",
            way_out,
        )
