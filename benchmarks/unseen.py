"""Do the settings hold on a network that none of them was chosen on? The front door's answers.

Two convolutions with GELU, 15 090 parameters, on 3 000 other MNIST images than those of
`fidelity.py`, trained by SGD with momentum or by Adam with a cosine schedule. The truth is 40
models of random halves from three other seeds, two of them judged against the third for the
ceiling. Each row is what `uw.attribute` answers with what it is told, or a method by name.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from environment import DATA, environment
from torch import nn

import upweight as uw
from upweight.evaluation import LDS, Bootstrap
from upweight.training import retrain, subset_weights

HERE = Path(__file__).resolve().parent
TRAIN, QUERIES = slice(20_000, 23_000), slice(3_000, 3_100)
SUBSETS, SEEDS, BUDGETS = 40, (101, 102, 103), ("2 min", "10 min")


def network() -> nn.Module:
    """8 filters of 5 × 5, 16 of 3 × 3, 32 units."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2), nn.GELU(),
        nn.Flatten(), nn.Linear(400, 32), nn.GELU(), nn.Linear(32, 10),
    )  # fmt: skip


RECIPES = {
    "SGD": uw.Training(network, uw.SGD(0.05, momentum=0.9), 12, 64, skip_absent=True),
    "Adam": uw.Training(
        network, uw.Adam(2e-3), 12, 64, uw.training.Cosine(), skip_absent=True
    ),
}  # fmt: skip


def images(data: Path, inputs: str, labels: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    kept = np.load(data / "mnist.npz")
    X = torch.tensor(kept[inputs][rows], dtype=torch.float32)[:, None] / 255
    return X, torch.tensor(kept[labels][rows]).long()


def judged(scores: torch.Tensor, weights: torch.Tensor, values: torch.Tensor) -> dict[str, object]:
    """LDS with its ceiling, and measured against predicted differences between the halves."""
    predicted = (weights.double() - 1) @ scores.double().T
    found = LDS(predicted, values[:2], values[2:], bootstrap=Bootstrap(resamples=300))
    actual = values.mean(dim=0)
    actual, predicted = actual - actual.mean(dim=0), predicted - predicted.mean(dim=0)
    score, top = found.spearman, found.ceiling
    assert top is not None
    return {
        "lds": [score.value, score.low, score.high],
        "ceiling": [top.value, top.low, top.high],
        "slope": float((actual * predicted).sum() / predicted.square().sum()),
    }


def rows_of(recipe: uw.Training, given: argparse.Namespace) -> dict[str, object]:
    train, queries = images(given.data, "X", "y", TRAIN), images(given.data, "Xt", "yt", QUERIES)
    task = uw.Task(network(), uw.CrossEntropy())
    started = time.perf_counter()
    model = recipe.trained(task, train).eval()
    training = time.perf_counter() - started
    weights = subset_weights(len(train[0]), SUBSETS, 0.5, renormalize=True)
    truth = torch.stack([
        retrain(replace(recipe, seed=seed), task, train, weights, queries).values for seed in SEEDS
    ]).double()  # fmt: skip
    own = uw.Task(model, uw.CrossEntropy())

    def asked(**more: object) -> uw.Scores:
        return uw.attribute(model, train, queries, nn.CrossEntropyLoss(), **more)

    def by(method: uw.Method, history: object = None) -> uw.Scores:
        return method.fit(own, train, history=history).attribute(queries)

    ways: dict[str, Callable[[], uw.Scores]] = {
        "attribute(…)": asked,
        "attribute(…, recipe)": lambda: asked(recipe=recipe),
        **{
            f'attribute(…, recipe, budget="{budget}")': lambda b=budget: asked(
                recipe=recipe, budget=b
            )
            for budget in BUDGETS
        },
        "SOURCE()": lambda: by(uw.SOURCE(), recipe),
        "Influence(EKFAC(), damping=Relative(0.1))": lambda: by(
            uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
        ),
        "GradientDot()": lambda: by(uw.GradientDot()),
    }
    rows: dict[str, object] = {}
    for name, way in ways.items():
        started = time.perf_counter()
        scores = way()
        seconds = time.perf_counter() - started
        method = scores.provenance.method
        rows[name] = {"method": method, "seconds": seconds} | judged(scores.values, weights, truth)
        print(name, rows[name], flush=True)
    with torch.no_grad():
        right = (model(queries[0]).argmax(1) == queries[1]).double().mean()
    return {"training_seconds": training, "test_accuracy": float(right), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "unseen.json", metavar="FILE"
    )
    given = parser.parse_args()
    report: dict[str, object] = {"environment": environment()}
    for name, recipe in RECIPES.items():
        print(name)
        report[name] = rows_of(recipe, given)
    given.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
