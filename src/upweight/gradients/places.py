"""Gradients by place: rows [start, stop) of the gradients of a data set, wherever they come from.

    Projected    taken when they are asked for
    Stored       read from a folder: a matrix that `Resources.matrix` keeps

A source that is told places, not batches, may be a store: it knows which rows are asked.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.gradients.passes import Function, GradientPass
from upweight.gradients.projections import Projection
from upweight.task.data import Data


class Gradients(Protocol):
    """P gᵢ of the examples of a data set, by their places in it."""

    def rows(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        """P gᵢ for i from start to stop − 1."""
        ...


@dataclass(eq=False)
class Projected:
    """P ∇θ function(θ, ·)ᵢ, a batch at a time.

    Args:
        data: Of which examples.
        theta: θ.
        function: One value per example: losses, outputs, or a measure.
        projection: P.
        at_once: Examples in a batch.
    """

    data: Data
    theta: Float[Tensor, " p"]
    function: Function
    projection: Projection
    at_once: int
    _passes: GradientPass = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # One for all rows: it checks each kind of batch once.
        self._passes = GradientPass(self.projection.plan, self.theta)

    @property
    def width(self) -> int:
        return self.projection.width

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        task, parts = self.projection.plan.task, []
        with self._passes:
            for first in range(start, stop, self.at_once):
                last = min(first + self.at_once, stop)
                batch = task.to_device(self.data.batch(first, last))
                parts.append(self.projection(self._passes.of(self.function, batch, last - first)))
        return torch.cat(parts)
