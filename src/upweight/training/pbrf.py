"""PBRF: what influence functions estimate of a network that is neither convex nor converged.

    Q(θ, w) = (1/n) Σᵢ D_i(θ) + (1/n) Σᵢ (wᵢ − 1) ℓᵢ(θ) + (λ/2) ‖θ − θ̂‖²

    D_i(θ) = ℓ(f, yᵢ) − ℓ(f̂, yᵢ) − ⟨∇_f ℓ(f̂, yᵢ), f − f̂⟩          f = f(θ, xᵢ), f̂ = f(θ̂, xᵢ)

The proximal Bregman objective of Bae, Ng, Lo, Ghassemi & Grosse (2022), "If influence functions
are the answer, then what is the question?", §4, for any data weights w (theirs is the removal of
one example, wᵢ = 0). θ̂ minimizes Q(·, 1) wherever the loss is convex in the outputs: no gradient is
left over that says something other than the weights. To first order in w − 1

    dθ/dwᵢ = −(1/n) (G + λI)⁻¹ ∇ℓᵢ(θ̂)          G: the generalized Gauss-Newton matrix

which is `Influence(curvature=GGN(), damping=Absolute(λ))`. A penalty R enters by its own
divergence, R(θ) − R(θ̂) − ⟨∇R(θ̂), θ − θ̂⟩, as its curvature enters there.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.errors import SpecError
from upweight.task.data import Data
from upweight.task.params import Layout
from upweight.task.penalties import Penalty
from upweight.task.task import Task
from upweight.training.optimizers import SGD, Optimizer
from upweight.training.schedules import Cosine, Schedule
from upweight.training.trainer import Terms, TrainingTrainer, trainer_for
from upweight.training.training import Training


@dataclass(frozen=True)
class PBRF:
    """The response of a trained network to data weights near θ̂: argmin_θ Q(θ, w).

    Args:
        damping: λ of the proximity; the λ of the influence it is compared with.
        optimizer, epochs, batch, schedule, seed: How Q is minimized, from θ̂; as for `Training`.

    Raises:
        SpecError: λ is not positive.

    Exact when: Q is minimized. Where f is linear in θ and ℓ is quadratic in f, the response to
    small weights is then that of `Influence(curvature=GGN(), damping=Absolute(λ))`.
    Cost: `epochs` passes of two forward and one backward over the data per model.
    """

    damping: float
    optimizer: Optimizer = field(default_factory=lambda: SGD(lr=0.1, momentum=0.9))
    epochs: int = 20
    batch: int = 64
    schedule: Schedule = field(default_factory=Cosine)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise SpecError(
                "PBRF needs a damping λ > 0.",
                f"damping={self.damping!r}.",
                "an undamped influence: without a proximity the objective may have no minimum.",
                "use the damping of the scores it is compared with.",
            )
        self._training  # noqa: B018  it checks the other numbers

    @property
    def _training(self) -> Training:
        return Training(
            None, self.optimizer, self.epochs, self.batch, self.schedule, self.seed,
            proximity=self.damping,
        )  # fmt: skip

    def prepare(self, task: Task, train: Data) -> TrainingTrainer:
        """Start at θ̂.

        Raises:
            UnsupportedModel: A layer keeps statistics of its batches while training.
        """
        theta = task.theta()
        penalty = _PenaltyDivergence(task.penalty, task.penalty.gradient(theta, task.layout))
        start = Task(task.model, task.loss, penalty, task.params, task.forward)
        return trainer_for(self._training, start, train, theta, _Divergence(theta))


@dataclass(frozen=True, eq=False)
class _Divergence(Terms):
    """D_i + (wᵢ − 1) ℓᵢ."""

    center: Float[Tensor, " p"]

    def __call__(
        self, task: Task, params: Params, batch: Batch, weights: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        f, targets = task.outputs(params, batch)
        with torch.no_grad():
            f0, _ = task.outputs(self.center, batch)
        losses = task.losses_of(f, targets)
        slope = torch.func.grad(lambda x: task.loss(x, targets).sum())(f0)
        linear = (slope * (f - f0)).reshape(len(f), -1).sum(dim=1)
        divergence = losses - task.losses_of(f0, targets) - linear
        return divergence + (weights - 1) * losses


@dataclass(frozen=True, eq=False)
class _PenaltyDivergence(Penalty):
    """R(θ) − ⟨∇R(θ̂), θ⟩: the divergence of R from θ̂, up to a constant."""

    penalty: Penalty
    slope: Float[Tensor, " p"]

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        return self.penalty(params, layout) - layout.flatten(params) @ self.slope
