"""R, ∇R and ∇²R: each against autograd; what SumToZero must not change."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import Tied, draw, labels, log_cosh, train_in_place
from upweight.cli.spec import parse
from upweight.errors import SpecError
from upweight.task.params import Layout
from upweight.task.penalties import NoPenalty, as_penalty


def linear_in_theta(params):
    return sum(p.sum() for p in params.values())


PENALTIES = {
    "none": NoPenalty(),
    "L2": uw.L2(0.3),
    "L2 without biases": uw.L2(0.3, exclude=("*bias",)),
    "L2 without two": uw.L2(0.3, exclude=("0.*", "1.bias")),
    "sum to zero": uw.SumToZero("1.bias", 2.0),
    "sum": uw.L2(0.3, exclude=("*bias",)) + uw.SumToZero("1.bias") + as_penalty(log_cosh),
    "custom": as_penalty(log_cosh),
    "custom, without curvature": as_penalty(linear_in_theta),
}


@pytest.fixture
def theta_and_layout():
    layout = Layout.of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double(), ("*",))
    return draw(torch.Generator().manual_seed(0), layout.size), layout


@pytest.mark.parametrize("name", PENALTIES)
def test_derivatives(name, theta_and_layout):
    theta, layout = theta_and_layout
    penalty = PENALTIES[name]

    def value(t):
        return penalty(layout.unflatten(t), layout) + 0.0 * t.sum()

    gradient = torch.autograd.functional.jacobian(value, theta)
    hessian = torch.autograd.functional.hessian(value, theta)
    torch.testing.assert_close(penalty.gradient(theta, layout), gradient, rtol=1e-12, atol=1e-12)
    curvature = penalty.curvature(theta, layout)
    found = torch.zeros_like(hessian) if curvature is None else curvature.dense()
    torch.testing.assert_close(found, hessian, rtol=1e-12, atol=1e-12)
    assert curvature is None or curvature.is_symmetric


def test_l2_is_half_the_strength_times_the_squares(theta_and_layout):
    theta, layout = theta_and_layout
    value = uw.L2(0.3)(layout.unflatten(theta), layout)
    torch.testing.assert_close(value, 0.15 * theta @ theta)
    value = uw.L2(0.3, exclude=("*weight",))(layout.unflatten(theta), layout)
    named = layout.unflatten(theta)
    squares = named["0.bias"].square().sum() + named["1.bias"].square().sum()
    torch.testing.assert_close(value, 0.15 * squares)


def test_l2_is_an_optimizers_weight_decay():
    """One SGD step with weight_decay=λ on the mean loss is one step on J."""
    g = torch.Generator().manual_seed(1)
    X, y = draw(g, 8, 3), labels(g, 8, 2)
    model = nn.Linear(3, 2).double()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.3))
    J = torch.func.grad(lambda t: task.objective(t, (X, y), torch.ones(8).double()))
    expected = task.theta() - 0.1 * J(task.theta())
    nn.functional.cross_entropy(model(X), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3).step()
    torch.testing.assert_close(task.theta(), expected, rtol=1e-12, atol=1e-12)


def test_a_tied_parameter_is_penalized_once():
    model = Tied().double()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1.0))
    expected = 0.5 * sum(float(p.detach().square().sum()) for p in model.parameters())
    found = float(task.penalty(task.named(task.theta()), task.layout))
    assert found == pytest.approx(expected, rel=1e-12)


MEASURES = {
    "loss": uw.Loss(),
    "margin": uw.Margin(),
    "log_prob": uw.LogProb(),
    "difference of logits": lambda f, y: f[:, 0] - f[:, 1],
}


def scores(strength, measure, p):
    penalty = uw.L2(0.02, exclude=("bias",)) + uw.SumToZero("bias", strength)
    task = uw.Task(p["model"], uw.CrossEntropy(), penalty)
    method = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())
    return method.fit(task, p["train"]).attribute(p["queries"], measure).values


@pytest.fixture(scope="module")
def softmax():
    """Softmax regression with free biases, at the minimum whose biases sum to zero."""
    g = torch.Generator().manual_seed(2)
    train, queries = (draw(g, 20, 2), labels(g, 20, 3)), (draw(g, 4, 2), labels(g, 4, 3))
    model = nn.Linear(2, 3).double()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.02, exclude=("bias",)) + uw.SumToZero("bias"))
    train_in_place(task, train)
    assert abs(float(model.bias.detach().sum())) < 1e-12
    return {"model": model, "train": train, "queries": queries}


@pytest.mark.parametrize("measure", MEASURES)
def test_sum_to_zero_is_neutral_for_what_a_shift_does_not_change(measure, softmax):
    weak, strong = (scores(s, MEASURES[measure], softmax) for s in (0.01, 100.0))
    torch.testing.assert_close(weak, strong, rtol=1e-9, atol=1e-9 * float(strong.abs().max()))
    assert float(strong.abs().max()) > 1e-4


def test_sum_to_zero_keeps_the_shift_out_of_what_it_would_change(softmax):
    """A logit alone has no meaning but by convention: then S keeps Σ logits' bias at zero."""
    each = [scores(1.0, uw.Logit(c), softmax) for c in range(3)]
    weights = softmax["queries"][0]
    task = uw.Task(softmax["model"], uw.CrossEntropy(), uw.SumToZero("bias"))
    assert task.layout.mask(("bias",)).sum() == 3
    total = torch.stack(each).sum(dim=0)
    # Σ_c f_c = Σ_c W_c x + Σ b, and Σ_c W_c = 0 by the ridge at any weights w: nothing moves it.
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
    assert weights.shape == (4, 2)


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_a_strength_that_means_nothing(strength):
    with pytest.raises(SpecError, match="strength"):
        uw.L2(strength)
    with pytest.raises(SpecError, match="strength"):
        uw.SumToZero("bias", strength)


def test_a_pattern_that_matches_nothing(theta_and_layout):
    theta, layout = theta_and_layout
    with pytest.raises(SpecError, match=r"head\.bias"):
        uw.SumToZero("head.bias").gradient(theta, layout)


def test_penalties_compare_and_print():
    for penalty in (uw.L2(0.1), uw.L2(0.1, ("*bias",)), uw.SumToZero("bias"), NoPenalty()):
        assert parse(repr(penalty)) == penalty
    assert uw.L2(0.1, "bias") == uw.L2(0.1, ("bias",))
    assert as_penalty(None) == NoPenalty()
