"""FromFunction: a training loop of the user's own as a recipe.

    θ(w) = train(w)          any function from weights [n] to a trained model

Held to the one condition that retraining rests on: the same weights give the same model, bit for
bit.
"""

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.errors import SpecError, message
from upweight.task.data import Data
from upweight.task.params import Layout
from upweight.task.recipe import Recipe, Trained
from upweight.task.task import Task


@dataclass(frozen=True)
class FromFunction:
    """Any deterministic training loop.

    Args:
        train: From weights [n] to the trained module, its `state_dict()`, or θ [p] in the task's
            layout. wᵢ = 0 means that example i is left out.
        twice: Train w = 1 twice before anything else, and refuse if the results differ.

    Cost: one call per model, and two more for `twice`.
    """

    train: Callable[[Float[Tensor, " n"]], nn.Module | Mapping[str, Tensor] | Tensor]
    twice: bool = True

    def prepare(self, task: Task, train: Data) -> "FunctionTrainer":
        """Train on the full data twice.

        Raises:
            SpecError: The two models differ, or are not the task's.
        """
        trainer = FunctionTrainer(self, task)
        if self.twice:
            ones = torch.ones(len(train), dtype=torch.float64)
            first, second = trainer.theta(ones), trainer.theta(ones)
            if not torch.equal(first, second):
                apart = float((first - second).abs().max())
                raise SpecError(
                    "A recipe gives the same model for the same weights, bit for bit.",
                    f"two runs of {self.train!r} on the full data whose parameters differ by "
                    f"up to {apart:.2e}.",
                    "a random initialization, shuffling or dropout without a fixed seed, or "
                    "kernels that add in no fixed order.",
                    "seed everything inside the function (torch.manual_seed, the loader's "
                    "generator), and call torch.use_deterministic_algorithms(True).",
                )
        return trainer


@dataclass(frozen=True, eq=False)
class FunctionTrainer:
    """w ↦ θ(w) by the function. Made by `FromFunction.prepare`."""

    spec: FromFunction
    task: Task

    at_once = 1

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """θ(w) for each row."""
        theta = torch.stack([self.theta(row) for row in weights])
        bad = (~theta.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        failures = dict.fromkeys(bad, "its parameters are NaN or infinite")
        return Trained(theta, theta.new_full((len(theta),), torch.nan), failures)

    def theta(self, weights: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
        """Of one model, flat.

        Raises:
            SpecError: What came back are not the task's parameters.
        """
        made = self.spec.train(weights)
        layout = self.task.layout
        if isinstance(made, nn.Module):
            made = dict(made.named_parameters())
        if isinstance(made, Mapping):
            wrong = [
                name
                for name, shape in zip(layout.names, layout.shapes, strict=True)
                if name not in made or tuple(made[name].shape) != shape
            ]
            if wrong:
                raise SpecError(_not_the_model(layout, f"no or another {', '.join(wrong[:4])}"))
            made = layout.flatten({name: made[name] for name in layout.names})
        if not isinstance(made, Tensor) or tuple(made.shape) != (layout.size,):
            is_tensor = isinstance(made, Tensor)
            given = f"shape {tuple(made.shape)}" if is_tensor else type(made).__name__
            raise SpecError(_not_the_model(layout, given))
        return made.detach().to(layout.device, layout.dtype).clone()


def _not_the_model(layout: Layout, given: str) -> str:
    return message(
        f"A training function returns the task's model: a module or state dict with its "
        f"parameters, or one vector of {layout.size} numbers.",
        f"{given}.",
        "a loop that returns its losses, or nothing.",
        "end it with `return model`.",
    )


def as_recipe(value: Any) -> Any:
    """A recipe; of a function from data weights to a trained model that of it; others as given."""
    is_function = isinstance(value, types.FunctionType | types.MethodType | functools.partial)
    return FromFunction(value) if is_function and not isinstance(value, Recipe) else value
