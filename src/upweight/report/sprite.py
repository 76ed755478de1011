"""Many small images as one PNG: one decode for the browser, one file for the page."""

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_SIDE = 96
"""Pixels of a thumbnail; larger images are scaled down to it, smaller ones are left as they are."""

GUTTER = 1
"""Empty pixels around each tile: at fractional zoom a browser mixes in the neighbour's edge."""


@dataclass(frozen=True)
class Sprite:
    """Tile t is at column t mod `columns`, row t div `columns`, each `width + 2·GUTTER` wide."""

    png: bytes
    width: int
    height: int
    columns: int
    rows: int

    @property
    def url(self) -> str:
        """A data address: the page asks the network for nothing."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    def geometry(self) -> dict[str, int]:
        """What the page needs to find a tile."""
        return {
            "width": self.width,
            "height": self.height,
            "columns": self.columns,
            "rows": self.rows,
            "gutter": GUTTER,
        }


def as_images(values: NDArray[np.generic]) -> NDArray[np.generic] | None:
    """Arrays as images [k, h, w, c] with 1, 3 or 4 channels, or None where they are not images.

    `[k, h, w]` is gray; of four axes the channels are the second if that has 1, 3 or 4 entries
    (PyTorch's order), else the last.
    """
    if values.dtype.kind not in "buif" or min(values.shape[1:], default=0) < 1:
        return None
    if values.ndim == 3:
        return values[..., None]
    if values.ndim == 4 and values.shape[1] in (1, 3, 4):
        return np.moveaxis(values, 1, -1)
    if values.ndim == 4 and values.shape[3] in (1, 3, 4):
        return values
    return None


def display_range(*images: NDArray[np.generic]) -> tuple[float, float]:
    """What is drawn black and what white, the same for every image given.

    Bytes are 0…255 and values within 0…1 are 0…1; anything else (normalized inputs) from its
    smallest to its largest value.
    """
    if all(image.dtype == np.uint8 for image in images):
        return 0.0, 255.0
    low = min(float(image.min()) for image in images)
    high = max(float(image.max()) for image in images)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def sprite(images: NDArray[np.generic], low: float, high: float) -> Sprite:
    """One PNG of all the images [k, h, w, c].

    Args:
        images: As from `as_images`.
        low: What is drawn black, as from `display_range`.
        high: What is drawn white.

    Returns:
        The PNG and where its tiles are. The bytes depend on the arguments alone.
    """
    from PIL import Image  # an import of a second that only the report needs

    pixels = _bytes(images, low, high)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    height, width = pixels.shape[1:3]
    shrink = min(1.0, LARGEST_SIDE / max(height, width))
    height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    across, down = width + 2 * GUTTER, height + 2 * GUTTER
    sheet = Image.new(mode, (columns * across, rows * down))
    for tile, array in enumerate(pixels):
        image = Image.fromarray(array[..., 0] if mode == "L" else array)
        if shrink < 1.0:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        place = (tile % columns * across + GUTTER, tile // columns * down + GUTTER)
        sheet.paste(image, place)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return Sprite(buffer.getvalue(), width, height, columns, rows)


def _bytes(images: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    if images.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return np.ascontiguousarray(images)
    span = high - low if high > low else 1.0
    scaled = (images.astype(np.float64) - low) * (255.0 / span)
    return np.ascontiguousarray(scaled.clip(0.0, 255.0).round().astype(np.uint8))
