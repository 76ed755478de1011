"""Tasks whose scores are known by formula, to hold methods to.

    S[q, i] = −(1/n) ∇m_qᵀ H⁻¹ ∇ℓᵢ        H, ∇m and ∇ℓ written out by hand

    location    f = θ, ℓ = ½(θ − y)²                      S = (y − ȳ)/n
    ridge       f = Θx, ℓ = ½‖Θx − y‖², R = (λ/2)‖Θ‖²     H = I ⊗ (XᵀX/n + λI)
    logistic    ℓ = log(1 + eᶠ) − yf, R = (λ/2)‖θ‖²       H = Xᵀ diag(p(1 − p)) X/n + λI

Each is at its minimum, small, and in float64. Nothing here uses the package's gradients, curvature
or solvers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.task.losses import Bernoulli, SquaredError
from upweight.task.penalties import L2
from upweight.task.task import Task

NEWTON_STEPS = 30


@dataclass(frozen=True, eq=False)
class Problem:
    """A trained task.

    Args:
        name: What it is.
        task: The model at its minimum.
        train, queries: Data as a user would pass them; two queries or more.
    """

    name: str
    task: Task
    train: Any
    queries: Any


@dataclass(frozen=True, eq=False)
class ClosedForm(Problem):
    """A trained task with the exact derivatives of its first output.

    Args:
        name, task: See `Problem`.
        train, queries: `(X, y)`.
        output_scores: ∂f_q/∂wᵢ at w = 1, for the first output f of each query.
        removals: The exact change of f_q when example i is left out (wᵢ = 0), or None where it has
            no closed form.
    """

    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    output_scores: Float[Tensor, "q n"]
    removals: Float[Tensor, "q n"] | None


def first_output(outputs: Tensor, targets: Tensor) -> Float[Tensor, " q"]:
    """The measurement that `ClosedForm.output_scores` are of."""
    return outputs.reshape(len(outputs), -1)[:, 0]


def closed_forms() -> list[ClosedForm]:
    """All problems of this file."""
    return [location(), ridge(), logistic()]


class Constant(nn.Module):
    """f(θ, x) = θ for every x."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """θ for each row of x."""
        return self.value.expand(len(x), 1)


def location() -> ClosedForm:
    """The mean: H = 1, so an example moves it by its distance over n, or n − 1 when left out."""
    n, generator = 9, torch.Generator().manual_seed(0)
    y = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x, queries = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    distance = (y - y.mean()).T.expand(2, n)
    return ClosedForm(
        "location",
        Task(Constant(float(y.mean())), SquaredError()),
        (x, y),
        (queries, queries.clone()),
        distance / n,
        -distance / (n - 1),
    )


def ridge(n: int = 12, strength: float = 0.1) -> ClosedForm:
    """Two outputs by ridge regression; leaving one out by the leverages h of the hat matrix."""
    generator = torch.Generator().manual_seed(1)
    X, x = _normal(generator, n, 3), _normal(generator, 4, 3)
    Y, y = _normal(generator, n, 2), _normal(generator, 4, 2)
    H = X.T @ X / n + strength * torch.eye(3, dtype=torch.float64)
    theta = torch.linalg.solve(H, X.T @ Y / n).T
    residual = (X @ theta.T - Y)[:, 0]
    kernel = x @ torch.linalg.solve(H, X.T) / n
    leverage = (X * torch.linalg.solve(H, X.T).T).sum(dim=1) / n
    task = Task(_linear(theta), SquaredError(), L2(strength))
    removals = kernel * residual / (1 - leverage)
    return ClosedForm("ridge", task, (X, Y), (x, y), -kernel * residual, removals)


def logistic(n: int = 14, strength: float = 0.05) -> ClosedForm:
    """One logit, fitted by Newton's method written out; removals have no closed form."""
    generator = torch.Generator().manual_seed(2)
    X, x = _normal(generator, n, 3), _normal(generator, 4, 3)
    y = torch.arange(n, dtype=torch.float64)[:, None] % 2
    identity = torch.eye(3, dtype=torch.float64)
    theta = torch.zeros(3, 1, dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        p = (X @ theta).sigmoid()
        H = (X * p * (1 - p)).T @ X / n + strength * identity
        theta = theta - torch.linalg.solve(H, X.T @ (p - y) / n + strength * theta)
    task = Task(_linear(theta.T), Bernoulli(), L2(strength))
    kernel = x @ torch.linalg.solve(H, X.T) / n
    queries = (x, torch.ones(4, 1, dtype=torch.float64))
    return ClosedForm("logistic", task, (X, y), queries, -kernel * (p - y)[:, 0], None)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _linear(weight: Float[Tensor, "c i"]) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    linear.weight.data.copy_(weight)
    return linear
