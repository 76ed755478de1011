"""What is a step of training, and what does it start from?

    step t:    B_t ⊂ {1 … n},  w_i of i ∈ B_t,  η_t,  a seed        known before training begins
    state t:   θ_t and what the optimizer remembers

What is drawn in a step, such as dropout, is drawn from the seed of that step: whoever has state t
can go on from there, to the same bits.
"""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from upweight.runtime.fingerprint import digest
from upweight.training.optimizers import OptimizerState


@dataclass(frozen=True, eq=False)
class Step:
    """What step t of a training run does, whatever θ_t is.

    Args:
        number: t, from 0.
        lr: η_t.
        indices: B_t, as places in the training data: of one model, or of all, or of each.
        weights: w_i of the batch.
        share: What multiplies the mean over the batch: the share of the data that is present.
        seed: Of what is drawn in this step.
        factors: What each loss is multiplied with besides, of a run that was recorded: of clipped
            gradients min(1, c/‖g‖), of a mean over tokens |B|/(their number). None: 1.
    """

    number: int
    lr: float
    indices: Int[Tensor, "*s b"]
    weights: Float[Tensor, "*s b"]
    share: float
    seed: int
    factors: Float[Tensor, " b"] | None = None


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where training stands before a step: all that the rest of the run depends on."""

    theta: Float[Tensor, "*s p"]
    optimizer: OptimizerState = field(default_factory=OptimizerState)

    @property
    def step(self) -> int:
        """t: how many steps were taken."""
        return self.optimizer.steps

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """θ_t and the optimizer's memories."""
        return (self.theta, *self.optimizer.memories.values())

    def by_model(self) -> "list[TrainingState]":
        """Of several models each its own, in memory of its own."""
        named = self.optimizer.memories.items()
        return [
            TrainingState(
                theta.clone(), OptimizerState(self.step, {name: m[k].clone() for name, m in named})
            )
            for k, theta in enumerate(self.theta)
        ]


def step_seed(seed: int, number: int) -> int:
    """Of what is drawn in step t, for a training seed."""
    return int(digest(f"step {number} of seed {seed}")[:15], 16)
