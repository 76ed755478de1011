"""f₋U(x_U): the outputs of examples under a model without them, from one fit and by refits.

    from one fit    θ₋U ≈ argmin J(θ, w) − ∇J(θ̂)ᵀθ,  wᵢ = 0 in U: steps from θ̂ with the inverse of
                    the Hessian of all the data
    refitted        θ₋U by the learning algorithm

The inverse of a Hessian without a fold costs more than the steps that it would save: H₋U and H
differ by the fold's leverage, so a step with H leaves that share of the error, and L-BFGS less
(Nocedal & Wright 2006, §7.2). All groups step together, one gradient of each model per step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError
from upweight.methods.dense import DenseScorer
from upweight.methods.fitted import Fitted
from upweight.runtime.resources import Resources
from upweight.runtime.versions import numeric_versions
from upweight.task.data import Data
from upweight.task.identity import described
from upweight.task.losses import SquaredError
from upweight.task.measures import AT_ONCE
from upweight.task.recipe import Recipe, Trainer
from upweight.task.task import Task
from upweight.training.descent import descend
from upweight.training.kept import Kept, as_bytes, as_text, kept_trainer
from upweight.training.objective import WeightedObjective, weighted_objective
from upweight.training.weights import removal_weights

TOLERANCE = 1e-2
"""‖∇‖ that steps may leave, as a share of what it was at θ̂. Held-out losses of ten folds of digits
were within 0.1 % of the minimum's from there on."""

STEPS = 25
"""At most; a group that needs more is unsafe."""

MEMORY = 10


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Outputs of each group under a model without it.

    Args:
        outputs: `[e, c]` of each group, in the order of its members.
        theta: Where the steps ended, one row per group; None where they were not followed up.
        remainders: ‖∇‖ that is left, as a share of what it was at θ̂, of each group; None where the
            step was not followed up.
    """

    outputs: list[Float[Tensor, "e *c"]]
    theta: Float[Tensor, "g p"] | None = None
    remainders: Float[Tensor, " g"] | None = None


def is_followed(fitted: Fitted) -> bool:
    """Whether steps go on to the minimum: of a model that is linear in θ, with its Hessian."""
    scorer = fitted.scorer
    return isinstance(scorer, DenseScorer) and scorer.linear_removals is not None


def left_out(
    fitted: Fitted, groups: Sequence[list[int]], renormalize: bool, tolerance: float = TOLERANCE
) -> LeftOut:
    """Outputs of each group without it, from one fit.

    Args:
        fitted: At θ̂.
        groups: Which examples leave together.
        renormalize: Whether the mean is taken over what is left (1/(n − k) in place of 1/n).
        tolerance: ‖∇‖ that steps may leave, as a share of what it was at θ̂.

    Cost: where the model is linear in θ a few gradients of each model over the data, all models
    together; otherwise a removal step of each group.
    """
    task, train, theta, scorer = fitted.task, fitted.train, fitted.theta, fitted.scorer
    if not is_followed(fitted):
        steps = (task.layout.flatten(fitted.removal_step(group)) for group in groups)
        moved = [
            outputs_of(task, theta + step, train, group)
            for step, group in zip(steps, groups, strict=True)
        ]
        return LeftOut(moved)
    assert isinstance(scorer, DenseScorer)
    objective = _Tilted(weighted_objective(task, train), scorer)
    outputs, remainders, ends = [], [], []
    for start in range(0, len(groups), objective.at_once):
        some = groups[start : start + objective.at_once]
        weights = removal_weights(len(train), some, renormalize=renormalize).to(theta)
        # ∇J(θ̂, w) − ∇J(θ̂): what removing leaves.
        before = objective(theta.expand(len(some), -1), weights)[1]
        norms = before.norm(dim=1)
        found = descend(
            objective, weights, _starts(scorer, some, before), scorer.solve,
            tol=tolerance * float(norms.min()), max_steps=STEPS, memory=MEMORY,
        )  # fmt: skip
        # Examples without a gradient leave nothing to do.
        left = torch.where(norms > 0, found.gradient_norms / norms, 0.0)
        remainders.append(left)
        ends.append(found.theta)
        outputs += [
            outputs_of(task, each, train, group)
            for each, group in zip(found.theta, some, strict=True)
        ]
    return LeftOut(outputs, torch.cat(ends), torch.cat(remainders))


def _starts(
    scorer: DenseScorer, groups: Sequence[list[int]], before: Float[Tensor, "g p"]
) -> Float[Tensor, "g p"]:
    """The end of a Newton step without each group where that is cheap or exact, else with all."""
    linear, loss = scorer.linear_removals, scorer.task.loss
    assert linear is not None
    is_parabola = isinstance(getattr(loss, "base", loss), SquaredError)
    if all(len(group) == 1 for group in groups):
        return scorer.theta + linear.steps([group[0] for group in groups])
    if is_parabola:
        return scorer.theta + scorer.steps(groups)
    return scorer.theta - scorer.solve(before)


@dataclass(frozen=True, eq=False)
class _Tilted(WeightedObjective):
    """J(θ, w) − ∇J(θ̂)ᵀθ + (λ/2)‖θ − θ̂‖²: θ̂ is its minimum at w = 1, wherever training stopped."""

    plain: WeightedObjective
    scorer: DenseScorer

    @property
    def at_once(self) -> int:
        return self.plain.at_once

    def __call__(
        self, theta: Float[Tensor, "s p"], weights: Float[Tensor, "s n"]
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, "s p"]]:
        value, gradient = self.plain(theta, weights)
        step, lam, slope = theta - self.scorer.theta, self.scorer.damping, self.scorer.gradient
        value = value - step @ slope + lam / 2 * step.square().sum(dim=1)
        return value, gradient - slope + lam * step


def outputs_of(
    task: Task, theta: Float[Tensor, " p"], train: Data, group: Sequence[int]
) -> Float[Tensor, "e *c"]:
    """f(θ, x) of some training examples."""
    with torch.no_grad():
        found: Tensor = task.outputs(theta, task.to_device(train.take(list(group))))[0]
    return found


Refit = tuple[Float[Tensor, "e *c"] | None, str]
"""The outputs of a group by a fit without it; or None, and why."""


class Refits(Protocol):
    """Fits without each group."""

    def __call__(self, groups: Sequence[list[int]]) -> Iterator[Refit]:
        """The outputs of each group by a model that never saw it."""


@dataclass(frozen=True, eq=False)
class ByRecipe:
    """Refits by a learning algorithm; the objective keeps its 1/n.

    With a folder in the resources its models are kept there.
    """

    task: Task
    train: Data
    recipe: Recipe
    resources: Resources = field(default_factory=Resources)

    @cached_property
    def trainer(self) -> Trainer:
        """Prepared once."""
        return kept_trainer(self.recipe, self.task, self.train, self.resources)

    def __call__(self, groups: Sequence[list[int]]) -> Iterator[Refit]:
        for start in range(0, len(groups), self.trainer.at_once):
            some = groups[start : start + self.trainer.at_once]
            trained = self.trainer(removal_weights(len(self.train), some))
            for row, group in enumerate(some):
                if row in trained.failures:
                    yield None, trained.failures[row]
                else:
                    task = trained.task_of(self.task, row)
                    yield outputs_of(task, trained.theta[row], self.train, group), ""


@dataclass(frozen=True, eq=False)
class KeptRefits:
    """Refits of scikit-learn, one group after the other, whose outputs are kept in a folder.

    `refits` say in their fields all that their answers depend on. Without a folder nothing is kept.
    """

    refits: Refits
    resources: Resources

    @cached_property
    def kept(self) -> Kept:
        """Opened once, when the first group is asked for."""
        return Kept.of(
            self.resources,
            lambda: {"refits": described(self.refits), "versions": repr(numeric_versions())},
        )

    def __call__(self, groups: Sequence[list[int]]) -> Iterator[Refit]:
        for group in groups:

            def make(group: list[int] = group) -> dict[str, Tensor]:
                outputs, reason = next(iter(self.refits([group])))
                return {"reason": as_bytes(reason)} if outputs is None else {"outputs": outputs}

            made = self.kept.once("without", torch.tensor(group), make)
            yield made.get("outputs"), as_text(made["reason"]) if "reason" in made else ""


def losses_of(
    fitted: Fitted, outputs: Float[Tensor, "n *c"], loss: Callable[..., Tensor] | None
) -> Float[Tensor, " n"]:
    """ℓ(fᵢ, yᵢ) of every training example at given outputs, in float64 on the CPU.

    Raises:
        ShapeError: The loss does not give one value per example.
    """
    task, train, parts = fitted.task, fitted.train, []
    of = task.loss if loss is None else loss
    for start, stop, batch in train.batches(AT_ONCE):
        with torch.no_grad():
            targets = task.outputs(fitted.theta, task.to_device(batch))[1]
            found = of(outputs[start:stop], targets)
        if found.shape != (stop - start,):
            raise ShapeError(
                "A loss gives one value per example, (outputs, targets) -> [b].",
                f"shape {tuple(found.shape)} for {stop - start} examples.",
                "a mean over the batch, or a value per output.",
                "reduce over the outputs alone: .mean(dim=1), or reduction='none'.",
            )
        parts.append(found.double().cpu())
    return torch.cat(parts)
