"""One query's maps by every method beside those of the training examples that move its loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.applications.maps import Map
from upweight.applications.views import Row, Views
from upweight.errors import ShapeError, SpecError
from upweight.notation import percent, readable
from upweight.report.rendering import render_static, write_page
from upweight.report.sprite import address, as_images, display_range, png, thumbnails

SIDE = 96
"""Pixels of the longer side of a picture, at most."""

INK = 0.25
"""How much of the input is seen under its map."""

RAISED = np.array([184.0, 72.0, 10.0])
LOWERED = np.array([0.0, 99.0, 156.0])


def explain(
    views: Views,
    path: str | Path,
    *,
    shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    title: str = "Both views of a prediction",
) -> Path:
    """Write maps of one query and of its training examples as one page, offline, without script.

    Args:
        views: What `saliency.views` returned.
        path: The file to write; it is replaced whole or not at all.
        shape: How an input that is a vector is drawn, such as (28, 28); None: as one row.
        classes: Names of the classes.
        title: The heading of the page.

    Returns:
        The path.

    Raises:
        SpecError: It is not `Views`.
        ShapeError: The inputs cannot be drawn in this shape.

    Example:
        >>> explain(saliency.views(fitted, (X_test[:1], y_test[:1])), "maps.html")
    """
    if not isinstance(views, Views):
        raise SpecError(
            "The page shows what saliency.views(...) returned.",
            f"a {type(views).__module__}.{type(views).__qualname__}.",
            "a fitted method, or one map.",
            "explain(saliency.views(fitted, query), path); of one map: outcomes(map, path).",
        )
    drawn = _Drawn(views, shape)
    words = {
        "title": title,
        "label": _class(views.label, classes),
        "query": drawn.input(views.query),
        "examples": [
            {
                "name": f"example {i}",
                "label": _class(label, classes),
                "score": readable(float(s), signed=True),
                "image": drawn.input(x),
            }
            for i, label, s, x in zip(
                views.examples, views.labels, views.scores, views.inputs, strict=True
            )
        ],
        "concept": views.concept,
        "rows": [drawn.row(row) for row in views.rows],
        "unanswered": [*views.unanswered.items()],
        "notes": _notes(views),
    }
    return write_page(path, render_static("explain.html", words))


class _Drawn:
    """Pictures of inputs and maps in one shape."""

    def __init__(self, views: Views, shape: Sequence[int] | None) -> None:
        self.views = views
        given = tuple(views.query.shape)
        self.shape = (
            tuple(shape) if shape is not None else (1, *given) if len(given) == 1 else given
        )
        size = views.query.numel()
        if int(np.prod(self.shape)) != size or as_images(np.zeros((1, *self.shape))) is None:
            raise ShapeError(
                f"An input of {size} numbers is drawn as rows and columns, with 1 or 3 channels.",
                f"shape={self.shape}.",
                "tokens, volumes, or another number of pixels.",
                "shape=(1, n) draws any n numbers in one row.",
            )
        everything = [_numbers(views.query), *map(_numbers, views.inputs)]
        self.range = display_range(*everything)

    def input(self, x: Tensor) -> str:
        """The address of a picture of an input."""
        return address(png(self._pixels(x)))

    def row(self, row: Row) -> dict[str, Any]:
        """What the template says of a method."""
        views, first = self.views, self.views.inputs[0]
        cells = [
            self._cell(row.query, views.query, f"{row.name}, query"),
            self._cell(row.query, views.query, f"{row.name}, upper weights shuffled", True),
            self._cell(row.on_query, views.query, f"{row.name} of the score in the query"),
            self._cell(row.on_train, first, f"{row.name} of the score in the training input"),
        ]
        for example, x, i in zip(row.examples, views.inputs, views.examples, strict=True):
            cells.append(self._cell(example, x, f"{row.name}, example {i}"))
        return {
            "name": row.name,
            "meaning": row.meaning,
            "facts": _facts(row),
            "cells": cells,
        }

    def _cell(
        self, found: Map | str, x: Tensor, alt: str, shuffled: bool = False
    ) -> dict[str, str]:
        if isinstance(found, str):
            return {"image": "", "alt": alt, "why": found}
        values = found.randomized if shuffled else found.values
        if values is None:
            return {"image": "", "alt": alt, "why": "The model has no upper weights."}
        a = as_images(_numbers(values[0]).reshape(1, *self.shape))
        assert a is not None  # the shape is one of an image
        total = a[0].astype(np.float64).sum(axis=-1)
        size = float(np.abs(total).max()) or 1.0
        share = (np.abs(total) / size)[..., None]
        gray = 255.0 - INK * self._pixels(x).astype(np.float64)[..., :1]
        color = np.where((total > 0)[..., None], RAISED, LOWERED)
        pixels = (gray * (1 - share) + color * share).round().astype(np.uint8)
        small = thumbnails(pixels[None], 0.0, 255.0, SIDE)[0]
        return {"image": address(png(small)), "alt": alt, "why": ""}

    def _pixels(self, x: Tensor) -> NDArray[np.uint8]:
        images = as_images(_numbers(x).reshape(1, *self.shape))
        assert images is not None
        low, high = self.range
        return thumbnails(images, low, high, max(images.shape[1:3]))[0]


def _facts(row: Row) -> str:
    """How far the sums are off, and how alike the map under shuffled weights is."""
    said, offs = [], []
    for each in (row.query, row.on_query, row.on_train):
        if isinstance(each, Map) and each.method.adds_up:
            error = float(each.errors[0])
            offs.append("–" if error != error else percent(error))
    if offs:
        said.append("off " + "; ".join(offs))
    if isinstance(row.query, Map) and row.query.alike and row.query.alike[0] is not None:
        said.append(f"alike {row.query.alike[0]:.2f}".replace("-", "−"))
    return ", ".join(said)


def _notes(views: Views) -> list[str]:
    """What maps say of themselves, each once."""
    found: dict[str, None] = {}
    for row in views.rows:
        for each in (row.query, row.on_query, row.on_train):
            if isinstance(each, Map):
                of = "" if each is row.query else ", of the score"
                found.update({f"{row.name}{of}: {note}": None for note in each.notes})
    return [*found]


def _class(label: str, classes: Sequence[str] | None) -> str:
    at = label if classes is None or not label.isdecimal() else classes[int(label)]
    return str(at)


def _numbers(x: Tensor) -> NDArray[Any]:
    return np.asarray(x.detach().cpu().double().numpy())
