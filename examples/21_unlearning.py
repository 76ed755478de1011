"""Unlearn 25 patients from a model, with a certificate, and hold it against fitting again.

Real data: breast cancer, 569 patients. A request to be forgotten could be met by fitting again each
time. A Newton step per request is cheaper, and a model trained with noise in its objective comes
with a guarantee (Guo et al. 2020): up to (ε, δ) it cannot be distinguished from one that never saw
them.
"""

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from torch import nn

import upweight as uw
from upweight.applications import unlearning

X, y = load_breast_cancer(return_X_y=True)
X = (X - X.mean(axis=0)) / X.std(axis=0)
X /= np.linalg.norm(X, axis=1, keepdims=True)
gone = list(range(0, 250, 10))

# A model as it is: what a few Newton steps do, and what scikit-learn does without these patients.
estimator = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(X, y)
for steps in (1, 5):
    unlearned = unlearning.without(estimator, gone, (X, y), steps=steps)
    print(unlearned.verdict)
before, after, refit = unlearned.change.forgotten
print(f"their mean loss: {before:.4f} before, {after:.4f} after, {refit:.4f} refitted\n")

# A model that was trained to be unlearned from.
train = torch.tensor(X), torch.tensor(y).double()[:, None]
task = uw.Task(nn.Linear(30, 1).double(), uw.Bernoulli(), uw.L2(0.03))
certified = unlearning.Certificate(epsilon=1.0, delta=1e-4, sigma=5.0).train(task, train, seed=0)
for patient in gone:
    certified = certified.remove(patient)
certified = certified.confirm()
print(certified)
right = ((certified.model(train[0]) > 0) == train[1]).double().mean()
print(f"accuracy {float(right):.3f} with the noise, {estimator.score(X, y):.3f} without any")
print(
    f"\n{len(gone)} removals: {certified.spent:.3f} of {certified.budget:.3f} spent, "
    f"{100 * certified.distance / certified.moved:.2f} % of the distance moved from a refit"
)
assert certified.distance < 0.01 * certified.moved
