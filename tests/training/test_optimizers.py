"""Update rules and schedules, against PyTorch's own."""

import pytest
import torch

from tests.market import draw
from upweight.errors import SpecError
from upweight.training.optimizers import SGD, Adam, AdamW
from upweight.training.schedules import Constant, Cosine, LinearDecay, Stepwise

PAIRS = [
    (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (
        SGD(lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    (Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (
        Adam(lr=0.01, betas=(0.5, 0.9), eps=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3),
    ),
    (AdamW(lr=0.01, decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
]


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=[repr(ours) for ours, _ in PAIRS])
def test_steps_are_those_of_torch_optim(ours, theirs):
    """Two models on one axis, each beside an optimizer of its own; the rate changes on the way."""
    g = torch.Generator().manual_seed(0)
    start = [draw(g, 2, 3, 4), draw(g, 2, 5)]
    stacked = [x.clone().requires_grad_() for x in start]
    together = ours.start(stacked)
    alone = [[x[k].clone().requires_grad_() for x in start] for k in range(2)]
    optimizers = [theirs(params) for params in alone]
    for t in range(7):
        gradients, lr = [draw(g, *x.shape) for x in start], ours.lr / (1 + t)
        together.param_groups[0]["lr"] = lr
        for x, gradient in zip(stacked, gradients, strict=True):
            x.grad = gradient.clone()
        together.step()
        for k, optimizer in enumerate(optimizers):
            for group in optimizer.param_groups:
                group["lr"] = lr
            for p, gradient in zip(alone[k], gradients, strict=True):
                p.grad = gradient[k].clone()
            optimizer.step()
    for k in range(2):
        for x, p in zip(stacked, alone[k], strict=True):
            torch.testing.assert_close(x[k].detach(), p.detach(), rtol=1e-12, atol=1e-12)


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
        (lambda: Adam(betas=(0.9, 1.0)), "betas"),
        (lambda: Adam(eps=0.0), "eps"),
        (lambda: Cosine(warmup=500), "warmup"),
        (lambda: LinearDecay(final=2.0), "final"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(wrong, words):
    with pytest.raises(SpecError, match=words):
        wrong()
