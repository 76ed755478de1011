"""Law 2: Σᵢ S[q, i] = ∇m_qᵀ H⁻¹ ∇R at a stationary point, and 0 without a penalty.

Upweighting everything equally changes nothing but the penalty's relative weight. Binds the exact
Hessian with λ = 0; for anything else the excess is a diagnostic, which scores carry.
"""

import copy

import pytest
import torch

import upweight as uw
from tests.laws.subjects import assert_same
from tests.market import draw, names, problem, train_in_place
from tests.reference import dense

EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("name", names(without=("float32", "untrained")))
def test_rows_sum_to_the_pull_of_the_penalty(name):
    p = problem(name)
    values = EXACT.fit(p.task, p.train).attribute(p.queries).values
    m = dense.measure_gradients(p.task, p.task.loss, p.queries)
    H = dense.hessian(p.task, p.train)
    expected = m @ torch.linalg.solve(H, dense.penalty_gradient(p.task))
    # One entry may be tiny beside those it is the sum of.
    scale = float(values.abs().sum(dim=1).max())
    torch.testing.assert_close(values.sum(dim=1), expected, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("loss", [uw.SquaredError(), uw.Bernoulli()], ids=repr)
def test_rows_sum_to_zero_without_a_penalty(loss):
    g = torch.Generator().manual_seed(1)
    X, y = draw(g, 20, 3), torch.arange(20).remainder(2).double()[:, None]
    task = uw.Task(torch.nn.Linear(3, 1).double(), loss)
    train_in_place(task, (X, y))
    values = EXACT.fit(task, (X, y)).attribute((X, y)).values
    scale = float(values.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(values.sum(dim=1), values.new_zeros(20), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
def test_health_reports_the_excess(name):
    p = problem(name)
    health = EXACT.fit(p.task, p.train).attribute(p.queries).provenance.health
    assert health["row_sum_excess_relative"] < 1e-10
    assert health["gradient_norm"] < 1e-12 and abs(health["decrement"]) < 1e-20


def test_health_reports_a_model_that_was_not_trained_to_the_end():
    p = problem("softmax")
    model = copy.deepcopy(p.task.model)
    model.weight.data[0].add_(0.1)  # not all rows: a softmax would not notice
    task = uw.Task(model, p.task.loss, p.task.penalty)
    scores = EXACT.fit(task, p.train).attribute(p.queries)
    health = scores.provenance.health
    gradient = dense.gradients(task, p.train).mean(dim=0) + dense.penalty_gradient(task)
    H = dense.hessian(task, p.train)
    m = dense.measure_gradients(task, task.loss, p.queries)
    step = torch.linalg.solve(H, gradient)
    excess = (m @ step).abs()
    assert_same(number(health["row_sum_excess"]), excess.max(), rtol=1e-9)
    assert health["row_sum_excess"] > 1e-3
    assert_same(number(health["gradient_norm"]), gradient.norm(), rtol=1e-9)
    assert_same(number(health["decrement"]), 0.5 * gradient @ step, rtol=1e-9)
