"""Backdoors in MNIST networks: from five queries to the rows, and fits without them."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import upweight as uw
from applied.goal import Goal
from upweight.applications import poisoning
from upweight.evaluation import mislabel
from upweight.task.data import as_data
from upweight.testing.attacks import Patch, backdoor, perturb_training

TARGET = 0
TRIGGER = Patch(24, 24)


WHY = {
    "CNN, 2 % of 3 000 poisoned: fitted again": (
        "trained longer the attack works and is gone after; the price is above .5 points by less "
        "than its interval, which starts at 0. At 12 epochs the price was .37 points and the "
        "attack .8987: on this many images neither is told from what was asked."
    ),
}
"""Of goals that are not reached, by a part of their name: the reason, and what shows it."""


def goals(data: Path) -> Iterator[Goal]:
    mnist = np.load(data / "mnist.npz")
    for name, net, epochs, k, n, seed in (
        ("MLP 784-64-10, 1 % of 6 000 poisoned", mlp, 20, 60, 6000, 0),
        ("MLP 784-64-10, 2 % of 3 000 poisoned", mlp, 20, 60, 3000, 1),
        ("CNN, 2 % of 3 000 poisoned", cnn, 16, 60, 3000, 2),
    ):
        yield from _backdoor(mnist, name, net, epochs, k, n, seed)
    yield _adversarial(mnist)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10),
    )  # fmt: skip


def _images(X: np.ndarray, y: np.ndarray, count: int, seed: int) -> tuple:
    drawn = np.random.default_rng(seed).permutation(len(X))[:count]
    return torch.tensor(X[drawn]).float() / 255, torch.tensor(y[drawn]).long()


def _backdoor(mnist, name, net, epochs, k, n, seed) -> Iterator[Goal]:
    X, y = _images(mnist["X"], mnist["y"], n, seed)
    Xt, yt = _images(mnist["Xt"], mnist["yt"], 3000, seed)
    rows = (y != TARGET).nonzero()[:k, 0].tolist()
    attack = backdoor(X, y, rows, TARGET, TRIGGER)
    train, test, triggered = (attack.X, attack.y), (Xt, yt), (TRIGGER(Xt), yt)
    recipe = uw.Training(net, uw.SGD(0.05, momentum=0.9), epochs, batch=100, seed=seed)
    blank = uw.Task(net(), uw.CrossEntropy(), uw.L2(1e-4))
    task = uw.Task(recipe.trained(blank, train), uw.CrossEntropy(), uw.L2(1e-4))

    # Five that misbehave, by the model's own answer; the rest of the test images confirm.
    with torch.no_grad():
        works = (yt != TARGET) & (task.model(triggered[0]).argmax(1) == TARGET)
    first = works.nonzero()[:5, 0]
    left = torch.ones(len(yt), dtype=torch.bool)
    left[first] = False
    queries = [(a[first], b[first]) for a, b in (triggered, test)]
    fresh = [(a[left], b[left]) for a, b in (triggered, test)]
    started = time.perf_counter()
    torch.manual_seed(100 + seed)
    untrained = [net() for _ in range(5)]
    cosine = uw.GradientCosine().fit(task, train)
    found = poisoning.suspects(cosine, *queries, history=untrained)
    seconds = time.perf_counter() - started
    truth = found.against(attack.poisoned)
    others = {
        "GradientCosine at θ̂ alone": uw.GradientCosine(),
        "GradientDot": uw.GradientDot(),
        "EK-FAC": uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)),
    }
    beside = []
    for title, method in others.items():
        fitted = method.fit(task, train)
        beside.append(f"{title} {_within(poisoning.suspects(fitted, *queries), attack):.3f}")
        if title == "EK-FAC":
            alone = -fitted.self_influence()
    one = [poisoning.suspects(
               cosine, *[(a[q : q + 1], b[q : q + 1]) for a, b in queries], history=untrained)
           for q in range(5)]  # fmt: skip
    single = np.mean([each.against(attack.poisoned).auroc.value for each in one])
    yield Goal(
        f"{name}: five triggered queries beside their originals, GradientCosine at θ̂ and at 5 "
        "untrained models",
        "AUROC ≥ .99",
        f"{truth.auroc}; within the class {truth.within_class}; one query {single:.3f}; within "
        f"the class by {', '.join(beside)}",
        truth.auroc.value >= 0.99,
        seconds,
    )
    inside = attack.y == TARGET
    signature, cluster = _baselines(task.model, attack.X[inside])
    scores = [_auroc(each, attack.poisoned[inside]) for each in (signature, cluster)]
    assert truth.within_class is not None
    yield Goal(
        f"{name}: the same within the class, against a spectral signature and activation "
        "clustering of the last layer's inputs (our own few lines)",
        "above both",
        f"{truth.within_class.value:.3f}; {scores[0]:.3f} and {scores[1]:.3f}",
        truth.within_class.value > max(scores),
    )
    yield Goal(
        f"{name}: no trigger known, self-influence",
        "stated",
        f"AUROC {_auroc(alone, attack.poisoned):.3f}, within the class "
        f"{_auroc(alone[inside], attack.poisoned[inside]):.3f}",
        True,
    )
    started = time.perf_counter()
    counts = [k // 2, k, round(1.5 * k)]
    done = poisoning.cleanse(recipe, found, *fresh, counts=counts, seed=seed)
    last = next(each for each in done.curve if each.count == counts[-1])
    yield Goal(
        f"{name}: fitted again without 1.5 k = {counts[-1]} rows",
        "attack success ≥ .9 before and ≤ .05 after, at ≤ .5 points of clean accuracy",
        f"{done.before.success} → {last.success}; {100 * last.lost.value:.2f} points "
        f"[{100 * last.lost.low:.2f}, {100 * last.lost.high:.2f}]",
        done.before.success.value >= 0.9
        and last.success.value <= 0.05
        and last.lost.value <= 0.005,
        time.perf_counter() - started,
    )
    yield Goal(
        f"{name}: the count chosen without the truth",
        "cleansed, on images that chose nothing",
        f"{done.verdict} Random rows of the class: {done.control.success}",
        done.is_confirmed,
    )


def _within(found: poisoning.Suspects, attack) -> float:
    inside = found.against(attack.poisoned).within_class
    assert inside is not None
    return inside.value


def _auroc(ranking: torch.Tensor, mask: torch.Tensor) -> float:
    return mislabel.auroc(ranking, mask).value


def _baselines(model: nn.Module, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tran et al. (2018): |projection on the first singular vector|. Chen et al. (2018): two
    clusters of ten principal components, the smaller one suspected."""
    with torch.no_grad():
        features = model[:-1](X).double()
    features = features - features.mean(0)
    left, values, right = torch.linalg.svd(features, full_matrices=False)
    reduced = left[:, :10] * values[:10]
    generator = torch.Generator().manual_seed(0)
    best, found = float("inf"), reduced[:, 0]
    for _ in range(10):
        centers = reduced[torch.randperm(len(reduced), generator=generator)[:2]]
        for _ in range(50):
            near = torch.cdist(reduced, centers).argmin(1)
            if near.bincount(minlength=2).min() == 0:
                break
            centers = torch.stack([reduced[near == c].mean(0) for c in range(2)])
        apart = torch.cdist(reduced, centers)
        if float(apart.min(1).values.square().sum()) < best:
            best = float(apart.min(1).values.square().sum())
            small = int(near.bincount(minlength=2).argmin())
            found = apart[:, 1 - small] - apart[:, small]
    return (features @ right[0]).abs(), found


def _adversarial(mnist) -> Goal:
    """4 against 9, 150 images, features of a random convolution: p = 785 > n."""
    chosen, tested = (np.isin(mnist[each], (4, 9)) for each in ("y", "yt"))
    X, y = _images(mnist["X"][chosen], mnist["y"][chosen], 150, 0)
    Xt, yt = _images(mnist["Xt"][tested], mnist["yt"][tested], 300, 0)
    X, Xt = X.double(), Xt.double()
    y, yt = ((each == 4).double()[:, None] for each in (y, yt))

    class Net(nn.Module):
        """A frozen convolution, and a logistic regression on what it gives."""

        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("filters", torch.randn(8, 1, 5, 5, generator=generator).double())
            self.head = nn.Linear(800, 1).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = nn.functional.conv2d(x[:, None], self.filters / 5, stride=2)
            pooled = nn.functional.avg_pool2d(nn.functional.softplus(found), 2, 1)[:, :, :10, :10]
            return self.head(pooled.flatten(1))

    recipe = uw.training.Newton()
    blank = uw.Task(Net(), uw.Bernoulli(), uw.L2(1e-3))
    start = recipe.prepare(blank, as_data((X, y)))
    theta = start(torch.ones(1, len(X)).double()).theta[0]
    task = blank.moved_to(theta)
    fitted = uw.Influence(uw.Hessian()).fit(task, (X, y))
    with torch.no_grad():
        right = ((task.model(Xt) > 0).double() == yt)[:, 0].nonzero()[:12, 0].tolist()
    started, flipped, largest = time.perf_counter(), 0, 0.0
    for q in right:
        query = (Xt[q : q + 1], yt[q : q + 1])
        made = perturb_training(fitted, query, 10, 8 / 255, recipe=recipe, steps=3, candidates=20)
        largest = max(largest, made.largest)
        with torch.no_grad():
            out = task.moved_to(made.theta).model(query[0])
        flipped += int(((out > 0).double() != query[1]).any())
    return Goal(
        "MNIST 4 against 9, 150 images, p = 801 on frozen convolutions: ten changed training "
        f"images within 8/255 (largest change after rounding {largest * 255:.2f}/255), trained "
        "from the start",
        "at least half of the right test images flipped",
        f"{flipped} of {len(right)}",
        2 * flipped >= len(right),
        time.perf_counter() - started,
    )
