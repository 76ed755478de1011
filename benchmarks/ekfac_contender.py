"""Run one contender of `ekfac.py` in this process, so that its time and failures are its own.

`ekfac.py` starts it; by hand: `python benchmarks/ekfac_contender.py NAME WORKLOAD.safetensors
FOLDER --n N --queries Q`. It writes `report.json` into the folder, anew after each stage, and if
all went well `scores.npy` (mapped to S) and `factors.safetensors`. NAME may be `plain_epoch`.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ekfac_contenders import CONTENDERS, Contender, Method
from ekfac_workloads import Problem, plain_epoch
from measure import peak_memory_bytes, timed, version
from safetensors.torch import save_file

PLAIN_EPOCH_RUNS = 5


class Report:
    """What is known so far, kept on disk in case the process is stopped."""

    def __init__(self, file: Path) -> None:
        self.file, self.facts = file, dict[str, Any]()

    def add(self, **facts: Any) -> None:
        """Write it down."""
        self.facts |= facts
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.facts))
        unfinished.replace(self.file)


def measure_contender(
    contender: Contender, given: argparse.Namespace, report: Report, problem: Problem
) -> Method:
    """Time the fit and the scores, `--runs` times; the last scores go into the folder."""
    fit_seconds, score_seconds = list[float](), list[float]()
    for run in range(given.runs):
        folder = given.folder / f"run-{run}"
        folder.mkdir(parents=True)
        fresh = Problem.load(given.workload, given.n, given.queries) if run else problem
        method = contender.make(fresh, json.loads(given.settings), given.seed, folder)
        report.add(stage="fit")
        start = time.perf_counter()
        method.fit()
        fit_seconds.append(time.perf_counter() - start)
        report.add(stage="scores", fit_seconds=fit_seconds, fit_peak_bytes=peak_memory_bytes())
        start = time.perf_counter()
        scores = method.scores(lambda done: report.add(scores_done=done))
        score_seconds.append(time.perf_counter() - start)
        report.add(score_seconds=score_seconds)
        if not run:
            report.add(peak_memory_bytes=peak_memory_bytes())
            np.save(
                given.folder / "scores.npy",
                contender.factor(problem) * scores.detach().float().numpy(),
            )
        del scores, fresh
    return method


def save_factors(method: Method, file: Path) -> None:
    """For `ekfac_truth.py`: the tensors of every layer, and their names as metadata."""
    tensors, described = {}, []
    for block in method.blocks():
        for part in ("left", "right", "eigenvalues"):
            tensors[f"{block.weight}/{part}"] = getattr(block, part).detach().contiguous().clone()
        described.append({"weight": block.weight, "bias": block.bias, "damping": block.damping})
    save_file(tensors, file, {"blocks": json.dumps(described)})


def run(given: argparse.Namespace, report: Report) -> None:
    """Everything that `report.json` says."""
    problem = Problem.load(given.workload, given.n, given.queries)
    report.add(
        status="running",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        peak_memory_bytes_before=peak_memory_bytes(),
    )
    if given.name == "plain_epoch":
        _, seconds, peak = timed(lambda: plain_epoch(problem), PLAIN_EPOCH_RUNS)
        report.add(status="ok", seconds=seconds, peak_memory_bytes=peak)
        return
    contender = next(c for c in CONTENDERS if c.name == given.name)
    missing = [m for m in contender.modules if importlib.util.find_spec(m) is None]
    if missing:
        report.add(status="not installed", why=f"no module {', '.join(missing)}")
        return
    # A library is imported before the clock starts, as a user's session has it already.
    importlib.import_module(contender.modules[0])
    report.add(version=version(contender.distribution))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method = measure_contender(contender, given, report, problem)
    report.add(warnings=sorted({f"{w.category.__name__}: {w.message}"[:300] for w in caught}))
    report.add(details=method.details())
    save_factors(method, given.folder / "factors.safetensors")
    report.add(status="ok")


def main() -> None:
    """Whatever happens, a report is written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("workload", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--queries", type=int, required=True)
    parser.add_argument("--settings", default="{}", help="JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    report = Report(given.folder / "report.json")
    try:
        run(given, report)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report.add(status="failed", why=f"{type(error).__name__}: {lines[0]}")
        raise


if __name__ == "__main__":
    main()
