"""FromFunction: a training loop of the user's own as a recipe.

    θ(w) = train(w)          any function from weights [n] to a trained model
    θ(w) = train(w, seed=)   one that draws its noise from a seed, which is trained from others too

Held to the one condition that retraining rests on: the same weights give the same model, bit for
bit.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.errors import SpecError, message
from upweight.runtime.generators import own_random_numbers
from upweight.task.data import Data
from upweight.task.params import Layout
from upweight.task.recipe import Recipe, Trained
from upweight.task.task import Task


@dataclass(frozen=True)
class FromFunction:
    """Any deterministic training loop.

    Args:
        train: From weights [n] to the trained module, its `state_dict()`, or θ [p] in the task's
            layout. wᵢ = 0 means that example i is left out. Running statistics and frozen layers
            of a module's own go with its parameters wherever it is used.
        twice: Train the first model twice, and refuse if the results differ. Of several seeds that
            is done from the first.
        seed: Passed on by name, `train(w, seed=seed)`. None: the function has none. Of a function
            that is handed over in place of a recipe, its argument `seed`, or 0 without a default.

    Cost: one call per model, and one more for `twice`.
    """

    train: Callable[..., nn.Module | Mapping[str, Tensor] | Tensor]
    twice: bool = True
    seed: int | None = None

    def prepare(self, task: Task, train: Data) -> "FunctionTrainer":
        """Nothing is trained yet."""
        return FunctionTrainer(self, task, not self.twice)


@dataclass(eq=False)
class FunctionTrainer:
    """w ↦ θ(w) by the function. Made by `FromFunction.prepare`."""

    spec: FromFunction
    task: Task
    is_held: bool
    """Whether the function is taken to repeat itself: it was seen to, or nobody asks."""

    at_once = 1

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """θ(w) for each row, and what else of each model is its own; of the first model twice.

        The global generators of random numbers, which the function may seed or draw from, come
        back as they were. Between two of its calls they do not: one that draws without seeding
        would otherwise seem to repeat itself.

        Raises:
            SpecError: The two differ, or a model is not the task's.
        """
        made = list[tuple[Tensor, dict[str, Tensor]]]()
        with own_random_numbers():
            for row in weights:
                made.append(self._made(row))
                theta = made[-1][0]
                if not self.is_held and bool(theta.isfinite().all()):
                    self._require_repeats(row, theta)
        theta = torch.stack([each for each, _ in made])
        bad = (~theta.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        failures = dict.fromkeys(bad, "its parameters are NaN or infinite")
        others = tuple(each for _, each in made)
        norms = theta.new_full((len(theta),), torch.nan)
        return Trained(theta, norms, failures, others if any(others) else ())

    def _require_repeats(self, weights: Float[Tensor, " n"], first: Float[Tensor, " p"]) -> None:
        second = self._made(weights)[0]
        if not torch.equal(first, second):
            raise SpecError(
                "A recipe gives the same model for the same weights, bit for bit.",
                f"two runs of {self.spec.train!r} with the same weights whose parameters differ by "
                f"up to {float((first - second).abs().max()):.2e}.",
                "a random initialization, shuffling or dropout without a fixed seed, or "
                "kernels that add in no fixed order.",
                "seed everything inside the function (torch.manual_seed, the loader's "
                "generator), and call torch.use_deterministic_algorithms(True).",
            )
        self.is_held = True

    def _made(self, weights: Float[Tensor, " n"]) -> tuple[Float[Tensor, " p"], dict[str, Tensor]]:
        spec, others = self.spec, dict[str, Tensor]()
        made = spec.train(weights) if spec.seed is None else spec.train(weights, seed=spec.seed)
        layout = self.task.layout
        if isinstance(made, nn.Module):
            made = state_of(made)
        if isinstance(made, Mapping):
            wrong = [
                name
                for name, shape in zip(layout.names, layout.shapes, strict=True)
                if name not in made or tuple(made[name].shape) != shape
            ]
            if wrong:
                raise SpecError(_not_the_model(layout, f"no or another {', '.join(wrong[:4])}"))
            others = others_of(self.task, made)
            made = layout.flatten({name: made[name] for name in layout.names})
        if not isinstance(made, Tensor) or tuple(made.shape) != (layout.size,):
            is_tensor = isinstance(made, Tensor)
            given = f"shape {tuple(made.shape)}" if is_tensor else type(made).__name__
            raise SpecError(_not_the_model(layout, given))
        return made.detach().to(layout.device, layout.dtype).clone(), others


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under its first name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def others_of(task: Task, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a model is no part of θ, and another than the task's."""
    mine = {k: x for k, x in state_of(task.model).items() if k not in task.layout.names}
    return {
        name: made[name].detach().clone()
        for name, x in mine.items()
        if name in made
        and not name.endswith("num_batches_tracked")  # counts, which nothing is computed with
        and not torch.equal(made[name].detach().to(x), x.detach())
    }


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
    if not is_function or isinstance(value, Recipe):
        return value
    seed = inspect.signature(value).parameters.get("seed")
    if seed is None:
        return FromFunction(value)
    return FromFunction(value, seed=seed.default if isinstance(seed.default, int) else 0)
