"""What is named is what is meant, in every form; what means nothing is refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from upweight.errors import DataError, ShapeError
from upweight.runtime.selection import labels_by_place, places, require_labels

FORMS = {
    "list": [3, 0],
    "tuple": (3, 0),
    "generator": (i for i in (3, 0)),
    "range": range(3, -1, -3),
    "NumPy": np.array([3, 0]),
    "NumPy integers": [np.int32(3), np.uint8(0)],
    "tensor": torch.tensor([3, 0]),
    "tensors": [torch.tensor(3), torch.tensor(0)],
    "pandas": pd.Index([3, 0]),
    "series": pd.Series([3, 0], index=[7, 9]),
}
MASK = [True, False, False, True, False]


@pytest.mark.parametrize("form", FORMS)
def test_indices_in_every_form(form):
    assert places(FORMS[form], 5, "Rows") == [3, 0]


@pytest.mark.parametrize(
    "form", [list, tuple, np.array, torch.tensor, pd.Series], ids=lambda f: f.__name__
)
def test_a_mask_names_the_places_that_are_true(form):
    assert places(form(MASK), 5, "Rows") == [0, 3]


def test_one_and_none():
    assert places(3, 5, "Rows") == places(np.int64(3), 5, "Rows") == [3]
    assert places(torch.tensor(3), 5, "Rows") == [3]
    assert places([], 5, "Rows") == places(torch.tensor([]), 5, "Rows") == []
    assert places([False] * 5, 5, "Rows") == []
    assert places([1, 1], 5, "Rows", repeats=True) == [1, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.9], r"0…4.*\n.*1\.9"),
        ([1.0], "whole numbers"),
        (torch.tensor([0.0, 2.0]), r"0\.0, 2\.0"),
        ([5], "0…4.*\n.*5"),
        ([-1], r"-1.*\n.*counted from the end"),
        ([0, 2, 0], r"twice 0.*\n.*listed twice"),
        (["0"], "'0'"),
        ("abc", "'a', 'b', 'c'"),
        ([None], "None"),
        ([float("nan")], "nan"),
        ([True, False], r"for each: 5.*\n.*2 of them"),
        (np.ones(6, bool), r"for each: 5.*\n.*6 of them"),
        (True, r"for each: 5.*\n.*1 of them"),
        ([0, True], "True"),
        ([[0, 1]], r"\[0, 1\]"),
        (np.ones((5, 1), bool), r"\[True\]"),
    ],
    ids=str,
)
def test_what_names_nothing_is_refused(given, said):
    with pytest.raises(ShapeError, match=said):
        places(given, 5, "Rows")


@pytest.mark.parametrize("given", [[], [False] * 5, torch.tensor([])], ids=str)
def test_something_must_be_named_where_it_is_needed(given):
    with pytest.raises(ShapeError, match="at least 1 of them"):
        places(given, 5, "Rows", least=1)


@pytest.mark.parametrize(
    "form", [list, np.array, torch.tensor, pd.Series, iter], ids=lambda f: f.__name__
)
def test_labels_by_place(form):
    names, at = labels_by_place(form([2, 0, 2, 10]), 4, "column")
    assert names == ("0", "10", "2") and at == [2, 0, 2, 1]


def test_labels_that_are_not_one_for_each():
    with pytest.raises(ShapeError, match=r"3\.\n.*2 labels"):
        labels_by_place(["a", "b"], 3, "column")
    for lacking in ([None, "a"], [float("nan"), 1.0]):
        with pytest.raises(DataError, match=r"no label at places \[0\]"):
            require_labels(lacking, "column")
    require_labels(pd.Series([None, "a"]).fillna("unknown"), "column")  # the way out
    with pytest.raises(ShapeError, match=r"\(3, 2\).*\n.*one-hot"):
        labels_by_place(torch.eye(3)[:, :2], 3, "column")
