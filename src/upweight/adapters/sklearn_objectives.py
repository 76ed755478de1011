"""What each scikit-learn estimator minimizes.

    J(θ) = (1/n) Σᵢ vᵢ ℓ(W xᵢ + b, yᵢ) + R(W, b)        vᵢ = sample weight × class weight

Every estimator here is one linear map; its own objective is divided by whatever brings the losses
to 1/n, which moves that factor into R:

    C Σ vᵢ ℓᵢ + ½‖W‖²                (LogisticRegression, LinearSVC)   L2(1/(nC))
    Σ vᵢ rᵢ² + α‖W‖²                 (Ridge, RidgeClassifier)          L2(α/n), ℓ = ½r²
    (1/n) Σ vᵢ ℓᵢ + (α/2)‖W‖²        (SGD)                             L2(α)
    (1/Σv) Σ vᵢ ℓᵢ + (α/2)‖W‖²       (PoissonRegressor)                L2(α Σv/n)
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.pipeline import Pipeline
from torch import Tensor

from upweight._typing import Params
from upweight.task.losses import Loss, SmoothHinge
from upweight.task.params import Layout
from upweight.task.penalties import L2, NoPenalty, Penalty, SumToZero


class Encoding(enum.Enum):
    """How labels become targets."""

    INDEX = "class indices [n]"
    ZERO_ONE = "0 or 1 for each output [n, c]"
    SIGN = "−1 or +1 for each output [n, c]"
    REAL = "numbers [n, c]"


@dataclass(frozen=True)
class Objective:
    """J of one fitted estimator, but for the data.

    Args:
        loss: ℓ.
        encoding: How its targets are written.
        strength: (n, Σv) ↦ the strength of the penalty on W, by the estimator's own convention.
        bias: Strength of the penalty on b relative to that on W; 0 where b is free.
        softmax: Whether adding a constant to all outputs changes nothing.
    """

    loss: Loss
    encoding: Encoding
    strength: Callable[[int, float], float]
    bias: float = 0.0
    softmax: bool = False

    def penalty(self, n: int, total: float, has_bias: bool) -> Penalty:
        """R for n examples of total weight Σv."""
        strength = self.strength(n, total)
        penalty: Penalty = NoPenalty()
        if strength > 0 and has_bias and self.bias != 1.0:
            penalty = L2(strength, exclude=("*bias",))
            if self.bias > 0:
                penalty = penalty + L2(strength * self.bias, exclude=("*weight",))
        elif strength > 0:
            penalty = L2(strength)
        pins: list[Penalty] = []
        if self.softmax and has_bias:
            pins.append(SumToZero("*bias"))
        if self.softmax and strength == 0:
            pins.append(ColumnsSumToZero())
        for pin in pins:
            penalty = pin if isinstance(penalty, NoPenalty) else penalty + pin
        return penalty


@dataclass(frozen=True)
class SquaredHinge(Loss):
    """ℓ = Σ max(0, 1 − y f)², y ∈ {−1, +1}: once differentiable.

    Its second derivative is 2 where y f < 1 and 0 beyond; at y f = 1 it jumps. The Hessian is exact
    as long as no example lies on its margin, and the first order holds until one crosses it.
    """

    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        SmoothHinge().check(outputs, targets)  # the same targets

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return (1 - targets * outputs).relu().square().flatten(1).sum(dim=1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return -2 * (targets * (1 - targets * outputs).relu()).flatten(1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        inside = (targets * outputs < 1).to(outputs.dtype)
        return torch.diag_embed(2 * inside.flatten(1))

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return (targets * outputs).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class ColumnsSumToZero(Penalty):
    """R = (1/2c) Σⱼ (Σ_c W_cj)²: pins the shifts that an unpenalized softmax does not feel."""

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        weight = params["weight"]
        return 0.5 * weight.sum(dim=0).square().sum() / len(weight)


def has_steps(estimator: Any) -> bool:
    """Whether it is a Pipeline with steps before the last."""
    return isinstance(estimator, Pipeline) and len(estimator.steps) > 1


def final_step(estimator: Any) -> Any:
    """The estimator, or the last step of a Pipeline."""
    return estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator


def coefficients(
    final: Any, objective: Objective
) -> tuple[Float[Tensor, "c i"], Float[Tensor, " c"] | None]:
    """coef_ and intercept_ as W and b in float64; no b where no intercept was fitted.

    Of a softmax, whatever J does not feel is taken out: b sums to zero, and so does each column of
    W where it is not penalized. Outputs change by a constant, probabilities and losses not at all.
    """
    weight = torch.from_numpy(np.array(np.atleast_2d(final.coef_), dtype=np.float64))
    if objective.softmax and objective.strength(1, 1.0) == 0:
        weight = weight - weight.mean(dim=0)
    if not final.fit_intercept:
        return weight, None
    full = np.broadcast_to(np.asarray(final.intercept_, dtype=np.float64), (len(weight),))
    bias = torch.from_numpy(full.copy())
    return weight, bias - bias.mean() if objective.softmax else bias
