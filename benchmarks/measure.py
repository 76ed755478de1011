"""What a contender measures of its own process: seconds, memory, versions."""

import platform
import resource
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

PROCESS_STATUS = Path("/proc/self/status")

T = TypeVar("T")


def peak_memory_bytes() -> int:
    """The most memory this process has held.

    Linux's VmHWM begins anew with each program; `getrusage` there begins with what the parent
    held when it started us. Elsewhere `getrusage` is what there is: bytes on macOS, else KiB.
    """
    if PROCESS_STATUS.exists():
        for line in PROCESS_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def timed(run: Callable[[], T], runs: int) -> tuple[T, list[float], int]:
    """The last result, the seconds of each run, and the peak memory after the first run."""
    start = time.perf_counter()
    result = run()
    seconds = [time.perf_counter() - start]
    peak = peak_memory_bytes()
    for _ in range(runs - 1):
        del result  # a run must not hold the memory of the one before
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, seconds, peak


def version(distribution: str) -> str:
    """The installed version, or what is known when the checkout itself is measured."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "checkout"
