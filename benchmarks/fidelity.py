"""Does retraining confirm the scores? Each method on real tasks, against the same retrained models.

Three tasks: softmax regression and an MLP on the first 5 000 MNIST images, and an MLP on words of
the SpamAssassin mails. Of each, a hundred models are trained on random halves of the data, from
several seeds where training has one; they are kept in `benchmarks/.cache` as they finish, so that a
run that was stopped goes on. A method's scores of margins are held against them by the linear
datamodeling score (Spearman over subsets, mean over queries), beside the score of retraining itself
from further seeds, and by the slope of measured against predicted change.

The data are mnist.npz (X [60000, 28, 28] uint8, y, Xt, yt; from the original MNIST files) and
spamassassin.jsonl.gz (a JSON object with "text" and "spam" per line and mail).
"""

import argparse
import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import DATA, environment
from torch import Tensor, nn

import upweight as uw
from upweight.evaluation import Retrained, lds, retrain, slope, subset_weights
from upweight.scores import Scores

HERE = Path(__file__).resolve().parent
SUBSETS = 100
MEASURE = uw.Margin()  # losses of what a network is sure of are exactly 0 in float32
Arrays = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained task, its data, and how it was trained."""

    task: uw.Task
    train: Arrays
    queries: Arrays
    recipe: Any
    seeds: int
    """How often each subset is trained for the truth, and again for the ceiling; 1: no noise."""


def digits(folder: Path, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """5 000 training and 100 test images, pixels / 255."""
    read = np.load(folder / "mnist.npz")

    def part(images: str, labels: str, count: int) -> Arrays:
        X = torch.tensor(read[images][:count]).flatten(1).to(dtype) / 255
        return X, torch.tensor(read[labels][:count]).long()

    return part("X", "y", 5000), part("Xt", "yt", 100)


def mails(folder: Path) -> tuple[Arrays, Arrays]:
    """3 000 mails and 100 others, as log(1 + count) of the 1 000 most frequent words."""
    with gzip.open(folder / "spamassassin.jsonl.gz", "rt", encoding="utf-8") as lines:
        read = [json.loads(line) for line in lines]
    order = torch.randperm(len(read), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [read[k] for k in order[:3100]]
    counts = [Counter(re.findall(r"[a-z]{2,}", mail["text"].lower())) for mail in chosen]
    frequent = Counter(word for count in counts[:3000] for word in count)
    words = [word for word, _ in frequent.most_common(1000)]
    X = torch.tensor([[count[word] for word in words] for count in counts]).float().log1p()
    y = torch.tensor([int(mail["spam"]) for mail in chosen])
    return (X[:3000], y[:3000]), (X[3000:], y[3000:])


def softmax(folder: Path) -> Trained:
    """A strictly convex objective, at its minimum."""
    train, queries = digits(folder, torch.float64)
    untrained = uw.Task(nn.Linear(784, 10).double(), uw.CrossEntropy(), uw.L2(0.01))
    recipe = uw.Newton(tol=1e-8)
    trainer = recipe.prepare(untrained, uw.as_data(train))
    model = nn.Linear(784, 10).double()
    model.load_state_dict(untrained.layout.unflatten(trainer.center))
    return Trained(uw.Task(model, untrained.loss, untrained.penalty), train, queries, recipe, 1)


def network(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    """Two hidden layers."""

    def made() -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs)
        )

    return made


def of_network(train: Arrays, queries: Arrays, outputs: int) -> Trained:
    """Ten epochs of SGD with momentum, batches of 32."""
    init = network(train[0].shape[1], outputs)
    recipe = uw.Training(init, uw.SGD(0.05, momentum=0.9), 10, 32, uw.Cosine(), skip_absent=True)
    untrained = uw.Task(init(), uw.CrossEntropy())
    task = uw.Task(recipe.trained(untrained, train), uw.CrossEntropy())
    return Trained(task, train, queries, recipe, 2)


TASKS: Mapping[str, Callable[[Path], Trained]] = {
    "digits-softmax": softmax,
    "digits-mlp": lambda folder: of_network(*digits(folder, torch.float32), 10),
    "spam-mlp": lambda folder: of_network(*mails(folder), 2),
}

RELATIVE = uw.Relative(0.1)
METHODS: Mapping[str, Mapping[str, uw.Influence]] = {
    "digits-softmax": {
        "Hessian": uw.Influence(uw.Hessian(), solver=uw.Cholesky()),
        "EK-FAC": uw.Influence(uw.EKFAC(), damping=uw.Absolute(1e-6)),
        "K-FAC": uw.Influence(uw.KFAC(), damping=uw.Absolute(1e-6)),
        "diagonal": uw.Influence(uw.Diagonal(), damping=uw.Absolute(1e-6)),
    }
}
NETWORK_METHODS: Mapping[str, uw.Influence] = {
    "GGN, CG": uw.Influence(uw.GGN(), damping=RELATIVE, solver=uw.BlockCG(rtol=1e-3)),
    "EK-FAC": uw.Influence(uw.EKFAC(), damping=RELATIVE),
    "EK-FAC, λ = 0.01": uw.Influence(uw.EKFAC(), damping=uw.Absolute(0.01)),
    "K-FAC": uw.Influence(uw.KFAC(), damping=RELATIVE),
    "diagonal": uw.Influence(uw.Diagonal(), damping=RELATIVE),
}


def truth(made: Trained, cache: Path) -> tuple[Tensor, list[Retrained], list[Retrained] | None]:
    """The subsets, and the models trained on them: as many seeds again for the ceiling."""
    weights = subset_weights(len(made.train[0]), SUBSETS, renormalize=True)

    def seed(k: int) -> Retrained:
        recipe = made.recipe if made.seeds == 1 else replace(made.recipe, seed=k)
        folder = cache / f"seed-{k}"
        return retrain(recipe, made.task, made.train, weights, made.queries, MEASURE, cache=folder)

    first = [seed(k) for k in range(made.seeds)]
    again = None if made.seeds == 1 else [seed(made.seeds + k) for k in range(made.seeds)]
    return weights, first, again


def epoch_seconds(made: Trained) -> float:
    """A plain forward and backward pass over the training data."""
    X, y = made.train
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for start in range(0, len(X), 512):
            f = made.task.model(X[start : start + 512])
            nn.functional.cross_entropy(f, y[start : start + 512]).backward()
        best = min(best, time.perf_counter() - started)
    for p in made.task.model.parameters():
        p.grad = None
    return best


def judged(method: uw.Influence, made: Trained, held: tuple[Any, ...], epoch: float) -> dict:
    """One row of the table."""
    weights, first, again = held
    started = time.perf_counter()
    scores: Scores = method.fit(made.task, made.train).attribute(made.queries, MEASURE)
    seconds = time.perf_counter() - started
    found = lds(scores, weights, first, again)
    predicted, measured = (x - x.mean(dim=0) for x in (found.predicted, found.measured))
    about = slope(predicted, measured)
    return {
        "method": repr(method),
        **found.summary(),
        "slope": [about.value, about.low, about.high],
        "seconds": seconds,
        "epochs": seconds / epoch,
    }


def main() -> None:
    """All tasks, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DATA, metavar="DIR", help="default: ../shared/data")
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME")
    add("--cache", type=Path, default=HERE / ".cache", metavar="DIR")
    add("--out", type=Path, default=HERE / "results" / "fidelity.json", metavar="FILE")
    given = parser.parse_args()
    report = json.loads(given.out.read_text()) if given.out.exists() else {"tasks": {}}
    for name in given.task:
        made = TASKS[name](given.data)
        X, y = made.queries
        with torch.no_grad():
            right = float((made.task.model(X).argmax(dim=1) == y).float().mean())
        started = time.perf_counter()
        held = truth(made, given.cache / f"fidelity-{name}")
        spent, epoch = time.perf_counter() - started, epoch_seconds(made)
        rows = {}
        print(f"\n{name}: {len(made.train[0])} examples, {made.task.layout.size} parameters, "
              f"{right:.0%} of the queries right")  # fmt: skip
        for label, method in METHODS.get(name, NETWORK_METHODS).items():
            row = rows[label] = judged(method, made, held, epoch)
            low, high = row["intervals"]["spearman"]
            ceiling = "none" if row["ceiling"] is None else f"{row['ceiling']:.3f}"
            print(f"  {label:18} LDS {row['spearman']:.3f} [{low:.3f}, {high:.3f}] ceiling "
                  f"{ceiling}  slope {row['slope'][0]:.2f}  {row['seconds']:.1f} s = "
                  f"{row['epochs']:.0f} epochs")  # fmt: skip
        report["tasks"][name] = {
            "environment": environment(),
            "recipe": repr(made.recipe),
            "accuracy": right,
            "retraining_seconds": spent,
            "epoch_seconds": epoch,
            "methods": rows,
        }
        given.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
