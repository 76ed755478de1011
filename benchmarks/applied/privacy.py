"""Membership attacks through explanations of MNIST softmax regressions, and redactions."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import upweight as uw
from applied.goal import Goal
from upweight.applications import privacy
from upweight.task.data import as_data

COMPONENTS = 50


def goals(data: Path) -> Iterator[Goal]:
    mnist = np.load(data / "mnist.npz")
    yield from _audited(mnist, 300, 300, 1e-4)
    yield from _audited(mnist, 2000, 1000, 1e-3)
    yield from _audited(mnist, 2000, 1000, 1e-5)


def _audited(mnist, n: int, asked: int, strength: float) -> Iterator[Goal]:
    """Members are the first of n images, outsiders come from the same shuffled 60 000."""
    drawn = np.random.default_rng(0).permutation(60000)[: n + asked]
    A, y = mnist["X"][drawn].reshape(-1, 784) / 255.0, torch.tensor(mnist["y"][drawn]).long()
    mean = A[:n].mean(0)
    axes = np.linalg.svd(A[:n] - mean, full_matrices=False)[2][:COMPONENTS]
    X = torch.tensor((A - mean) @ axes.T)
    train, outsiders = (X[:n], y[:n]), (X[n:], y[n:])
    blank = uw.Task(nn.Linear(COMPONENTS, 10).double(), uw.CrossEntropy(), uw.L2(strength))
    made = uw.training.Newton().prepare(blank, as_data(train))(torch.ones(1, n).double())
    fitted = uw.Influence(uw.Hessian()).fit(blank.moved_to(made.theta[0]), train)
    started = time.perf_counter()
    found = privacy.audit(fitted, range(asked), outsiders, k=5)
    seconds = time.perf_counter() - started
    where = (
        f"MNIST PCA-{COMPONENTS} softmax, n = {n}, λ = {strength:g}, {asked} members and as many"
    )
    now, soon = "records and values", "near-duplicates withheld"
    by_name = {(each.redaction, each.name): each for each in found.attacks}
    for name in found.revealed:
        told = [
            f"{each.name} AUC {each.auc}, TPR {each.rates[0].value:.3f} at .1 % and "
            f"{each.rates[1].value:.3f} at 1 %"
            for each in found.attacks
            if each.redaction == name
        ]
        yield Goal(
            f"{where} outsiders: {name}",
            "stated",
            f"{'; '.join(told)}; members shown {found.shown[name][0]:.3f}; rows revealed "
            f"{found.revealed[name]}; overlap {found.overlap[name]:.2f} of 5",
            True,
            seconds,
        )
    loss = by_name["no explanation", "loss"]
    yield Goal(f"{where} outsiders: loss, no explanation", "stated", f"AUC {loss.auc}", True)
    own, ratio = by_name[soon, "own row"], by_name[soon, "ratio"]
    yield Goal(
        f"{where} outsiders: after redaction ({soon})",
        "own-row and ratio AUC ≤ .55" if n >= 2000 else "stated (the goal is for n ≥ 2 000)",
        f"own row {by_name[now, 'own row'].auc.value:.3f} → {own.auc.value:.3f}, ratio "
        f"{by_name[now, 'ratio'].auc.value:.3f} → {ratio.auc}; overlap "
        f"{found.overlap[soon]:.2f} of 5",
        n < 2000 or max(own.auc.value, ratio.auc.value, 1 - ratio.auc.value) <= 0.55,
    )
