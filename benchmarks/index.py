"""What does an index keep of EK-FAC's order, per byte, and what does it cost to build?

The fine-tuned model of `language_model.py` (2 049 440 parameters), its 1 024 passages and 64 others
of the same documents. Truth: the scores of `Influence(EKFAC(), damping)` without tolerance, with a
damping for each layer and with one for all. Against it, for each size of a row, the products of
rows, before any candidate is scored again:

    spearman, pearson   mean over the queries
    slope               ⟨Ŝ, S⟩/⟨S, S⟩; only of rows in the unit of EK-FAC
    recall@10           of the ten largest |S|, how many are among the ten largest |Ŝ|
    candidates          of the ten largest |S|, how many are among the 100 largest |Ŝ|
    lds                 of `language_fidelity.py`: by products, and with the 100 largest |Ŝ| of each
                        query replaced by S

Each size is an index of its own. `coordinates alone` are rows without a sketch. What a build and an
`extend` by a tenth cost is measured on some of the passages, in plain epochs of as many: forward
and backward, batch 64, processor seconds.

LoGra has another inverse than EK-FAC, so a part of its distance is another method and no loss.
Writes results/index.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from environment import DATA, environment  # noqa: E402
from language_fidelity import row, task  # noqa: E402
from language_model import passages  # noqa: E402
from torch import Tensor  # noqa: E402

import upweight as uw  # noqa: E402
from upweight.index import transform  # noqa: E402
from upweight.index.verification import verification  # noqa: E402

BATCH = 64
CANDIDATES = 100

DAMPINGS = {
    "one for all layers": uw.Absolute(0.03),
    "one for each layer": uw.Relative(0.1),
}
"""λ of all layers: twice the mean eigenvalue, which is .014."""

ROWS: tuple[tuple[int, int], ...] = ((4096, 1), (2048, 1), (4096, 2), (8192, 1), (16_384, 1))
"""Bytes of a row, and bits of a number."""

RANKS = (16, 8)
"""Of LoGra."""

TIMED = 640
"""Passages of the timed build, and a tenth of it appended."""


def cpu_seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and how long the processor worked on it."""
    start = time.process_time()
    return run(), time.process_time() - start


def plain_epoch(model: torch.nn.Module, X: Tensor, y: Tensor) -> None:
    """Forward and backward, with the gradient of the mean."""
    for start in range(0, len(X), BATCH):
        model.zero_grad()
        rows = slice(start, start + BATCH)
        logits = model(input_ids=X[rows], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), y[rows].flatten(), reduction="sum"
        )
        losses.backward()
    model.zero_grad()


def judged(found: Tensor, S: Tensor) -> dict[str, Any]:
    """What is left of EK-FAC in these scores, and what retraining says of them."""
    told = asdict(verification(found, S, 10, S.shape[1]))
    best, near = S.abs().topk(10).indices, found.abs().topk(CANDIDATES).indices
    told["candidates"] = float((best[:, :, None] == near[:, None, :]).any(dim=2).double().mean())
    first = found.abs().topk(CANDIDATES).indices
    told["lds"] = row(found)["lds"]
    told["lds_reranked"] = row(found.scatter(1, first, S.gather(1, first)))["lds"]
    return told


def by_bytes(
    fitted: Any, queries: Any, S: Tensor, sizes: Sequence[tuple[int, int]], sketched: float
) -> dict[str, Any]:
    """A row of the table for each size and number of bits."""
    table, usual = {}, transform.SKETCHED
    transform.SKETCHED = sketched
    for size, bits in sizes:
        with tempfile.TemporaryDirectory() as folder:
            index = uw.Index.build(fitted, None, folder, size, bits=bits)
            found = index.scores(queries).values
        kind = "" if sketched else ", coordinates alone"
        name = f"{index.bytes_per_example} bytes, {bits} bits{kind}"
        table[name] = judged(found, S) | {"bytes": index.bytes_per_example, "bits": bits}
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in table[name].items()}
        print(name, shown, flush=True)
    transform.SKETCHED = usual
    return table


def timed(fitted: Any, X: Tensor, y: Tensor, epoch: float) -> dict[str, float]:
    """A build of some passages and an `extend` by a tenth, in plain epochs of all passages."""
    more = TIMED + TIMED // 10
    with tempfile.TemporaryDirectory() as folder:
        build = lambda: uw.Index.build(fitted, (X[:TIMED], y[:TIMED]), folder, 4352)  # noqa: E731
        index, spent = cpu_seconds(build)
        rows = spent * index.seconds["rows"] / sum(index.seconds.values())
        _, added = cpu_seconds(lambda: index.extend((X[TIMED:more], y[TIMED:more])))
    share = TIMED / len(X) * epoch
    return {
        "rows_epochs": rows / share,
        "coordinates_epochs_of_128": (spent - rows) / (128 / len(X) * epoch),
        "extend_of_a_tenth": added / spent,
    }


def main() -> None:
    """Fit, score, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of brown.jsonl.gz")
    parser.add_argument("--out", type=Path, help="where to write; None: results/index.json")
    given = parser.parse_args()
    texts, subject = passages(given.data), task()
    (X, y), queries = texts.split(texts.train), texts.split(texts.queries)
    epoch = min(cpu_seconds(lambda: plain_epoch(subject.model, X, y))[1] for _ in range(2))
    result: dict[str, Any] = {
        "environment": environment(),
        "model": {"parameters": subject.layout.size},
        "epoch_cpu_seconds": epoch,
        "rows": {},
    }
    for name, damping in DAMPINGS.items():
        method = uw.Influence(uw.EKFAC(), damping=damping, tolerance=0.0)
        fitted, fit = cpu_seconds(lambda method=method: method.fit(subject, (X, y)))
        scores, asked = cpu_seconds(lambda fitted=fitted: fitted.attribute(queries))
        S = scores.values
        told = {"fit_epochs": fit / epoch, "scores_epochs": asked / epoch, "lds": row(S)["lds"]}
        told |= by_bytes(fitted, queries, S, ROWS, transform.SKETCHED)
        result["rows"][name] = told | by_bytes(fitted, queries, S, ROWS[:3], 0.0)
    for rank in RANKS:
        logra, spent = cpu_seconds(lambda rank=rank: uw.LoGra(rank=rank).fit(subject, (X, y)))
        found, numbers = logra.attribute(queries).values, logra.scorer.projection.width
        told = judged(found, S) | {"bytes": 2 * numbers, "bits": 16, "fit_epochs": spent / epoch}
        result["rows"][f"LoGra({rank}), as float16"] = told
    result["build"] = timed(fitted, X, y, epoch)
    out = given.out or ROOT / "benchmarks" / "results" / "index.json"
    out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
