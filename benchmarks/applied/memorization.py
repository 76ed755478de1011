"""Memorization: one model against exact leave-one-out, and against 200 models of samples.

Feldman & Zhang (2020), on MNIST: a softmax regression of 1 500 digits that is refitted without a
row by another program, and a network of 5 000 digits. Seconds are of CPU, with one thread: other
processes run beside it.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import upweight as uw
from applied.goal import Goal
from upweight.applications import memorization
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import Bootstrap, estimate
from upweight.linalg.cholesky import Cholesky
from upweight.methods.fitted import Fitted

PENALTY = 3e-4
RECIPE = uw.training.Newton(tol=1e-9)
ROWS = 120
SEEDS = 4
FEW = Bootstrap(resamples=400)


WHY = {
    "cost against": (
        "a fit of these 310 parameters takes scikit-learn some 20 ms of CPU. In one run by CPU "
        "time 40 models (.951) take .93 s, and one model's scores .060 s with their checks, 16 ×: "
        "100 × asks for 9 ms with the Hessian, whose products alone take 5 and the leverages 10. "
        "It takes more rows: with 20 000 (the row after these) it is reached."
    ),
    "the same with 20 000": "the samples' models were fitted in less time here.",
    "the same as sizes": (
        "TracIn adds up ten states of training, which order the largest values as 200 models "
        "do; one model at its end does not see them. The interval holds TracIn's value; in "
        "rank (the rows above) one model by EK-FAC is the better."
    ),
    "pairs of a memorized row": (
        "25 million pairs are looked at, and those of .15 or more by the noise of half of "
        "the models are noise: the other half gives .01. By 5 standard errors (the row after it) "
        "they are confirmed."
    ),
}
"""Of goals that are not reached, by a part of their name: the reason, and what shows it."""


def goals(data: Path) -> Iterator[Goal]:
    yield from convex(data)
    yield from network(data)


def mnist(data: Path, n: int, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits as numbers between 0 and 1, drawn as in the study."""
    held, draw = np.load(data / "mnist.npz"), np.random.default_rng(0)
    i, j = draw.permutation(60_000)[:n], draw.permutation(10_000)[:t]
    X, X_test = held["X"][i].reshape(n, -1) / 255.0, held["Xt"][j].reshape(t, -1) / 255.0
    y, y_test = held["y"][i].astype(int), held["yt"][j].astype(int)
    return tuple(map(torch.tensor, (X, y, X_test, y_test)))  # type: ignore[return-value]


def principal(X: Tensor, k: int) -> Tensor:
    """The first k principal components and a column of ones."""
    centered = X - X.mean(dim=0)
    vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :k]
    return torch.cat([centered @ vectors, torch.ones(len(X), 1, dtype=X.dtype)], dim=1)


def refitted(
    X: Tensor, y: Tensor, kept: np.ndarray, n: int, start: np.ndarray | None
) -> np.ndarray:
    """p of all classes on every row, by scikit-learn's fit to those kept; (1/n) Σ stays."""
    model = LogisticRegression(
        C=1 / (n * PENALTY), fit_intercept=False, tol=1e-6, max_iter=5000, warm_start=True
    )
    if start is not None:  # every sample of this size has every class
        model.coef_, model.intercept_, model.classes_ = start.copy(), np.zeros(10), np.arange(10)
    model.fit(X[kept].numpy(), y[kept].numpy())
    return model.predict_proba(X.numpy())


def softmax(data: Path, n: int, count: int) -> tuple[uw.Task, Tensor, Tensor]:
    """A softmax regression of n digits at its minimum."""
    torch.manual_seed(0)
    X, y, *_ = mnist(data, n, 1)
    X = principal(X, count)
    # No bias: the column of ones is it, and is penalized like the others by both programs.
    model = nn.Linear(count + 1, 10, bias=False).double()
    task = uw.Task(model, uw.CrossEntropy(), penalty=uw.L2(PENALTY))
    ones = torch.ones(1, n, dtype=torch.float64)
    return task.moved_to(RECIPE.prepare(task, uw.as_data((X, y)))(ones).theta[0]), X, y


def one_model(task: uw.Task, X: Tensor, y: Tensor) -> tuple[Fitted, Any, float, float]:
    """The method, its scores, their CPU seconds, and those of its numbers without any check."""
    seconds = alone = torch.inf
    for _ in range(3):
        started = time.process_time()
        fitted = uw.Influence(uw.Hessian()).fit(task, (X, y))
        ours = memorization.scores(fitted)
        seconds = min(seconds, time.process_time() - started)
        fresh = uw.Influence(uw.Hessian()).fit(task, (X, y))  # which has not kept leverages
        started = time.process_time()
        Cholesky().init(uw.Hessian().fit(task, fresh.train, fresh.theta))
        fresh.loo_outputs()
        alone = min(alone, time.process_time() - started)
    return fitted, ours, seconds, alone


def exact_of(task: uw.Task, X: Tensor, y: Tensor, rows: list[int]) -> Tensor:
    """By how much scikit-learn without each row has less of its label's probability."""
    n, label = len(X), y.numpy()
    start = task.theta().reshape(10, -1).numpy()
    full = refitted(X, y, np.arange(n), n, start)
    exact = []
    for i in rows:
        p = refitted(X, y, np.delete(np.arange(n), i), n, start)
        exact.append(full[i, label[i]] - p[i, label[i]])
    return torch.tensor(exact)


def by_samples(
    X: Tensor, y: Tensor, rows: Tensor, truth: Tensor, start: np.ndarray | None
) -> tuple[int, float, float]:
    """Models of samples, fitted by scikit-learn one after the other until Pearson .95 or 400.

    Returns:
        How many, Pearson with exact leave-one-out, and CPU seconds.
    """
    n, label = len(X), y.numpy()
    generator = torch.Generator().manual_seed(2)
    inside = torch.stack(
        [torch.randperm(n, generator=generator) < round(0.7 * n) for _ in range(400)]
    )
    right, reached, spent = [], 0.0, 0.0
    for m in range(400):
        kept = inside[m].nonzero()[:, 0].numpy()
        started = time.process_time()
        p = refitted(X, y, kept, len(kept), start)
        spent += time.process_time() - started
        right.append(torch.tensor(p[np.arange(n), label]))
        if m >= 19 and m % 10 == 9:
            mem = _with_less_without(inside[: m + 1, rows], torch.stack(right)[:, rows])
            reached = metrics.pearson(mem, truth, FEW).value
            if reached >= 0.95:
                break
    return len(right), reached, spent


def convex(data: Path) -> Iterator[Goal]:
    task, X, y = softmax(data, 1500, 30)
    fitted, ours, seconds, alone = one_model(task, X, y)
    asked = memorization.scores(fitted, confirm=ROWS, recipe=RECIPE)
    rows = asked.rows
    assert rows is not None
    truth = exact_of(task, X, y, rows.tolist())
    r, b = (f(ours.values[rows], truth) for f in (metrics.pearson, metrics.slope))
    yield Goal(
        f"one model against scikit-learn without each of {ROWS} rows, MNIST n 1 500, PCA 30",
        "Pearson ≥ .999, slope .97 to 1.03",
        f"Pearson {r}, slope {b}",
        r.value >= 0.999 and 0.97 <= b.value <= 1.03,
        seconds,
    )
    first = -fitted.self_influence() * ours.probability
    f, g = (m(first[rows], truth) for m in (metrics.pearson, metrics.slope))
    yield Goal(
        "the same to first order, p · |S|, for comparison",
        "worse than the corrected one",
        f"Pearson {f}, slope {g}; largest value {float(first.max()):.2f}",
        f.value < r.value,
    )
    # Each from its own start, as models of samples are trained, and from the model of all rows.
    start, models = task.theta().reshape(10, -1).numpy(), 0
    for how, begin in (("each from the start", None), ("from the model of all rows", start)):
        models, reached, spent = by_samples(X, y, rows, truth, begin)
        yield Goal(
            f"cost against models of 70 % samples that reach Pearson .95, scikit-learn, {how}",
            "≥ 100 × cheaper",
            f"{models} models ({reached:.3f}) take {spent:.2f} s of CPU; one model's scores with "
            f"its Hessian {seconds:.3f} s, {alone:.3f} of it numbers alone: "
            f"{spent / seconds:.0f} ×, {spent / alone:.0f} × without a check",
            reached >= 0.95 and spent >= 100 * seconds,
            seconds,
        )
    started = time.process_time()
    memorization.by_subsets(RECIPE, task, (X, y), models=models, measure="probability")
    together = time.process_time() - started
    yield Goal(
        "cost against as many models by this library's Newton, all at once",
        "≥ 100 × cheaper",
        f"{together:.2f} s of CPU: {together / seconds:.0f} ×",
        together >= 100 * seconds,
        seconds,
    )
    yield more_rows(data)


def more_rows(data: Path) -> Goal:
    """The same cost with thirteen times the rows."""
    task, X, y = softmax(data, 20_000, 30)
    _, ours, seconds, _ = one_model(task, X, y)
    rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))[:ROWS]
    truth = exact_of(task, X, y, rows.tolist())
    r, b = (f(ours.values[rows], truth) for f in (metrics.pearson, metrics.slope))
    models, reached, spent = by_samples(X, y, rows, truth, None)
    return Goal(
        "the same with 20 000 rows: Pearson, slope and cost of one model, against samples, "
        "scikit-learn, each from the start",
        "Pearson ≥ .999, slope .97 to 1.03, and ≥ 100 × cheaper than samples that reach .95 or 400",
        f"Pearson {r}, slope {b}; {models} models ({reached:.3f}) take {spent:.1f} s of CPU; one "
        f"model's scores with its Hessian {seconds:.3f} s: {spent / seconds:.0f} ×",
        r.value >= 0.999 and 0.97 <= b.value <= 1.03 and spent >= 100 * seconds,
        seconds,
    )


def _with_less_without(inside: Tensor, right: Tensor) -> Tensor:
    some = inside.double()
    return (some * right).sum(0) / some.sum(0) - ((1 - some) * right).sum(0) / (1 - some).sum(0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def network(data: Path) -> Iterator[Goal]:
    X, y, X_test, y_test = mnist(data, 5000, 5000)
    train, test = (X.float(), y), (X_test.float(), y_test)
    recipe = uw.Training(mlp, uw.SGD(0.1, momentum=0.9), epochs=10, batch=100, skip_absent=True)

    def trained(seed: int) -> uw.Task:
        own = replace(recipe, seed=seed)
        return uw.Task(own.trained(uw.Task(mlp(), uw.CrossEntropy()), train), uw.CrossEntropy())

    task = trained(0)
    started = time.process_time()
    truth = memorization.by_subsets(recipe, task, train, test, measure="probability")
    spent = time.process_time() - started
    counted = memorization.by_subsets(recipe, task, train, test, measure="correct")
    assert truth.ceiling is not None and counted.ceiling is not None

    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    started = time.process_time()
    fitted = method.fit(task, train)
    ours = memorization.scores(fitted)
    seconds = time.process_time() - started
    loss = fitted.losses.double()
    tracin = -uw.TracIn().fit(task, train, history=recipe).self_influence().double()
    others = {"loss": loss, "1 − p": 1 - ours.probability, "TracIn": tracin}
    found = truth.beside(ours)
    assert found.agreement is not None
    told = ", ".join(
        f"{name} {metrics.spearman(v, truth.actual, FEW)}" for name, v in others.items()
    )
    yield Goal(
        "one model by EK-FAC against 200 models, MNIST n 5 000, MLP 784-32-10, probability",
        "Spearman ≥ .6, above loss, confidence and TracIn",
        f"{found.agreement} (as many models again {truth.ceiling}); {told}",
        found.agreement.value >= 0.6
        and all(_above(ours.values, v, truth.actual) > 0 for v in others.values()),
        seconds,
    )
    told = ", ".join(
        f"{name} {metrics.spearman(v, counted.actual, FEW).value:.3f}" for name, v in others.items()
    )
    right = metrics.spearman(ours.values, counted.actual, FEW)
    yield Goal(
        "the same of right and wrong answers",
        "Spearman ≥ .6, or by how much not",
        f"{right} (as many models again {counted.ceiling}); {told}",
        right.value >= 0.6,
    )
    r = {name: metrics.pearson(v, truth.actual, FEW).value for name, v in others.items()}
    mine = metrics.pearson(ours.values, truth.actual, FEW)
    yield Goal(
        "the same as sizes: Pearson with 200 models",
        "above loss, confidence and TracIn",
        f"{mine}; {', '.join(f'{k} {v:.3f}' for k, v in r.items())}; {spent / seconds:.1f} × the "
        "time of one model's scores",
        mine.value > max(r.values()),
        seconds,
    )
    further = [ours.values]
    for seed in range(1, SEEDS):
        again = trained(seed)
        further.append(memorization.scores(method.fit(again, train)).values)
    several = torch.stack(further).mean(dim=0)
    alone = [metrics.spearman(v, truth.actual, FEW).value for v in further[1:]]
    rho, linear = (f(several, truth.actual, FEW) for f in (metrics.spearman, metrics.pearson))
    yield Goal(
        f"mean over {SEEDS} seeds of the training, of which one is that of the 200 models",
        "Pearson above that of one",
        f"Spearman {rho}, Pearson {linear}; other seeds alone have Spearman "
        f"{', '.join(f'{v:.3f}' for v in alone)}",
        linear.value > mine.value,
    )

    for errors in (0.0, 5.0):
        paired = memorization.pairs(counted, errors=errors)
        yield Goal(
            "pairs of a memorized row and a test row with influence ≥ .15, by "
            f"{errors:g} standard errors",
            "counted, and half of it or more by the models that did not choose them",
            paired.verdict,
            paired.is_confirmed,
        )
    for name, order in (("one model", ours), ("200 models", counted)):
        cost = memorization.removal_experiment(recipe, task, train, test, order, draws=10, seeds=2)
        yield Goal(
            f"without the 10 % most memorized by {name}",
            "costs more test accuracy than random 10 %",
            cost.verdict,
            cost.cost.low > 0,
        )


def _above(ours: Tensor, other: Tensor, truth: Tensor) -> float:
    """By how much the rank correlation is larger: the lower end of the paired interval."""

    def statistic(counts: Tensor) -> Tensor:
        return metrics.rank_correlation(ours, truth, counts) - metrics.rank_correlation(
            other, truth, counts
        )

    return estimate(statistic, [len(truth)], FEW).low


PARTS = {
    "convex": (
        convex,
        ("one model against", "the same to first order", "cost against", "the same with 20 000"),
    )
}
"""What can be measured by itself, and how the names of its rows begin."""

PARTS_ARE_ALL = False
"""Whether every row is of a part."""
