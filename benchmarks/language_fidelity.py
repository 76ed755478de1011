"""Which scores does fine-tuning confirm? Each method against the same retrained language models.

The model of `language_model.py`, attributed to the 1 024 passages that it was fine-tuned on; the
truth of `language_truth.py`.

    LDS          rank correlation over random halves, mean over 64 queries; second seeds: ceiling
    removal      change of a query's loss without the 50 passages that a method ranks first for it
    tail-patch   the same after one more step on each of the ten that are ranked first

    python benchmarks/language_fidelity.py --data ../shared/data                 # every row
    python benchmarks/language_fidelity.py --method EK-FAC BM25                  # others stay
    python benchmarks/language_fidelity.py --choose chosen.json

Scores are kept in the cache, so rows are judged again in seconds when more halves are there. A row
of something else, such as an index, is `row(scores)` of a matrix `[64, 1024]`.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import DATA, environment
from fidelity import written
from language_model import HERE, KEPT, PASSAGES, QUERIES, Passages, facts, model, passages
from language_truth import LOSSES, measured
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import upweight as uw
from upweight.evaluation import LDS, Bootstrap, tail_patch
from upweight.runtime.fingerprint import digest

Row = dict[str, Any]
BOOTSTRAP = Bootstrap(resamples=300)
GONE = 50
"""Passages removed together."""
ASKED = 5
"""Queries whose first passages are removed: the first ones, which are random."""
PATCHED, TRIED = 16, 10
STEP = uw.SGD(1e-4)
"""Of the tail-patch, on a loss summed over 32 tokens; with 0.01 every step spoils the model."""
REMOVED = ("EK-FAC", "BM25", "embedding", "random")


def task(which: str = "finetuned") -> uw.Task:
    """The kept model with its loss, summed over the tokens of a passage."""
    lm = model(which)
    lm.config.use_cache = False
    return uw.Task(lm, uw.CrossEntropy())


def influence(method: uw.Method) -> Callable[[Passages], tuple[Tensor, float]]:
    """Scores of the queries' losses, and CPU seconds."""

    def scores(texts: Passages) -> tuple[Tensor, float]:
        subject, used = task(), time.process_time()
        fitted = method.fit(subject, texts.split(texts.train))
        values = fitted.attribute(texts.split(texts.queries)).values
        return values, time.process_time() - used

    return scores


def embedding(texts: Passages) -> tuple[Tensor, float]:
    """Minus the cosine of the mean hidden state of the base, which no fine-tuning has touched."""
    lm, used = model("base"), time.process_time()

    def means(ids: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [
                lm.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state.mean(dim=1)
                for rows in ids.split(64)
            ]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    return -means(texts.queries) @ means(texts.train).T, time.process_time() - used


METHODS: Mapping[str, Callable[[Passages], tuple[Tensor, float]]] = {
    "EK-FAC": influence(uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))),
    "LoGra, rank 16": influence(uw.LoGra(rank=16)),
    "TRAK, one model": influence(uw.TRAK()),
    "gradient dot": influence(uw.GradientDot()),
    "gradient cosine": influence(uw.GradientCosine()),
    "BM25": influence(uw.BM25(ignore=(0,))),
    "embedding": embedding,
    "random": influence(uw.Random()),
    "GGN, CG by EK-FAC": influence(
        uw.Influence(uw.GGN(), uw.solvers.CG(rtol=0.3, preconditioner=uw.EKFAC()), uw.Relative(0.1))
    ),
}
DEAR = ("GGN, CG by EK-FAC",)
"""Half a minute of one core for each query and step: only when asked for, with few queries."""


def fingerprint(texts: Passages) -> str:
    """Of the model that is attributed and its passages."""
    kept = load_file(KEPT / "finetuned.safetensors")
    return digest(texts.train, texts.queries, *(kept[k] for k in sorted(kept)))[:12]


def kept_scores(
    name: str, texts: Passages, cache: Path, *, anew: bool = False
) -> tuple[Tensor, float]:
    """Scores from the cache, or made."""
    folder = cache / f"language-scores-{fingerprint(texts)}"
    file = folder / f"{name.replace(' ', '-')}-{len(texts.queries)}.safetensors"
    if anew or not file.exists():
        values, seconds = METHODS[name](texts)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"scores": values.contiguous()}, file, {"cpu_seconds": str(seconds)})
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("scores"), float(opened.metadata()["cpu_seconds"])


def row(scores: Tensor) -> Row:
    """LDS of scores `[q, 1024]` of the first q queries' losses, with its ceiling.

    Over the halves that were trained from two seeds; and from the first seed alone, of which there
    may be more.
    """

    def judged(seeds: int) -> LDS:
        kept, values = measured(seeds)
        predicted = kept.double() @ scores.double().T
        return LDS(predicted, values[..., : len(scores)].double(), bootstrap=BOOTSTRAP)

    one, two = judged(1), judged(2)
    told: Row = {"lds": interval(two.spearman), "lds_one_seed": interval(one.spearman)}
    if two.ceiling is not None and two.relative is not None:
        told |= {"ceiling": interval(two.ceiling), "of_ceiling": interval(two.relative)}
    return told


def interval(estimate: Any) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def patched(scores: Tensor, texts: Passages) -> Row:
    """Tail-patch of the first ten of some queries."""
    some = texts.split(texts.queries[:PATCHED])
    first = scores[:PATCHED].argsort(dim=1)[:, :TRIED]
    found = tail_patch(task(), texts.split(texts.train), some, first, STEP, TRIED)
    return {"tail_patch": interval(found.mean), "at_random": interval(found.random)}


def first(scores: Tensor, query: int) -> list[int]:
    """The passages that lower a query's loss most."""
    chosen: list[int] = scores[query].argsort(stable=True)[:GONE].tolist()
    return chosen


def removals() -> Row:
    """Change of a query's loss without what each method ranks first for it, in nats."""
    found = load_file(LOSSES)
    names = {q: {m: f"without-q{q:02d}-{m}/0" for m in REMOVED} for q in range(ASKED)}
    done = [q for q, each in names.items() if all(name in found for name in each.values())]
    rows: Row = {}
    for m in REMOVED if done else ():
        changes = [float(found[names[q][m]][q] - found["full/0"][q]) for q in done]
        rows[m] = {"changes": changes, "mean": sum(changes) / len(changes)}
    return rows


def noise() -> Row:
    """Between trainings on all passages that differ in their order: a query's loss, in nats."""
    found = load_file(LOSSES)
    full = torch.stack([v for k, v in sorted(found.items()) if k.startswith("full/")])
    kept, values = measured()
    told: Row = {
        "full_seeds": len(full),
        "halves_of_two_seeds": len(kept),
        "halves_of_one_seed": len(measured(1)[0]),
    }
    if len(full) > 1:
        told["standard_deviation"] = float(full.std(dim=0).mean())
    if len(kept) > 1:
        told["of_halves"] = float(values.mean(dim=0).std(dim=0).mean())
    return told


def main() -> None:
    """The rows asked for; the others stay in the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DATA, metavar="DIR", help="default: ../shared/data")
    add("--cache", type=Path, default=HERE / ".cache", metavar="DIR")
    cheap = [name for name in METHODS if name not in DEAR]
    add("--method", nargs="*", choices=list(METHODS), default=cheap, metavar="NAME")
    add("--queries", type=int, default=QUERIES, help="only the first so many")
    add("--choose", type=Path, metavar="FILE", help="write what to leave out, and end")
    add("--no-tail-patch", action="store_true")
    add("--anew", action="store_true", help="score although scores are in the cache")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=HERE / "results" / "language.json", metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    texts = passages(given.data)
    texts = replace(texts, queries=texts.queries[: given.queries])
    if given.choose:
        ranked = {name: kept_scores(name, texts, given.cache)[0] for name in REMOVED}
        chosen = {
            f"q{q:02d}-{name}": first(scores, q)
            for q in range(ASKED)
            for name, scores in ranked.items()
        }
        given.choose.write_text(json.dumps(chosen))
        return
    report = json.loads(given.out.read_text()) if given.out.exists() else {"methods": {}}
    with safe_open(LOSSES, "pt") as opened:
        truth = json.loads(opened.metadata()["facts"])
    report |= {
        "passages": PASSAGES,
        "queries": QUERIES,
        "base": facts("base"),
        "finetuned": facts("finetuned"),
        "truth": truth | noise(),
        "removals": removals(),
        "environment": environment(),
    }
    few = given.queries < QUERIES
    rows = report.setdefault(f"first {given.queries} queries", {}) if few else report["methods"]
    for name in given.method:
        scores, seconds = kept_scores(name, texts, given.cache, anew=given.anew)
        before = rows.get(name, {})
        found = before | row(scores) | {"cpu_seconds": seconds}
        if not given.no_tail_patch:
            found |= patched(scores, texts)
        rows[name] = found
        print(name, json.dumps(found), flush=True)
        given.out.write_text(written(report))
    given.out.write_text(written(report))


if __name__ == "__main__":
    main()
