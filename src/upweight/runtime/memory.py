"""How much memory may a pass use, and how many examples fit into it?"""

import os
from pathlib import Path

import torch

from upweight.errors import SpecError, message

SHARE = 0.25
"""Of the memory that is free, how much a pass may take when the user sets no budget."""

ENOUGH = 256 * 2**20
"""More than this makes no pass faster: matrix products are at full speed long before."""


def working_bytes(device: torch.device, budget: int | None) -> int:
    """The bytes that one pass may use for a batch.

    Args:
        device: Where the pass runs.
        budget: What the user allows; None: a quarter of what is free, and no more than is useful.

    Raises:
        SpecError: The budget is not positive.
    """
    if budget is None:
        return min(int(SHARE * free_bytes(device)), ENOUGH)
    if budget <= 0:
        raise SpecError(
            message(
                "A memory budget is a positive number of bytes.",
                f"memory_bytes={budget!r}.",
                "gigabytes given as a plain number, or a subtraction that went below zero.",
                "memory_bytes=2 * 2**30 allows 2 GiB; None takes a share of what is free.",
            )
        )
    return budget


def kept_bytes(device: torch.device, budget: int | None, used: int) -> int:
    """The bytes that may stay taken from one pass to the next.

    Args:
        device: Where the passes run.
        budget: What the user allows; None: a quarter of what is free.
        used: What the passes themselves use of it.
    """
    allowed = int(SHARE * free_bytes(device)) if budget is None else budget
    return max(0, allowed - used)


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now, on a GPU or on this machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Elsewhere: half of what is installed, for want of a portable count of what is free.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def examples_within(budget: int, bytes_per_example: int, most: int) -> int:
    """How many examples to take at once: a power of two, at least 1, at most `most`."""
    fit = max(1, min(most, budget // max(1, bytes_per_example)))
    return 1 << (fit.bit_length() - 1)


def require_room(q: int, n: int, dtype: torch.dtype, device: torch.device, way_out: str) -> None:
    """Refuse, before anything is computed or read, a matrix of scores that memory cannot hold.

    Args:
        q: Its rows.
        n: Its columns.
        dtype: Of its numbers.
        device: Where it would be.
        way_out: What to do instead.

    Raises:
        SpecError: It does not fit.
    """
    needed, free = q * n * dtype.itemsize, free_bytes(device)
    if needed > free:
        raise SpecError(
            message(
                "All scores at once must fit into memory.",
                f"{q} × {n} scores of {needed / 1e9:.1f} GB, with {free / 1e9:.1f} GB free.",
                "a large training set with many queries.",
                way_out,
            )
        )
