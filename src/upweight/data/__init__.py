"""Real data that come with the package: a balanced subset of MNIST."""

import csv
import lzma
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

__all__ = ["Digits", "mnist_subset"]


@dataclass(frozen=True, eq=False)
class Digits:
    """Handwritten digits, split as MNIST is.

    Args:
        X: Training images [5000, 28, 28], uint8.
        y: Their digits [5000], int64.
        X_test: Test images [1000, 28, 28], uint8.
        y_test: Their digits [1000], int64.
        index: Where each training image is among MNIST's 60 000.
        index_test: Where each test image is among MNIST's 10 000.
    """

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    index: np.ndarray
    index_test: np.ndarray


def mnist_subset() -> Digits:
    """5 000 training and 1 000 test images of MNIST, 500 and 100 of each digit.

    Source: MNIST, Y. LeCun, C. Cortes and C. J. C. Burges; licence CC BY-SA 3.0. Drawn by
    `scripts/draw_mnist_subset.py` with a fixed seed. Read from the installed package.
    """
    folder = files(__name__)
    rows = list(csv.DictReader(folder.joinpath("digits.csv").read_text().splitlines()))
    labels = np.array([int(row["label"]) for row in rows])
    index = np.array([int(row["index"]) for row in rows])
    train = np.array([row["split"] == "train" for row in rows])
    pixels = lzma.decompress(folder.joinpath("digits.xz").read_bytes())
    images = np.frombuffer(pixels, dtype=np.uint8).reshape(len(rows), 28, 28).copy()
    return Digits(
        images[train], labels[train], images[~train], labels[~train], index[train], index[~train]
    )
