"""How near to retraining did a method come on the standing benchmark? Read, not measured here.

`fidelity.json` is made of the benchmark's results by `benchmarks/fidelity_table.py`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.notation import interval

FILE = Path(__file__).with_name("fidelity.json")


@dataclass(frozen=True)
class Fidelity:
    """A method on one task of the benchmark, each number as (value, low, high).

    Args:
        task: Its name.
        parameters: p of its model.
        examples: n.
        lds: Rank correlation of predicted and retrained losses over random halves of the data.
        ceiling: What retraining again with other seeds gets; None: training has no noise.
        slope: Of measured against predicted change under removals: 1 where sizes are right.
    """

    task: str
    parameters: int
    examples: int
    lds: tuple[float, float, float]
    ceiling: tuple[float, float, float] | None
    slope: tuple[float, float, float] | None

    def __str__(self) -> str:
        most = "1" if self.ceiling is None else f"{self.ceiling[0]:.2f}"
        slope = "" if self.slope is None else f", slope {interval(self.slope, 2)}"
        return (
            f"{self.task} (p = {self.parameters:,}): rank correlation (LDS) "
            f"{interval(self.lds, 2)} of {most}{slope}"
        )


def fidelity_of(measured_as: str) -> tuple[Fidelity, ...]:
    """What the benchmark says of a method, a task each; empty where it was not measured."""
    held = json.loads(FILE.read_text(encoding="utf-8"))
    rows, kept = held["methods"].get(measured_as, {}), ("lds", "ceiling", "slope")
    return tuple(
        Fidelity(task, **held["tasks"][task], **{key: _estimate(row[key]) for key in kept})
        for task, row in rows.items()
    )


def _estimate(values: Any) -> Any:
    return None if values is None else tuple(values)
