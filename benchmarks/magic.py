"""Does MAGIC predict training without 1 % of the data, and what does it cost?

Handwritten digits of scikit-learn, 8 × 8 pixels: 1 200 to train on, 40 of the rest as queries.
Networks 64-48-48-10 in float64, SGD with momentum, batches of 200, cosine schedule. Forty random
1 % drops (12 examples) are retrained with the same seed and order; predictions are sums of scores.

    smooth   tanh, learning rate 0.05, 20 epochs        metasmooth: the adjoint hardly grows
    gelu     GELU, the same
    relu     ReLU, the same
    rough    ReLU, learning rate 0.3, the same          the adjoint grows

Costs are CPU seconds in plain trainings of the model per query, of an MLP 784-128-64-10 (tanh) on
1 000 of the bundled images, in float32, for one query, 16 and 100 at once.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw
from upweight.evaluation import lds
from upweight.training import Cosine, removal_weights, retrain

HERE = Path(__file__).resolve().parent
N, QUERIES, DROPS, GONE = 1200, 40, 40, 12
PENALTY = 1e-3
TRAININGS = {
    "smooth": (nn.Tanh, 0.05, 20),
    "gelu": (nn.GELU, 0.05, 20),
    "relu": (nn.ReLU, 0.05, 20),
    "rough": (nn.ReLU, 0.3, 20),
}


def network(act: Callable[[], nn.Module]) -> nn.Module:
    """64-48-48-10."""
    layers = [nn.Linear(64, 48), act(), nn.Linear(48, 48), act(), nn.Linear(48, 10)]
    return nn.Sequential(*layers).double()


def drops(n: int) -> list[list[int]]:
    """Random groups of 1 %."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randperm(n, generator=draw)[:GONE].tolist() for _ in range(DROPS)]


def fidelity(act: Callable[[], nn.Module], lr: float, epochs: int) -> dict[str, Any]:
    """LDS and slope of margins, of each method against the same retrained models."""
    X, y = load_digits(return_X_y=True)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    x, y = torch.tensor(X)[order] / 16, torch.tensor(y)[order]
    train, queries = (x[:N], y[:N]), (x[N : N + QUERIES], y[N : N + QUERIES])
    recipe = uw.Training(
        lambda: network(act), uw.SGD(lr, momentum=0.9), epochs, batch=200, schedule=Cosine()
    )
    start = uw.Task(network(act).eval(), uw.CrossEntropy(), uw.L2(PENALTY))
    run = recipe.trajectory(start, train)
    task = start.moved_to(run.theta)
    weights = removal_weights(N, drops(N))
    with torch.no_grad():
        wrong = task.outputs(task.theta(), queries)[0].argmax(1) != queries[1]
    found: dict[str, Any] = {"test_error": float(wrong.double().mean()), "steps": len(run)}
    # Losses rank drops as margins do: one is a falling function of the other.
    measure = uw.Margin()
    truth = retrain(recipe, task, train, weights, queries, measure, progress=False)
    for name, method, history in (
        ("MAGIC()", uw.MAGIC(), run),
        ("MAGIC(GGN())", uw.MAGIC(uw.GGN()), run),
        ("EK-FAC, damping=Relative(0.1)", uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)), None),
    ):
        scores = method.fit(task, train, history=history).attribute(queries, measure)
        judged = lds(scores, weights, truth)
        predicted = (scores.values @ (weights.T - 1)).T
        predicted -= predicted.mean(dim=0)
        measured = judged.measured - judged.measured.mean(dim=0)
        found[name] = {
            "lds": [(e := judged.spearman).value, e.low, e.high],
            "slope": float((measured * predicted).sum() / predicted.square().sum()),
            "adjoint_growth": scores.provenance.health.get("adjoint_growth"),
        }
        print(f"  {name:32}{found[name]}", flush=True)
    return found


def cost() -> dict[str, Any]:
    """CPU seconds in plain trainings, per query."""
    read = uw.data.mnist_subset()

    def tensors(images: Any, labels: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(images)[:count].float().flatten(1) / 255, torch.tensor(labels)[:count]

    train = tensors(read.X, read.y, 1000)
    x, y = tensors(read.X_test, read.y_test, 100)

    def init() -> nn.Module:
        layers = [nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)

    found = {}
    for optimizer in (uw.SGD(0.05, momentum=0.9), uw.Adam(1e-3)):
        recipe = uw.Training(init, optimizer, 3, batch=100)
        start = uw.Task(init().eval(), uw.CrossEntropy(), uw.L2(1e-4))
        plain = []
        for _ in range(4):
            began = time.process_time()
            run = recipe.trajectory(start, train, every=[])
            plain.append(time.process_time() - began)
        run = recipe.trajectory(start, train)
        task = start.moved_to(run.theta)
        for curvature in (uw.Hessian(), uw.GGN()):
            fitted = uw.MAGIC(curvature).fit(task, train, history=run)
            each = {}
            for q in (1, 16, 100):
                began = time.process_time()
                fitted.attribute((x[:q], y[:q]))
                each[str(q)] = (time.process_time() - began) / min(plain) / q
            name = f"{type(optimizer).__name__}, {fitted.spec!r}"
            found[name] = {"plain_training_seconds": min(plain), "trainings_per_query": each}
            print(f"  {name}: {each}", flush=True)
    return found


def main() -> None:
    """Train, score, drop, retrain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "magic.json", metavar="FILE")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    report: dict[str, Any] = {
        "environment": environment(),
        "n": N,
        "queries": QUERIES,
        "drops": [DROPS, GONE],
        "penalty": PENALTY,
        "fidelity": {},
    }

    def written() -> None:
        report["seconds"] = time.perf_counter() - started
        given.out.write_text(json.dumps(report, indent=2) + "\n")

    for name, (act, lr, epochs) in TRAININGS.items():
        print(name, act.__name__, lr, epochs, flush=True)
        report["fidelity"][name] = {
            "activation": act.__name__,
            "lr": lr,
            "epochs": epochs,
            **fidelity(act, lr, epochs),
        }
        written()
    report["cost"] = cost()
    written()


if __name__ == "__main__":
    main()
