"""Which digits does a network know by heart, and does it need them?

One model says which (by EK-FAC); a hundred small networks, trained on random 70 % of the bundled
digits, say it again, with what another hundred would agree with. Then the network is trained
without the most memorized tenth, and without other tenths.
"""

import torch
from torch import nn

import upweight as uw
from upweight.applications import memorization


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))


digits = uw.data.mnist_subset()
X, y = torch.tensor(digits.X[::4]).float() / 255, torch.tensor(digits.y[::4])
X_test, y_test = torch.tensor(digits.X_test).float() / 255, torch.tensor(digits.y_test)
train, test = (X, y), (X_test, y_test)

recipe = uw.Training(network, uw.SGD(0.1, momentum=0.9), epochs=12, batch=50, skip_absent=True)
model = recipe.trained(uw.Task(network(), uw.CrossEntropy()), train)
task = uw.Task(model, uw.CrossEntropy())

fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
one = memorization.scores(fitted)
print(one)

many = memorization.by_subsets(recipe, task, train, test, models=100, measure="probability")
both = many.beside(one)
print(both)
print(both.frame().head(8).round(2))

needed = memorization.removal_experiment(recipe, task, train, test, order=one, draws=20)
print(needed)

rho, ceiling = both.agreement, both.ceiling
assert rho is not None and ceiling is not None
print(f"one model against 100: rank correlation {rho.value:.2f} (another 100: {ceiling.value:.2f})")
assert rho.low > 0.4
