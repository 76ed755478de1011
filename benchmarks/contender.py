"""Run one contender in this process, so that its time, memory and failures are its own.

`exact.py` starts it; by hand: `python benchmarks/contender.py NAME WORKLOAD.npz FOLDER`. It writes
`report.json` and, if all went well, `scores.npy` (mapped to S) into the folder. NAME may be
`plain_epoch`.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import peak_memory_bytes, timed, version
from softmax_contenders import CONTENDERS, Problem, plain_epoch

PLAIN_EPOCH_RUNS = 7


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
    if name == "plain_epoch":
        _, seconds, peak = timed(lambda: plain_epoch(problem), PLAIN_EPOCH_RUNS)
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
