"""Sixteen maps of an MNIST query beside its training examples, maps of scores, mass in a region."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import upweight as uw
from applied.goal import Goal
from upweight.applications import saliency
from upweight.methods.fitted import Fitted

TRAIN = 1500
COMPLETE = ("integrated-gradients", "deeplift", "shap")
GROUPS = 30


WHY = {
    "network of rectifiers": (
        "the score of a network of rectifiers jumps where one of them switches, and no "
        "gradient sees a jump: completeness cannot hold. With softplus in place of "
        "rectifiers (the row after it) it holds to 1e-7; DeepLIFT and SHAP hold with rectifiers as "
        "well."
    ),
}
"""Of goals that are not reached, by a part of their name: the reason, and what shows it."""


def goals(data: Path) -> Iterator[Goal]:
    mnist = np.load(data / "mnist.npz")
    X = torch.tensor(mnist["X"][:TRAIN]).float().reshape(-1, 1, 28, 28) / 255
    y = torch.tensor(mnist["y"][:TRAIN].astype(int))
    test = torch.tensor(mnist["Xt"][:200]).float().reshape(-1, 1, 28, 28) / 255
    queries = test, torch.tensor(mnist["yt"][:200].astype(int))
    fitted = _fitted(nn.ReLU, (X, y))
    right = float((fitted.task.model(test).argmax(dim=1) == queries[1]).float().mean())

    started = time.perf_counter()
    views = saliency.views(fitted, (test[:1], queries[1][:1]))
    with tempfile.TemporaryDirectory() as folder:
        size = uw.report.explain(views, Path(folder) / "maps.html").stat().st_size
    seconds = time.perf_counter() - started
    yield Goal(
        f"MNIST, a convolutional network of {fitted.theta.numel()} parameters (test accuracy "
        f"{right:.3f}, n = {TRAIN}): the 16 names and input × gradient for one query, beside the 5 "
        "strongest training examples with their own maps, and both maps of the first score",
        "one page in under 60 s, none left out",
        f"{len(views.rows)} methods, {len(views.unanswered)} without some map, {size // 1000} kB, "
        f"{seconds:.1f} s with the imports of captum, shap and lime",
        seconds < 60 and not views.unanswered,
        seconds,
    )
    some = (test[:10], queries[1][:10])
    errors = {
        name: float(saliency.output(fitted.task, some, name, seed=None).errors.max())
        for name in (*COMPLETE, "lrp", "deep-taylor")
    }
    yield Goal(
        "the same network, 10 queries, outputs: how far sums miss their totals, at worst",
        "at most 2 % for integrated gradients, DeepLIFT and SHAP",
        _listed(errors) + " (LRP's relevance goes to the biases)",
        all(errors[name] <= 0.02 for name in COMPLETE),
    )
    smooth = _fitted(nn.Softplus, (X, y))
    for name, fit, methods in (
        ("rectifiers", fitted, ("deeplift", "shap")),
        ("rectifiers", fitted, ("integrated-gradients",)),
        ("softplus", smooth, ("integrated-gradients", "shap")),
    ):
        i = views.examples[0]
        missed = {
            method: max(
                float(saliency.score(fit, some, i, method, side=side).errors.max())
                for side in ("query", "train")
            )
            for method in methods
        }
        jumps = (
            ""
            if fit is smooth or "shap" in methods
            else (": the score jumps where a rectifier switches, and no gradient sees a jump")
        )
        yield Goal(
            f"scores in the query's and the training input, network of {name}, 10 queries",
            f"at most 2 % for {' and '.join(methods)}",
            _listed(missed) + jumps,
            all(error <= 0.02 for error in missed.values()),
        )
    yield _against_autograd(smooth, (test[:5], queries[1][:5]))
    yield _mass()


def _fitted(activation: type[nn.Module], train: tuple[torch.Tensor, torch.Tensor]) -> Fitted:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2), activation(), nn.Conv2d(16, 32, 3, 2, 1), activation(),
            nn.Conv2d(32, 32, 3, 1, 1), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 10),
        )  # fmt: skip

    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for batch in torch.randperm(TRAIN).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
    task = uw.Task(model.eval(), uw.CrossEntropy())
    return uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)


def _against_autograd(fitted: Fitted, queries: tuple[torch.Tensor, torch.Tensor]) -> Goal:
    """Gradients and integrated gradients of x ↦ ⟨∇ℓ(x), u⟩ by double backward in float64."""
    i, worst = 3, {}
    model = fitted.task.moved_to(fitted.theta).model.double()
    u = {k: v.double() / TRAIN for k, v in fitted.parameter_influence(i).items()}
    named = dict(model.named_parameters())

    def gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), y.expand(len(x)), reduction="sum")
        slopes = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        total = sum((g * u[k]).sum() for k, g in zip(named, slopes, strict=True))
        return torch.autograd.grad(total, x)[0]

    places, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(300))
    maps = [saliency.score(fitted, queries, i, m) for m in ("gradient", "integrated-gradients")]
    for k in range(len(queries[0])):
        x, y = queries[0][k : k + 1].double(), queries[1][k : k + 1]
        path = gradient((places.reshape(-1, 1, 1, 1) + 1) / 2 * x, y)
        exact = gradient(x, y)[0], x[0] * (weights.reshape(-1, 1, 1, 1) / 2 * path).sum(dim=0)
        for found, want in zip(maps, exact, strict=True):
            off = float((found.values[k] - want).abs().max() / want.abs().max())
            worst[found.method.name] = max(off, worst.get(found.method.name, 0.0))
    return Goal(
        "network of softplus: maps of a score by central difference against autograd, 5 queries",
        "equal to 1e-6 of the largest entry",
        ", ".join(f"{name} {off:.1e}" for name, off in worst.items()),
        max(worst.values()) <= 1e-6,
    )


def _mass() -> Goal:
    """Softmax regression on bundled digits; groups of 20 of one digit are left out."""
    digits = uw.data.mnist_subset()
    X = torch.tensor(digits.X[::5] / 255.0).reshape(-1, 14, 2, 14, 2).mean(dim=(2, 4)).flatten(1)
    y = torch.tensor(digits.y[::5])
    Q = torch.tensor(digits.X_test[::100] / 255.0).reshape(-1, 14, 2, 14, 2).mean(dim=(2, 4))
    queries = Q.flatten(1), torch.tensor(digits.y_test[::100])
    task = uw.Task(nn.Linear(196, 10).double(), uw.CrossEntropy(), uw.L2(1e-2))
    newton = uw.training.Newton()
    ones = torch.ones(1, len(X)).double()
    task = task.moved_to(newton.prepare(task, task.training((X, y)))(ones).theta[0])
    fitted = uw.Influence(uw.Hessian()).fit(task, (X, y))
    upper = torch.zeros(14, 14, dtype=torch.bool)
    upper[:7] = True
    draw = np.random.default_rng(0)
    groups = [
        draw.choice(np.flatnonzero(digits.y[::5] == k % 10), 20, replace=False).tolist()
        for k in range(GROUPS)
    ]
    weights = torch.ones(GROUPS, len(X)).double()
    for row, group in zip(weights, groups, strict=True):
        row[group] = 0
    said, least = [], 1.0
    started = time.perf_counter()
    for share in (False, True):
        mass = saliency.Mass("integrated-gradients", upper.flatten(), share)
        actual = uw.training.retrain(newton, task, (X, y), weights, queries, mass).change.T
        for how, predicted in (
            ("first order", fitted.attribute(queries, mass).removal(groups).values),
            ("a Newton step", fitted.removal(queries, mass, groups, evaluate="plugin").values),
        ):
            rs = [
                float(torch.corrcoef(torch.stack(both))[0, 1])
                for both in zip(predicted, actual, strict=True)
            ]
            what = "share" if share else "sum"
            said.append(f"{what} by {how}: median {np.median(rs):.4f}, least {min(rs):.4f}")
        least = min(least, *rs)  # of the step
    return Goal(
        f"softmax on bundled digits (n = {len(X)}, p = 1 970): mass of integrated gradients in the "
        f"upper half of {len(Q)} queries, {GROUPS} groups of 20 left out, predicted against refits",
        "r ≥ .95 by the Newton step, for every query",
        "; ".join(said),
        least >= 0.95,
        time.perf_counter() - started,
    )


def _listed(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * error:.2g} %" for name, error in errors.items())
