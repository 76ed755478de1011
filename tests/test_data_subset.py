"""The bundled digits are the ones that were drawn."""

import hashlib

import numpy as np

from upweight.data import mnist_subset


def test_digits_are_balanced_and_unchanged():
    digits = mnist_subset()
    assert digits.X.shape == (5000, 28, 28) and digits.X.dtype == np.uint8
    assert digits.X_test.shape == (1000, 28, 28) and digits.X_test.dtype == np.uint8
    assert np.bincount(digits.y).tolist() == [500] * 10
    assert np.bincount(digits.y_test).tolist() == [100] * 10
    assert len(set(digits.index)) == 5000 and len(set(digits.index_test)) == 1000
    contents = hashlib.sha256(digits.X.tobytes() + digits.y.astype(np.int64).tobytes())
    assert (
        contents.hexdigest() == "eff6064038760a409ffbd7c5b5f946150b25a466feb243bf864496c60283dbd2"
    )
