"""The demo's networks, and the recipe that trains them: momentum SGD from a seed.

    v ← μ v + (1/|B|) Σ_{i∈B} wᵢ ∇ℓᵢ + λθ        θ ← θ − η v        η falls linearly to zero

The seed draws the initial parameters and the order of the batches. The same seed with other weights
meets the same batches: what differs between two such models is the weights. SGD with a fixed number
of steps stops near a minimum, not at one, and another seed gives another network; retraining from
several seeds shows how much of a change is that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from upweight.task.data import Data
from upweight.task.recipe import Trained
from upweight.task.task import Task


def mlp() -> nn.Module:
    """784-128-64-10 with ReLU: 109 386 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def cnn() -> nn.Module:
    """Two convolutions of stride 2 and two linear layers: 26 826 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "mlp": (mlp, "A perceptron with two hidden layers", 0.1),
    "cnn": (cnn, "A small convolutional network", 0.03),
}
"""How to make each, what it is called, and its step size η.

At 0.1 the convolutional network learns more, but 20 images at random then move its hardest losses
by 3.6, root mean square, which hides what any other 20 do; at 0.03 by 0.7, as the perceptron's.
"""


@dataclass(frozen=True)
class NetworkRecipe:
    """Train a network of the demo on images and classes.

    Args:
        network: "mlp" or "cnn".
        seed: Of the initial parameters and of the order of batches.
        epochs, batch, momentum: As in the formula above.
        decay: λ of the penalty (λ/2)‖θ‖².
    """

    network: str
    seed: int = 0
    epochs: int = 10
    batch: int = 100
    momentum: float = 0.9
    decay: float = 1e-3

    def prepare(self, task: Task, train: Data) -> "NetworkTrainer":
        """The data as two tensors; nothing else is needed twice."""
        batch: Any = train.batch(0, len(train))
        return NetworkTrainer(self, task, batch[0], batch[1])

    def trained(self, X: Tensor, y: Tensor, w: Tensor | None = None) -> nn.Module:
        """One network, by data weights w (default: all one)."""
        w = X.new_ones(len(X)) if w is None else w.to(X)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = NETWORKS[self.network][0]().to(X.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.SGD(
            model.parameters(), NETWORKS[self.network][2], self.momentum, weight_decay=self.decay
        )
        steps = self.epochs * -(-len(X) // self.batch)
        fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(self.epochs):
            order = torch.randperm(len(X), generator=generator)
            for batch in order.split(self.batch):  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
                losses = F.cross_entropy(model(X[batch]), y[batch], reduction="none")
                (losses * w[batch]).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                fall.step()
        return model.eval()


@dataclass(frozen=True, eq=False)
class NetworkTrainer:
    """w ↦ θ(w) on the images X and classes y."""

    recipe: NetworkRecipe
    task: Task
    X: Tensor
    y: Tensor

    @property
    def at_once(self) -> int:
        """One network after the other."""
        return 1

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """See `Trainer`."""
        models = [self.recipe.trained(self.X, self.y, w) for w in weights]
        norms = [self._gradient_norm(m, w) for m, w in zip(models, weights, strict=True)]
        rows = [self.task.layout.flatten(dict(m.named_parameters())).detach() for m in models]
        return Trained(torch.stack(rows), torch.tensor(norms))

    def _gradient_norm(self, model: nn.Module, w: Tensor) -> float:
        """‖∇J(θ, w)‖."""
        losses = F.cross_entropy(model(self.X), self.y, reduction="none")
        squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        objective = (losses * w.to(losses)).mean() + self.recipe.decay / 2 * squares
        gradients = torch.autograd.grad(objective, list(model.parameters()))
        return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
