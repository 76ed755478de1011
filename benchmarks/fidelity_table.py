"""Tables of the benchmark's file: for the docs, and what `uw.plan` quotes.

    python benchmarks/fidelity_table.py        # writes src/upweight/front/fidelity.json

Of `results/fidelity.json` that file keeps the losses of random halves, and the slope of removals,
of the methods that a plan may choose. `fidelity.py --markdown` and `method_table.py` print from
here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "fidelity.json"
TABLE = HERE.parent / "src" / "upweight" / "front" / "fidelity.json"

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
    if column == "AUROC":
        area = row.get("mislabeled", {}).get("auroc")
        return "" if area is None else f"{area[0]:.3f}"
    measure, what = column.split()
    values = row.get("removals" if what != "lds" else HALVES, {})
    found = values.get(measure) if measure == "loss" else other_of(values)
    value = (found or {}).get(what)
    return "" if value is None else number(value, with_interval)


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
    for label in labels:
        cells = [cell_of(task["methods"].get(label), column) for task in tasks.values()]
        if any(cell not in ("", "–", "not run") for cell in cells):
            lines.append([label, *cells])
    return in_lines(lines)


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
    TABLE.write_text(text(json.loads(RESULTS.read_text())))
