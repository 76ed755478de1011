"""Which unlabelled digits to have labelled next, where half of the digits are rare?

A pool of the bundled images in which digits 0-4 are thinned to a twentieth, 30 labels to start
with, and 200 labelled images of all digits alike that guide. First the order of one model, then the
labels are bought, every model is fitted again, and each way of choosing is tested at the same cost.
"""

import torch
from torch import nn

import upweight as uw
from upweight.applications import acquisition

digits = uw.data.mnist_subset()
X = torch.tensor(digits.X).double().flatten(1) / 255
y = torch.tensor(digits.y)
X_rest, y_rest = torch.tensor(digits.X_test).double().flatten(1) / 255, torch.tensor(digits.y_test)

draw = torch.Generator().manual_seed(0)
kept = (y >= 5) | (torch.rand(len(y), generator=draw) < 0.05)
X, y = X[kept], y[kept]
mean, axes = X.mean(dim=0), torch.linalg.eigh(torch.cov(X.T)).eigenvectors[:, -20:]
X, X_rest = (X - mean) @ axes, (X_rest - mean) @ axes

order = torch.randperm(len(X), generator=draw)
X, y = X[order], y[order]
labelled, pool, oracle = (X[:30], y[:30]), X[30:], y[30:]
mixed = torch.randperm(len(X_rest), generator=draw)
guides, test = mixed[:200], mixed[200:]
validation, test_data = (X_rest[guides], y_rest[guides]), (X_rest[test], y_rest[test])

recipe = uw.training.Newton(tol=1e-6)
task = uw.Task(nn.Linear(20, 10).double(), uw.CrossEntropy(), uw.L2(0.01))

start = task.moved_to(recipe.prepare(task, task.training(labelled)).center)
fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(start, labelled)
first = acquisition.rank(fitted, pool, validation, batch=20)
print(first)
rare = float((oracle[first.chosen] < 5).double().mean())
print(
    f"rare digits: {rare:.0%} of the choice, {float((oracle < 5).double().mean()):.0%} of the pool"
)

found = acquisition.curve(
    recipe, task, labelled, pool, oracle, validation, test_data, batch=20, rounds=4, repeats=2
)  # fmt: skip
print(found)
table = found.frame().pivot(index="labels", columns="strategy", values="accuracy")
print(table.round(3).to_string())

gain = found.difference("expected gain", "random")
print(f"expected gain against random after 80 labels: {100 * gain.value:+.1f} points of accuracy")
assert gain.value > 0.03
