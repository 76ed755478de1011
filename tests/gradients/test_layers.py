"""Every layer rule against other ways to the same gradients, at several batch sizes.

On the market, by `vmap(grad)`; on the layers beyond it, also by loops over `torch.autograd`.
"""

import pytest
import torch

from tests import market
from tests.gradients import layer_market
from tests.gradients.layer_market import gradient_rows
from tests.reference import dense
from upweight.gradients.functional import value_gradients
from upweight.gradients.planning import plan
from upweight.task.data import as_data

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# Said of bilinear layers by PyTorch, which runs them one example at a time under vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def batches(data):
    """Whole, in batches that leave a remainder, one by one."""
    for size in {len(data), 2, 1}:
        yield from data.batches(size)


def by_vmap(task, data):
    n = len(data)
    return value_gradients(task.losses, task.theta(), data.batch(0, n), n)


@pytest.mark.parametrize("name", market.BUILDERS)
def test_on_the_market_they_are_those_by_vmap(name):
    p = market.problem(name)
    data = as_data(p.train)
    made, expected = plan(p.task, p.task.theta(), data), by_vmap(p.task, data)
    for start, stop, batch in batches(data):
        torch.testing.assert_close(gradient_rows(made, batch), expected[start:stop], **p.tolerance)


@pytest.mark.parametrize("name", layer_market.BUILDERS)
def test_on_layers_they_are_those_by_loops_and_by_vmap(name):
    case, made = layer_market.case(name), layer_market.planned(name)
    expected = dense.gradients(case.task, case.data)
    for start, stop, batch in batches(case.data):
        torch.testing.assert_close(gradient_rows(made, batch), expected[start:stop], **EXACT)
    if case.has_vmap:
        torch.testing.assert_close(by_vmap(case.task, case.data), expected, **EXACT)


@pytest.mark.parametrize("name", layer_market.BUILDERS)
def test_what_has_a_rule(name):
    case, made = layer_market.case(name), layer_market.planned(name)
    assert set(made.by_function) == case.by_function
    assert set(made.repeated) == case.repeated
