"""A network that reads digits: which training images made it right or wrong, and is it so?

A perceptron trained by SGD on the bundled MNIST digits, and EK-FAC influence on the test images it
finds hardest. For each of them the 20 images that lowered its loss most are removed, and the
network is trained again from three seeds; and so without 20 images drawn at random. The same seed
meets the same batches with and without the images: nothing but the images differs.
"""

import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw

QUERIES, TOGETHER, SEEDS, DECAY = 6, 20, 3, 1e-3

digits = uw.data.mnist_subset()
X, X_test = (torch.tensor(x).float().flatten(1) / 255 for x in (digits.X, digits.X_test))
y, y_test = torch.tensor(digits.y), torch.tensor(digits.y_test)


def train(w: torch.Tensor, seed: int = 0, epochs: int = 10, batch: int = 100) -> nn.Module:
    """Momentum SGD on (1/n) Σ wᵢ ℓᵢ + (λ/2)‖θ‖²; the seed draws the start and the batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=DECAY)
    decline = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, epochs * len(X) // batch)
    for _ in range(epochs):
        for i in torch.randperm(len(X)).split(batch):
            optimizer.zero_grad()
            (w[i] * F.cross_entropy(model(X[i]), y[i], reduction="none")).mean().backward()
            optimizer.step()
            decline.step()
    return model.eval()


def losses(model: nn.Module, on: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(X_test[on]), y_test[on], reduction="none")


everything = torch.ones(len(X))
model = train(everything)
hardest = losses(model, torch.arange(len(X_test))).argsort(descending=True)[:QUERIES]

task = uw.Task(model, loss=uw.CrossEntropy(), penalty=uw.L2(DECAY))
method = uw.Influence(curvature=uw.EKFAC(), damping=uw.Relative(0.1))
fitted = method.fit(task, (X, y))
scores = fitted.attribute((X_test[hardest], y_test[hardest]), measure=uw.Loss())
print(f"{len(X):,} images, {scores.provenance.p:,} parameters; {fitted.stationarity}")

before = torch.stack([losses(train(everything, seed), hardest) for seed in range(SEEDS)])


def change(removed: torch.Tensor) -> torch.Tensor:
    """Change of every query's loss without the images, [seed, query]."""
    w = everything.index_fill(0, removed, 0.0)
    return torch.stack([losses(train(w, seed), hardest) for seed in range(SEEDS)]) - before


by_chance = change(torch.randperm(len(X), generator=torch.Generator().manual_seed(0))[:TOGETHER])
predicted, actual = [], []
for q in range(QUERIES):
    lowered = scores.values[q].argsort()[:TOGETHER]
    predicted.append(float(scores.predict(drop=lowered.tolist())[q]))
    found = change(lowered)[:, q]
    actual.append(float(found.mean()))
    error, random = float(found.std()) / SEEDS**0.5, float(by_chance[:, q].mean())
    print(
        f"test image {digits.index_test[hardest[q]]:>4}, a {y_test[hardest[q]]}: predicted "
        f"{predicted[q]:+.2f}, retrained {actual[q]:+.2f} ± {error:.2f}, 20 at random {random:+.2f}"
    )
ratio = sum(actual) / sum(predicted)
print(
    f"{sum(a > 0 for a in actual)} of {QUERIES} losses rose as predicted, by {ratio:.2f} of the "
    f"prediction; without {TOGETHER} at random they changed by {float(by_chance.mean()):+.2f}"
)
assert sum(actual) / QUERIES > 5 * abs(float(by_chance.mean()))
