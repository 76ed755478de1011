"""What `uw.plan` quotes: LDS, ceiling and slope of our methods per task, from the benchmark's file.

    python benchmarks/fidelity_table.py        # writes src/upweight/front/fidelity.json

Of `results/fidelity.json` it keeps the losses of random halves, and the slope of removals, of the
methods that a plan may choose.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "fidelity.json"
TABLE = HERE.parent / "src" / "upweight" / "front" / "fidelity.json"


def table(results: dict[str, Any]) -> dict[str, Any]:
    """{method: {task: numbers}}, of our methods that ran, and what the tasks are."""
    tasks, methods = {}, {}
    for name, task in results["tasks"].items():
        tasks[name] = {"parameters": task["parameters"], "examples": task["examples"]}
        for method, row in task["methods"].items():
            halves = row.get("subsets-0.5", {}).get("loss")
            if not method.startswith("upweight ") or row.get("status") != "ok" or halves is None:
                continue
            methods.setdefault(method, {})[name] = {
                "lds": rounded(halves["lds"]),
                "ceiling": rounded(halves["ceiling"]),
                "slope": rounded(row.get("removals", {}).get("loss", {}).get("slope")),
                "epochs": float(f"{row['yardsticks']:.3g}"),
            }
    return {"tasks": tasks, "methods": methods}


def rounded(estimate: list[float] | None) -> list[float] | None:
    """(value, low, high) to three digits."""
    return None if estimate is None else [float(f"{x:.3g}") for x in estimate]


def text(results: dict[str, Any]) -> str:
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
