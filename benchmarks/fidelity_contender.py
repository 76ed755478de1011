"""Run one contender of `fidelity.py` in this process: its time, memory and failures are its own.

By hand: `python benchmarks/fidelity_contender.py NAME PROBLEM.safetensors FOLDER`. It writes
`report.json` and, as far as it got, `scores.safetensors`. NAME may be `plain_epoch` or `training`.
"""

import argparse
import contextlib
import importlib
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from ekfac_contender import Report
from fidelity_methods import Contender
from fidelity_networks import Problem, plain_epoch
from measure import peak_memory_bytes, version
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PLAIN_EPOCH_RUNS = 5
TRAINING_RUNS = 3
MODULES = {
    "upweight": "upweight",
    "kronfluence": "kronfluence.analyzer",
    "pyDVL": "pydvl.influence.torch",
    "dattri": "dattri.algorithm",
    "captum": "captum.influence",
    "traker": "trak",
    "bergson": "bergson",
}


def contenders(name: str) -> dict[str, Contender]:
    """Ours or the peers': neither needs what the other one imports."""
    if name.startswith("upweight") or name == "loss":
        from fidelity_ours import OURS

        return {c.name: c for c in OURS}
    from fidelity_peers import PEERS

    return {c.name: c for c in PEERS}


def cpu_seconds(run: Callable[[], object], runs: int) -> float:
    """The fewest of some runs, of all threads: other work changes them less than wall time."""
    found = []
    for _ in range(runs):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return min(found)


def finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        said = f"{int((~values.isfinite()).sum())} of {values.numel()} scores are not finite"
        raise FloatingPointError(said)
    return values.detach().float().contiguous().clone()


def run(given: argparse.Namespace, report: Report) -> None:
    """Everything that `report.json` says."""
    problem = Problem.load(given.problem)
    report.add(status="running", threads=torch.get_num_threads(), memory_before=peak_memory_bytes())
    if given.name == "plain_epoch":
        seconds = cpu_seconds(lambda: plain_epoch(problem), PLAIN_EPOCH_RUNS)
        report.add(status="ok", seconds=seconds)
        return
    if given.name == "training":
        from fidelity_tasks import trained

        seconds = cpu_seconds(lambda: trained(problem.name, problem.X, problem.y), TRAINING_RUNS)
        report.add(status="ok", seconds=seconds)
        return
    contender = contenders(given.name)[given.name]
    library = contender.library
    if library != "none":
        try:
            # Before the clock starts, as a user's session has it already.
            importlib.import_module(MODULES[library])
        except ImportError as error:
            report.add(status="not installed", why=str(error))
            return
        report.add(version=version(library), imported=True)
    if library not in ("upweight", "none"):
        problem = problem.contained()
    tensors = dict[str, Tensor]()
    twice = problem.kind == "text" and library in ("pyDVL", "dattri")
    # PyTorch's fused attention has no second derivative on a CPU.
    attention = sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext()
    with warnings.catch_warnings(record=True) as caught, attention:
        warnings.simplefilter("always")
        method = contender.make(problem, given.folder)
        started, cpu_started = time.perf_counter(), time.process_time()
        method.fit()
        report.add(fit_seconds=time.perf_counter() - started)
        if given.themselves:
            tensors["self"] = finite(method.self_scores())
            report.add(self_seconds=time.perf_counter() - started)
        else:
            wall = dict[str, float]()
            for measure in contender.measures(problem):
                started = time.perf_counter()
                values = method.scores(measure)
                wall[measure] = time.perf_counter() - started
                if len(wall) == 1:
                    cpu = time.process_time() - cpu_started
                    report.add(peak_memory=peak_memory_bytes(), cpu_seconds=cpu)
                tensors[measure] = finite(values)
            report.add(score_seconds=wall)
    save_file(tensors, given.folder / "scores.safetensors")
    said = sorted({f"{w.category.__name__}: {w.message}"[:200] for w in caught})
    report.add(status="ok", warnings=said[:5])


def main() -> None:
    """Whatever happens, a report is written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("problem", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--themselves", action="store_true", help="self-influence in place of queries"
    )
    parser.add_argument("--memory-gb", type=float, default=6.0)
    given = parser.parse_args()
    most = round(given.memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    report = Report(given.folder / "report.json")
    try:
        run(given, report)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report.add(status="failed", why=f"{type(error).__name__}: {lines[0]}"[:300])
        raise


if __name__ == "__main__":
    main()
