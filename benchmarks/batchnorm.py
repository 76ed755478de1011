"""Do halves help a network with batch normalization that a function trains? LDS against cost.

Two networks with batch normalization on 1 000 of the bundled digits, each trained by a plain loop
in a function of data weights and a seed: a CNN by SGD with momentum and weight decay, and an MLP by
Adam. The truth is 40 models of random halves that fitted nothing, the mean of two seeds, and a
third seed for the ceiling. The rows are EK-FAC at one model, its mean over 40 halves, and the stack
that `uw.attribute(…, recipe=function, budget=…)` chooses, over 10, 20 and 40 halves.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment
from torch import Tensor, nn
from unseen import judged

import upweight as uw
from upweight.data import mnist_subset
from upweight.front.choice import stacked_ends
from upweight.training import FromFunction, retrain, subset_models, subset_weights

HERE = Path(__file__).resolve().parent
EXAMPLES, QUERIES, EPOCHS, BATCH, DECAY = 1000, 60, 8, 50, 1e-3
SUBSETS, SEEDS, HALVES = 40, (101, 102, 103), (10, 20, 40)

DIGITS, ORDER = mnist_subset(), torch.Generator().manual_seed(0)
ROWS = torch.randperm(len(DIGITS.X), generator=ORDER)[:EXAMPLES].numpy()
ASKED = torch.randperm(len(DIGITS.X_test), generator=ORDER)[:QUERIES].numpy()


def images(X: object, y: object) -> tuple[Tensor, Tensor]:
    return torch.tensor(X, dtype=torch.float32)[:, None] / 255, torch.tensor(y)


X, Y = images(DIGITS.X[ROWS], DIGITS.y[ROWS])
TEST = images(DIGITS.X_test[ASKED], DIGITS.y_test[ASKED])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), nn.BatchNorm1d(32), nn.GELU(),
        nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 10),
    )  # fmt: skip


def loop(weights: Tensor, seed: int, net: Callable[[], nn.Module], rule: str) -> nn.Module:
    """A plain loop over the examples that have weight."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model, rows, w = net().train(), weights.nonzero()[:, 0], weights.float()
    if rule == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=DECAY)
        steps = EPOCHS * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    else:
        optimizer, schedule = torch.optim.Adam(model.parameters(), 2e-3), None
    for _ in range(EPOCHS):
        for some in rows[torch.randperm(len(rows), generator=order)].split(BATCH):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(X[some]), Y[some], reduction="none")
            ((w[some] * losses).sum() / w[some].sum()).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return model.eval()


def train_cnn(weights: Tensor, seed: int = 0) -> nn.Module:
    return loop(weights, seed, cnn, "SGD")


def train_mlp(weights: Tensor, seed: int = 0) -> nn.Module:
    return loop(weights, seed, mlp, "Adam")


FUNCTIONS = {
    "CNN by SGD": (train_cnn, uw.L2(DECAY)),
    "MLP by Adam": (train_mlp, uw.L2(0.0)),
}


def rows_of(function: Callable[..., nn.Module], penalty: uw.L2) -> dict[str, object]:
    recipe = FromFunction(function, seed=0)
    task = uw.Task(function(torch.ones(EXAMPLES)), uw.CrossEntropy(), penalty)
    train = uw.as_data((X, Y))
    weights = subset_weights(EXAMPLES, SUBSETS, 0.5, renormalize=True)
    truth = torch.stack([
        retrain(replace(recipe, seed=seed), task, train, weights, TEST).values for seed in SEEDS
    ]).double()  # fmt: skip
    rows: dict[str, object] = {}

    def row(name: str, trainings: float, method: uw.Method, history: object = None) -> None:
        started = time.process_time()
        fitted = method.fit(task, train, history=history)
        scores = fitted.attribute(TEST)
        seconds = time.process_time() - started
        rows[name] = {"trainings": trainings, "cpu_seconds": seconds}
        rows[name] |= judged(scores.values, weights, truth)
        print(name, rows[name], flush=True)

    ekfac = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    row("EK-FAC", 0, ekfac)
    for halves in HALVES:
        row(f"stacked, {halves} halves", halves / 2, stacked_ends(halves), recipe)
    most = HALVES[-1]
    models = subset_models(recipe, task, train, most, 0.5, most)
    row(f"mean of EK-FAC over {most} halves", most / 2, uw.Ensemble(ekfac, most, 0.5), models)
    with torch.no_grad():
        right = (task.model(TEST[0]).argmax(1) == TEST[1]).double().mean()
    return {"parameters": task.layout.size, "test_accuracy": float(right), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "batchnorm.json")
    given = parser.parse_args()
    report: dict[str, object] = {"environment": environment()}
    for name, (function, penalty) in FUNCTIONS.items():
        print(name)
        report[name] = rows_of(function, penalty)
    given.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
