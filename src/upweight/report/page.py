"""Scores → one HTML file that opens offline: what raised and lowered each measurement, and proof.

The page is data (JSON), two sprites and our own style and script, all inside the file. Its content
policy lets run exactly our script, by its hash, and load nothing: a label that contains markup is
text. The bytes depend on the arguments alone.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import ShapeError, message
from upweight.report.check import Check, Comparison
from upweight.report.content import Selection, payload, require_fit, selection
from upweight.report.examples import Examples, examples
from upweight.report.facts import noun_of, query_facts
from upweight.report.health import convention, health, verdicts
from upweight.report.notation import count, interval, readable
from upweight.report.spectrum import spectrum
from upweight.report.sprite import Sprite, display_range, sprite
from upweight.report.strongest import require_scores
from upweight.scores import Scores
from upweight.task.data import Data, as_data

PER_SIDE = 12
"""Examples shown at each end of a query's ranking."""


def html(
    scores: Scores,
    train: Any,
    queries: Any,
    path: str | Path,
    *,
    checks: Sequence[Check] = (),
    comparison: Comparison | None = None,
    removal: Scores | None = None,
    title: str | None = None,
    names: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    values: Sequence[float] | None = None,
    predictions: Sequence[Any] | None = None,
    train_images: Any = None,
    query_images: Any = None,
    k: int = PER_SIDE,
    start: int | None = None,
    command: str | None = None,
) -> Path:
    """Write a page on what raised and lowered the measurement of each query.

    Args:
        scores: S or Δm, `[q, n]` or `[q, groups]`.
        train: The training data, as for `as_data`. Only the examples shown are read.
        queries: The queries, in the order of the rows.
        path: The file to write; it is replaced whole or not at all.
        checks: Predictions beside what retraining gave; they make the first panel.
        comparison: What `fitted.check(recipe, budget)` found; the page says it first.
        removal: Better predictions of Δm for the same columns, as from `fitted.removal(queries)`;
            by default removal is predicted as minus the derivative.
        title: What the page is about: the data and the model.
        names: Of the classes, by index.
        features: Names of the columns, where inputs are tables `[n, f]`.
        values: m of each query as trained. By default asked of the model, where scores carry it.
        predictions: The predicted class of each query, as index or name; by default as `values`.
        train_images: What to show in place of the training inputs, one per example: images where
            the model's inputs are flattened, rows where they are transformed.
        query_images: The same for the queries.
        k: Examples at each end of a query's ranking.
        start: The query shown first; by default the first that was checked, else 0.
        command: The command that makes this page again, for its footer.

    Returns:
        The path.

    Raises:
        DataError: There is nothing to show.
        NonFinite: A score is NaN or infinite.
        ShapeError: Parts disagree about the number of queries, examples or columns.

    Example:
        >>> html(scores, (X, y), (X_test, y_test), path="cats.html")
    """
    require_scores(scores)
    train_data, query_data = as_data(train), as_data(queries)
    require_fit(scores, removal, checks, len(train_data), len(query_data))
    _require_options(k, start, len(query_data))
    facts = query_facts(scores, values, predictions)
    chosen = selection(scores, checks, k)
    shown = _train_examples(scores, train_data, chosen, names, train_images)
    asked = examples(query_data, range(len(query_data)), names, query_images, "query")
    sprites = _sprites(shown, asked)
    first = start if start is not None else checks[0].query if checks else 0
    data = payload(scores, removal, checks, chosen, shown, asked, facts, names, features)
    data |= {
        "noun": noun_of(scores),
        "kind": asked.noun,
        "start": first,
        "sprites": {role: image.geometry() for role, image in sprites.items()},
    }
    text = _render(data, sprites, _words(scores, checks, comparison, asked.noun, title, command))
    return _write(Path(path), text)


def _require_options(k: int, start: int | None, q: int) -> None:
    if k < 1 or (start is not None and not 0 <= start < q):
        raise ShapeError(
            message(
                f"k must be at least 1 and start one of the queries 0…{q - 1}.",
                f"k={k}, start={start}.",
                "an index into the full test set where only some queries were attributed.",
                "use a row of the scores.",
            )
        )


def _train_examples(
    scores: Scores, data: Data, chosen: Selection, names: Sequence[str] | None, instead: Any
) -> Examples:
    if scores.columns is not None:
        # A column is a group: there is no one image of it, and its name is its index.
        return Examples(("",) * len(chosen.columns))
    if not chosen.columns:
        return Examples(())
    return examples(data, chosen.columns, names, instead, "train")


def _sprites(train: Examples, queries: Examples) -> dict[str, Sprite]:
    images = {"train": train.images, "query": queries.images}
    present: dict[str, NDArray[np.generic]] = {r: x for r, x in images.items() if x is not None}
    if not present:
        return {}
    low, high = display_range(*present.values())
    return {role: sprite(x, low, high) for role, x in present.items()}


def _words(
    scores: Scores,
    checks: Sequence[Check],
    comparison: Comparison | None,
    kind: str,
    title: str | None,
    command: str | None,
) -> dict[str, Any]:
    """The text of the page that does not change with the query."""
    provenance = scores.provenance
    noun = noun_of(scores)
    columns = "group" if scores.columns is not None else kind
    return {
        "title": title,
        "heading": f"What raised and lowered the {noun} on this {kind}",
        "scale": f"{count(scores.values.shape[1], f'training {columns}')}, "
        f"{count(len(scores.values), 'query')}, {count(provenance.p, 'parameter')}",
        "noun": noun,
        "kind": kind,
        "verdicts": verdicts(checks, comparison, kind),
        "convention": convention(scores),
        "health": [asdict(fact) for fact in health(scores, checks, comparison)],
        "sets": any(len(removal) > 1 for check in checks for removal in check.removed),
        "spectrum": spectrum(provenance.health),
        "notes": [_clean(note) for note in provenance.notes],
        "checks": [
            {
                "label": check.label,
                "query": check.query,
                "n": len(check.examples),
                "estimates": [
                    interval(estimate).partition(" ")[::2]
                    for estimate in (check.pearson, check.slope, check.spearman)
                ],
            }
            for check in checks
        ],
        "provenance": _provenance(scores, command),
    }


def _provenance(scores: Scores, command: str | None) -> list[tuple[str, str]]:
    made = scores.provenance
    rows = [
        ("method", made.method),
        ("task", made.task),
        ("measure", made.measure),
        ("numbers", f"{made.dtype} on {made.device}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
        *(
            (name.replace("_", " "), _value(value))
            for name, value in made.health.items()
            if name != "blocks"  # they have a table of their own
        ),
    ]
    if command:
        rows.append(("command", command))
    return [(name, _clean(value)) for name, value in rows]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_value(part)}" for name, part in value.items())
    return readable(value, 4) if isinstance(value, float) else str(value)


def _clean(text: str) -> str:
    """Without memory addresses, which the repr of a function has and which no two runs share."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _render(data: dict[str, Any], sprites: dict[str, Sprite], words: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined  # only the report needs it
    from markupsafe import Markup

    folder = resources.files("upweight.report")
    source = {e: (folder / f"template.{e}").read_text(encoding="utf-8") for e in ("css", "js")}
    style = source["css"] + "".join(
        f'\n.tile.{role} {{ background-image: url("{image.url}"); }}'
        for role, image in sprites.items()
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "template.html").read_text(encoding="utf-8"))
    return template.render(
        **words,
        # These three are ours or escaped already; the engine escapes everything else.
        style=Markup(style),
        script=Markup(source["js"]),
        data=Markup(_json(data)),
        style_hash=_hash(style),
        script_hash=_hash(source["js"]),
    )


def _json(data: dict[str, Any]) -> str:
    """JSON in ASCII in which no parser of HTML can find markup."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    staged.write_text(text, encoding="utf-8", newline="\n")
    os.replace(staged, path)
    return path
