"""What does an index keep of EK-FAC's scores, per byte, and what does it cost to build?

The fine-tuned model of `language_model.py` (2 049 440 parameters), its 1 024 passages and 64 others
of the same documents. Truth: the scores of `Influence(EKFAC(), damping=Absolute(0.03))` without
tolerance, twice the mean eigenvalue. Against it, the products of rows, before any candidate is
scored again:

    spearman, pearson   mean over the queries
    slope               ⟨Ŝ, S⟩/⟨S, S⟩; only of rows in the unit of EK-FAC
    recall              of the ten largest |S|, how many are among the ten largest |Ŝ|
    candidates          of the ten largest |S|, how many are among the 100 largest |Ŝ|
    lds                 of `language_fidelity.py`
    lds_reranked        the same with the 100 largest |Ŝ| of each query replaced by S
    rows_epochs         what rows of 960 passages cost, in plain epochs of as many: forward and
                        backward, batches of 64, processor seconds, measured before and after
    rows_flops          the same in multiply-adds of matrix products, counted on one batch
    coordinates_epochs  the choice of coordinates and their factors, for any number of examples, in
                        plain epochs of the 1 024 passages

Each size is an index of its own. Beside it, of projected gradients of each layer (k × k numbers):

    LoGra        `uw.LoGra`, numbers in float16; and in the codes of an index with 1 bit
    low rank     the same with each layer's k × k matrix kept as its first c singular vectors, in
                 float16, as LoRIF does; with the whole inverse in place of a truncated one
    TrackStar    of projected gradients, R^−½ with the second moments R of training and queries
                 mixed half and half and a damping of a tenth of the mean, divided by their norm
    bergson      the scores of its own command, where --bergson names its folder:
                 bergson trackstar FOLDER --model … --query.aggregation none --unit_normalize True

They have another inverse than EK-FAC, so a part of their distance is another method and no loss:
LDS compares. A row is written as soon as it is there; one that is there is not made again.
Writes results/index.json.

    python benchmarks/index.py --data ../shared/data
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from environment import DATA, environment  # noqa: E402
from fidelity import written  # noqa: E402
from language_fidelity import fingerprint, row, task  # noqa: E402
from language_model import Passages, passages  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import upweight as uw  # noqa: E402
from upweight.gradients.passes import GradientPass  # noqa: E402
from upweight.index.asking import ScanJob  # noqa: E402
from upweight.index.codes import Codes  # noqa: E402
from upweight.index.scan import Scan  # noqa: E402
from upweight.index.shards import filled  # noqa: E402
from upweight.index.verification import verification  # noqa: E402
from upweight.methods.layered import LayeredJob  # noqa: E402
from upweight.methods.reduce import Reducer, Sink  # noqa: E402
from upweight.scoring.stream import training_loss  # noqa: E402

BATCH = 64
CANDIDATES = 100
DAMPING = uw.Absolute(0.03)
BYTES = (4096, 1024, 16_384, 65_536, 2048, 8192, 32_768)
"""Of a row, 1 bit a number; the ends of the curve first."""
RANKS = (8, 16, 32)
"""k of the projected gradients."""
KEPT = {32: (1, 4)}
"""c of the low rank, for k."""


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


def judged(found: Tensor, S: Tensor, *, is_of_size: bool = True) -> dict[str, Any]:
    """What is left of EK-FAC in these scores, and what retraining says of them."""
    told = asdict(verification(found, S, 10, S.shape[1]))
    told = {name: told[name] for name in ("spearman", "pearson", "slope", "recall")}
    best, near = S.abs().topk(10).indices, found.abs().topk(CANDIDATES).indices
    told["candidates"] = float((best[:, :, None] == near[:, None, :]).any(dim=2).double().mean())
    told["lds"] = row(found)["lds"]
    if is_of_size:
        told["lds_reranked"] = row(found.scatter(1, near, S.gather(1, near)))["lds"]
    else:
        del told["slope"]
    return told


class Report:
    """Rows by name in a file, which is written with each."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out = out
        self.told = json.loads(out.read_text()) if out.exists() else {"rows": {}}
        self.told |= facts

    def add(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """One row, unless it is there."""
        if name in self.told["rows"]:
            return
        found = self.told["rows"][name] = make()
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        print(name, shown, flush=True)
        self.out.write_text(written(self.told))


def epochs(fitted: Any, X: Tensor, y: Tensor, examples: int) -> tuple[float, int]:
    """Processor seconds of a plain epoch of so many, and its multiply-adds for a batch."""
    model, some = fitted.task.model, slice(0, 2 * BATCH)
    spent = min(cpu_seconds(lambda: plain_epoch(model, X[some], y[some]))[1] for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        plain_epoch(model, X[:BATCH], y[:BATCH])
    return spent * examples / (2 * BATCH), counter.get_total_flops()


class Solved(LayeredJob):
    """Queries that were solved before."""

    def __init__(self, every: list[Tensor]) -> None:
        self.every = every

    def solved(self) -> Iterator[Tensor]:
        """V_q of each block."""
        yield from self.every


class Solving(Reducer):
    """`Solved` of all queries."""

    is_exact = True

    def begin(self, sweep: Any) -> Any:
        return _Solving()


class _Solving(Sink):
    def __init__(self) -> None:
        self.every: list[list[Tensor]] = []

    def missing(self, job: Any, n: int) -> list[tuple[int, int]]:
        self.every.append([vectors.clone() for vectors in job.solved()])
        return []

    def result(self, answer: Any) -> Solved:
        return Solved([torch.cat(parts) for parts in zip(*self.every, strict=True)])


def of_index(
    fitted: Any, solved: Solved, S: Tensor, X: Tensor, y: Tensor, size: int
) -> dict[str, Any]:
    """An index of this size: what its products are worth, and what it cost."""
    n, start = len(X), BATCH
    before, plain = epochs(fitted, X, y, n)
    with tempfile.TemporaryDirectory() as folder:
        first = X[:start], y[:start]
        index, chosen = cpu_seconds(lambda: uw.Index.build(fitted, first, folder, size))
        _, spent = cpu_seconds(lambda: index.extend((X[start:], y[start:])))
        after, _ = epochs(fitted, X, y, n)
        made = index._transform
        rows = Scan(filled(made.of_query(solved)), index._rows.codes)
        found = ScanJob(0, rows, index._rows, n, torch.float32).block(0, n)
        with GradientPass(made.plan, made.theta) as passes:
            batch = X[:BATCH], y[:BATCH]
            list(passes.of(training_loss(fitted.task), batch, BATCH))  # checked once
            with FlopCounterMode(display=False) as counter:
                made.of_example(list(passes.of(training_loss(fitted.task), batch, BATCH)))
        epoch = (before + after) / 2
        return judged(found, S) | {
            "bytes": index.bytes_per_example,
            "bits": index.bits,
            "at_once": made.at_once,
            "rows_epochs": spent / (epoch * (n - start) / n),
            "rows_flops": counter.get_total_flops() / plain,
            "coordinates_epochs": chosen / epoch,
            "folder_bytes": (Path(folder) / "transform.safetensors").stat().st_size,
        }


# -- rows of projected gradients ------------------------------------------------------------------


def projected(fitted: Any, ids: Tensor) -> Tensor:
    """P g of other passages, by the projection of a fitted `LoGra`."""
    projection, found = fitted.scorer.projection, []
    X, y = Passages.split(ids)
    with GradientPass(projection.plan, fitted.theta) as passes:
        for start in range(0, len(X), BATCH):
            batch = X[start : start + BATCH], y[start : start + BATCH]
            factors = passes.of(training_loss(fitted.task), batch, len(batch[0]))
            found.append(projection(list(factors)))
    return torch.cat(found)


def parts(fitted: Any) -> list[tuple[slice, tuple[int, ...]]]:
    """The numbers of each layer, and their shape."""
    projection = fitted.scorer.projection
    return list(zip(projection.parts, projection.shapes, strict=True))


def low_rank(fitted: Any, rows: Tensor, c: int) -> tuple[Tensor, int]:
    """Each layer's matrix by its first c singular vectors, and the bytes of a row in float16."""
    out, numbers = rows.clone(), 0
    for part, shape in parts(fitted):
        if len(shape) == 1:
            numbers += shape[0]
            continue
        u, s, v = torch.linalg.svd(rows[:, part].reshape(-1, *shape), full_matrices=False)
        left, right = (u[..., :c] * s[:, None, :c]).half().float(), v[:, :c].half().float()
        out[:, part] = (left @ right).flatten(1)
        numbers += c * sum(shape)
    return out, 2 * numbers


def whitened(fitted: Any, train: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """R^−½ P g of each, divided by its norm."""
    out = []
    for part, _ in parts(fitted):
        a, b = train[:, part].double(), asked[:, part].double()
        moments = (a.mT @ a / len(a) + b.mT @ b / len(b)) / 2
        values, vectors = torch.linalg.eigh(moments)
        values = values.clamp_min(0) + 0.1 * values.mean()
        out.append([(x @ vectors) * values.rsqrt() for x in (a, b)])
    found = [torch.cat(column, dim=1) for column in zip(*out, strict=True)]
    rows, queries = (torch.nn.functional.normalize(x, dim=1).float() for x in found)
    return rows, queries


def of_projections(report: Report, subject: Any, texts: Passages, S: Tensor, k: int) -> None:
    """Every row of k × k projected gradients of each layer."""
    name = f"LoGra({k}), 1 bit"
    if name in report.told["rows"]:
        return
    fitted = uw.LoGra(rank=k).fit(subject, texts.split(texts.train))
    (member,) = fitted.scorer.members
    rows, asked = member.gradients.rows(0, len(texts.train)), projected(fitted, texts.queries)
    solved = member.solve(asked.double()).float() * -1 / len(rows)

    def told(found: Tensor, size: int, bits: int) -> Callable[[], dict[str, Any]]:
        return lambda: judged(found, S, is_of_size=False) | {"bytes": size, "bits": bits}

    report.add(f"LoGra({k})", told(solved @ rows.half().float().mT, 2 * rows.shape[1], 16))
    for c in KEPT.get(k, ()):
        few, size = low_rank(fitted, rows, c)
        report.add(f"low rank {c} of {k} × {k}", told(solved @ few.mT, size, 16))
    a, b = whitened(fitted, rows, asked)
    report.add(f"TrackStar({k})", told(-b @ a.half().float().mT, 2 * rows.shape[1], 16))
    spread = rows.square().mean(dim=0).sqrt()
    spread[spread == 0] = 1
    whole = filled(rows / spread)
    few = Codes(1).decode(Codes(1).encode(whole))[:, : rows.shape[1]] * spread
    report.add(name, told(solved @ few.mT, Codes(1).bytes(whole.shape[1]), 1))


def of_bergson(folder: Path, texts: Passages) -> tuple[Tensor, int]:
    """Minus its scores [q, n], whose sign is the other way round; and k, of its projections."""
    import numpy as np

    about = json.loads((folder / "scores" / "info.json").read_text())
    kept = np.memmap(folder / "scores" / "scores.bin", dtype=np.dtype(about["dtype"]), mode="r")
    names = [name for name in kept.dtype.names if name.startswith("score")]
    names.sort(key=lambda name: int(name.rsplit("_", 1)[1]))
    scores = np.stack([kept[name].astype(np.float32) for name in names[: len(texts.queries)]])
    k = re.search(r"projection_dim: (\d+)", (folder / "scores" / "config.yaml").read_text())
    assert k is not None
    return -torch.from_numpy(scores), int(k[1])


def main() -> None:
    """Fit, score, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of brown.jsonl.gz")
    parser.add_argument("--out", type=Path, help="where to write; None: results/index.json")
    parser.add_argument("--bergson", type=Path, nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / ".cache")
    given = parser.parse_args()
    torch.set_num_threads(1)
    texts, subject = passages(given.data), task()
    (X, y), queries = texts.split(texts.train), texts.split(texts.queries)
    cache = given.cache / f"index-{fingerprint(texts)}"
    cache.mkdir(parents=True, exist_ok=True)
    method = uw.Influence(uw.EKFAC(), damping=DAMPING, tolerance=0.0)
    kept = uw.Resources(folder=cache / "fit")
    fitted, fit = cpu_seconds(lambda: method.fit(subject, (X, y), resources=kept))
    scores = cache / "scores.safetensors"
    if not scores.exists():
        save_file({"S": fitted.attribute(queries).values.contiguous()}, scores)
    S = load_file(scores)["S"]
    facts = {
        "environment": environment(),
        "model": {"parameters": subject.layout.size},
        "passages": len(X),
        "queries": len(queries[0]),
        "damping": repr(DAMPING),
        "lds": row(S)["lds"],
    }
    report = Report(given.out or ROOT / "benchmarks" / "results" / "index.json", facts)
    print(f"fit {fit:.0f} s", facts["lds"], flush=True)
    # Solved once for all indexes, as `Index.scores` would each time.
    solved = fitted.attribute(queries, into=Solving())
    for size in BYTES:
        make = partial(of_index, fitted, solved, S, X, y, size)
        report.add(f"index, {size} bytes", make)
        if size == BYTES[2]:
            for k in RANKS:
                of_projections(report, subject, texts, S, k)
    for folder in given.bergson:
        found, k = of_bergson(folder, texts)
        # Of 28 layers: it leaves out norms and the tied embedding.
        told = judged(found, S, is_of_size=False) | {"bytes": 4 * 28 * k**2, "bits": 32}
        report.add(f"bergson, {k} × {k}", lambda told=told: told)
    report.out.write_text(written(report.told))


if __name__ == "__main__":
    main()
