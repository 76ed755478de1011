"""Descriptions differ exactly where things differ."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import Ridge
from torch import nn

import upweight as uw
from upweight.errors import SpecError
from upweight.task.identity import contents, described


def times(factor):
    return lambda f, y: factor * f


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.linear, self.factor = nn.Linear(2, 1), factor
        for parameter in self.parameters():
            parameter.data.fill_(0.5)

    def forward(self, x):
        return self.factor * self.linear(x)


class Doubled(Scaled):
    def forward(self, x):
        return 2.0 * self.factor * self.linear(x)


@dataclass(frozen=True)
class Holds:
    value: object


def moved():
    model = Scaled(1.0)
    model.linear.bias.data += 1e-6
    return model


SAME = [
    (lambda: times(2.0)),
    (lambda: Scaled(3.0)),
    (lambda: Holds(torch.arange(3))),
    (lambda: Ridge(alpha=0.3)),
    (lambda: functools.partial(times, 2.0)),
    (lambda: uw.CrossEntropy().log_prob),
    (lambda: {"a": [1, 2.5, None, "x"]}),
]


@pytest.mark.parametrize("make", SAME)
def test_equal_things_have_one_description(make):
    assert described(make()) == described(make())


DIFFERENT = [
    (times(2.0), times(3.0)),
    (Scaled(1.0), Scaled(1.5)),
    (Scaled(1.0), Doubled(1.0)),
    (Scaled(1.0), moved()),
    (Holds(torch.arange(3)), Holds(torch.arange(3).float())),
    (Holds(np.arange(3)), Holds(np.array([0, 1, 3]))),
    (Ridge(alpha=0.3), Ridge(alpha=0.31)),
    (Holds(1), Holds(1.0)),
    (Holds("1"), Holds(1)),
    (functools.partial(times, 2.0), functools.partial(times, 3.0)),
    (uw.L2(0.1), uw.L2(0.1, exclude=("bias",))),
    (lambda f, y: f + 1, lambda f, y: f - 1),
]


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different_things_have_two(a, b):
    assert described(a) != described(b)


def test_data_are_described_by_content_and_order():
    X, y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])
    assert contents(uw.as_data((X, y))) == contents(uw.as_data((X.numpy(), y.numpy())))
    assert contents(uw.as_data((X, y))) != contents(uw.as_data((X.flip(0), y)))
    assert contents(uw.as_data((X, y))) != contents(uw.as_data({"x": X, "labels": y}))


def test_what_has_only_an_address_is_refused():
    with pytest.raises(SpecError, match="frozen dataclass of its hyperparameters"):
        described(Holds(object()))
    with pytest.raises(SpecError, match="RandomState"):
        described(Ridge(random_state=np.random.RandomState(0)))


def test_a_function_with_a_set_in_it_is_described_alike_in_every_process():
    code = (
        "from upweight.task.identity import described\n"
        "a, b, c, d = 1, 2, 3, 4\n"
        "def other(x): return x * a * b\n"
        "def another(x): return x + a\n"
        "def loss(x): return other(a * b * c * d) + another(x) or "
        "x in {'red', 'green', 'blue', 'grey', 'black', 'white'}\n"
        "print(described(loss))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(found) == 1


def test_the_places_that_labels_are_drawn_by_count_as_contents():
    """Two examples of a larger set are not the two alone, unless they are its first."""
    data = uw.as_data((torch.arange(8.0).reshape(4, 2), torch.arange(4)))
    rows = [[0, 1], [2, 3]]
    same = [contents(data.subset(r)) == contents(uw.as_data(data.take(r))) for r in rows]
    assert same == [True, False]


FACTOR = 1.0


def by_factor(f, y):
    return tenfold(f)[:, 0] * FACTOR


def tenfold(f):
    return 10 * f


class ByFactor(nn.Module):
    factor = 1.0

    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return x * FACTOR + self.factor


@pytest.mark.parametrize("value", [by_factor, ByFactor(), functools.partial(by_factor, y=1)])
def test_what_code_reads_by_name_is_part_of_its_description(value, monkeypatch):
    before = described(value)
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.FACTOR", 2.0)
        assert described(value) != before
        if not isinstance(value, nn.Module):
            patch.setattr(f"{__name__}.FACTOR", 1.0)
            patch.setattr(f"{__name__}.tenfold", lambda f: 9 * f)
            assert described(value) != before
        else:
            patch.setattr(f"{__name__}.FACTOR", 1.0)
            patch.setattr(ByFactor, "factor", 2.0)
            assert described(value) != before
    assert described(value) == before


def test_long_arrays_of_objects_and_frames_are_told_in_full():
    def frame(middle=0.0, name="x"):
        values = np.arange(2000.0)
        values[1000] = middle
        words = np.array(["a", "b"] * 1000, dtype=object)
        words[1000] = f"{middle:g}"
        return pd.DataFrame({name: values, "words": words})

    told = [described(each) for each in (frame(), frame(1.0), frame(0.0, "y"))]
    assert len(set(told)) == 3 and described(frame()) == told[0]
    words = [described(frame(x).words.to_numpy(dtype=object)) for x in (0.0, 1.0, 0.0)]
    assert words[0] == words[2] != words[1]
    assert described(frame().x) != described(frame(1.0).x)
    numbers = [np.arange(2000), np.arange(2000)]
    numbers[1][1000] = 0
    assert described(pd.Index(numbers[0])) != described(pd.Index(numbers[1]))
    assert described(pd.Index(numbers[0])) == described(pd.Index(np.arange(2000)))
    column = pd.Series(numbers[0])
    levels = pd.CategoricalDtype([*range(2000)]), pd.CategoricalDtype([*range(2000)], ordered=True)
    kinds = [column.astype(d).to_frame("x") for d in ("int32", "int64", "Int64", "object", *levels)]
    assert len({described(each) for each in kinds}) == len(kinds)
    assert described(kinds[2]) == described(column.astype("Int64").to_frame("x"))
    for dtype in (">f8", np.longdouble, np.clongdouble, ">i4", "M8[ns]", "U3"):
        told = [described(np.array([0, 1, k]).astype(dtype)) for k in (2, 2, 3)]
        assert told[0] == told[1] != told[2]
    sparse = [scipy.sparse.csr_array(np.eye(60) * x) for x in (1.0, 2.0)]
    assert described(sparse[0]) != described(sparse[1])
