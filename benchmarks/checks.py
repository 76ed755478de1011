"""What do the checks before a number cost, beside the passes that they guard?

    python benchmarks/checks.py --data DIR

The workloads of `ekfac.py`, with networks as they are made (what a check costs does not depend on
training): seconds of `fit` and `attribute`, and how many of them are spent in each check. The goal
is a twentieth for all of them together.

Data: mnist.npz and brown.jsonl.gz, as for `ekfac.py`.
"""

import argparse
import functools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ekfac_networks import NETWORKS, SEED, as_inputs, images, sequences
from ekfac_workloads import WORKLOADS
from environment import DATA, environment

import upweight as uw
from upweight.methods import layered
from upweight.task import check
from upweight.task.seen import Seen
from upweight.task.snapshot import Snapshot

CHECKS: dict[Any, tuple[str, ...]] = {
    check: (
        "read_twice",
        "own_losses",
        "loss_notes",
        "require_same_losses",
        "require_own_measurements",
        "require_own_gradients",
        "unreached_notes",
    ),
    layered: ("require_own_losses",),
    Snapshot: ("of",),
    Seen: ("arrays",),
}
"""Where each check is called from, under which names."""

RESULTS = Path(__file__).resolve().parent / "results" / "checks.json"


def watched(seconds: dict[str, float]) -> Callable[[], None]:
    """Time every call of the checks; what it returns takes the clocks away again."""
    before = [
        (place, name, getattr(place, name)) for place, names in CHECKS.items() for name in names
    ]

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        return run

    for place, name, function in before:
        run = clocked(f"{getattr(place, '__name__', '')}.{name}", function)
        # What is bound to its class already takes no further `self`.
        is_bound = isinstance(place, type) and hasattr(function, "__self__")
        setattr(place, name, staticmethod(run) if is_bound else run)

    def restore() -> None:
        for place, name, function in before:
            setattr(place, name, function)

    return restore


def measured(name: str, folder: Path, n: int | None) -> dict[str, Any]:
    """Seconds of one workload, of its checks, and their share."""
    workload = WORKLOADS[name]
    torch.manual_seed(SEED)
    model = NETWORKS[workload.made_as][0]().eval()
    n = n or workload.n
    if workload.made_as == "gpt":
        data = sequences(folder / "brown.jsonl.gz", n, workload.queries)
    else:
        data = images(folder / "mnist.npz", n, workload.queries)
    inputs = as_inputs(workload.made_as)
    train = (inputs(data["X"]), data["y"].long())
    queries = (inputs(data["Xq"]), data["yq"].long())
    task = uw.Task(model, uw.CrossEntropy(), params=workload.params)
    seconds: dict[str, float] = {}
    restore = watched(seconds)
    started = time.perf_counter()
    try:
        fitted = uw.Influence(uw.EKFAC(), damping=workload.damping).fit(task, train)
        middle = time.perf_counter()
        fitted.attribute(queries)
        ended = time.perf_counter()
    finally:
        restore()
    total = ended - started
    return {
        "workload": name,
        "n": n,
        "queries": workload.queries,
        "fit_s": middle - started,
        "attribute_s": ended - middle,
        "checks_s": seconds,
        "share": sum(seconds.values()) / total,
    }


def main() -> None:
    """Measure and print; write with --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="see above")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["mlp", "cnn", "gpt"])
    parser.add_argument("--n", type=int, help="fewer training examples, for a quick look")
    parser.add_argument("--out", type=Path, help=f"where to write, such as {RESULTS.name}")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [measured(name, given.data, given.n) for name in given.workloads]
    for row in rows:
        print(
            f"{row['workload']:10} n {row['n']:6}  fit {row['fit_s']:6.2f} s  attribute "
            f"{row['attribute_s']:6.2f} s  checks {100 * row['share']:.1f} %"
        )
    if given.out is not None:
        whole = {"environment": environment(), "rows": rows}
        given.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
