"""Does `upweight view` answer any page of a million training examples × 1 000 queries in 100 ms?

A test of size: the scores are drawn at random (Student's t with 3 degrees of freedom, heavy-tailed
as scores are), written in shards as a pass would, and served by `upweight.view`. Each page
is asked over HTTP from this machine, at places drawn at random, after the file has been read once:
how long it takes from a disk is the disk's.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from environment import environment

from upweight.provenance import Provenance
from upweight.report import Display
from upweight.report.answers import Answers
from upweight.runtime.matrix import StoredMatrix
from upweight.scores import Scores
from upweight.view import Server
from upweight.view.totals import keeping_totals

HERE = Path(__file__).resolve().parent
SHARD = 10_000
"""Training examples of one file."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=int, default=1_000_000, help="training examples (default: 1000000)")
    add("--queries", type=int, default=1_000, help="queries (default: 1000)")
    add("--asked", type=int, default=50, help="times each kind of page is asked (default: 50)")
    add("--folder", type=Path, help="keep the scores here, and use those that are there")
    add("--out", type=Path, metavar="FILE", help="the result file (default: "
        "benchmarks/results/view.json for a run with all defaults, else none)")  # fmt: skip
    given = parser.parse_args()
    if given.out is None and (given.n, given.queries, given.asked) == (1_000_000, 1_000, 50):
        given.out = HERE / "results" / "view.json"
    return given


def main() -> None:
    """Write, open, ask."""
    given = arguments()
    where = environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        written(folder, given.n, given.queries)
        started = time.perf_counter()
        scores = Scores.open(folder)
        compared = time.perf_counter() - started
        draw = np.random.default_rng(0)
        labels = draw.integers(0, 10, given.n)
        started = time.perf_counter()
        display = Display(
            train_labels=labels,
            train_losses=draw.exponential(size=given.n),
            metadata={"source": draw.integers(0, 50, given.n)},
        )
        summed = keeping_totals(folder)
        Answers(scores, display, ask=False, summed=summed)
        prepared = time.perf_counter() - started
        started = time.perf_counter()
        Answers(scores, display, ask=False, summed=summed)
        kept = time.perf_counter() - started
        with Server(scores, display, keep=folder) as server:
            pages = {
                name: timed(server.address, paths)
                for name, paths in addresses(draw, given.n, given.queries, given.asked).items()
            }
    result: dict[str, Any] = {
        "n": given.n,
        "queries": given.queries,
        "seconds_open": compared,
        "seconds_totals": prepared,
        "seconds_kept_totals": kept,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "pages_ms": pages,
        "environment": where,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def written(folder: Path, n: int, q: int) -> None:
    """Generated scores, as a pass would leave them."""
    about = {"task": "generated", "method": "none: a size test"}
    shards = StoredMatrix.open(folder, about, shape=(q, n))
    if len(list(folder.glob("tile-*.safetensors"))) == -(-n // SHARD):
        return  # of an earlier run
    for start in range(0, n, SHARD):
        draw = np.random.default_rng(start)
        size = min(SHARD, n - start)
        values = draw.standard_t(3, (q, size)).astype(np.float32) / n
        shards.append(0, start, torch.from_numpy(values))
    made = Provenance("none", "generated", "none", n, q, 0, "float32", "cpu")
    shards.finish({"unit": "DERIVATIVE", "provenance": asdict(made)})


def addresses(draw: np.random.Generator, n: int, q: int, times: int) -> dict[str, list[str]]:
    """Pages of every kind, each elsewhere."""

    def ids(count: int) -> str:
        return ",".join(str(i) for i in draw.choice(n, count, replace=False))

    queries = draw.permutation(q)[:times]
    return {
        "the page itself": [""] * times,
        "a query": [f"query/{k}" for k in queries],
        "further down its ranking": [
            f"ranking/{k}/raised?start={draw.integers(n // 4)}" for k in draw.permutation(q)[:times]
        ],
        "dropping one": [f"drop?ids={ids(1)}" for _ in range(times)],
        "dropping twenty": [f"drop?ids={ids(20)}" for _ in range(times)],
        "the training set": ["training"] * times,
        "all examples": [f"browse/absolute?start={draw.integers(n)}" for _ in range(times)],
        "examples": [f"examples?ids={ids(24)}" for _ in range(times)],
    }


def timed(address: str, paths: list[str]) -> dict[str, float]:
    """Milliseconds from the request to the last byte of the answer."""
    parts = urlsplit(address)
    times = []
    for path in paths:
        url = f"http://{parts.netloc}/{path}{'&' if '?' in path else '?'}{parts.query}"
        started = time.perf_counter()
        with urllib.request.urlopen(url, timeout=60) as answer:
            answer.read()
        times.append(1000 * (time.perf_counter() - started))
    ordered = sorted(times)
    return {
        "median": statistics.median(ordered),
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
        "worst": ordered[-1],
    }


if __name__ == "__main__":
    main()
