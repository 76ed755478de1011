"""`Averaged`: the mean of several methods' scores of one model, each row at one length."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import upweight as uw
from tests.market import train_in_place
from upweight.errors import SpecError

RECIPE = uw.Training(lambda: network(), uw.SGD(0.1, momentum=0.9), epochs=3, batch=10, seed=1)
GGN = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), 0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(n, seed):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=made, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=made)


TRAIN, QUERIES = data(31, 1), data(7, 2)


@pytest.fixture(scope="module")
def task():
    return uw.Task(RECIPE.trained(uw.Task(network(), uw.CrossEntropy()), TRAIN), uw.CrossEntropy())


@pytest.fixture(scope="module")
def fitted(task):
    return uw.Averaged((uw.SOURCE(2), GGN)).fit(task, TRAIN, history=RECIPE)


def test_the_rows_are_the_mean_of_rows_of_one_length(task, fitted):
    each = [
        uw.SOURCE(2).fit(task, TRAIN, history=RECIPE).attribute(QUERIES).values,
        GGN.fit(task, TRAIN).attribute(QUERIES).values,
    ]
    lengths = [values.norm(dim=1, keepdim=True) for values in each]
    expected = sum(v / f for v, f in zip(each, lengths, strict=True)) / 2
    expected = expected * (lengths[0] * lengths[1]).sqrt()
    found = fitted.attribute(QUERIES)
    assert_close(found.values, expected, rtol=1e-9, atol=1e-12)
    assert found.unit is uw.Unit.DERIVATIVE
    assert found.provenance.health["averaged"] == 2
    assert "not known to be exact" in found.against_sizes


def test_where_both_are_exact_it_is():
    x, y = data(40, 3)
    task = uw.Task(nn.Linear(4, 3).double(), uw.CrossEntropy(), uw.L2(0.1))
    train_in_place(task, (x, y))
    exact = uw.Influence(uw.Hessian())
    both = uw.Averaged((exact, uw.Influence(uw.GGN(), uw.solvers.CG(rtol=1e-12))))
    queries = data(5, 4)
    truth = exact.fit(task, (x, y)).attribute(queries).values
    assert_close(both.fit(task, (x, y)).attribute(queries).values, truth, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("into", [uw.Top(3), uw.GroupSums([0, 1, 2] * 10 + [0])])
def test_reducers_keep_of_the_same_scores(fitted, into):
    whole = fitted.attribute(QUERIES)
    found = fitted.attribute(QUERIES, into=into)
    if isinstance(into, uw.Top):
        assert torch.equal(found.raises, whole.values.topk(3, dim=1).indices)
    else:
        assert_close(found.values, whole.group(into.labels).values)


def test_queries_in_parts_are_the_same(fitted, tmp_path):
    whole = fitted.attribute(QUERIES).values
    by_part = uw.Averaged((uw.SOURCE(2), GGN)).fit(
        fitted.task, TRAIN, history=RECIPE,
        resources=uw.Resources(memory_bytes=20_000),
    )  # fmt: skip
    parts = by_part.attribute(QUERIES, into=uw.Shards(tmp_path))
    assert_close(parts[:], whole, rtol=1e-9, atol=1e-12)


def test_a_row_of_zeros_stays_out(task):
    averaged = uw.Averaged((GGN, Silent())).fit(task, TRAIN).attribute(QUERIES).values
    assert_close(averaged, GGN.fit(task, TRAIN).attribute(QUERIES).values, rtol=1e-9, atol=1e-12)


class Silent(uw.GradientDot):
    """Scores of 0."""

    unit = uw.Unit.DERIVATIVE

    def prepare(self, fitting):
        from upweight.methods.scorer import BlockScorer

        def score(queries, measure, start, stop):
            return torch.zeros(len(queries), stop - start, dtype=torch.float64)

        return BlockScorer(score)


def test_ranks_give_a_rank():
    assert uw.Averaged((GGN, uw.Random(0))).unit is uw.Unit.RANK
    assert uw.Averaged((GGN, GGN)).unit is uw.Unit.DERIVATIVE


def test_what_it_needs_of_training_is_what_its_methods_need(task):
    with pytest.raises(SpecError, match="how the model was trained"):
        uw.Averaged((uw.SOURCE(2), GGN)).fit(task, TRAIN)
    with pytest.raises(SpecError, match="looks at θ̂ alone"):
        uw.Averaged((GGN, uw.GradientDot())).fit(task, TRAIN, history=RECIPE)
    told = uw.Influence(uw.EKFAC(), damping=uw.FromTraining())
    assert not uw.Averaged((told, uw.SOURCE(2))).history_is_optional
    for given in ((GGN,), (GGN, uw.SOURCE), ()):
        with pytest.raises(SpecError, match="two methods or more"):
            uw.Averaged(given)
