"""Contenders in processes of their own, and a table of what they did."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from environment import ROOT


def process_environment(threads: int | None) -> dict[str, str]:
    """This checkout's sources first, and the same threads for all."""
    variables = dict(os.environ)
    paths = (str(ROOT / "src"), variables.get("PYTHONPATH", ""))
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if threads is not None:
        variables |= {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return variables


def made(file: Path, command: Iterable[Any], threads: int | None) -> None:
    """Run one of our programs, which makes a file."""
    print(f"making {file.name}", file=sys.stderr, flush=True)
    words = [sys.executable, *map(str, command)]
    subprocess.run(words, check=True, env=process_environment(threads))


def failure_of(
    command: Sequence[Any], timeout: float, threads: int | None
) -> dict[str, str] | None:
    """Run a contender, which writes its own report; why there may be none or not a whole one."""
    try:
        process = subprocess.run(
            [str(word) for word in command],
            check=False,
            timeout=timeout,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment(threads),
        )
    except subprocess.TimeoutExpired:
        return {"status": "timed out", "why": f"not finished after {timeout:.0f} s"}
    except OSError as error:
        return {"status": "failed", "why": str(error)}
    if process.returncode == 0:
        return None
    last = (process.stderr.strip().splitlines() or ["no message"])[-1]
    return {"status": "failed", "why": f"exit code {process.returncode}: {last}"}


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        text.append("  ".join([first.strip().ljust(widths[0]), *rest]))
    return "\n".join(text)
