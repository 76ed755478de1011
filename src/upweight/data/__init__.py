"""Real data that come with the package: a balanced subset of MNIST."""

import csv
import lzma
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jaxtyping import Int64, UInt8

__all__ = ["Digits", "mnist_subset"]


@dataclass(frozen=True, eq=False)
class Digits:
    """Handwritten digits, split as MNIST is.

    Args:
        X: Training images, 0 is background and 255 is ink.
        y: Which digit each shows.
        X_test: Test images.
        y_test: Which digit each shows.
        index: Where each training image stands among MNIST's 60 000.
        index_test: Where each test image stands among MNIST's 10 000.
    """

    X: UInt8[np.ndarray, "n 28 28"]
    y: Int64[np.ndarray, " n"]
    X_test: UInt8[np.ndarray, "q 28 28"]
    y_test: Int64[np.ndarray, " q"]
    index: Int64[np.ndarray, " n"]
    index_test: Int64[np.ndarray, " q"]


def mnist_subset() -> Digits:
    """5 000 training and 1 000 test images of MNIST, 500 and 100 of each digit.

    Source: MNIST, Y. LeCun, C. Cortes and C. J. C. Burges; licence CC BY-SA 3.0. Drawn by
    `scripts/draw_mnist_subset.py` with a fixed seed, within each split in the published order.

    Returns:
        Arrays of your own: a second call reads them from the installed package again.

    Example:
        >>> digits = mnist_subset()
        >>> digits.X.shape, digits.X_test.shape
        ((5000, 28, 28), (1000, 28, 28))
    """
    folder = files(__name__)
    rows = list(csv.DictReader(folder.joinpath("digits.csv").read_text("ascii").splitlines()))
    labels = np.array([int(row["label"]) for row in rows], dtype=np.int64)
    index = np.array([int(row["index"]) for row in rows], dtype=np.int64)
    train = np.array([row["split"] == "train" for row in rows])
    pixels = lzma.decompress(folder.joinpath("digits.xz").read_bytes())
    images = np.frombuffer(pixels, dtype=np.uint8).reshape(len(rows), 28, 28)
    return Digits(
        images[train], labels[train], images[~train], labels[~train], index[train], index[~train]
    )
