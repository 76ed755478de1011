"""Where a benchmark ran: without it a time says nothing."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
"""Where the data of the benchmarks are unless --data says otherwise."""

CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")


def environment() -> dict[str, Any]:
    """CPU, cores, memory, system, load, commit and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _field(CPU_INFO, "model name") or platform.processor(),
        "cpu_flags": [f for f in ("avx2", "avx512f", "amx_tile") if f in _flags()],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": _field(MEMORY_INFO, "MemTotal"),
        "system": platform.platform(),
        "load_at_start": os.getloadavg()[0],
        "commit": _commit(),
    }


def _field(file: Path, name: str) -> str:
    if not file.exists():
        return ""
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _flags() -> set[str]:
    return set(_field(CPU_INFO, "flags").split())


def _commit() -> str:
    """The commit measured, marked when files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
