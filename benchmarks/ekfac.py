"""What does EK-FAC influence cost, and how exactly is it computed? Ours beside the peers.

Three trained networks (an MLP and a CNN on MNIST, a byte-level language model on the Brown corpus)
and all scores of the loss of some queries with respect to all training examples. Each contender
runs in a process of its own, with the same absolute damping; the time of its factors and that of
its scores are told apart, in seconds and in epochs: plain forward and backward epochs over the
same data at the same batch size. Its scores are compared with float64 scores from its own factors,
and with those of the others.

The data are mnist.npz with X [60000, 28, 28] uint8, y, Xt [10000, 28, 28] and yt, and
brown.jsonl.gz with a JSON object with a "text" per line and document. The former can be made from
the original MNIST files (LeCun, Cortes, Burges), the latter from the Brown corpus as NLTK has it.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contest import aligned, failure_of, made
from ekfac_contenders import CONTENDERS, Contender, Settings
from ekfac_workloads import WORKLOADS, Workload, training
from environment import DATA, environment

HERE = Path(__file__).resolve().parent
NAMES = [contender.name for contender in CONTENDERS]
OURS = "upweight"
REFERENCE = "upweight-0.1%"
PEER = "kronfluence"

Report = dict[str, Any]


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
        help="the folder of mnist.npz and brown.jsonl.gz (default: ../shared/data from the "
        "repository's root); where else to get them is said above",
    )
    add(
        "--only",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="NAME",
        help="run only these of: " + ", ".join(NAMES).replace("%", "%%"),
    )
    add(
        "--workload",
        nargs="+",
        choices=list(WORKLOADS),
        default=list(WORKLOADS),
        metavar="NAME",
        help=f"only these of: {', '.join(WORKLOADS)}",
    )
    add(
        "--peers-python",
        default=sys.executable,
        metavar="PATH",
        help="the Python interpreter that has the peers (default: this one)",
    )
    add("--n", type=int, help="training examples (default: the workload's)")
    add("--queries", type=int, help="queries (default: the workload's)")
    add("--threads", type=int, help="threads of every process (default: torch's choice)")
    add("--runs", type=int, default=3, help="of ours, the fastest counts (default: 3); peers: 1")
    add(
        "--timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="give up on a process after this long, and say how far it came (default: 3600)",
    )
    add(
        "--sample",
        type=int,
        default=128,
        metavar="N",
        help="training examples for which scores are compared with float64's (default: 128)",
    )
    add(
        "--batches",
        nargs="+",
        metavar="F:Q:T",
        type=_batch_sizes,
        help="batch sizes to try for the peers, of examples for factors, of queries, and of "
        "examples for scores, instead of theirs in ekfac_contenders.py",
    )
    add("--no-seeds", action="store_true", help="leave out the comparison of two seeds")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the result file, of which the workloads that run are replaced (default: "
        "benchmarks/results/ekfac.json for a run of all contenders at full size; a smaller run "
        "is only printed)",
    )
    add(
        "--cache",
        type=Path,
        default=HERE / ".cache",
        metavar="DIR",
        help="where the trained networks are kept (default: benchmarks/.cache)",
    )
    given = parser.parse_args()
    if given.out is None and (given.n, given.queries, given.only) == (None, None, NAMES):
        given.out = HERE / "results" / "ekfac.json"
    return given


def _batch_sizes(text: str) -> Settings:
    factor, query, train = (int(word) for word in text.split(":"))
    return {"factor_batch": factor, "query_batch": query, "train_batch": train}


def trained(given: argparse.Namespace, name: str) -> Path:
    """The trained network and its data, made once per version of the program that makes them."""
    program = HERE / "ekfac_networks.py"
    mark = hashlib.sha256(program.read_bytes()).hexdigest()[:10]
    given.cache.mkdir(parents=True, exist_ok=True)
    file = given.cache / f"ekfac-{name}-{mark}.safetensors"
    if not file.exists():
        source = given.data / ("brown.jsonl.gz" if name == "gpt" else "mnist.npz")
        if not source.exists():
            refusal = f"{source} is not there; --help says where to get it."
            raise SystemExit(refusal)
        made(file, [program, name, given.data, file], given.threads)
    return file


class Contest:
    """One workload at one size: its network, and the folder where scores are kept."""

    def __init__(self, given: argparse.Namespace, workload: Workload, folder: Path) -> None:
        self.given, self.workload, self.folder = given, workload, folder
        self.n, self.queries = given.n or workload.n, given.queries or workload.queries
        self.file = trained(given, workload.made_as)
        self.result: Report = {}
        self.kept: dict[str, Path] = {}
        """Where each contender's scores at full size are."""

    def run(
        self,
        name: str,
        folder: Path,
        size: tuple[int, int],
        *options: Any,
    ) -> Report:
        """A process of its own; its report, whatever came of it."""
        ours = name == "plain_epoch" or name.startswith(OURS)
        python = sys.executable if ours else self.given.peers_python
        folder.mkdir(parents=True)
        words = [python, HERE / "ekfac_contender.py", name, self.file, folder]
        sizes = ["--n", size[0], "--queries", size[1]]
        failure = failure_of([*words, *sizes, *options], self.given.timeout, self.given.threads)
        file = folder / "report.json"
        report: Report = json.loads(file.read_text()) if file.exists() else {}
        if failure and report.get("status") not in ("ok", "failed", "not installed"):
            report |= failure
        return report

    def plain_epoch(self) -> Report:
        """Seconds of a plain epoch."""
        measured = self.run("plain_epoch", self.folder / "plain_epoch", (self.n, self.queries))
        if measured["status"] != "ok":
            refusal = f"the plain epoch failed: {measured['why']}"
            raise SystemExit(refusal)
        self.epoch = min(measured["seconds"])
        return {"batch": self.workload.batch, **measured}

    def settings(self, contender: Contender) -> list[Settings]:
        """What to try."""
        if self.given.batches and not contender.name.startswith(OURS):
            return list(self.given.batches)
        return contender.settings(self.workload)

    def contender(self, contender: Contender) -> Report:
        """One row: the best of its settings in small trials, then all of it with that one."""
        size = contender.size(self.workload, self.n, self.queries)
        choices, trials = self.settings(contender), []
        for number, settings in enumerate(choices):
            if len(choices) == 1:
                break
            small = min(self.workload.trial, size[0]), size[1]
            place = f"{self.workload.name} at n = {small[0]}"
            folder = self.folder / f"{contender.name}-trial-{number}"
            words = ["--settings", json.dumps(settings)]
            say(f"trying {contender.name} with {settings} on {place}")
            trial = self.run(contender.name, folder, small, *words)
            trials.append({"settings": settings, "n": small[0], "queries": small[1], **trial})
            if trial["status"] == "not installed":
                break
        finished = [t for t in trials if t["status"] == "ok"]
        best = min(finished or trials, key=total, default={"settings": choices[0]})["settings"]
        folder = self.folder / contender.name
        runs = self.given.runs if contender.repeated else 1
        say(f"running {contender.name} on {self.workload.name}")
        options = ["--settings", json.dumps(best), "--runs", runs]
        report = self.run(contender.name, folder, size, *options)
        report = {
            "description": contender.description,
            "mapping": contender.mapping,
            "settings": best,
            "n": size[0],
            "queries": size[1],
            **report,
            "trials": trials,
        }
        if report["status"] == "ok":
            epoch = self.epoch * size[0] / self.n
            report["plain_epochs"] = total(report) / epoch
            report["fit_plain_epochs"] = min(report["fit_seconds"]) / epoch
            report["score_plain_epochs"] = min(report["score_seconds"]) / epoch
            report["against_float64"] = self.truth(folder, size)
            if size == (self.n, self.queries):
                self.kept[contender.name] = folder / "scores.npy"
        return report

    def truth(self, folder: Path, size: tuple[int, int]) -> Report:
        """The comparison that `ekfac_truth.py` makes."""
        out = folder / "truth.json"
        sample = min(self.given.sample, size[0])
        files = [self.file, folder / "factors.safetensors", folder / "scores.npy", out]
        sizes = ["--n", size[0], "--queries", size[1], "--sample", sample]
        made(out, [HERE / "ekfac_truth.py", *files, *sizes], self.given.threads)
        compared: Report = json.loads(out.read_text())
        return compared

    def correlations(self) -> Report:
        """Of each contender with the reference, all at full size."""
        if REFERENCE not in self.kept:
            return {}
        reference = np.load(self.kept[REFERENCE], mmap_mode="r")
        return {
            name: pearson_per_query(np.load(file, mmap_mode="r"), reference)
            for name, file in self.kept.items()
            if name != REFERENCE
        }

    def seeds(self) -> Report:
        """How far two seeds of one library and two libraries agree, on part of the data."""
        n, queries = self.workload.seeds
        size = min(n, self.n), min(queries, self.queries)
        compared: Report = {"n": size[0], "queries": size[1]}
        files: dict[str, Path] = {}
        for name in (REFERENCE, PEER):
            report = self.result["contenders"].get(name, {"status": "not run"})
            if report["status"] != "ok":
                return compared | {"why": f"{name}: {report['status']}"}
            for seed in (0, 1):
                if seed == 0 and name in self.kept and size == (self.n, self.queries):
                    files[f"{name} {seed}"] = self.kept[name]
                    continue
                say(f"running {name} with seed {seed} on {self.workload.name} at n = {size[0]}")
                folder = self.folder / f"{name}-seed-{seed}"
                settings = json.dumps(report["settings"])
                options = ["--settings", settings, "--seed", seed]
                done = self.run(name, folder, size, *options)
                if done["status"] != "ok":
                    return compared | {"why": f"{name} with seed {seed}: {done['why']}"}
                files[f"{name} {seed}"] = folder / "scores.npy"
        scores = {key: np.load(file, mmap_mode="r") for key, file in files.items()}
        pairs = ((REFERENCE, PEER), (REFERENCE, REFERENCE), (PEER, PEER))
        for a, b in pairs:
            key = f"{a}, seed 0, with {b}, seed {int(a == b)}"
            compared[key] = pearson_per_query(scores[f"{a} 0"], scores[f"{b} {int(a == b)}"])
        return compared


def say(words: str) -> None:
    """For whoever waits."""
    print(words, file=sys.stderr, flush=True)


def total(report: Report) -> float:
    """Seconds of the fastest run, factors and scores."""
    if report.get("status") != "ok":
        return float("inf")
    both = zip(report["fit_seconds"], report["score_seconds"], strict=True)
    return min(fit + scores for fit, scores in both)


def pearson_per_query(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The correlation of two contenders' scores of a query: mean, median and lowest of all."""
    values = []
    for x, y in zip(a, b, strict=True):
        x, y = x.astype(np.float64) - x.mean(), y.astype(np.float64) - y.mean()
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        values.append(float(x @ y / norms) if norms else 0.0)
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "lowest": float(min(values)),
    }


COLUMNS = (
    "contender",
    "n x q",
    "factors s",
    "scores s",
    "total s",
    "plain_epochs",
    "peak MB",
    "rel. error",
    "median query",
    "worst query",
    "float32's worst",
    "Pearson",
)


def table(result: Report) -> str:
    """One workload for reading: seconds are the smallest of the runs."""
    contenders = result["contenders"]
    lines = [COLUMNS]
    for name, report in contenders.items():
        if report["status"] == "ok":
            lines.append(_cells(name, report, result["correlations"].get(name)))
    text = [aligned(lines)]
    for name, report in contenders.items():
        text += [f"  {name} tried {_tried(trial)}" for trial in report.get("trials", ())]
        if report["status"] != "ok":
            came = [f"{report['stage']} unfinished"] if "stage" in report else []
            if "fit_seconds" in report:
                came.append(f"factors {report['fit_seconds'][0]:.1f} s")
            if "scores_done" in report:
                came.append(f"{report['scores_done']:.0%} of the scores done")
            text.append(f"{name}: {report['status']} ({'; '.join([report['why'], *came])})")
    if result.get("seeds"):
        seeds = result["seeds"]
        text.append(f"Pearson per query at n = {seeds['n']}, {seeds['queries']} queries:")
        text += [
            f"  {pair}: mean {r['mean']:.4f}, median {r['median']:.4f}, lowest {r['lowest']:.4f}"
            for pair, r in seeds.items()
            if isinstance(r, dict)
        ]
        if "why" in seeds:
            text.append(f"  not compared ({seeds['why']})")
    return "\n".join(text)


def _tried(trial: Report) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in trial["settings"].items())
    size = f"n = {trial['n']}, {trial['queries']} queries"
    if trial["status"] != "ok":
        return f"{settings} at {size}: {trial['status']} ({trial['why']})"
    seconds = f"{trial['fit_seconds'][0]:.1f} + {trial['score_seconds'][0]:.1f} s"
    return f"{settings} at {size}: {seconds}, {trial['peak_memory_bytes'] / 1e6:.0f} MB"


def _cells(name: str, report: Report, correlation: Report | None) -> tuple[str, ...]:
    errors = report["against_float64"]
    return (
        name,
        f"{report['n']} x {report['queries']}",
        f"{min(report['fit_seconds']):.2f}",
        f"{min(report['score_seconds']):.2f}",
        f"{total(report):.2f}",
        f"{report['plain_epochs']:.1f}",
        f"{report['peak_memory_bytes'] / 1e6:.0f}",
        f"{errors['relative_error']:.1e}",
        f"{errors['median_query']:.1e}",
        f"{errors['worst_query']:.1e}",
        f"{errors['float32_gradients']['worst_query']:.1e}",
        f"{correlation['mean']:.4f}" if correlation else "",
    )


def save(out: Path | None, name: str, result: Report) -> None:
    """Put the workload's result into the file, beside the others that are there."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    everything = json.loads(out.read_text()) if out.exists() else {"workloads": {}}
    question = "EK-FAC influence: seconds, memory and agreement, factors and scores"
    workloads = everything["workloads"] | {name: result}
    ordered = {key: workloads[key] for key in WORKLOADS if key in workloads}
    everything = {"question": question, "workloads": ordered}
    out.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")


def measure(given: argparse.Namespace, workload: Workload, folder: Path) -> Report:
    """Everything of one workload; the result is written after each contender."""
    contest = Contest(given, workload, folder)
    result = contest.result
    result |= {
        "workload": {
            "data": workload.data,
            "n": contest.n,
            "queries": contest.queries,
            "parameters": workload.parameters,
            "attributed": workload.params,
            "damping": workload.damping,
            "dtype": "float32",
            "training": training(contest.file),
        },
        "environment": environment(),
        "plain_epoch": contest.plain_epoch(),
        "contenders": {},
        "correlations": {},
    }
    for contender in (c for c in CONTENDERS if c.name in given.only):
        result["contenders"][contender.name] = contest.contender(contender)
        result["correlations"] = contest.correlations()
        save(given.out, workload.name, result)
    if workload.seeds and not given.no_seeds and {REFERENCE, PEER} <= set(given.only):
        result["seeds"] = contest.seeds()
        save(given.out, workload.name, result)
    return result


def main() -> None:
    """Run everything; print a table for each workload as it is done."""
    given = arguments()
    for name in given.workload:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(given, WORKLOADS[name], Path(folder))
        plain_epoch = result["plain_epoch"]
        described = result["workload"]
        print(f"\n{name}: {described['n']} x {described['queries']}, {described['data']}")
        seconds, threads = min(plain_epoch["seconds"]), plain_epoch["threads"]
        print(f"plain epoch: {seconds:.4f} s at batch {plain_epoch['batch']}, {threads} threads")
        print(table(result))


if __name__ == "__main__":
    main()
