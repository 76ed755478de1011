"""The proximal Bregman response: exact for quadratics, and first-order what influence computes."""

from dataclasses import replace

import pytest
import torch

import upweight as uw
from tests.market import draw, problem
from tests.reference.dense import gradients
from upweight.errors import SpecError
from upweight.task.data import as_data
from upweight.training.optimizers import SGD
from upweight.training.pbrf import PBRF

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def untrained(name, seed=0):
    """The problem with other parameters: its own θ̂ would make every gradient vanish."""
    p = problem(name)
    theta = p.task.theta()
    moved = theta + 0.3 * draw(torch.Generator().manual_seed(seed), len(theta))
    return p, moved


@pytest.fixture
def moved():
    """Tasks whose parameters are moved for the time of a test."""
    undo = []

    def move(name):
        p, theta = untrained(name)
        named = dict(p.task.model.named_parameters())
        for key, value in p.task.layout.unflatten(theta).items():
            undo.append((named[key], named[key].detach().clone()))
            named[key].data.copy_(value)
        return p

    yield move
    for parameter, value in undo:
        parameter.data.copy_(value)


NAMES = ("ridge", "softmax", "logistic_without_bias", "mlp_tanh", "mlp_gelu", "conv")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves_where_no_weight_does(name, moved):
    """θ̂ is stationary for Q(·, 1), trained or not."""
    p = moved(name)
    found = PBRF(0.1, SGD(0.1), 3, 4).prepare(p.task, as_data(p.train))(torch.ones(1, p.n))
    torch.testing.assert_close(found.theta[0], p.task.theta(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_small_weights_move_it_as_influence_says(name, moved):
    """dθ/dw by central differences of full-batch minimizations, in every direction of w."""
    p = moved(name)
    damping, h, train = 0.5, 1e-4, as_data(p.train)
    w = torch.cat([1 + h * torch.eye(p.n), 1 - h * torch.eye(p.n)]).double()
    recipe = PBRF(damping, SGD(0.3), 400, p.n)
    theta = recipe.prepare(p.task, train)(w).theta
    found = (theta[: p.n] - theta[p.n :]) / (2 * h)
    operator = uw.GGN().fit(p.task, train, p.task.theta()).dense() + damping * torch.eye(
        p.task.layout.size
    )
    expected = -torch.linalg.solve(operator, gradients(p.task, p.train).mT).mT / p.n
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_on_least_squares_any_weights_have_a_closed_form():
    """(X_wᵀX_w + λI)(θ − θ̂) = −(1/n) Σ (wᵢ − 1) gᵢ, since the divergences are quadratics."""
    p, train = problem("ridge"), as_data(problem("ridge").train)
    x, _ = p.train
    g = torch.Generator().manual_seed(1)
    w = torch.stack([torch.ones(p.n), draw(g, p.n).abs()]).double()
    w[0, 3] = 0.0
    theta = p.task.theta()
    found = PBRF(0.2, SGD(0.3), 400, p.n).prepare(p.task, train)(w).theta
    g = gradients(p.task, p.train)
    unit = 2 * float(uw.SquaredError()(torch.ones(1, 1), torch.zeros(1, 1)))  # ∂²ℓ/∂f²
    penalty = p.task.penalty.curvature(theta, p.task.layout).dense()
    for row, reached in zip(w, found, strict=True):
        matrix = unit * x.mT @ (row[:, None] * x) / p.n
        matrix = matrix + penalty + 0.2 * torch.eye(3)
        right = -((row - 1)[:, None] * g).sum(dim=0) / p.n
        torch.testing.assert_close(reached, theta + torch.linalg.solve(matrix, right), **CLOSE)


def test_batches_end_where_the_full_batch_does():
    p, train = problem("softmax"), as_data(problem("softmax").train)
    w = torch.ones(1, p.n)
    w[0, 2] = 0.0
    full = PBRF(0.3, SGD(0.3), 100, p.n).prepare(p.task, train)(w).theta
    parts = PBRF(0.3, SGD(0.3), 100, 4).prepare(p.task, train)(w).theta
    change = (full - p.task.theta()).norm()
    assert float((parts - full).norm() / change) < 0.05


def test_together_as_alone():
    p, train = problem("mlp_tanh"), as_data(problem("mlp_tanh").train)
    w = draw(torch.Generator().manual_seed(0), 3, p.n).abs()
    trainer = PBRF(0.3, SGD(0.1, momentum=0.5), 5, 4).prepare(p.task, train)
    assert trainer.at_once > 1, trainer.alone_because
    alone = replace(trainer, at_once=1)
    torch.testing.assert_close(trainer(w).theta, alone(w).theta, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_a_response_needs_a_proximity(damping):
    with pytest.raises(SpecError, match="damping λ > 0"):
        PBRF(damping)
