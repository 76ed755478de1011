"""Find wrong labels: examples that the model could only learn by heart.

Real digits, of which we give one in twelve a wrong label, so that the truth is known. An example's
self-influence S[i, i] = ∂ℓᵢ/∂wᵢ says how much its own weight lowers its own loss; wrong labels have
the most negative ones.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw

X, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
X = X / 16.0
generator = torch.Generator().manual_seed(0)
flipped = torch.randperm(len(y), generator=generator)[: len(y) // 12]
labels = y.clone()
labels[flipped] = (y[flipped] + torch.randint(1, 10, flipped.shape, generator=generator)) % 10

model = nn.Linear(64, 10).double()
penalty = 0.01
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")


def closure() -> torch.Tensor:
    optimizer.zero_grad()
    squares = sum((p**2).sum() for p in model.parameters())
    loss = nn.functional.cross_entropy(model(X), labels) + 0.5 * penalty * squares
    loss.backward()
    return loss


optimizer.step(closure)

task = uw.Task(model.eval(), loss=uw.CrossEntropy(), penalty=uw.L2(penalty))
fitted = uw.Influence().fit(task, (X, labels))
suspicion = -fitted.self_influence()

ranked = suspicion.argsort(descending=True)[: len(flipped)]
found = len(set(ranked.tolist()) & set(flipped.tolist()))
print(f"{len(flipped)} of {len(y)} labels are wrong; gradient norm {fitted.stationarity}")
print(
    f"of the {len(flipped)} most suspicious, {found} are wrong: recall {found / len(flipped):.2f} "
    f"(chance {len(flipped) / len(y):.2f})"
)
assert found / len(flipped) > 0.8
