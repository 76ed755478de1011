"""A page to click through: each suspect row with its label, the proposed one, and what to do.

suspects(found, "suspects.html", Display(train_images=…))     one file, which opens offline
decisions("decisions.json", found)                            what was clicked and downloaded
"""

import json
from pathlib import Path
from typing import Any

from upweight.applications.debugging import DROP, KEEP, Suspects
from upweight.errors import DataError, ShapeError
from upweight.notation import readable
from upweight.provenance import Context
from upweight.report.display import Display
from upweight.report.examples import Examples, examples
from upweight.report.rendering import filled, script_of, write_page
from upweight.report.shown import content

FORMAT = "upweight decisions 1"
"""The first entry of the file that the page makes."""


def suspects(
    found: Suspects,
    path: str | Path,
    display: Display = Display(),  # noqa: B008  frozen
    *,
    k: int = 100,
) -> Path:
    """Write the page on the first k suspects.

    Args:
        found: From `upweight.applications.debugging.suspects`.
        path: The file to write; it is replaced whole or not at all.
        display: How rows are shown: `train_images` or `train_texts` where the model's inputs are
            features, `features` for the columns of tables, `render`, `title`.
        k: How many suspects.

    Returns:
        The path.

    Raises:
        ShapeError: k is below 1, or the display has not one entry per row.
        DataError: A label is nothing that JSON holds.
    """
    if k < 1:
        raise ShapeError(
            "A page shows at least one suspect.",
            f"k={k}.",
            "an empty selection.",
            "k=100 for the first hundred.",
        )
    rows, fitted = found.order[:k].tolist(), found.subject.fitted
    display = display.named(Context(fitted.task, fitted.train, fitted.train, None))
    held = examples(found.subject.fitted.train, rows, "train", display)
    names = [_named(name) for name in found.classes.names]
    cards = [_card(found, row, place, held, display) for place, row in enumerate(rows)]
    data = {
        "format": FORMAT,
        "rows": len(found),
        "names": names,
        "cards": [
            {name: card[name] for name in ("row", "label", "proposed", "relabelling", "removing")}
            for card in cards
        ],
    }
    words = {
        "title": display.title or found.title,
        "verdict": found.verdict,
        "notes": found.notes,
        "cards": cards,
        "names": [str(name) for name in names],
        "predicts": found.relabelling is not None,
        "rows": len(found),
    }
    page = filled(
        "suspects.html", ["template.css", "suspects.css"], script_of("suspects"), data, words
    )
    return write_page(path, page)


def decisions(path: str | Path, found: Suspects) -> dict[int, Any]:
    """What was decided on a page, for `Suspects.apply`: by row a label, "keep" or "drop".

    Raises:
        DataError: The file is none of such a page, or of one of other data.
        OSError: It cannot be read.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise KeyError(held["format"])
        entries = [
            (int(each["row"]), each["label"], each["action"], each.get("new"))
            for each in held["decisions"]
        ]
        rows = int(held["rows"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Decisions are the JSON that a page of suspects downloads ({FORMAT!r}).",
            f"{Path(path).name}: {type(error).__name__} {error}.",
            "another file, or one that was edited.",
            "download the decisions from the page again.",
        ) from error
    made: dict[int, Any] = {}
    for row, label, action, new in entries:
        is_there = rows == len(found) and 0 <= row < rows
        if not is_there or _named(found.label(row)) != label:
            raise DataError(
                "Decisions belong to the training data of their page.",
                f"row {row} with the label {label!r} of {rows} rows, where row {row} "
                + (f"has the label {found.label(row)!r}." if is_there else f"of {len(found)}."),
                "a page of other data, or of the data before they were corrected.",
                "write the page again: upweight.report.suspects(found, path).",
            )
        made[row] = {"keep": KEEP, "drop": DROP}.get(action, new)
    return made


def _card(
    found: Suspects, row: int, place: int, held: Examples, display: Display
) -> dict[str, Any]:
    """One suspect: what is shown of it, its labels, and what is predicted."""
    shown = held.contents[place]
    parts = shown.get("custom", [])
    if held.images is not None:
        parts = content(held.images[place])
    elif "text" in shown:
        parts = content(shown["text"])
    elif held.table is not None:
        names = display.features or [f"column {j}" for j in range(held.table.shape[1])]
        parts = content(dict(zip(names, shown["row"], strict=False)))
    changes = {
        name: None if values is None else float(values[row])
        for name, values in (("relabelling", found.relabelling), ("removing", found.removing))
    }
    return {
        "row": row,
        "name": f"#{row}" if display.train_ids is None else str(display.train_ids[row]),
        "place": place + 1,
        "parts": parts,
        "label": int(found.labels[row]),
        "proposed": int(found.proposals[row]),
        "suspicion": readable(float(found.suspicion[row]), signed=True),
        "told": {
            name: None if value is None else readable(value, signed=True)
            for name, value in changes.items()
        },
        **changes,
    }


def _named(name: Any) -> Any:
    """A label as JSON holds it."""
    if isinstance(name, str | int | float | bool):
        return name
    raise DataError(
        "The labels of a page are texts or numbers, which its file of decisions can hold.",
        f"a label {name!r} of type {type(name).__name__}.",
        "classes that are objects.",
        "fit with texts or numbers as labels.",
    )
