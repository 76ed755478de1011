"""Damping against the spectrum, block by block: where λ decides a score and where the data do.

    mean and largest eigenvalue of Hₗ · λₗ · share of its eigenvalues below λₗ · error of the mean

All of it from `provenance.health["blocks"]`; nothing is measured here. Where an eigenvalue is far
above λ the curvature decides what H⁻¹ does; where it is far below, λ does.
"""

import math
from collections.abc import Mapping
from typing import Any

from upweight.notation import percent, readable, superscript

MOST_OPEN = 12
"""Blocks up to which the table is shown at once; a longer one waits behind a click."""

MARKS = {"mean": "mean_eigenvalue", "largest": "largest_eigenvalue", "damping": "damping"}


def spectrum(health: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table and its axis, as the template says them; None without blocks.

    A row has words for its cells, and `marks`: where on the common logarithmic axis the mean, the
    largest eigenvalue and λ stand, in percent, None for no place.
    """
    blocks = health.get("blocks")
    if not isinstance(blocks, Mapping) or not blocks:
        return None
    values = {
        str(name): {mark: float(block[key]) for mark, key in MARKS.items()}
        for name, block in blocks.items()
    }
    positive = [v for row in values.values() for v in row.values() if v > 0 and math.isfinite(v)]
    low = math.floor(math.log10(min(positive))) if positive else -1
    high = max(math.ceil(math.log10(max(positive))) if positive else 0, low + 1)

    def place(value: float) -> str | None:
        if not (value > 0 and math.isfinite(value)):
            return None
        # Room at both ends for the marks themselves.
        return f"{4 + 92 * (math.log10(value) - low) / (high - low):.2f}%"

    rows = []
    for (name, found), block in zip(values.items(), blocks.values(), strict=True):
        words = {mark: readable(value) for mark, value in found.items()}
        error, damped = float(block.get("mean_eigenvalue_error", 0.0)), found["damping"] > 0
        rows.append(
            words
            | {
                "name": name,
                "entries": f"{int(block['entries']):,}",
                "damping": words["damping"] if damped else "none",
                "below": percent(float(block["below_damping"])) if damped else "–",
                "error": f"± {percent(error)}" if error > 0 else "",
                "marks": {mark: place(value) for mark, value in found.items()},
                "told": f"{name}: mean eigenvalue {words['mean']}, largest {words['largest']}, "
                f"λ {words['damping']}",
            }
        )
    powers = range(low, high + 1, math.ceil((high - low) / 4))
    return {
        "rows": rows,
        "ticks": [(place(10.0**power) or "", superscript(power)) for power in powers],
        "damped": any(row["damping"] > 0 for row in values.values()),
        "sampled": any(row["error"] for row in rows),
        "folded": len(rows) > MOST_OPEN,
    }
