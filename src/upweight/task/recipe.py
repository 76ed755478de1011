"""𝒜: the learning algorithm, as a function of the data weights.

    θ(w) = 𝒜(w)          ideally argmin_θ J(θ, w) = (1/n) Σᵢ wᵢ ℓᵢ(θ) + R(θ)

A `Recipe` is a frozen spec: hyperparameters only, with a `repr` that says all of them. `prepare`
binds it to a task and its data, once; the `Trainer` that comes back maps rows of weights to trained
parameters. The same weights must give the same θ(w), bit for bit on one machine.

Conventions. w = 1 is how the model was trained, and wᵢ = 0 removes example i. The objective keeps
its 1/n and its penalty as they were: n is the number of rows of the data, whatever their weights.
To refit with 1/Σw in place of 1/n, as when the rows are deleted from the data set and the mean is
taken over what is left, scale the weights by n/Σw: J(θ, cw) is that objective
(`removal_weights(n, groups, renormalize=True)`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import UnsupportedModel, listed
from upweight.task.data import Data
from upweight.task.measures import measured
from upweight.task.task import Task


@dataclass(frozen=True, eq=False)
class Trained:
    """θ(w) for each row of weights, and how well it was reached.

    Args:
        theta: One model a row, flat in `task.layout`, in the task's dtype.
        gradient_norms: ‖∇J(θ(w), w)‖ of each model: how stationary it is. NaN where it was not
            taken, or J has no gradient to speak of.
        failures: Rows that did not train, with the reason. Their θ is not used; the other rows are.
        others: What of each model is no part of θ and another than the task's, by name: running
            statistics. Empty where no model has any.
    """

    theta: Float[Tensor, "s p"]
    gradient_norms: Float[Tensor, " s"]
    failures: Mapping[int, str] = field(default_factory=dict)
    others: Sequence[Mapping[str, Tensor]] = ()

    def task_of(self, task: Task, row: int) -> Task:
        """The task with what of a model is no part of θ; itself where that is none.

        A model is measured by this task at its θ.
        """
        return task.with_others(self.others[row]) if self.others else task

    def alone(self, row: int = 0) -> Float[Tensor, " p"]:
        """θ of a model, for what compares parameters and nothing else.

        Raises:
            UnsupportedModel: The model has running statistics or frozen layers of its own.
        """
        if self.others and self.others[row]:
            raise UnsupportedModel(
                "Here retrained models are the task's model with other parameters, and nothing "
                "else of it differs.",
                f"a model with another {listed(list(self.others[row]))}.",
                "batch normalization in training mode, layers that the task has not among its "
                "params, or frozen layers that are drawn anew.",
                "put these layers in eval mode inside of the function; use GroupNorm or LayerNorm; "
                "or ask check(scores, recipe), which measures each model with its own.",
            )
        return self.theta[row]

    def measured(
        self, task: Task, queries: Data, measure: Callable[..., Tensor]
    ) -> Float[Tensor, "s q"]:
        """m_q of every query under each model, on the CPU in float64."""
        models = enumerate(self.theta)
        rows = [measured(self.task_of(task, k), theta, queries, measure) for k, theta in models]
        return torch.stack(rows).cpu()

    @classmethod
    def joined(cls, parts: Sequence["Trained"]) -> "Trained":
        """The models of several calls, of which none failed, on the CPU."""
        theta, norms = (
            torch.cat([x.cpu() for x in each])
            for each in zip(*((part.theta, part.gradient_norms) for part in parts), strict=True)
        )
        others = [some for part in parts for some in (part.others or [{}] * len(part.theta))]
        return cls(theta, norms, {}, tuple(others) if any(others) else ())


@runtime_checkable
class Trainer(Protocol):
    """w ↦ θ(w), bound to a task and its data.

    Attributes:
        at_once: How many models to hand over in one call. 1 for what trains one after the other;
            more where training many together is faster. What a call returns is recorded together,
            so an interrupted run loses at most this many models.
    """

    @property
    def at_once(self) -> int: ...

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """Train one model for each row of weights.

        The same rows give the same θ, bit for bit; other rows beside them change no more than
        rounding. What fails for one row is best told by `Trained.failures`: an error ends the run.
        """


@runtime_checkable
class Recipe(Protocol):
    """A learning algorithm: hyperparameters only; frozen; `repr` says all of them."""

    def prepare(self, task: Task, train: Data) -> Trainer:
        """Bind the recipe to a task and its training data: whatever is needed once, not per model.

        Raises:
            UpweightError: The recipe cannot train this task.
        """
