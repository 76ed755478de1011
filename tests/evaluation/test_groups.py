"""Groups to remove: what they hold, and that the influential ones are the extremes."""

import itertools

import pytest
import torch

import upweight as uw
from tests.evaluation.models import effects, scored
from tests.market import problem
from upweight.errors import ShapeError
from upweight.evaluation import (
    class_groups,
    compare,
    influential_groups,
    leave_one_out,
    predicted_removals,
    random_groups,
    removal_order,
)
from upweight.scores import Unit
from upweight.training.newton import Newton


def test_random_groups_have_their_sizes_and_no_example_twice():
    sizes = [1, 5, 5, 19, 2]
    groups = random_groups(20, sizes)
    assert [len(set(group)) for group in groups] == sizes
    assert all(0 <= i < 20 for group in groups for i in group)
    assert random_groups(20, sizes) == groups
    assert random_groups(20, sizes, seed=1) != groups


def test_all_groups_come_once_when_all_are_asked_for():
    assert set(random_groups(5, [2] * 10)) == set(itertools.combinations(range(5), 2))


def test_class_groups_are_of_one_class():
    labels = torch.tensor([0, 1, 2, 1, 0, 1, 1, 2, 0])
    groups = class_groups(labels, [2, 3, 3, 1, 4, 2])
    assert [len(group) for group in groups] == [2, 3, 3, 1, 4, 2]
    assert all(len(labels[list(group)].unique()) == 1 for group in groups)
    assert groups[4] == (1, 3, 5, 6)  # the only class with four
    every = class_groups(labels, [3] * 5)  # 1 of class 0, 4 of class 1
    assert set(every) == {(0, 4, 8), *itertools.combinations((1, 3, 5, 6), 3)}


@pytest.mark.parametrize("as_effects", [False, True])
def test_influential_groups_are_the_extremes_among_all(as_effects):
    """Brute force over every group of three."""
    scores = scored(torch.randn(2, 9))
    given = effects(scores) if as_effects else scores
    for query in (0, 1, -1):
        lowers, raises = influential_groups(given, query, [3])
        every = list(itertools.combinations(range(9), 3))
        found = predicted_removals(scores, every)[:, query]
        assert tuple(sorted(lowers)) == every[int(found.argmin())]
        assert tuple(sorted(raises)) == every[int(found.argmax())]


def test_removal_order_puts_first_what_lowers_m():
    values = torch.tensor([[0.5, -1.0, 2.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    expected = torch.tensor([[2, 0, 3, 1], [2, 0, 1, 3]])
    assert torch.equal(removal_order(scored(values)), expected)
    assert torch.equal(removal_order(scored(values, Unit.RANK)), expected)
    assert torch.equal(removal_order(effects(scored(values))), expected)


def test_ranks_have_ends_but_no_sign():
    scores = scored(torch.tensor([[3.0, 1.0, 2.0]]), Unit.RANK)
    assert influential_groups(scores, 0, [1, 2]) == ((0,), (1,), (0, 2), (1, 2))
    with pytest.raises(ShapeError, match=r"raises m needs 1.*\n.*0 of 3 for query 0"):
        influential_groups(scored(scores.values), 0, [1])


def test_groups_are_removals_that_the_comparison_takes():
    p = problem("ridge")
    fitted = uw.Influence(solver=uw.solvers.Cholesky()).fit(p.task, p.train)

    def prediction(outputs, targets):
        return outputs[:, 0]

    scores = fitted.attribute(p.queries, prediction)
    groups = (*random_groups(p.n, [1, 2, 3]), *influential_groups(scores, 0, [3]))
    truth = leave_one_out(Newton(tol=1e-12), p.task, p.train, groups, p.queries, prediction)
    exact = compare(fitted.removal(p.queries, prediction, groups=groups), truth, groups)
    torch.testing.assert_close(exact.predicted, exact.actual, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make, given",
    [
        (lambda: random_groups(5, [5]), r"sizes \[5\]"),
        (lambda: random_groups(5, [0, 9]), r"sizes \[0, 9\]"),
        (lambda: random_groups(5, [0.5]), r"sizes \[0\.5\]"),
        (lambda: random_groups(5, []), r"sizes \[\]"),
        (lambda: random_groups(5, [4] * 6), "6 groups of 4, of which there are 5"),
        (lambda: class_groups([0, 0, 1], [2, 2]), "2 groups of 2, of which there are 1"),
        (lambda: class_groups([0, 1, 2], [2]), "1 groups of 2, of which there are 0"),
        (lambda: influential_groups(scored(torch.ones(1, 4)), 1, [1]), "query=1"),
        (lambda: influential_groups(scored(torch.ones(1, 4)), 0, [4]), r"sizes \[4\]"),
        (lambda: removal_order(scored(torch.ones(1, 2), columns=("1", "0"))), "in order"),
    ],
)
def test_impossible_groups_are_refused(make, given):
    with pytest.raises(ShapeError, match=given):
        make()
