"""Which λ does the GGN of a network take, where nothing is known of its training?

Five networks of at most 2 050 parameters on real data, trained by SGD or Adam as one would, the
truth the mean of three models of each of 40 random halves. For a λ from 10⁻⁶ to 1, the LDS of
losses and the slope of measured against predicted changes, from one eigendecomposition of the GGN
in float64. Beside the grid the rules that a default could follow:

    label        0.02 for each label of an example (`uw.attribute`; of no classes `mean`)
    mean         the mean eigenvalue: Relative(1)
    tenth        a tenth of it: Relative(0.1)
    largest      a hundredth of the largest eigenvalue
    evidence     γ/(n ‖θ‖²): MacKay (1992)
    by layer     EK-FAC with a tenth of each layer's mean eigenvalue

    python benchmarks/damping.py       # three minutes; wants scikit-learn and statsmodels
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import statsmodels.api as sm
import torch
from environment import DATA, environment
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from unseen import judged

import upweight as uw
from upweight.front.choice import LEARNED
from upweight.linalg.eigen import Eigen
from upweight.training import retrain, subset_weights

HERE = Path(__file__).resolve().parent
SUBSETS, SEEDS = 40, (11, 12, 13)
GRID = tuple(10.0 ** (k / 2) for k in range(-12, 1))

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """A network, how it is trained, and its data."""

    name: str
    train: Pair
    queries: Pair
    recipe: uw.Training
    loss: Any


def networks(data: Path) -> Iterator[Network]:
    """Nothing here was looked at when the estimators were made."""
    cancer, digits, wine = load_breast_cancer(), load_digits(), load_wine()

    def mlp(*widths: int, unit: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), unit())]
            return nn.Sequential(*layers[:-1])

        return made

    def recipe(model: Any, optimizer: Any, epochs: int, batch: int) -> uw.Training:
        return uw.Training(model, optimizer, epochs, batch, skip_absent=True)

    momentum = 0.9
    yield Network(
        "breast cancer, 30-16-2, tanh, Adam",
        *split(standard(cancer.data), torch.tensor(cancer.target).long(), 469, 100),
        recipe(mlp(30, 16, 2, unit=nn.Tanh), uw.Adam(2e-3), 40, 32),
        uw.CrossEntropy(),
    )
    yield Network(
        "digits, 64-24-10, ReLU, SGD",
        *split(standard(digits.data), torch.tensor(digits.target).long(), 1200, 100),
        recipe(mlp(64, 24, 10, unit=nn.ReLU), uw.SGD(0.05, momentum=momentum), 20, 50),
        uw.CrossEntropy(),
    )
    visits = sm.datasets.randhie.load_pandas()
    counts = torch.tensor(np.log1p(visits.endog.to_numpy()), dtype=torch.float32)[:, None]
    yield Network(
        "visits to doctors, 9-24-1, GELU, Adam",
        *split(standard(visits.exog.to_numpy()), counts, 1500, 100),
        recipe(mlp(visits.exog.shape[1], 24, 1, unit=nn.GELU), uw.Adam(3e-3), 30, 50),
        uw.SquaredError(),
    )
    with np.load(data / "mnist.npz") as kept:
        images = torch.tensor(kept["X"][30000:32100]).float().view(-1, 1, 28, 28) / 255
        labels = torch.tensor(kept["y"][30000:32100]).long()
    yield Network(
        "MNIST in 7 × 7, 49-24-24-10, ReLU, AdamW",
        *split(nn.functional.avg_pool2d(images, 4).flatten(1), labels, 2000, 100),
        recipe(mlp(49, 24, 24, 10, unit=nn.ReLU), uw.AdamW(3e-3, weight_decay=0.01), 20, 50),
        uw.CrossEntropy(),
    )
    yield Network(
        "wine, 13-16-3, ReLU, SGD",
        *split(standard(wine.data), torch.tensor(wine.target).long(), 128, 50),
        recipe(mlp(13, 16, 3, unit=nn.ReLU), uw.SGD(0.02, momentum=momentum), 40, 16),
        uw.CrossEntropy(),
    )


def standard(X: Any) -> Tensor:
    """Columns of mean 0 and standard deviation 1."""
    found = torch.tensor(np.asarray(X), dtype=torch.float32)
    return (found - found.mean(0)) / (found.std(0) + 1e-6)


def split(X: Tensor, y: Tensor, n: int, q: int) -> tuple[Pair, Pair]:
    """n training rows and q others, drawn."""
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    train, queries = order[:n], order[n : n + q]
    return (X[train], y[train]), (X[queries], y[queries])


def measured(net: Network) -> dict[str, Any]:
    """LDS and slope at every λ and by every rule."""
    torch.manual_seed(0)
    recipe, n = net.recipe, len(net.train[0])
    assert recipe.init is not None
    task = uw.Task(recipe.init(), net.loss)
    model = recipe.trained(task, net.train).eval()
    weights = subset_weights(n, SUBSETS, 0.5, renormalize=True)
    truth = torch.stack([
        retrain(replace(recipe, seed=seed), task, net.train, weights, net.queries).values
        for seed in SEEDS
    ]).double()  # fmt: skip
    layered = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    by_layer = layered.fit(uw.Task(model, net.loss), net.train).attribute(net.queries)

    own = uw.Task(model.double(), net.loss)
    train, queries = (
        tuple(x.double() if x.is_floating_point() else x for x in part)
        for part in (net.train, net.queries)
    )
    # Without damping it is singular, and refused.
    scorer: Any = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), 1.0).fit(own, train).scorer
    values, basis = torch.linalg.eigh(scorer.operator.dense())
    values = (values - 1.0).clamp_min(0)
    theta = own.theta()
    g, gq = (gradients(own, theta, *part) @ basis for part in (train, queries))

    def at(lam: float) -> dict[str, Any]:
        found = judged(-(gq / (values + lam)) @ g.mT / n, weights, truth)
        return {"lambda": lam, "lds": found["lds"], "slope": found["slope"]}

    mean = float(values.mean())
    classes = not isinstance(net.loss, uw.SquaredError)
    rules = {
        "label": LEARNED if classes else mean,
        "mean": mean,
        "tenth": mean / 10,
        "largest": float(values[-1]) / 100,
        "evidence": uw.Evidence().of(Eigen((None,), values), theta, n),
    }
    judgement = judged(by_layer.values, weights, truth)
    return {
        "n": n,
        "parameters": len(values),
        "ceiling": judgement["ceiling"],
        "grid": [at(lam) for lam in GRID],
        **{name: at(lam) for name, lam in rules.items()},
        "by layer": {"lds": judgement["lds"], "slope": judgement["slope"]},
    }


def gradients(task: uw.Task, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Of each example, `[n, p]`."""

    def loss(point: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return task.losses_of(*task.call(point, (x[None], target[None])))[0]

    found: Tensor = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(theta, X, y)
    return found


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "damping.json", metavar="FILE"
    )
    given = parser.parse_args()
    found = {}
    for net in networks(given.data):
        row = found[net.name] = measured(net)
        best = max(row["grid"], key=lambda at: at["lds"][0])
        print(f"{net.name}: n {row['n']}, p {row['parameters']}, ceiling {row['ceiling'][0]:.2f}")
        rules = {name: at for name, at in row.items() if isinstance(at, dict)}
        for name, at in {"best of the grid": best, **rules}.items():
            lam = f"{at['lambda']:.1e}" if "lambda" in at else ""
            lds, low, high = at["lds"]
            print(f"  {name:17} {lam:8} {lds:.3f} [{low:.2f}, {high:.2f}] slope {at['slope']:.2g}")
    given.out.write_text(json.dumps({"networks": found, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
