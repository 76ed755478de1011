"""Why does influence differ from retraining? The five gaps on a network of the bundled digits.

The MLP 784-32-32-10 on the first 1 000 images that come with the package, in float64, trained for
30 epochs (not to convergence). Twenty single images are removed, from those that influence says
matter most down to the two hundredth; each is retrained four ways, and each way measured on 50 test
images. Scores are EK-FAC's; the linearized stage is damped Gauss-Newton influence, solved by CG.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from environment import environment
from torch import nn

import upweight as uw
from upweight.evaluation import gaps

HERE = Path(__file__).resolve().parent
N, QUERIES, REMOVALS, AMONG = 1000, 50, 20, 200
DAMPING, DECAY, EPOCHS, EPOCHS_WARM = 0.01, 1e-3, 30, 100


def network() -> nn.Module:
    """784-32-32-10."""
    layers = [nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*layers).double()


def main() -> None:
    """Train, score, remove, retrain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gaps.json", metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="where to draw the five gaps")
    given = parser.parse_args()
    started = time.perf_counter()
    read = uw.data.mnist_subset()

    def tensors(images: object, labels: object, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(images)[:count].double().flatten(1) / 255, torch.tensor(labels)[:count]

    train = tensors(read.X, read.y, N)
    queries = tensors(read.X_test, read.y_test, QUERIES)
    sgd = uw.SGD(0.1, momentum=0.9)
    recipe = uw.Training(network, sgd, EPOCHS, batch=100)
    warm = uw.Training(None, sgd, EPOCHS_WARM, batch=100, schedule=uw.training.Cosine())
    untrained = uw.Task(network(), uw.CrossEntropy(), uw.L2(DECAY))
    model = recipe.trained(untrained, train)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(DECAY))
    damping = uw.Absolute(DAMPING)
    exact = uw.Influence(uw.GGN(), damping=damping, solver=uw.solvers.CG(rtol=1e-6)).fit(
        task, train
    )
    approximate = uw.Influence(uw.EKFAC(), damping=damping, tolerance=0.0).fit(task, train)
    linearized = exact.attribute(queries)
    scores = approximate.attribute(queries)
    order = approximate.self_influence().argsort()  # most negative, most influential, first
    chosen = order[torch.linspace(0, AMONG, REMOVALS).long()].tolist()
    found = gaps(scores, linearized, recipe, chosen, damping=DAMPING, warm=warm)
    print(found)
    pairs = [("linearized", other) for other in ("PBRF", "proximal", "warm start", "cold start")]
    report = {
        "environment": environment(),
        "network": [784, 32, 32, 10],
        "n": N,
        "damping": DAMPING,
        "weight_decay": DECAY,
        "epochs": {"cold": EPOCHS, "warm": EPOCHS_WARM},
        "correlations": {
            f"{a} with {b}": [(e := found.correlation(a, b)).value, e.low, e.high]
            for a, b in [*pairs, ("scores", "linearized")]
        },
        **found.summary(),
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(report["correlations"], indent=2))
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    if given.figure:
        figure = found.plot().figure
        figure.set_size_inches(7, 3)
        figure.savefig(given.figure, dpi=110)


if __name__ == "__main__":
    main()
