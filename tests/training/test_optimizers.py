"""Update rules and schedules, against PyTorch's own."""

import pytest
import torch

from tests.market import draw
from upweight.errors import SpecError
from upweight.training.optimizers import SGD, Adam, AdamW, OptimizerState
from upweight.training.schedules import Constant, Cosine, LinearDecay, Stepwise

RULES = [
    *(
        SGD(0.1, momentum, nesterov, dampening, weight_decay)
        for momentum, nesterov, dampening in [
            (0.0, False, 0.0), (0.0, False, 0.4), (0.9, False, 0.0), (0.9, True, 0.0),
            (0.9, False, 0.4),
        ]
        for weight_decay in (0.0, 0.03)
    ),
    *(
        rule(0.01, betas, eps, weight_decay, amsgrad)
        for rule in (Adam, AdamW)
        for betas, eps in [((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3)]
        for weight_decay in (0.0, 0.03)
        for amsgrad in (False, True)
    ),
]  # fmt: skip


def torch_optimizer(rule, params):
    options = {key: value for key, value in vars(rule).items()}
    return getattr(torch.optim, type(rule).__name__)(params, **options)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_steps_are_those_of_torch_optim(rule):
    """Two models on one axis, each beside an optimizer of its own; the rate changes on the way."""
    g = torch.Generator().manual_seed(0)
    theta = draw(g, 2, 17)
    given, first = theta.clone(), theta
    alone = [row.clone().requires_grad_() for row in theta]
    optimizers = [torch_optimizer(rule, [row]) for row in alone]
    state = rule.init(theta)
    for t in range(200):
        # Some entries never get a gradient, as of units that never fire.
        gradient, lr = draw(g, 2, 17) * (torch.arange(17) > 2), rule.lr / (1 + t % 7)
        theta, state = rule.step(theta, gradient, state, lr)
        for row, x, optimizer in zip(gradient, alone, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr
            x.grad = row.clone()
            optimizer.step()
    torch.testing.assert_close(theta, torch.stack(alone).detach(), rtol=1e-12, atol=1e-12)
    assert state.steps == 200
    assert tuple(state.memories) == rule.memories
    assert torch.equal(first, given), "nothing is changed in place"


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_steps_in_place_are_the_same(rule, models):
    """Of parts that fused steps take and parts that they do not."""
    g = torch.Generator().manual_seed(0)
    parts = [draw(g, models, 4, 16), draw(g, models, 5)]
    theta, state = [x.clone() for x in parts], [rule.init(x) for x in parts]
    memories = {name: [torch.zeros_like(x) for x in parts] for name in rule.memories}
    for t in range(20):
        gradients, lr = [draw(g, *x.shape) for x in parts], rule.lr / (1 + t % 7)
        steps = [rule.step(x, d, s, lr) for x, d, s in zip(theta, gradients, state, strict=True)]
        theta, state = [x for x, _ in steps], [s for _, s in steps]
        rule.update_(parts, gradients, memories, t, lr, models)
    for k, x in enumerate(parts):
        torch.testing.assert_close(x, theta[k], rtol=1e-12, atol=1e-12)
        for name, each in memories.items():
            torch.testing.assert_close(each[k], state[k].memories[name], rtol=1e-12, atol=1e-12)


def loss(theta):
    """Not quadratic, with an entry that never has a gradient."""
    return (theta[:-1].square() * torch.tensor([1.0, 3.0, 0.5])).sum() + theta[:-1].sin().prod()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_five_steps_are_differentiable(rule):
    """d θ₅ / d θ₀, d state₀ and d lr-scaled gradients, against central differences."""

    def trained(theta, memories, scale):
        state = OptimizerState(3, dict(zip(rule.memories, memories, strict=True)))
        for t in range(5):
            tracked = theta if theta.requires_grad else theta.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(scale * loss(tracked), tracked, create_graph=True)
            gradient = gradient if theta.requires_grad else gradient.detach()
            theta, state = rule.step(theta, gradient, state, 0.1 / (1 + t))
        return theta

    theta = torch.tensor([0.3, -0.7, 1.1, 0.5])
    memories = [torch.tensor([0.2, 0.3, 0.4, 0.0]) * (k + 1) for k in range(len(rule.memories))]
    parts = [theta, *memories, torch.tensor(1.3)]
    leaves = [x.double().requires_grad_() for x in parts]

    def function(theta, *rest):
        return trained(theta, rest[:-1], rest[-1])[:-1]

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-6)
    theta5 = trained(leaves[0], leaves[1:-1], leaves[-1])
    for g in torch.autograd.grad(theta5.sum(), leaves):
        assert bool(g.isfinite().all()), "also of the entry that never has a gradient"


def test_tracked_and_untracked_steps_agree():
    g = torch.Generator().manual_seed(0)
    for rule in RULES:
        theta, gradient = draw(g, 6), draw(g, 6)
        gradient[0] = 0.0
        state = rule.init(theta)
        plain, after = rule.step(theta, gradient, state, 0.1)
        tracked, _ = rule.step(theta.clone().requires_grad_(), gradient, state, 0.1)
        torch.testing.assert_close(plain, tracked.detach(), rtol=1e-14, atol=1e-14)
        assert not any(m.requires_grad for m in after.memories.values())


def test_cosine_is_that_of_torch_without_a_warmup():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    for step in range(10):
        assert Cosine(final=0.1)(step, 10) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_schedules_rise_and_fall():
    steps = range(100)
    assert [Constant()(t, 100) for t in steps] == [1.0] * 100
    linear = [LinearDecay(warmup=0.1)(t, 100) for t in steps]
    assert linear[10] == max(linear) == 1.0
    assert linear[9] == pytest.approx(10 / 11)
    assert linear[99] == pytest.approx(1 / 90)
    differences = torch.tensor(linear[10:]).diff()
    torch.testing.assert_close(differences, differences[:1].expand(89))
    assert [Stepwise(at=(0.5,), factor=0.2)(t, 4) for t in range(4)] == [1.0, 1.0, 0.2, 0.2]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: SGD(lr=0.0), "learning rate"),
        (lambda: SGD(lr=float("nan")), "learning rate"),
        (lambda: SGD(momentum=1.0), "momentum"),
        (lambda: SGD(nesterov=True), "Nesterov"),
        (lambda: SGD(momentum=0.9, nesterov=True, dampening=0.1), "no dampening"),
        (lambda: SGD(dampening=2.0), "dampening"),
        (lambda: SGD(weight_decay=-1.0), "weight decay"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas"),
        (lambda: Adam(eps=0.0), "eps"),
        (lambda: Cosine(warmup=500), "warmup"),
        (lambda: LinearDecay(final=2.0), "final"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(wrong, words):
    with pytest.raises(SpecError, match=words):
        wrong()
