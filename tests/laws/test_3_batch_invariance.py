"""Law 3: any partition of the data into batches gives the same S.

Binds every deterministic method. Batch sizes follow from a memory budget, which is shrunk here to
one example a batch and to several sizes between; a `Data` that keeps count proves that it took.
Labels that are drawn belong to an example's place in the data, so methods that draw them are bound
too.
"""

import pytest

import upweight as uw
import upweight.task.data
from tests.fitted import at
from tests.laws.subjects import (
    DIRECT,
    ITERATIVE,
    LAYERED,
    SAMPLED,
    SAMPLED_LAYERED,
    assert_same,
    attributed,
    first_output,
    tolerance,
)
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
        "mean loss": fitted.losses.mean(),
    }


def assert_invariant(method, name, budgets, numbers, monkeypatch):
    p = problem(name)
    whole = Counted(p.train)
    methods = DIRECT | ITERATIVE | SAMPLED
    expected = numbers(methods[method], p, whole)
    for budget in budgets:
        parts = Counted(p.train)
        monkeypatch.setattr(upweight.task.data, "WORKING_BYTES", budget)
        found = numbers(methods[method], p, parts)
        at_once = (whole.sizes.count(p.n), parts.sizes.count(p.n))
        assert at_once[1] < at_once[0], f"{budget} bytes: the data were not taken in parts"
        for key, value in expected.items():
            assert_same(found[key], value, tolerance(method))


# One example a batch for each method and model; several to a batch at two sizes, of which each
# method has both and each model has both.
BUDGETS = [
    (method, name, (1, (400, 1500)[(k + j) % 2]))
    for k, method in enumerate(DIRECT)
    for j, name in enumerate(["softmax", "mlp_tanh"])
]


@pytest.mark.parametrize("method, name, budgets", BUDGETS)
def test_batches_do_not_matter(method, name, budgets, monkeypatch):
    assert_invariant(method, name, budgets, everything, monkeypatch)


@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
@pytest.mark.parametrize("method", ITERATIVE)
def test_batches_do_not_matter_to_iterative_solvers(method, name, monkeypatch):
    def numbers(method, p, train):
        return {"scores": method.fit(p.task, train).attribute(p.queries).values}

    assert_invariant(method, name, [1000], numbers, monkeypatch)


@pytest.mark.parametrize("method", SAMPLED)
def test_batches_do_not_matter_to_labels_that_are_drawn(method, monkeypatch):
    def numbers(method, p, train):
        fitted = method.fit(p.task, train)
        scores = fitted.attribute(p.queries).values
        return {"scores": scores, "curvature": fitted.scorer.operator.dense()}

    assert_invariant(method, "softmax", [1, 1500], numbers, monkeypatch)


def by_layer(method, p, train, budget):
    """All numbers that one fit by layers gives, and the sizes of its batches."""
    counted = Counted(train)
    fitted = method.fit(p.task, counted, resources=uw.Resources(memory_bytes=budget))
    scores = attributed(fitted, p.queries)
    health = scores.provenance.health
    labels = [i % 3 for i in range(len(counted))]
    numbers = {
        "scores": scores.values,
        "outputs": attributed(fitted, p.queries, first_output).values,
        "curvature": fitted.scorer.curvature.operator().dense(),
        "self-influence": fitted.self_influence(),
        "groups": at(fitted, 0).attribute(p.queries, into=uw.GroupSums(labels)).values,
        "highest": at(fitted, 0).attribute(p.queries, into=uw.Top(3)).raises_by,
    }
    for name, share in at(fitted, 0).attribute(p.queries, into=uw.PerLayer()).items():
        numbers[name] = share.values
    for key in ("mean_loss", "damping", "mean_eigenvalue"):
        numbers[key] = scores.values.new_tensor(health[key])
    return numbers, counted.sizes


@pytest.mark.parametrize("name", ["mlp_tanh", "tied"])
@pytest.mark.parametrize("method", LAYERED)
def test_batches_do_not_matter_to_layers(method, name):
    """Nor do the groups of queries that fit into memory: with one byte, each query by itself."""
    p = problem(name)
    expected, whole = by_layer(LAYERED[method], p, p.train, None)
    for budget in (1, 3000):
        found, parts = by_layer(LAYERED[method], p, p.train, budget)
        assert max(parts[-3:]) < max(whole[-3:]), f"{budget} bytes: the data were not in parts"
        for key, value in expected.items():
            assert_same(found[key], value, 1e-10)


@pytest.mark.parametrize("method", SAMPLED_LAYERED)
def test_labels_do_not_depend_on_batches(method, monkeypatch):
    p = problem("mlp_tanh")
    many = as_data(p.train).subset([i % p.n for i in range(50)])
    expected, whole = by_layer(SAMPLED_LAYERED[method], p, many, None)
    for size in (1, 16):
        monkeypatch.setattr("upweight.curvature.layerwise.MOST_EXAMPLES", size)
        found, parts = by_layer(SAMPLED_LAYERED[method], p, many, None)
        # Once: the second pass reads what the first kept.
        assert whole.count(50) > parts.count(50) and parts.count(size) >= 50 // size
        for key, value in expected.items():
            assert_same(found[key], value, 1e-10)
