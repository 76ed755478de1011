"""Law 3: any partition of the data into batches gives the same S.

Binds every deterministic method. Batch sizes follow from a memory budget, which is shrunk here to
one example a batch and to several sizes between; a `Data` that keeps count proves that it took.
"""

import pytest

import upweight.task.data
from tests.laws.subjects import DETERMINISTIC, DIRECT, ITERATIVE, assert_same, tolerance
from tests.market import problem
from upweight.task.data import Data, as_data


class Counted(Data):
    """Data that remember the sizes of the batches they gave."""

    def __init__(self, data):
        self.data, self.sizes = as_data(data), []

    def __len__(self):
        return len(self.data)

    def take(self, indices):
        self.sizes.append(len(indices))
        return self.data.take(indices)


def everything(method, p, train):
    """All numbers that one fit gives."""
    fitted = method.fit(p.task, train)
    return {
        "scores": fitted.attribute(p.queries).values,
        "self-influence": fitted.self_influence(),
        "removal": fitted.removal(p.queries, groups=[[2], [1, 3]]).values,
        "input influence": fitted.input_influence(2, p.queries),
        "mean loss": fitted.operator.diagonal().new_tensor(fitted.mean_loss),
    }


def assert_invariant(method, name, budget, numbers, monkeypatch):
    p = problem(name)
    whole, parts = Counted(p.train), Counted(p.train)
    expected = numbers(DETERMINISTIC[method], p, whole)
    monkeypatch.setattr(upweight.task.data, "WORKING_BYTES", budget)
    found = numbers(DETERMINISTIC[method], p, parts)
    at_once = (whole.sizes.count(p.n), parts.sizes.count(p.n))
    assert at_once[1] < at_once[0], "the data were not taken in parts"
    for key, value in expected.items():
        assert_same(found[key], value, tolerance(method))


@pytest.mark.parametrize("budget", [1, 400, 1500])
@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
@pytest.mark.parametrize("method", DIRECT)
def test_batches_do_not_matter(method, name, budget, monkeypatch):
    assert_invariant(method, name, budget, everything, monkeypatch)


@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
@pytest.mark.parametrize("method", ITERATIVE)
def test_batches_do_not_matter_to_iterative_solvers(method, name, monkeypatch):
    def numbers(method, p, train):
        return {"scores": method.fit(p.task, train).attribute(p.queries).values}

    assert_invariant(method, name, 1000, numbers, monkeypatch)
