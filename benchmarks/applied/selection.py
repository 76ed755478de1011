"""Goals of `selection`: subsets of noisy and clean MNIST, and weights for an unbalanced pair.

As the study has them: softmax regression on 30 principal components, n = 3 000, L2(1e-3), 2 000
validation and 4 000 test images; and 4 against 9 on 50 components, n = 5 000, of which the 4s are
few. Rows and weights are chosen on validation images, the numbers are of test images.
"""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

import upweight as uw
from applied.goal import Goal
from upweight.applications import selection
from upweight.methods.fitted import Fitted

SEEDS = range(4)
"""The study printed seed 0."""
RATIOS = (10, 50, 200)
CLEAN_IMAGES = (50, 200, 1000)
PAIRS = range(2)
RECIPE = uw.training.Newton(tol=1e-8)
Split = tuple[torch.Tensor, torch.Tensor]


WHY = {
    "error asked": (
        "what is missing are images of the rare class and not weights: class weights are "
        "returned where no step beyond them is predicted to help, and a balanced clean "
        "training set of as many rows is only just below what was asked. At 200:1 even 60 steps of "
        "weights that descend the loss of the test images themselves have .059; at 50:1 they have "
        ".036, and 50 to 1000 clean images do not tell as much."
    ),
}
"""Of goals that are not reached, by a part of their name: the reason, and what shows it."""


def goals(data: Path) -> Iterator[Goal]:
    """Subsets with and without noise, then weights."""
    with np.load(data / "mnist.npz") as held:
        images = dict(held)
    yield from _noise(images)
    yield from _clean(images)
    yield from pairs(data)


def _noise(images: dict[str, np.ndarray]) -> Iterator[Goal]:
    found, seconds = _subsets(images, 0.3)
    accuracy, loss = _means(found, "kept")
    full, full_loss = _means(found, "everything")
    random, _ = _means(found, "random")
    rules = ", ".join(sorted({s.rule for s in found}))
    each = " ".join(f"{s.kept.accuracy.value:.4f}" for s in found)
    where = f"MNIST, 30 % noise, keep 70 %, rule picked by the library, mean of {len(found)} seeds"
    yield Goal(
        f"{where}: accuracy",
        "≥ .875 (full .842, random .833)",
        f"{accuracy:.4f} ({each}) by {rules}; full {full:.4f}, random {random:.4f}",
        accuracy >= 0.875 and all(s.expects_gain for s in found),
        seconds,
    )
    yield Goal(
        f"{where}: test loss",
        "≤ .44 (full .787)",
        f"{loss:.3f}; full {full_loss:.3f}",
        loss <= 0.44,
    )
    gaps = [s.predicted.value - s.actual.value for s in found]
    text = "; ".join(f"{s.predicted.value:+.3f} and {s.actual.value:+.3f}" for s in found)
    yield Goal(
        f"{where}: change of loss, predicted and on test data",
        "a gain predicted, and within a tenth of the loss of what came",
        text,
        max(map(abs, gaps)) <= 0.1 * full_loss,
    )


def _clean(images: dict[str, np.ndarray]) -> Iterator[Goal]:
    found, seconds = _subsets(images, 0.0)
    changes = [100 * s.change_of_accuracy.value for s in found]
    silent = [not s.expects_gain and s.verdict.startswith("No gain expected") for s in found]
    rules = ", ".join(sorted({s.rule for s in found}))
    yield Goal(
        f"MNIST, clean, keep 70 %, rule picked by the library, each of {len(found)} seeds",
        "never more than .2 points below full, and says 'no gain expected'",
        f"{' '.join(f'{c:+.3f}' for c in changes)} points by {rules}; said so in {sum(silent)} of "
        f"{len(silent)}",
        min(changes) >= -0.2 and all(silent),
        seconds,
    )


def pairs(data: Path) -> Iterator[Goal]:
    """Weights for 4 against 9."""
    with np.load(data / "mnist.npz") as held:
        images = dict(held)
    for clean in CLEAN_IMAGES:
        for ratio in RATIOS:
            started, found = time.perf_counter(), []
            for seed in PAIRS:
                train, validation, test = _pair(images, ratio, clean, seed)
                fitted = _fitted(train, 2)
                found.append(selection.reweight(fitted, RECIPE, validation, test=test, seed=seed))
            seconds = (time.perf_counter() - started) / len(found)
            mine, classes, equal = (
                [1 - w.models[name].accuracy.value for w in found]
                for name in ("these", "class weights", "equal weights")
            )
            steps = [w.steps for w in found]
            kept = ["class weights are returned" in w.verdict for w in found]
            right = [s or m < c for s, m, c in zip(kept, mine, classes, strict=True)]
            where = f"4 against 9 at {ratio}:1, {clean} clean images, {len(found)} seeds"
            rows = ", ".join(f"{w.effective_n:.0f}" for w in found)
            yield Goal(
                f"{where}: error",
                "below class weights, or the library says that class weights do",
                f"{_each(mine)} against {_each(classes)} (equal {_each(equal)}); steps {steps}, "
                f"effective rows {rows}; said so in {sum(kept)} of {len(kept)}",
                all(right),
                seconds,
            )
            yield Goal(
                f"{where}: error asked",
                "≤ .05",
                f"{np.mean(mine):.4f}; a balanced training set of as many rows, all clean, has "
                f"{_ceiling(images, clean):.4f}, the {clean} clean images alone "
                f"{_alone(images, clean):.4f}; weights chosen on the test images themselves "
                f"{_oracle(data, ratio):.4f}",
                float(np.mean(mine)) <= 0.05,
            )


def _subsets(images: dict[str, np.ndarray], noise: float) -> tuple[list[selection.Subset], float]:
    started, found = time.perf_counter(), []
    for seed in SEEDS:
        train, validation, test = _digits(images, noise, seed)
        fitted = _fitted(train, 10)
        found.append(
            selection.subset(
                fitted, 0.7, validation=validation, test=test, recipe=RECIPE, seed=seed
            )
        )
    return found, (time.perf_counter() - started) / len(found)


def _means(found: list[selection.Subset], name: str) -> tuple[float, float]:
    models = [getattr(s, name) for s in found]
    accuracy = np.mean([m.accuracy.value for m in models])
    return float(accuracy), float(np.mean([m.loss.value for m in models]))


def _each(values: list[float]) -> str:
    return " ".join(f"{v:.4f}" for v in values)


def _fitted(train: Split, classes: int) -> Fitted:
    model = nn.Linear(train[0].shape[1], classes, bias=False).double()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-3))
    theta = RECIPE.prepare(task, task.training(train)).center
    return uw.Influence(uw.Hessian()).fit(task.moved_to(theta), train)


def _projected(fit: np.ndarray, count: int):
    """Onto the principal components of some images, with a 1 for the intercept."""
    mean = fit.mean(0)
    _, vectors = np.linalg.eigh(np.cov((fit - mean).T))
    onto = vectors[:, ::-1][:, :count]
    return lambda A: torch.tensor(np.c_[(A - mean) @ onto, np.ones(len(A))])


def _digits(images: dict[str, np.ndarray], noise: float, seed: int) -> tuple[Split, Split, Split]:
    draw, n = np.random.default_rng(seed), 3000
    i, j = draw.permutation(60000)[:n], draw.permutation(10000)[:6000]
    A, B = images["X"][i].reshape(n, -1) / 255.0, images["Xt"][j].reshape(6000, -1) / 255.0
    onto = _projected(A, 30)
    y, held = torch.tensor(images["y"][i].astype(int)), torch.tensor(images["yt"][j].astype(int))
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(n, generator=generator, dtype=torch.float64) < noise
    y = torch.where(wrong, torch.randint(0, 10, (n,), generator=generator), y)
    X, H = onto(A), onto(B)
    return (X, y), (H[:2000], held[:2000]), (H[2000:], held[2000:])


def _pair(
    images: dict[str, np.ndarray], ratio: float, clean: int, seed: int
) -> tuple[Split, Split, Split]:
    draw, n = np.random.default_rng(seed), 5000
    X, y = images["X"].reshape(60000, -1) / 255.0, images["y"]
    nines, fours = (draw.permutation(np.nonzero(y == digit)[0]) for digit in (9, 4))
    few = round(n / (1 + ratio))
    train = np.r_[nines[: n - few], fours[:few]]
    guide = np.r_[nines[-clean // 2 :], fours[-clean // 2 :]]
    test = np.isin(images["yt"], (4, 9))
    onto = _projected(X[train[:2000]], 50)
    T = images["Xt"][test].reshape(-1, 784) / 255.0
    made = ((X[train], y[train]), (X[guide], y[guide]), (T, images["yt"][test]))
    a, b, c = ((onto(part), torch.tensor((label == 4).astype(int))) for part, label in made)
    return a, b, c


def _error(train: Split, test: Split) -> float:
    model = _fitted(train, 2).task.model
    return float((model(test[0]).argmax(1) != test[1]).double().mean())


def _ceiling(images: dict[str, np.ndarray], clean: int) -> float:
    train, _, test = _pair(images, 1, clean, 0)
    return _error(train, test)


@cache
def _oracle(folder: Path, ratio: float) -> float:
    """The least error of 60 steps of weights that descend the loss of the test images themselves.

    Logistic regression with the same penalty: two outputs ±d/2 have λ/4 ‖d‖².
    """
    with np.load(folder / "mnist.npz") as held:
        images = dict(held)
    least = []
    for seed in PAIRS:
        (X, y), _, (T, t) = (
            (part.numpy(), 2.0 * label.numpy() - 1)
            for part, label in _pair(images, ratio, 50, seed)
        )
        n, d = X.shape
        theta, errors = np.zeros(d), []
        w = np.where(y > 0, n / 2 / (y > 0).sum(), n / 2 / (y < 0).sum())  # class weights
        for _ in range(60):
            for _ in range(12):  # Newton
                p = 1 / (1 + np.exp(y * (X @ theta)))
                H = (X.T * (w * p * (1 - p))) @ X / n + 5e-4 * np.eye(d)
                theta -= np.linalg.solve(H, -X.T @ (w * y * p) / n + 5e-4 * theta)
            errors.append(float((np.sign(T @ theta) != t).mean()))
            slope = -T.T @ (t / (1 + np.exp(t * (T @ theta)))) / len(t)
            score = X @ np.linalg.solve(H, slope) * y * p / n  # d loss / d w
            w = w * np.exp(-0.5 * score / np.abs(score).max())
            w *= n / w.sum()
        least.append(min(errors))
    return float(np.mean(least))


def _alone(images: dict[str, np.ndarray], clean: int) -> float:
    _, guide, test = _pair(images, 200, clean, 0)
    return _error(guide, test)


PARTS = {"pairs": (pairs, ("4 against 9",))}
"""What can be measured by itself, and how the names of its rows begin."""

PARTS_ARE_ALL = False
"""Whether every row is of a part."""
