"""Damping against the spectrum, block by block: where λ decides a score and where the data do.

    mean and largest eigenvalue of Hₗ · λₗ · share of its eigenvalues below λₗ · error of the mean

All of it from `provenance.health["blocks"]`; nothing is measured here. Where an eigenvalue is far
above λ the curvature decides what H⁻¹ does; where it is far below, λ does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upweight.report.notation import readable

MOST_OPEN = 12
"""Blocks up to which the table is shown at once; a longer one waits behind a click."""


@dataclass(frozen=True)
class Row:
    """One block: words for its cells, and places on the common axis in percent, None for no place.

    Args:
        name: The block.
        entries: Of its parameters, how many.
        mean, largest, damping: Eigenvalues and λ, in words.
        below: Share of the eigenvalues below λ, in words.
        error: Standard error of the mean from seeing a part of the data; "" where all were seen.
        marks: Where the mean, the largest eigenvalue and λ stand, as x in percent.
        told: The row in a sentence, for those who do not see the marks.
    """

    name: str
    entries: str
    mean: str
    largest: str
    damping: str
    below: str
    error: str
    marks: Mapping[str, str | None]
    told: str


@dataclass(frozen=True)
class Spectrum:
    """The table and its axis.

    Args:
        rows: One per block, in the model's order.
        ticks: (x in percent, "10⁻³") along the logarithmic axis.
        damped: Whether any block has λ > 0.
        sampled: Whether some mean has a standard error.
        folded: Whether the table is too long to be shown at once.
    """

    rows: tuple[Row, ...]
    ticks: tuple[tuple[str, str], ...]
    damped: bool
    sampled: bool
    folded: bool


def spectrum(health: Mapping[str, Any]) -> Spectrum | None:
    """The blocks of a layerwise curvature; None where the scores come from another."""
    blocks = health.get("blocks")
    if not isinstance(blocks, Mapping) or not blocks:
        return None
    keys = ("mean_eigenvalue", "largest_eigenvalue", "damping")
    values = {str(name): [float(block[key]) for key in keys] for name, block in blocks.items()}
    positive = [v for row in values.values() for v in row if v > 0 and math.isfinite(v)]
    low = math.floor(math.log10(min(positive))) if positive else -1
    high = math.ceil(math.log10(max(positive))) if positive else 0
    high = max(high, low + 1)

    def place(value: float) -> str | None:
        if not (value > 0 and math.isfinite(value)):
            return None
        # Room at both ends for the marks themselves.
        return f"{4 + 92 * (math.log10(value) - low) / (high - low):.2f}%"

    rows = tuple(_row(name, blocks[name], values[name], place) for name in values)
    step = math.ceil((high - low) / 4)
    ticks = tuple((place(10.0**power) or "", _power(power)) for power in range(low, high + 1, step))
    return Spectrum(
        rows,
        ticks,
        damped=any(v[2] > 0 for v in values.values()),
        sampled=any(row.error for row in rows),
        folded=len(rows) > MOST_OPEN,
    )


def _row(name: str, block: Mapping[str, Any], values: list[float], place: Any) -> Row:
    mean, largest, damping = values
    error = float(block.get("mean_eigenvalue_error", 0.0))
    below = percent(float(block["below_damping"])) if damping > 0 else "–"
    words = [readable(v) for v in (mean, largest, damping)]
    return Row(
        name=name,
        entries=f"{int(block['entries']):,}",
        mean=words[0],
        largest=words[1],
        damping=words[2] if damping > 0 else "none",
        below=below,
        error=f"± {percent(error)}" if error > 0 else "",
        marks={"mean": place(mean), "largest": place(largest), "damping": place(damping)},
        told=f"{name}: mean eigenvalue {words[0]}, largest {words[1]}, λ {words[2]}",
    )


def percent(share: float) -> str:
    """`0 %`, `0.3 %`, `12 %`, `>99.9 %`: a share, never rounded to nothing or everything."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    if share < 1e-3:
        return "<0.1 %"
    if share > 0.999:
        return ">99.9 %"
    return f"{100 * share:.1f} %" if share < 0.1 or share > 0.9 else f"{100 * share:.0f} %"


def _power(power: int) -> str:
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
