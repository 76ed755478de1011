"""Fitting: what every method is given to learn from, once it is known that it can be answered."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from upweight.gradients.blocks import Plan
from upweight.gradients.cost import Cost, cost
from upweight.gradients.planning import plan
from upweight.runtime.resources import Resources
from upweight.task.check import checked_losses
from upweight.task.data import Data
from upweight.task.probe import Probe
from upweight.task.task import Task


@dataclass(eq=False)
class Fitting:
    """A fit on its way.

    Args:
        task, data, theta, probe, resources, history: As for `Method.fit`.
        losses: ℓᵢ(θ̂), once they are known.
        learned: Curvatures that were learned at this θ, for several methods to share; None: each
            method learns its own.
    """

    task: Task
    data: Data
    theta: Float[Tensor, " p"]
    probe: Probe
    resources: Resources
    history: Any = None
    losses: Tensor | None = None
    learned: list[Any] | None = None

    @cached_property
    def plan(self) -> Plan:
        """How gradients are obtained layer by layer, at any θ."""
        return plan(self.task, self.theta, self.data)

    @cached_property
    def cost(self) -> Cost:
        """What they take."""
        return cost(self.plan, self.theta, self.data)

    def checked_losses(self) -> Float[Tensor, " n"]:
        """ℓᵢ(θ̂) of every training example, each looked at once.

        Cost: a forward pass over the training data, unless a pass of the method's saw them.
        """
        if self.losses is None:
            self.losses = checked_losses(
                self.task, self.data, "training data", self.probe, self.resources.ranks
            )
        return self.losses
