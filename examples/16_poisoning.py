"""Who taught the model a backdoor? From five misbehaving inputs to a model without it.

Bundled digits, of which 24 of 1 200 training images carry a bright corner and the label 0: the
model answers 0 wherever the corner is bright. Rows are ranked by what raises that answer; a fit
from the start without them, measured on images that chose nothing, says whether it was them.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw
from upweight.applications import poisoning
from upweight.testing.attacks import Patch, backdoor

X, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
X, y = (X / 16).float().reshape(-1, 8, 8), y.long()
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
X, y = X[order], y[order]
trigger = Patch(6, 6, 2, 2)
rows = (y[:1200] != 0).nonzero()[:24, 0].tolist()
attack = backdoor(X[:1200], y[:1200], rows, 0, trigger)
train, test = (attack.X, attack.y), (X[1200:], y[1200:])
triggered = (trigger(test[0]), test[1])


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


recipe = uw.Training(net, uw.SGD(0.1, momentum=0.9), epochs=20, batch=60)
task = uw.Task(net(), uw.CrossEntropy(), uw.L2(1e-4))
task = uw.Task(recipe.trained(task, train), uw.CrossEntropy(), uw.L2(1e-4))

# Five images on which the model misbehaves, and what they looked like without the corner.
other = (test[1] != 0).nonzero()[:5, 0]
seen = [(a[other], b[other]) for a, b in (triggered, test)]
fitted = uw.GradientCosine().fit(task, train)
found = poisoning.suspects(fitted, *seen, history=[net() for _ in range(3)])
print(found)
detected = found.against(attack.poisoned)  # which nobody knows outside of a study
print(detected)

left = torch.ones(len(test[0]), dtype=torch.bool)
left[other] = False
fresh = [(a[left], b[left]) for a, b in (triggered, test)]
cleansed = poisoning.cleanse(recipe, found, *fresh, counts=[6, 12, 24, 48])
print(cleansed)
print(cleansed.frame()[["method", "removed", "success", "accuracy"]].to_string(index=False))
print(f"\nAUROC {detected.auroc.value:.3f}; attack success {cleansed.before.success.value:.3f} → "
      f"{cleansed.chosen.success.value:.3f}")  # fmt: skip
