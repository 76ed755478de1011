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

PNG_ADDRESS = "data:image/png;base64,"

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

    They are exact (PNG) up to `EXACT_BYTES`, else WebP. Arguments as for `sprite`.
    """
    side = side_for(len(images))
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


def side_for(count: int) -> int:
    """The longer side of each of so many thumbnails, at most."""
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, int(math.sqrt(PIXELS / max(1, count)))))


def thumbnails(
    images: NDArray[np.generic], low: float, high: float, side: int
) -> NDArray[np.uint8]:
    """Images [k, h, w, c] as bytes, their longer side at most `side`."""
    if images.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        pixels = np.ascontiguousarray(images)
    else:
        span = high - low if high > low else 1.0
        scaled = (images.astype(np.float64) - low) * (255.0 / span)
        pixels = np.ascontiguousarray(scaled.clip(0.0, 255.0).round().astype(np.uint8))
    height, width = pixels.shape[1:3]
    shrink = min(1.0, side / max(height, width))
    if shrink == 1.0 or not len(pixels):
        return pixels
    from PIL import Image  # an import of a second that only the report needs

    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    small = [
        np.asarray(picture_of(array).resize(size, Image.Resampling.LANCZOS)) for array in pixels
    ]
    return np.stack(small).reshape(len(small), size[1], size[0], -1)


def picture_of(pixels: NDArray[np.uint8]) -> Any:
    """Bytes [h, w, c] as a picture of Pillow."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Bytes [h, w, c] as a PNG file."""
    buffer = io.BytesIO()
    picture_of(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def address(file: bytes) -> str:
    """The address of an image that holds it, for a page that asks the network for nothing."""
    return PNG_ADDRESS + base64.b64encode(file).decode("ascii")


def sprite(
    images: NDArray[np.generic],
    low: float,
    high: float,
    side: int = LARGEST_SIDE,
    exact: bool = True,
) -> Sprite:
    """One sheet of all the images [k, h, w, c]. Its bytes depend on the arguments alone.

    Args:
        images: As from `as_images`.
        low: What is drawn black, as from `display_range`.
        high: What is drawn white.
        side: The longer side of a thumbnail in pixels, at most.
        exact: PNG, or WebP with a loss.
    """
    tiles = thumbnails(images, low, high, side)
    count, height, width, channels = tiles.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    across, down = width + 2 * GUTTER, height + 2 * GUTTER
    sheet = np.zeros((rows * down, columns * across, channels), dtype=np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * down + GUTTER, place % columns * across + GUTTER
        sheet[top : top + height, left : left + width] = tile
    if exact:
        return Sprite(png(sheet), width, height, columns, rows)
    buffer = io.BytesIO()
    picture_of(sheet).save(buffer, format="WEBP", quality=75, method=4)
    return Sprite(buffer.getvalue(), width, height, columns, rows, "image/webp")
