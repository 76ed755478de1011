"""Does retraining confirm the scores? Every method on six real tasks, against the same models.

    digits-softmax   softmax regression on 5 000 MNIST images, at its minimum       7 850 parameters
    digits-mlp       784-64-32-10 on the same images                                52 650
    digits-cnn       two convolutions on 1 500 images of 8 × 8 (scikit-learn)        1 898
    diabetes-mlp     10-16-1 with tanh on 342 patients (scikit-learn)                  193
    spam-mlp         1000-64-32-2 on words of 3 000 SpamAssassin mails              66 210
    brown-gpt        byte-level transformer on 64 bytes of 500 Brown documents      43 904

`fidelity_tasks.py` trains them, `fidelity_truth.py` retrains on subsets and without examples,
`fidelity_ours.py` and `fidelity_peers.py` score, each contender in a process of its own and on the
same trained model, and here scores and truth meet:

    LDS          rank correlation over 100 models of random halves of the data, mean over queries
    removals     Pearson correlation and slope of Δm without one example, or a group of one class
    AUROC        of a tenth of the labels made wrong in a second copy, by self-influence
    plain_epochs   fit and scores in plain forward and backward epochs, CPU seconds of both
    peak MB      of the contender's process

Beside the plain epoch one training of the attributed model is timed, so that a method's time can be
said in trainings. Rows without `cpu_seconds` are older: their epochs are of wall time.

The data are mnist.npz, spamassassin.jsonl.gz and brown.jsonl.gz in `--data`.
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from contest import aligned, failure_of
from environment import DATA, environment
from fidelity_methods import Contender
from fidelity_networks import Problem, losses
from fidelity_ours import OURS
from fidelity_peers import PEERS
from fidelity_table import markdown
from fidelity_tasks import SPECS, problem
from fidelity_truth import plans, removed, truth
from safetensors.torch import load_file
from torch import Tensor

from upweight.evaluation import LDS, LOO, Bootstrap, mislabel_detection, pearson
from upweight.runtime.fingerprint import digest

HERE = Path(__file__).resolve().parent
CONTENDERS = {c.name: c for c in (*OURS, *PEERS)}
BOOTSTRAP = Bootstrap(resamples=300)
LIMITS = ("timeout", "memory_gb")
CONSTANT = 1e-12
"""A query whose predictions differ by less than this share of their size has no order."""

Row = dict[str, Any]


def process(
    name: str, file: Path, folder: Path, python: str, given: argparse.Namespace, *more: str
) -> Row:
    """What a contender's process reports; from the cache if the problem is the same."""
    contender = CONTENDERS.get(name)
    about = digest(file.name, json.dumps(more), contender.settings if contender else "")
    about += digest(*load_file(file).values())
    mark, report = folder / "about", folder / "report.json"
    limits = {"timeout": given.timeout, "memory_gb": given.memory_gb}
    if not given.anew and mark.exists() and mark.read_text() == about:
        kept: Row = json.loads(report.read_text())
        if kept["status"] == "ok" or all(kept.get(k, 0) >= v for k, v in limits.items()):
            return kept
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    limit = ("--memory-gb", given.memory_gb)
    command = [python, HERE / "fidelity_contender.py", name, file, folder, *limit, *more]
    failed = failure_of(command, given.timeout, given.threads)
    found = json.loads(report.read_text()) if report.exists() else {}
    if failed and found.get("status") != "failed":
        found |= failed
    found |= limits | {"shared": not given.quiet, "date": time.strftime("%Y-%m-%d")}
    report.write_text(json.dumps(found))
    for left in ("kronfluence", "trak", "bergson"):  # gigabytes of factors and features
        shutil.rmtree(folder / left, ignore_errors=True)
    mark.write_text(about)
    return found


def judged(predicted: Tensor, first: Tensor, again: Tensor | None) -> Row:
    """The linear datamodeling score of predictions `[s, q]`."""
    predicted = predicted.double()
    spread = predicted.std(dim=0) > CONSTANT * predicted.abs().amax(dim=0)
    halves = [half.double()[None][:, :, spread] for half in (first, again) if half is not None]
    found = LDS(predicted[:, spread], *halves, bootstrap=BOOTSTRAP)
    score, top = found.spearman, found.ceiling
    row = {"lds": [score.value, score.low, score.high]}
    row |= {"ceiling": [top.value, top.low, top.high] if top else None}
    if not bool(spread.all()):
        row["queries_without_order"] = int((~spread).sum())
    return row


def removal(predicted: Tensor, actual: Tensor, groups: Any, calibrated: bool) -> Row:
    found = LOO(groups, predicted.double(), actual.double(), bootstrap=BOOTSTRAP)
    row = {"pearson": [found.pearson.value, found.pearson.low, found.pearson.high]}
    if calibrated:
        row["slope"] = [found.slope.value, found.slope.low, found.slope.high]
    return row


def held(
    scores: Mapping[str, Tensor], made: Problem, known: Mapping[str, Tensor], c: Contender
) -> Row:
    """Scores beside the truth, for each plan and measurement."""
    row: Row = {}
    for plan, weights in plans(made).items():
        row[plan] = {}
        for measure, values in scores.items():
            predicted = (weights - 1) @ values.double().T
            first, again = known[f"{plan}/{measure}/first"], known.get(f"{plan}/{measure}/again")
            if plan == "removals":
                mean = first if again is None else (first + again) / 2
                row[plan][measure] = removal(predicted, mean, removed(made), c.calibrated)
            else:
                row[plan][measure] = judged(predicted, first, again)
    return row


def row_of(
    c: Contender,
    made: Problem,
    files: tuple[Path, Path | None],
    known: Mapping[str, Tensor],
    plain_epoch: float,
    given: argparse.Namespace,
) -> Row:
    """Everything about one method on one task."""
    row: Row = {"library": c.library, "settings": c.settings}
    if (why := c.refusal(made)) is not None:
        return row | {"status": "does not run", "why": why}
    python = sys.executable if c.library in ("upweight", "none") else str(given.peers_python)
    folder = given.cache / "fidelity-scores" / made.name / c.name.replace(" ", "-")
    if c.predicts:
        said = process(c.name, files[0], folder / "queries", python, given)
        row |= {
            k: said[k]
            for k in ("status", "why", "version", "shared", "date", *LIMITS)
            if said.get(k)
        }
        if said["status"] == "ok":
            if c.library == "upweight" or said.get("imported"):
                seconds = {"fit": said["fit_seconds"], "scores": said["score_seconds"]["loss"]}
                cpu = said["cpu_seconds"]
                row |= {"seconds": seconds, "cpu_seconds": cpu, "plain_epochs": cpu / plain_epoch}
            row["peak_memory_mb"] = said["peak_memory"] / 2**20
            scores = load_file(folder / "queries" / "scores.safetensors")
            row |= held(scores, made, known, c)
    if c.detects(made) and files[1] is not None and row.get("status", "ok") == "ok":
        said = process(c.name, files[1], folder / "self", python, given, "--themselves")
        if said["status"] == "ok":
            ranking = load_file(folder / "self" / "scores.safetensors")["self"]
            wrong = torch.zeros(len(ranking), dtype=torch.bool)
            wrong[Problem.load(files[1]).facts["wrong"]] = True
            found = mislabel_detection({"": ranking.double()}, wrong, bootstrap=BOOTSTRAP)
            area, recall = found.auroc[""], found.recall[""]
            row["mislabeled"] = {
                "auroc": [area.value, area.low, area.high],
                "recall": [recall.value, recall.low, recall.high],
                "seconds": said["self_seconds"],
            }
        else:
            row["mislabeled"] = {k: said[k] for k in ("status", "why") if k in said}
    return row


def quality(made: Problem) -> Row:
    """How well the model does."""
    with torch.no_grad():
        parts = {
            "train": (made.model(made.X), made.y),
            "queries": (made.model(made.Xq), made.yq),
        }
        row: Row = {f"{k}_loss": float(losses(made.kind, *v).mean()) for k, v in parts.items()}
        for k, (outputs, y) in parts.items():
            if made.kind == "number":
                row[f"{k}_r2"] = float(1 - (outputs - y).square().mean() / y.var())
            else:
                row[f"{k}_accuracy"] = float((outputs.argmax(-1) == y).float().mean())
    return row


def noise(made: Problem, known: Mapping[str, Tensor]) -> Row:
    """Between two halves of the seeds: how much of a removal's effect is training noise."""
    row: Row = {}
    for measure in made.measures:
        first, again = (known.get(f"removals/{measure}/{half}") for half in ("first", "again"))
        if first is not None and again is not None:
            found = pearson(first.double(), again.double(), BOOTSTRAP)
            row[measure] = [found.value, found.low, found.high]
    return row


def shown(name: str, found: Row) -> str:
    """The rows of a task, side by side."""
    main = f"subsets-{SPECS[name].fractions[0]:g}"
    lines = [
        ["", "LDS loss", "LDS other", "removals r", "slope", "AUROC", "plain_epochs", "peak MB"]
    ]

    def cell(value: Any) -> str:
        return "" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"

    for label, row in found["methods"].items():
        if row.get("status", "ok") != "ok":
            lines.append([f"{label}: {row['status']}, {row.get('why', '')}"[:110], *[""] * 7])
            continue
        by, gone = row.get(main, {}), row.get("removals", {}).get("loss", {})
        other = next((v for k, v in by.items() if k != "loss"), {})
        area = row.get("mislabeled", {}).get("auroc")
        slope = gone.get("slope")
        lines.append(
            [
                label,
                cell(by.get("loss", {}).get("lds")),
                cell(other.get("lds")),
                cell(gone.get("pearson")),
                "" if slope is None else f"{slope[0]:.2f}",
                "" if area is None else f"{area[0]:.3f}",
                f"{row['plain_epochs']:.1f}" if "plain_epochs" in row else "",
                f"{row['peak_memory_mb']:.0f}" if "peak_memory_mb" in row else "",
            ]
        )
    return aligned(lines)


def written(report: Row) -> str:
    """The result as JSON, with a list of numbers on one line."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def main() -> None:
    """Each task and contender asked for; their rows are replaced in the result, others stay."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DATA, metavar="DIR", help="default: ../shared/data")
    add("--task", nargs="+", choices=list(SPECS), default=list(SPECS), metavar="NAME")
    add("--method", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    add("--peers-python", type=Path, default=Path(sys.executable), metavar="FILE")
    add("--timeout", type=float, default=300.0, help="seconds for each process")
    add("--memory-gb", type=float, default=12.0, help="what a contender's process may take")
    add("--threads", type=int, help="of each process; default: PyTorch's")
    add("--quiet", action="store_true", help="nothing else runs here: rows say `shared: false`")
    add("--anew", action="store_true", help="run contenders although their scores are in the cache")
    add("--truth-anew", action="store_true", help="retrain, although the truth is in `truths`")
    add("--cache", type=Path, default=HERE / ".cache", metavar="DIR")
    add("--out", type=Path, default=HERE / "results" / "fidelity.json", metavar="FILE")
    add("--markdown", metavar="COLUMN", help="print a column of the result, such as 'loss lds'")
    given = parser.parse_args()
    report = json.loads(given.out.read_text()) if given.out.exists() else {"tasks": {}}
    if given.markdown:
        print(markdown(report, given.markdown, list(CONTENDERS)))
        return
    for name in given.task:
        file = problem(name, given.data, given.cache)
        made = Problem.load(file)
        labeled = made.kind != "text"
        flipped = problem(name, given.data, given.cache, flipped=True) if labeled else None
        known, facts = truth(made, given.cache, anew=given.truth_anew)
        folder = given.cache / "fidelity-scores" / name
        plain_epoch, training = (
            process(what, file, folder / what, sys.executable, given)
            for what in ("plain_epoch", "training")
        )
        found = report["tasks"].setdefault(name, {"methods": {}})
        found |= {
            "parameters": sum(p.numel() for p in made.model.parameters()),
            "examples": len(made.X),
            "queries": len(made.Xq),
            **quality(made),
            "damping": made.damping,
            "truth": facts | {"removals_repeat": noise(made, known)},
            "epoch_seconds": plain_epoch["seconds"],
            "training_seconds": training["seconds"],
            "environment": environment(),
        }
        for label in given.method:
            print(f"{name}: {label}", file=sys.stderr, flush=True)
            found["methods"][label] = row_of(
                CONTENDERS[label], made, (file, flipped), known, plain_epoch["seconds"], given
            )
            order = [label for label in CONTENDERS if label in found["methods"]]
            found["methods"] = {label: found["methods"][label] for label in order}
            given.out.write_text(written(report))
        print(f"\n{name}\n{shown(name, found)}\n", flush=True)


if __name__ == "__main__":
    main()
