"""Tables of the benchmark's file: for the docs, and what `uw.plan` quotes.

    python benchmarks/fidelity_table.py        # src/upweight/front/fidelity.json, and the pages

Of `results/fidelity.json` that file keeps the losses of random halves, and the slope of removals,
of the methods that a plan may choose. In the pages each table below `<!-- fidelity.py: … -->` is
written. `fidelity.py --markdown` and `method_table.py` print from here.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "fidelity.json"
TABLE = HERE.parent / "src" / "upweight" / "front" / "fidelity.json"
PAGES = tuple(
    HERE.parent / page
    for page in ("docs/evaluation.md", "docs/methods/ensemble.md", "benchmarks/README.md")
)
PLACE = re.compile(r"(<!-- fidelity\.py: (.+?) -->\n\n)(?:\|.*\n)*")
"""What a table is of, and the table."""

HALVES = "subsets-0.5"
"""The plan of the table."""

OURS = "upweight "
"""What the names of our contenders begin with."""

Row = dict[str, Any]

SHORT = {"does not run": "–", "timed out": "time", "not installed": "?"}
"""Why a cell of the table has no number; `failed` is memory or an error of the library."""


def cell_of(row: Row | None, column: str, with_interval: bool = False) -> str:
    """One number of a method on a task, or why there is none."""
    if row is None:
        return "not run"
    if row.get("status", "ok") != "ok":
        no_memory = "allocate memory" in row.get("why", "")
        return "memory" if no_memory else SHORT.get(row["status"], row["status"])
    if column == "cost":
        return cost(row)
    if column == "AUROC":
        area = row.get("mislabeled", {}).get("auroc")
        return "" if area is None else f"{area[0]:.3f}"
    measure, what = column.split()
    values = row.get("removals" if what != "lds" else HALVES, {})
    found = values.get(measure) if measure == "loss" else other_of(values)
    value = (found or {}).get(what)
    return "" if value is None else number(value, with_interval)


def cost(row: Row) -> str:
    """Wall time of fit and scores, and peak memory; * beside other work."""
    if "seconds" not in row:
        return ""
    beside = "*" if row.get("shared") else ""
    seconds = short(sum(row["seconds"].values()))
    return f"{seconds} s{beside}, {row['peak_memory_mb']:.0f} MB"


def short(x: float) -> str:
    """To two digits, without an exponent."""
    return f"{float(f'{x:.2g}'):g}"


def number(value: Sequence[float], with_interval: bool) -> str:
    """To two digits, and its interval below it."""
    x, low, high = value
    below = f"<br><small>{low:.2f} … {high:.2f}</small>" if with_interval else ""
    return f"{x:.2f}{below}"


def other_of(values: Row) -> Row | None:
    """Of the measurement beside the loss."""
    return next((value for key, value in values.items() if key != "loss"), None)


def ceiling(methods: dict[str, Row], column: str, with_interval: bool = False) -> str:
    """What retraining from other seeds gets: the same for every method."""
    for row in methods.values():
        values = row.get(HALVES, {})
        found = values.get("loss") if column == "loss lds" else other_of(values)
        if found is not None:
            top = found["ceiling"]
            return "1" if top is None else number(top, with_interval)
    return ""


def markdown(report: Row, column: str, labels: Sequence[str]) -> str:
    """Methods down, tasks across."""
    tasks = report["tasks"]
    lines = [["method", *tasks], ["---"] * (len(tasks) + 1)]
    if column.endswith("lds"):
        tops = (ceiling(task["methods"], column) for task in tasks.values())
        lines.append(["*retraining again*", *tops])
    if column == "cost":
        for what in ("epoch", "training"):
            times = (task.get(f"{what}_seconds") for task in tasks.values())
            lines.append([f"*one {what}*", *("–" if t is None else f"{short(t)} s" for t in times)])
    for label in labels:
        cells = [cell_of(task["methods"].get(label), column) for task in tasks.values()]
        if any(cell not in ("", "–", "not run") for cell in cells):
            lines.append([label, *cells])
    return in_lines(lines)


STACKED = {
    (halves, beside): f"upweight stacked SOURCE, {halves} halves{beside}"
    for beside in ("", ", beside the GGN")
    for halves in (10, 16, 40)
}
WANTED = 0.9
"""Of the ceiling, with the slope of removals within `SIZED`."""
WANTED_OF = {"spam-mlp": 0.7}
SIZED = (0.8, 1.25)


def stacked(report: Row) -> str:
    """The stacks over halves: what they rank, and their whole time beside the trainings in it."""
    head = ["task", "halves", "GGN", "trainings", "whole time, trainings", "LDS", "of the ceiling"]
    lines = [[*head, "slope of removals"], ["---"] * (len(head) + 1)]
    for name, task in report["tasks"].items():
        rows = {key: task["methods"].get(label, {}) for key, label in STACKED.items()}
        rows = {key: row for key, row in rows.items() if row.get("status") == "ok"}
        first = min((key for key, row in rows.items() if reached(name, row)), default=None)
        for (halves, beside), row in rows.items():
            lds, top = row[HALVES]["loss"]["lds"], row[HALVES]["loss"]["ceiling"]
            slope = row["removals"]["loss"]["slope"]
            cpu = row.get("cpu_seconds")
            took = "–" if cpu is None else short(cpu / task["training_seconds"])
            found = [name, str(halves), "beside" if beside else "–", f"{halves / 2:g}", took]
            shares = [x / top[0] for x in lds]
            found += [within(lds), f"{within(shares, 3)} of {top[0]:.2f}", within(slope)]
            is_first = (halves, beside) == first
            lines.append([f"**{cell}**" if is_first else cell for cell in found])
    return in_lines(lines)


def reached(name: str, row: Row) -> bool:
    lds, top = row[HALVES]["loss"]["lds"][0], row[HALVES]["loss"]["ceiling"][0]
    slope = row["removals"]["loss"]["slope"][0]
    return bool(lds >= WANTED_OF.get(name, WANTED) * top and SIZED[0] <= slope <= SIZED[1])


def within(value: Sequence[float], digits: int = 2) -> str:
    """A number and its interval on one line."""
    x, low, high = (f"{y:.{digits}f}" for y in value)
    return f"{x} [{low}, {high}]"


DAMPED = (
    ("GGN, λ = 1/(step size × steps)", "upweight GGN, λ of training"),
    ("GGN, λ = 0.02 for each label", "upweight GGN, usual λ"),
    ("mean, λ = 1/(step size × steps)", "upweight SOURCE and GGN, λ of training"),
    ("mean, λ = 0.02 for each label", "upweight SOURCE and GGN"),
)


def damped(report: Row) -> str:
    """The two λ of the GGN, by itself and in the mean with SOURCE: LDS, and slope of removals."""
    tasks = {
        name: task["methods"]
        for name, task in report["tasks"].items()
        if "slope" in task["methods"][DAMPED[0][1]].get("removals", {}).get("loss", {})
    }
    lines = [["", *tasks], ["---"] * (len(tasks) + 1)]
    for words, label in DAMPED:
        rows = [methods.get(label, {}) for methods in tasks.values()]
        lines.append([words, *map(rank_and_size, rows)])
    return in_lines(lines)


def rank_and_size(row: Row) -> str:
    if row.get("status") != "ok":
        return "not run"
    return f"{row[HALVES]['loss']['lds'][0]:.2f}, {row['removals']['loss']['slope'][0]:.2f}"


def written(page: str, report: Row, labels: Sequence[str]) -> str:
    """The page with its tables as they are in the result."""

    def anew(found: re.Match[str]) -> str:
        of = {"stacked": stacked, "dampings": damped}.get(found[2])
        made = of(report) if of else markdown(report, found[2], labels)
        return f"{found[1]}{made}\n"

    return PLACE.sub(anew, page)


def contenders() -> list[str]:
    """Ours first, in the order of the tables."""
    import fidelity_ours
    import fidelity_peers

    return [each.name for each in (*fidelity_ours.OURS, *fidelity_peers.PEERS)]


def in_lines(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measured(results: Row) -> dict[str, dict[str, Row]]:
    """{method: {task: row}} of all that ran and predict losses of models of random halves."""
    methods: dict[str, dict[str, Row]] = {}
    for name, task in results["tasks"].items():
        for method, row in task["methods"].items():
            if row.get("status") == "ok" and "loss" in row.get(HALVES, {}):
                methods.setdefault(method, {})[name] = row
    return methods


def table(results: Row) -> dict[str, Any]:
    """{method: {task: numbers}}, of our methods that ran, and what the tasks are."""
    tasks = {
        name: {"parameters": task["parameters"], "examples": task["examples"]}
        for name, task in results["tasks"].items()
    }
    methods = {
        method: {
            task: {
                "lds": rounded(row[HALVES]["loss"]["lds"]),
                "ceiling": rounded(row[HALVES]["loss"]["ceiling"]),
                "slope": rounded(row.get("removals", {}).get("loss", {}).get("slope")),
                "epochs": float(f"{row['plain_epochs']:.3g}"),
            }
            for task, row in rows.items()
        }
        for method, rows in measured(results).items()
        if method.startswith(OURS)
    }
    return {"tasks": tasks, "methods": methods}


def rounded(estimate: list[float] | None) -> list[float] | None:
    """(value, low, high) to three digits."""
    return None if estimate is None else [float(f"{x:.3g}") for x in estimate]


def text(results: Row) -> str:
    """The file: a method's task per line."""
    found = table(results)
    rows = [
        f"  {json.dumps(method)}: {{\n"
        + ",\n".join(f"   {json.dumps(task)}: {json.dumps(row)}" for task, row in of.items())
        + "\n  }"
        for method, of in found["methods"].items()
    ]
    tasks = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found["tasks"].items())
    methods = ",\n".join(rows)
    return f'{{\n "tasks": {{\n{tasks}\n }},\n "methods": {{\n{methods}\n }}\n}}\n'


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    TABLE.write_text(text(found), encoding="utf-8")
    for file in PAGES:
        page = file.read_text(encoding="utf-8")
        file.write_text(written(page, found, contenders()), encoding="utf-8")
