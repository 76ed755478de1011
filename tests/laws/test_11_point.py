"""Law 11: θ is an argument. What is taken at θ′ is what a copy of the model at θ′ would give.

The plan of another point serves: it says which layers there are, not where θ is.
"""

from dataclasses import replace

import pytest
import torch

import upweight as uw
from tests.gradients import layer_market
from tests.gradients.layer_market import gradient_rows
from tests.market import BUILDERS, draw, names, problem
from upweight.gradients.linear import linear_form
from upweight.gradients.planning import plan
from upweight.gradients.source import Direct, gradient_source, value_source
from upweight.task.data import as_data

DENSE = {"Hessian": uw.Hessian(), "GGN": uw.GGN(), "EmpiricalFisher": uw.EmpiricalFisher()}
LAYERED = {
    "KFAC, expected": uw.KFAC(uw.labels.Expected()),
    "EKFAC, observed": uw.EKFAC(uw.labels.Observed(), uw.curvature.Reduce()),
    "EKFAC, sampled": uw.EKFAC(uw.labels.Sampled(2, 5)),
    "Diagonal, observed": uw.Diagonal(uw.labels.Observed()),
}

# Said of bilinear layers by PyTorch, which runs them one example at a time under vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def elsewhere(task):
    """θ′, and the task moved there."""
    theta = task.theta()
    step = draw(torch.Generator().manual_seed(1), len(theta)).to(theta)
    return theta + 0.3 * step, task.moved_to(theta + 0.3 * step)


def assert_rows_move(task, data):
    before = task.theta()
    there, moved = elsewhere(task)
    made, batch = plan(task, before, data), data.batch(0, len(data))
    found = gradient_rows(made, batch, theta=there)
    assert torch.equal(found, gradient_rows(plan(moved, there, data), batch))
    assert not torch.equal(found, gradient_rows(made, batch)), "θ′ is too near"
    assert torch.equal(task.theta(), before)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_by_layer(name):
    p = problem(name)
    assert_rows_move(p.task, as_data(p.train))


@pytest.mark.parametrize("name", layer_market.BUILDERS)
def test_gradients_of_every_layer(name):
    case = layer_market.case(name)
    assert_rows_move(case.task, case.data)


@pytest.mark.parametrize("name", BUILDERS)
def test_sources(name):
    p = problem(name)
    there, moved = elsewhere(p.task)
    data = as_data(p.train)
    batch, v = data.batch(0, p.n), draw(torch.Generator().manual_seed(0), 2, len(there)).to(there)
    assert linear_form(p.task, there, batch) == linear_form(moved, there, batch)
    pairs = [
        (gradient_source(p.task, there, data), gradient_source(moved, there, data)),
        (
            replace(gradient_source(p.task, p.task.theta(), data), theta=there),
            gradient_source(moved, there, data),
        ),
        (value_source(p.task, there, data, None), value_source(moved, there, data, None)),
        (Direct(p.task, there), Direct(moved, there)),
    ]
    for found, expected in pairs:
        assert type(found) is type(expected)
        assert torch.equal(found.rows(batch, p.n), expected.rows(batch, p.n))
        assert torch.equal(found.inner(v, batch, p.n), expected.inner(v, batch, p.n))
        assert torch.equal(found.total(batch), expected.total(batch))


def turns(curvatures, problems, each):
    """Of every problem `each` of the curvatures, the next ones for the next problem."""
    kinds = list(curvatures)
    return [
        (kinds[(k + j) % len(kinds)], name) for k, name in enumerate(problems) for j in range(each)
    ]


@pytest.mark.parametrize("curvature, name", turns(DENSE, BUILDERS, 1))
def test_curvatures_of_all_of_theta(curvature, name):
    p = problem(name)
    same_at_another_point(DENSE[curvature], p)


@pytest.mark.parametrize("name", names("sampled"))
def test_the_fisher(name):
    same_at_another_point(uw.Fisher(2, 5), problem(name))


def same_at_another_point(spec, p):
    there, moved = elsewhere(p.task)
    data, v = as_data(p.train), draw(torch.Generator().manual_seed(0), 2, len(there)).to(there)
    found, expected = (spec.fit(task, data, there) for task in (p.task, moved))
    for of in (lambda A: A.dense(), lambda A: A.mv(v), lambda A: A.diagonal()):
        assert torch.equal(of(found), of(expected))


@pytest.mark.parametrize("curvature, name", turns(LAYERED, names("sampled"), 2))
def test_curvatures_by_layer(curvature, name):
    p = problem(name)
    there, moved = elsewhere(p.task)
    data, spec = as_data(p.train), LAYERED[curvature]
    here = spec.fit_blocks(p.task, data, p.task.theta())
    found = spec.fit_blocks(p.task, data, there, plan=here.plan)
    expected = spec.fit_blocks(moved, data, there)
    assert found.theta is there
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        assert torch.equal(one.eigenvalues, other.eigenvalues), one.name
    assert torch.equal(found.operator().dense(), expected.operator().dense())
