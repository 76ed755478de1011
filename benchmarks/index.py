"""What does an index keep of EK-FAC's order, per byte, and what does it cost to build?

A language model of bytes (`GPT` of `ekfac_networks.py`, 875 264 parameters) is trained for a while
on the Brown corpus. Truth: the scores of `Influence(EKFAC(), damping=Relative(0.1))` of some
training passages on passages of held-out documents, without tolerance. Against it, for each size of
a row, the products of an index, before any candidate is scored again:

    spearman, pearson   mean over the queries
    slope               ⟨Ŝ, S⟩/⟨S, S⟩; only of rows in the unit of EK-FAC
    recall@10           of the ten largest |S|, how many are among the ten largest |Ŝ|
    candidates          of the ten largest S, how many are among the 100 largest Ŝ
    build               CPU seconds for the rows, in plain epochs: forward and backward, batch 64

LoGra has another inverse than EK-FAC, so a part of its distance is another method and no loss.
Writes results/index.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from ekfac_networks import GPT, sequences, token_losses, train  # noqa: E402
from environment import DATA, environment  # noqa: E402
from torch import Tensor  # noqa: E402

import upweight as uw  # noqa: E402
from upweight.index.codes import Codes  # noqa: E402
from upweight.index.verification import verification  # noqa: E402

BATCH = 64
CANDIDATES = 100

ROWS: tuple[tuple[int, int], ...] = ((2048, 2), (4352, 2), (544, 2), (4352, 8))
"""Bytes of a row, bits of a number."""

RANKS = (13, 9)
"""Of LoGra: 4.2 and 2.1 kB in 8 bits, with what it keeps of embeddings and vectors."""


def passage_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Summed over the bytes of a passage."""
    return token_losses(outputs, y).sum(dim=1)


def cpu_seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and how long the processor worked on it."""
    start = time.process_time()
    return run(), time.process_time() - start


def plain_epoch(model: torch.nn.Module, X: Tensor, y: Tensor) -> None:
    """Forward and backward, with the gradient of the mean."""
    for start in range(0, len(X), BATCH):
        model.zero_grad()
        rows = slice(start, start + BATCH)
        passage_losses(model(X[rows]), y[rows]).mean().backward()
    model.zero_grad()


def compared(index: uw.Index, queries: Any, S: Tensor) -> dict[str, Any]:
    """A row of the table."""
    found = index.scores(queries).values
    told = asdict(verification(found, S, 10, len(index)))
    best, near = S.topk(10).indices, found.topk(min(CANDIDATES, S.shape[1])).indices
    told["candidates"] = float((best[:, :, None] == near[:, None, :]).any(dim=2).double().mean())
    told |= {"bytes": index.bytes_per_example, "bits": index.bits, "numbers": index.numbers}
    return told


def main() -> None:
    """Train, score, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of brown.jsonl.gz")
    parser.add_argument("--n", type=int, default=2000, help="training passages that are attributed")
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--steps", type=int, default=400, help="of training, each of 64 passages")
    parser.add_argument("--out", type=Path, help="where to write; None: results/index.json")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = GPT()
    data = sequences(given.data / "brown.jsonl.gz", given.steps * BATCH, given.queries)
    _, training = cpu_seconds(lambda: train("gpt", model, data, BATCH, 1, 2e-3))
    model.eval()
    long = {key: value.long() for key, value in data.items()}
    attributed = (long["X"][: given.n], long["y"][: given.n])
    queries = (long["Xq"], long["yq"])
    with torch.no_grad():
        per_byte = float(passage_losses(model(queries[0]), queries[1]).mean() / queries[1].shape[1])
    print(f"trained: {training:.0f} s, {per_byte:.3f} nats per byte of held-out text", flush=True)
    epoch = min(cpu_seconds(lambda: plain_epoch(model, *attributed))[1] for _ in range(2))
    task = uw.Task(model, uw.CrossEntropy())
    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1), tolerance=0.0)
    fitted, fit = cpu_seconds(lambda: method.fit(task, attributed))
    scores, asked = cpu_seconds(lambda: fitted.attribute(queries))
    S = scores.values
    print(
        f"epoch {epoch:.1f} s; fit {fit / epoch:.2f}, scores {asked / epoch:.2f} epochs", flush=True
    )
    table: dict[str, Any] = {}

    def add(name: str, told: dict[str, Any]) -> None:
        table[name] = told
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in told.items()}
        print(name, shown, flush=True)

    def built(of: Any, limit: int, bits: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            index, spent = cpu_seconds(lambda: uw.Index.build(of, None, folder, limit, bits=bits))
            chosen = index.seconds["coordinates"] / sum(index.seconds.values())
            costs = {"build_epochs": (1 - chosen) * spent / epoch}
            costs["coordinates_epochs"] = chosen * spent / epoch
            return compared(index, queries, S) | costs

    for limit, bits in ROWS:
        try:
            Codes(bits)
        except uw.errors.SpecError:
            continue  # a checkout without codes of so few bits
        add(f"EK-FAC coordinates, {limit} bytes, {bits} bits", built(fitted, limit, bits))
    for rank in RANKS:
        logra, fit_logra = cpu_seconds(lambda rank=rank: uw.LoGra(rank=rank).fit(task, attributed))
        add(f"LoGra({rank}), 8 bits", built(logra, 2**20, 8) | {"fit_epochs": fit_logra / epoch})
    dot = uw.GradientDot().fit(task, attributed).attribute(queries).values
    add("gradient products, in full", asdict(verification(dot, S, 10, given.n)))
    result = {
        "environment": environment(),
        "settings": {**vars(given), "data": given.data.name, "out": None},
        "model": {"parameters": task.layout.size, "nats_per_byte": per_byte},
        "epoch_cpu_seconds": epoch,
        "ekfac": {"fit_epochs": fit / epoch, "scores_epochs": asked / epoch},
        "rows": table,
    }
    out = given.out or ROOT / "benchmarks" / "results" / "index.json"
    out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
