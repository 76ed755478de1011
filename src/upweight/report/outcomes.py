"""Outcomes of applications as sections: of a report of scores, or of a page of their own.

A section has the verdict, whether a refit stands behind it, the notes, the figure and the table of
an `Outcome`, and knows no application.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from upweight.applications.outcome import Outcome
from upweight.errors import SpecError
from upweight.notation import short
from upweight.report.rendering import render_static, write_page
from upweight.report.sprite import address

ROWS = 50
"""Rows of a table that are shown; the others are counted."""

COLUMNS = 14

INCHES = (7.2, 4.0)

DOTS_PER_INCH = 144
"""Twice what a page shows: sharp on a dense screen."""


def outcomes(
    found: Outcome | Iterable[Outcome], path: str | Path, title: str = "What follows"
) -> Path:
    """Write outcomes of applications as one page that opens offline, without script.

    Args:
        found: One, or several in their order.
        path: The file to write; it is replaced whole or not at all.
        title: The heading of the page.

    Returns:
        The path.

    Raises:
        SpecError: There is none, or something else among them.

    Example:
        >>> outcomes(robustness.amip(results, "white"), "robustness.html")
    """
    sections = sections_of(found)
    if not sections:
        raise SpecError(
            "A page of outcomes shows at least one.",
            "none.",
            "a list that was filtered to nothing.",
            "pass what an application returned: outcomes(amip(results, 'white'), path).",
        )
    page = render_static("outcomes.html", {"title": title, "outcomes": sections})
    return write_page(path, page)


def sections_of(found: Outcome | Iterable[Outcome]) -> list[dict[str, Any]]:
    """What the template says of each outcome; a SpecError where something is none."""
    every: Sequence[Any] = [found] if isinstance(found, Outcome) else [*found]
    for each in every:
        if not isinstance(each, Outcome):
            raise SpecError(
                "Outcomes are what applications return.",
                f"a {type(each).__module__}.{type(each).__qualname__}.",
                "its table or its summary, or a result of evaluation.",
                "pass the outcome itself; results of retraining go into evidence=.",
            )
    return [_section(each, k) for k, each in enumerate(every)]


def _section(outcome: Outcome, place: int) -> dict[str, Any]:
    table = outcome.frame()
    shown = table.iloc[:ROWS, :COLUMNS]
    named = not (table.index.name is None and list(table.index) == list(range(len(table))))
    return {
        "id": f"outcome-{place}",
        "title": outcome.title,
        "verdict": outcome.verdict,
        "confirmed": outcome.is_confirmed,
        "notes": outcome.notes,
        "figure": _figure(outcome),
        "head": [*([table.index.name or ""] if named else []), *map(str, shown.columns)],
        "rows": [
            [*([_cell(label)] if named else []), *map(_cell, row)]
            for label, row in zip(shown.index, shown.itertuples(index=False), strict=True)
        ],
        "left_out": len(table) - len(shown),
    }


def _figure(outcome: Outcome) -> str:
    """The figure as the address of an image that holds it."""
    figure: Any = outcome.plot().figure
    figure.set_size_inches(*INCHES)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return address(held.getvalue())


def _cell(value: Any) -> str:
    if isinstance(value, float) or type(value).__name__.startswith("float"):
        return f"{short(float(value), 4):g}" if value == value else "–"
    if isinstance(value, tuple | list):
        return ", ".join(map(_cell, value))
    return str(value)
