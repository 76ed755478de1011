"""Certified removals of MNIST 3 against 8, and a network by EK-FAC against refits."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import upweight as uw
from applied.goal import Goal
from upweight.applications import unlearning
from upweight.errors import NotOffered

PENALTY = 1e-3
CERTIFICATE = unlearning.Certificate(epsilon=1.0, delta=1e-4, sigma=10.0)
REMOVALS = 100
NETWORK_EXAMPLES = 2000
NETWORK_REMOVED = 40
NETWORK_SEEDS = 3


def goals(data: Path) -> Iterator[Goal]:
    mnist = np.load(data / "mnist.npz")
    yield from _certified(mnist)
    yield from _network(mnist)


def _pair(X: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 3 and 8 with norm 1, as in the paper, and whether they are an 8."""
    chosen = np.isin(y, (3, 8))
    rows = torch.tensor(X[chosen].reshape(-1, 784)).double()
    return rows / rows.norm(dim=1, keepdim=True), torch.tensor(y[chosen] == 8).double()[:, None]


def _certified(mnist: np.lib.npyio.NpzFile) -> Iterator[Goal]:
    train, (X, y) = _pair(mnist["X"], mnist["y"]), _pair(mnist["Xt"], mnist["yt"])
    n = len(train[0])
    task = uw.Task(nn.Linear(784, 1, bias=False).double(), uw.Bernoulli(), uw.L2(PENALTY))
    made = now = CERTIFICATE.train(task, train, seed=0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:REMOVALS]
    started = time.perf_counter()
    for i in order.tolist():
        now = now.remove(i)
    seconds = time.perf_counter() - started
    refit = now.confirm()
    settings = (
        f"λ = {PENALTY:g}, σ = {CERTIFICATE.sigma:g}, ε = 1, δ = 1e-4, n = {n}, rows of norm 1"
    )
    yield Goal(
        f"MNIST 3 against 8, {REMOVALS} removals in sequence ({settings})",
        "the accumulated bound stays within the certified budget σε/c",
        f"{now.spent:.3f} of {now.budget:.3f} spent; the gradient residual itself is "
        f"{now.residual:.4f}",
        now.residual <= now.spent <= now.budget,
        seconds,
    )
    assert refit.distance is not None and refit.moved is not None
    yield Goal(
        f"the same, distance to the refit after {REMOVALS} removals",
        "below 1 % of the distance moved",
        f"{100 * refit.distance / refit.moved:.3f} % ({refit.distance:.2e} of {refit.moved:.3f})",
        refit.distance < 0.01 * refit.moved,
    )

    # What the noise costs: two-sided 95 % interval of the paired difference on the test images.
    zero = torch.zeros(784).double()
    plain = dataclasses.replace(now.problem, b=zero).minimum(now.kept, zero)
    rights = [((X @ theta > 0).double() == y[:, 0]).double() for theta in (now.theta, plain)]
    lost = rights[1] - rights[0]
    half = 1.96 * float(lost.std()) / len(lost) ** 0.5
    yield Goal(
        "the same, what the noise costs in test accuracy",
        "stated",
        f"{float(rights[0].mean()):.4f} certified, {float(rights[1].mean()):.4f} without noise: "
        f"{100 * float(lost.mean()):.2f} ± {100 * half:.2f} points",
        True,
    )
    X, y = made.problem.X, made.problem.y  # of the training images
    sizes = X.square().sum(dim=1) * (torch.sigmoid(X @ made.theta) - y).square()
    hardest = sizes.argsort(descending=True)[:REMOVALS].tolist()
    now, count = made, 0
    try:
        for i in hardest:
            now = now.remove(i)
            count += 1
    except NotOffered:
        pass
    yield Goal(
        f"the same, the {REMOVALS} examples with the largest gradients first",
        "removed within the budget, or refused when it is spent",
        f"{count} removed, {now.spent:.3f} of {now.budget:.3f} spent"
        + ("" if count == REMOVALS else "; the next is refused"),
        now.spent <= now.budget,
    )


def _network(mnist: np.lib.npyio.NpzFile) -> Iterator[Goal]:
    """784-64-10, SGD; the examples removed are of one class, so that there is something to see."""
    X = torch.tensor(mnist["X"][:NETWORK_EXAMPLES].reshape(-1, 784)).float() / 255
    y = torch.tensor(mnist["y"][:NETWORK_EXAMPLES]).long()
    test = torch.tensor(mnist["Xt"][:1000].reshape(-1, 784)).float() / 255
    queries = (test, torch.tensor(mnist["yt"][:1000]).long())

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    gone = (y == 7).nonzero()[:NETWORK_REMOVED, 0].tolist()
    started = time.perf_counter()
    shares, outputs, correlations, losses = [], [], [], []
    for seed in range(NETWORK_SEEDS):
        recipe = uw.Training(net, uw.SGD(0.1, momentum=0.9), epochs=30, batch=100, seed=seed)
        blank = uw.Task(net(), uw.CrossEntropy(), uw.L2(1e-3))
        task = uw.Task(recipe.trained(blank, (X, y)), uw.CrossEntropy(), uw.L2(1e-3))
        fitted = uw.Influence(uw.EKFAC()).fit(task, (X, y))
        got = unlearning.without(fitted, gone, queries=queries, recipe=recipe)
        assert got.remaining is not None and got.remaining_outputs is not None
        assert got.change.refit_outputs is not None
        shares.append(1 - got.remaining)
        outputs.append(1 - got.remaining_outputs)
        both = torch.stack([got.change.outputs.flatten(), got.change.refit_outputs.flatten()])
        correlations.append(float(torch.corrcoef(both)[0, 1]))
        losses.append(got.change.forgotten)
        print(f"  {got}")
    seconds = time.perf_counter() - started
    before, after, really = (
        sum(part or 0.0 for part in parts) / NETWORK_SEEDS for parts in zip(*losses, strict=True)
    )
    yield Goal(
        f"MNIST network 784-64-10, n = {NETWORK_EXAMPLES}, {NETWORK_REMOVED} sevens removed by one "
        f"first-order EK-FAC step, {NETWORK_SEEDS} seeds",
        "stated",
        f"parameters {_listed(shares)}; test outputs {_listed(outputs)}, correlation of their "
        f"changes {_listed(correlations)}; mean loss of the removed {before:.3f} → {after:.3f}, "
        f"refitted {really:.3f}",
        True,
        seconds,
    )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
