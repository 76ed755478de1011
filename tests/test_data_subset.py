"""The bundled digits are the ones that were drawn."""

import hashlib
from dataclasses import FrozenInstanceError
from importlib.resources import files

import numpy as np
import pytest

from upweight.data import mnist_subset

CONTENTS = "521f060cdad72f9eabfc699b5b8bbd23b793a36de6c806b0408c737fa618a0cb"


@pytest.fixture(scope="module")
def digits():
    return mnist_subset()


def test_digits_are_balanced(digits):
    assert digits.X.shape == (5000, 28, 28) and digits.X.dtype == np.uint8
    assert digits.X_test.shape == (1000, 28, 28) and digits.X_test.dtype == np.uint8
    assert digits.y.dtype == digits.y_test.dtype == np.int64
    assert np.bincount(digits.y).tolist() == [500] * 10
    assert np.bincount(digits.y_test).tolist() == [100] * 10


def test_every_digit_is_another_image_of_the_source(digits):
    for index, size, count in [(digits.index, 60_000, 5000), (digits.index_test, 10_000, 1000)]:
        assert len(set(index.tolist())) == len(index) == count
        assert 0 <= index.min() and index.max() < size


def test_contents_are_unchanged(digits):
    arrays = (digits.X, digits.y, digits.index, digits.X_test, digits.y_test, digits.index_test)
    # As little-endian bytes, so that the sum is the same on every machine.
    parts = [array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays]
    assert hashlib.sha256(b"".join(parts)).hexdigest() == CONTENTS


def test_a_caller_may_write_to_the_arrays_but_not_to_the_digits(digits):
    fresh = mnist_subset()
    fresh.X[:] = 0
    assert mnist_subset().X.any()
    with pytest.raises(FrozenInstanceError):
        fresh.X = digits.X


def test_the_package_carries_them_with_source_and_licence():
    folder = files("upweight.data")
    size = sum(len(folder.joinpath(name).read_bytes()) for name in ("digits.xz", "digits.csv"))
    assert size < 1_500_000
    said = folder.joinpath("README.md").read_text()
    assert "LeCun" in said and "CC BY-SA 3.0" in said
