"""Where does the model look, and which training images made it look there?

Real digits. A map says which pixels have to do with an output. A score says which training images
do. Both together: the map of a score, and the influence of training images on the mass of a map,
which fitting again without them confirms.
"""

import torch
from torch import nn

import upweight as uw
from upweight.applications import saliency

digits = uw.data.mnist_subset()
X = torch.tensor(digits.X[::10] / 255.0).reshape(-1, 14, 2, 14, 2).mean(dim=(2, 4)).flatten(1)
Q = torch.tensor(digits.X_test[:5] / 255.0).reshape(-1, 14, 2, 14, 2).mean(dim=(2, 4)).flatten(1)
train, queries = (X, torch.tensor(digits.y[::10])), (Q, torch.tensor(digits.y_test[:5]))

# A softmax regression at its minimum, and the exact influence of its training images.
task = uw.Task(nn.Linear(196, 10).double(), uw.CrossEntropy(), uw.L2(0.01))
newton = uw.training.Newton()
ones = torch.ones(1, len(X)).double()
task = task.moved_to(newton.prepare(task, task.training(train))(ones).theta[0])
fitted = uw.Influence(uw.Hessian()).fit(task, train)

# The test side: a map of the output. The training side: who moves the loss, and by which pixels.
one = (Q[:1], queries[1][:1])
print(saliency.output(task, one, "integrated-gradients").verdict)
strongest = int(fitted.attribute(one).values[0].abs().argmax())
for side in ("query", "train"):
    print(saliency.score(fitted, one, strongest, "integrated-gradients", side=side).verdict)

# Who makes the model look at the upper half? Leave groups out, and fit again without them.
upper = torch.zeros(14, 14, dtype=torch.bool)
upper[:7] = True
mass = saliency.Mass("integrated-gradients", upper.flatten())
groups = [((train[1] == k).nonzero()[:15, 0]).tolist() for k in range(10)]
weights = torch.ones(len(groups), len(X)).double()
for row, group in zip(weights, groups, strict=True):
    row[group] = 0
predicted = fitted.removal(queries, mass, groups, evaluate="plugin").values
actual = uw.training.retrain(newton, task, train, weights, queries, mass).change.T
rs = [
    float(torch.corrcoef(torch.stack(both))[0, 1]) for both in zip(predicted, actual, strict=True)
]
print(f"mass of the map in the upper half, predicted against refitted: r at least {min(rs):.3f}")
assert min(rs) > 0.95
