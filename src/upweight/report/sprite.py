"""Many small images as few large ones: a sheet is decoded when one of its tiles is shown."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_SIDE = 96
"""Pixels of a thumbnail; larger images are scaled down to it, smaller ones are left as they are."""

SMALLEST_SIDE = 32
"""Pixels below which many thumbnails are not made smaller still."""

PIXELS = 8_000_000
"""Pixels of all thumbnails of a set together; many large images share them."""

TILES = 1024
"""Thumbnails of one sheet: one is decoded in a few milliseconds."""

EXACT_BYTES = 2_500_000
"""Bytes up to which sheets are kept as PNG; past them they are compressed with a loss."""

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
    media: str = "image/png"

    @property
    def text(self) -> str:
        """The file in base64, for a page that asks the network for nothing."""
        return base64.b64encode(self.png).decode("ascii")


def geometry(sheets: Sequence[Sprite]) -> dict[str, Any]:
    """What the page needs to find tile t: in sheet t div `TILES`."""
    return {
        "width": sheets[0].width,
        "height": sheets[0].height,
        "gutter": GUTTER,
        "tiles": TILES,
        "media": sheets[0].media,
        "sheets": [[sheet.columns, sheet.rows] for sheet in sheets],
    }


def sheets(images: NDArray[np.generic], low: float, high: float) -> tuple[Sprite, ...]:
    """Sheets of `TILES` thumbnails each, of all the images [k, h, w, c].

    They are exact (PNG) up to `EXACT_BYTES`, else WebP.

    Args:
        images: As from `as_images`.
        low: What is drawn black, as from `display_range`.
        high: What is drawn white.
    """
    side = _side(len(images))
    parts = [images[k : k + TILES] for k in range(0, len(images), TILES)]
    exact = []
    for part in parts:
        exact.append(sprite(part, low, high, side))
        if sum(len(sheet.png) for sheet in exact) > EXACT_BYTES:
            return tuple(sprite(part, low, high, side, exact=False) for part in parts)
    return tuple(exact)


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


def thumbnails(
    images: NDArray[np.generic], low: float, high: float, together: int
) -> NDArray[np.uint8]:
    """Images [k, h, w, c] as small as `sheets` would make them if there were so many, as bytes."""
    pixels = _bytes(images, low, high)
    height, width, shrink = _size(pixels, _side(together))
    if shrink == 1.0:
        return pixels
    small = [np.asarray(_resized(array, width, height, shrink)) for array in pixels]
    return np.stack(small).reshape(len(pixels), height, width, -1)


def _side(count: int) -> int:
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, int(math.sqrt(PIXELS / count))))


def _size(pixels: NDArray[np.uint8], side: int) -> tuple[int, int, float]:
    """Height and width of thumbnails, and by how much they are smaller."""
    height, width = pixels.shape[1:3]
    shrink = min(1.0, side / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink)), shrink


def _resized(array: NDArray[np.uint8], width: int, height: int, shrink: float) -> Any:
    from PIL import Image  # an import of a second that only the report needs

    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    return image if shrink == 1.0 else image.resize((width, height), Image.Resampling.LANCZOS)


def sprite(
    images: NDArray[np.generic],
    low: float,
    high: float,
    side: int = LARGEST_SIDE,
    exact: bool = True,
) -> Sprite:
    """One sheet of all the images [k, h, w, c].

    Args:
        images: As from `as_images`.
        low: What is drawn black, as from `display_range`.
        high: What is drawn white.
        side: The longer side of a thumbnail in pixels, at most.
        exact: PNG, or WebP with a loss.

    Returns:
        The file and where its tiles are. The bytes depend on the arguments alone.
    """
    from PIL import Image

    pixels = _bytes(images, low, high)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    height, width, shrink = _size(pixels, side)
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    across, down = width + 2 * GUTTER, height + 2 * GUTTER
    sheet = Image.new(mode, (columns * across, rows * down))
    for tile, array in enumerate(pixels):
        place = (tile % columns * across + GUTTER, tile // columns * down + GUTTER)
        sheet.paste(_resized(array, width, height, shrink), place)
    buffer = io.BytesIO()
    if exact:
        sheet.save(buffer, format="PNG", optimize=True)
        return Sprite(buffer.getvalue(), width, height, columns, rows)
    sheet.save(buffer, format="WEBP", quality=75, method=4)
    return Sprite(buffer.getvalue(), width, height, columns, rows, "image/webp")


def _bytes(images: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    if images.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return np.ascontiguousarray(images)
    span = high - low if high > low else 1.0
    scaled = (images.astype(np.float64) - low) * (255.0 / span)
    return np.ascontiguousarray(scaled.clip(0.0, 255.0).round().astype(np.uint8))
