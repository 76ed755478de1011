"""Run one contender in this process, so that its time, memory and failures are its own.

`exact.py` starts it; by hand: `python benchmarks/contender.py NAME WORKLOAD.npz FOLDER`. It writes
`report.json` and, if all went well, `scores.npy` (mapped to S) into the folder. NAME may be
`yardstick`.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import resource
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from softmax_contenders import CONTENDERS, Problem, yardstick

PROCESS_STATUS = Path("/proc/self/status")
YARDSTICK_RUNS = 7

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


def report_of(name: str, workload: Path, folder: Path) -> dict[str, Any]:
    """Time the contender; its scores go to `folder`, everything else is returned."""
    problem = Problem.load(workload)
    common = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "peak_memory_bytes_before": peak_memory_bytes(),
    }
    if name == "yardstick":
        _, seconds, peak = timed(lambda: yardstick(problem), YARDSTICK_RUNS)
        return {"status": "ok", "seconds": seconds, "peak_memory_bytes": peak, **common}
    contender = next(c for c in CONTENDERS if c.name == name)
    missing = [m for m in contender.modules if importlib.util.find_spec(m) is None]
    if missing:
        return {"status": "not installed", "why": f"no module {', '.join(missing)}", **common}
    # A library is imported before the clock starts, as a user's session has it already.
    importlib.import_module(contender.modules[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores, seconds, peak = timed(lambda: contender.scores(problem), contender.runs)
    np.save(folder / "scores.npy", contender.factor(len(problem.X)) * scores.numpy())
    return {
        "status": "ok",
        "version": version(contender.distribution),
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "warnings": sorted({f"{w.category.__name__}: {w.message}"[:300] for w in caught}),
        **common,
    }


def main() -> None:
    """Whatever happens, a report is written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("workload", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    try:
        report = report_of(given.name, given.workload, given.folder)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report = {"status": "failed", "why": f"{type(error).__name__}: {lines[0]}"}
        (given.folder / "report.json").write_text(json.dumps(report))
        raise
    (given.folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
