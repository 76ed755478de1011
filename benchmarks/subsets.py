"""How fast do a hundred models of random halves of the data train, together and one by one?

The MLP 784-64-32-10 on the first 5 000 MNIST images, a hundred random halves of them: by
`upweight.training.Training`, which stacks models, and a hundred times by two loops: one as
PyTorch's tutorials write it, with a `DataLoader` over a `Subset`, and one that slices tensors in
memory, which no loop of one model beats by much. The latter trains on the same halves from the same
initialization in the same order; all accuracies are shown, and how far apart its measurements are
from ours.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import DATA, environment
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import upweight as uw
from upweight.task.data import as_data
from upweight.training import subset_weights

HERE = Path(__file__).resolve().parent
LR, MOMENTUM = 0.1, 0.9


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="the folder of mnist.npz, with X [60000, 28, 28] uint8, y, Xt and yt (default: "
        "../shared/data from the repository's root)",
    )
    add("--models", type=int, default=100, help="random halves (default: 100)")
    add("--hidden", type=int, nargs=2, default=(64, 32), help="widths (default: 64 32)")
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=32)
    add("--out", type=Path, metavar="FILE", help="the result file (default: "
        "benchmarks/results/subsets.json for a run with all defaults, else none)")  # fmt: skip
    given = parser.parse_args()
    if given.out is None and all(
        getattr(given, a.dest) == a.default for a in parser._actions if a.dest in SIZES
    ):
        given.out = HERE / "results" / "subsets.json"
    return given


SIZES = ("models", "hidden", "epochs", "batch")


def network(hidden: tuple[int, int]) -> nn.Module:
    """784-a-b-10."""
    a, b = hidden
    return nn.Sequential(nn.Linear(784, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))


def plain(
    given: argparse.Namespace, X: torch.Tensor, y: torch.Tensor, w: torch.Tensor
) -> nn.Module:
    """A training loop as users write it, over tensors in memory."""
    torch.manual_seed(0)
    model = network(given.hidden)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    kept = w != 0
    for epoch in range(given.epochs):
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(epoch))
        for index in order[kept[order]].split(given.batch):
            loss = nn.functional.cross_entropy(model(X[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def tutorial(
    given: argparse.Namespace, X: torch.Tensor, y: torch.Tensor, w: torch.Tensor
) -> nn.Module:
    """The same as PyTorch's tutorials write it; the order of the examples is its own."""
    torch.manual_seed(0)
    model = network(given.hidden)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    half = Subset(TensorDataset(X, y), w.nonzero()[:, 0].tolist())
    loader = DataLoader(half, batch_size=given.batch, shuffle=True)
    for _ in range(given.epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model


def measured(models: list[nn.Module], Xt: torch.Tensor, yt: torch.Tensor) -> torch.Tensor:
    """Losses of the test images, a row per model."""
    with torch.no_grad():
        return torch.stack(
            [nn.functional.cross_entropy(m(Xt), yt, reduction="none") for m in models]
        )


def accuracy(models: list[nn.Module], Xt: torch.Tensor, yt: torch.Tensor) -> float:
    """Mean over models."""
    with torch.no_grad():
        right = [(m(Xt).argmax(dim=1) == yt).float().mean() for m in models]
    return float(torch.stack(right).mean())


def main() -> None:
    """Both ways, one after the other, in one process."""
    given = arguments()
    read = np.load(given.data / "mnist.npz")

    def tensors(images: str, labels: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        X = torch.tensor(read[images][:count]).flatten(1).float() / 255
        return X, torch.tensor(read[labels][:count]).long()

    (X, y), (Xt, yt) = tensors("X", "y", 5000), tensors("Xt", "yt", 2000)
    weights = subset_weights(len(X), given.models, renormalize=True)
    task = uw.Task(network(given.hidden).eval(), uw.CrossEntropy())
    recipe = uw.Training(
        lambda: network(given.hidden), uw.SGD(LR, momentum=MOMENTUM), given.epochs, given.batch,
        skip_absent=True,
    )  # fmt: skip
    for loop in (plain, tutorial):  # PyTorch loads parts of itself on first use
        loop(given, X, y, weights[0])
    started = time.perf_counter()
    trainer = recipe.prepare(task, as_data((X, y)))
    theta = trainer(weights).theta
    ours_seconds = time.perf_counter() - started
    started = time.perf_counter()
    theirs = [plain(given, X, y, row) for row in weights]
    theirs_seconds = time.perf_counter() - started
    started = time.perf_counter()
    usual = [tutorial(given, X, y, row) for row in weights]
    usual_seconds = time.perf_counter() - started
    ours = []
    for row in theta:
        model = network(given.hidden)
        model.load_state_dict(task.layout.unflatten(row))
        ours.append(model)
    a, b = measured(ours, Xt, yt), measured(theirs, Xt, yt)
    centered = [(x - x.mean(dim=0)).flatten() for x in (a, b)]
    report: dict[str, Any] = {
        "environment": environment(),
        "models": given.models,
        "network": [784, *given.hidden, 10],
        "epochs": given.epochs,
        "batch": given.batch,
        "at_once": trainer.at_once,
        "ours": {"seconds": ours_seconds, "accuracy": accuracy(ours, Xt, yt)},
        "plain": {"seconds": theirs_seconds, "accuracy": accuracy(theirs, Xt, yt)},
        "tutorial": {"seconds": usual_seconds, "accuracy": accuracy(usual, Xt, yt)},
        "ratio_to_plain": theirs_seconds / ours_seconds,
        "ratio_to_tutorial": usual_seconds / ours_seconds,
        "pearson_of_losses_about_their_mean": float(torch.corrcoef(torch.stack(centered))[0, 1]),
    }
    print(json.dumps({k: v for k, v in report.items() if k != "environment"}, indent=2))
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
