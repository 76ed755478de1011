"""Structured content of an example: texts, names with values, pictures. Never markup.

A renderer of the user's gives it for an index, and the page builds the elements itself: whatever a
renderer returns, it cannot run script or load anything.

    "a text"   {"name": value, …}   array [h, w] or [h, w, c]   a list of these
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from upweight.errors import DataError
from upweight.notation import written
from upweight.report.sprite import LARGEST_SIDE, address, as_images, display_range, png, thumbnails

Render = Callable[[str, int], Any]
"""("train" or "query", index) → content."""

TEXT_BYTES = 1_200_000
"""Characters of all texts of a set on the page together; long texts are cut to share them."""

MISSING = ("nan", "NaT", "<NA>")
"""How missing values of NumPy and pandas write themselves."""

LONGEST, SHORTEST = 4000, 160
"""Characters of one text, at most and in any case."""


def content(value: Any) -> list[dict[str, Any]]:
    """What a renderer returned, as JSON for the page; a DataError where it cannot be shown."""
    if isinstance(value, str):
        return [{"text": clipped(value, LONGEST)}]
    if isinstance(value, Mapping):
        return [{"pairs": [[str(name), clipped(_said(v), 400)] for name, v in value.items()]}]
    if isinstance(value, Tensor | np.ndarray):
        return [{"picture": _picture(value)}]
    if isinstance(value, Sequence):
        return [part for item in value for part in content(item)]
    raise DataError(
        "A renderer returns a text, a mapping of names to values, an image array or a list.",
        f"an object of type {type(value).__name__}.",
        "a figure, or markup wrapped in an object.",
        "return str(…) of it, or its pixels as an array [h, w] or [h, w, c].",
    )


def clipped(text: str, most: int) -> str:
    """At most `most` characters, with an ellipsis where something was left out."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def length(examples: int) -> int:
    """Characters that each of so many texts may have."""
    return max(SHORTEST, min(LONGEST, TEXT_BYTES // max(1, examples)))


def _said(value: Any) -> str:
    if not isinstance(value, str) and str(value) in MISSING:
        return "missing"
    return written(value) if isinstance(value, float) else str(value)


def _picture(value: Any) -> str:
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    images = as_images(array[None]) if array.ndim in (2, 3) else None
    if images is None:
        raise DataError(
            "An image is an array [h, w], [h, w, c] or [c, h, w].",
            f"shape {array.shape}, dtype {array.dtype}.",
            "a batch of images, or a row of numbers.",
            "return one image, or a mapping of names to numbers.",
        )
    small = thumbnails(images, *display_range(images), 2 * LARGEST_SIDE)
    return address(png(small[0]))
