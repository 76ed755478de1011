"""Draw two figures of the field: removals against their prediction, and the long tail.

python scripts/draw_figures.py

The first is figure 2 (left) of Koh & Liang (2017): softmax regression on digits, one test image,
the training images that matter most, each left out and the model trained again. The second is the
long tail of Feldman (2020), of one model, with rows that were left out and trained again on it.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from torch import nn

import upweight as uw
from upweight.applications import memorization
from upweight.cli.demo import MODELS
from upweight.evaluation import leave_one_out

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
REMOVALS = 60


def removals() -> None:
    """Changes of one test image's loss: predicted by the score and by a Newton step; measured."""
    digits, subject = uw.data.mnist_subset(), MODELS["softmax"]
    X, y = torch.tensor(digits.X).double() / 255, torch.tensor(digits.y)
    Xq, yq = torch.tensor(digits.X_test).double() / 255, torch.tensor(digits.y_test)
    task = subject.trained((X, y))
    fitted = subject.method.fit(task, (X, y))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(task.model(Xq), yq, reduction="none")
    worst = int(losses.argmax())
    query = (Xq[worst : worst + 1], yq[worst : worst + 1])
    scores = fitted.attribute(query)
    chosen = scores.values[0].abs().argsort(descending=True)[:REMOVALS].tolist()
    actual = leave_one_out(subject.recipe, task, (X, y), chosen, query).change[:, 0]
    steps = fitted.removal(query).values[0, chosen]
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.4), sharey=True)
    for ax, predicted, name in (
        (axes[0], -scores.values[0, chosen], "the score: first order"),
        (axes[1], steps, "fitted.removal: a Newton step"),
    ):
        ends = [float(actual.min()), float(actual.max())]
        ax.plot(ends, ends, color="0.7", lw=1)
        ax.scatter(predicted, actual, s=14)
        r = float(torch.corrcoef(torch.stack([predicted, actual]))[0, 1])
        ax.set_title(f"{name}, r = {r:.4f}", fontsize=10)
        ax.set_xlabel("predicted change of the loss")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("trained again without it")
    figure.tight_layout()
    figure.savefig(IMAGES / "removals.png", dpi=110)


def long_tail() -> None:
    """Memorization by one model, sorted; 60 rows left out and trained again."""
    digits = uw.data.mnist_subset()
    X, y = torch.tensor(digits.X[::5]).double().flatten(1) / 255, torch.tensor(digits.y[::5])
    recipe = uw.training.Newton()
    model = nn.Linear(X.shape[1], 10).double()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-3))
    weights = task.theta().new_ones(1, len(X))
    task = task.moved_to(recipe.prepare(task, task.training((X, y)))(weights).theta[0])
    fitted = uw.Influence().fit(task, (X, y))
    found = memorization.scores(fitted, confirm=60, recipe=recipe)
    print(found)
    figure, ax = plt.subplots(figsize=(7.4, 3.4))
    found.plot(ax)
    ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGES / "long-tail.png", dpi=110)


if __name__ == "__main__":
    removals()
    long_tail()
