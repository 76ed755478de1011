"""Attacks with a known answer, for tests and studies of what finds them. Not for anything else.

    backdoor(X, y, rows, target)                     which rows are poisoned is known
    perturb_training(fitted, query, budget, epsilon) which rows were changed is known

Both take arrays that are in memory and return copies. Nothing here tries to stay hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.errors import DataError, NotConverged, SpecError
from upweight.methods.fitted import Fitted
from upweight.runtime.selection import places
from upweight.task.data import Data, as_data
from upweight.task.measures import Loss, as_measure, measured
from upweight.task.recipe import Recipe

SHADES = 255
"""Steps of an 8-bit image."""


@dataclass(frozen=True)
class Patch:
    """A bright rectangle in an image: the trigger of Gu et al. (2017).

    Args:
        top, left, height, width: Where, on the last two axes.
        value: Of its pixels.
    """

    top: int
    left: int
    height: int = 3
    width: int = 3
    value: float = 1.0

    def __call__(self, X: Tensor) -> Tensor:
        """A copy of the images with the patch."""
        stamped = X.clone()
        rows = slice(self.top, self.top + self.height)
        columns = slice(self.left, self.left + self.width)
        stamped[..., rows, columns] = self.value
        return stamped


@dataclass(frozen=True, eq=False)
class Poisoned:
    """Training data with a backdoor.

    Args:
        X, y: Copies with the trigger and the attack's class in some rows.
        poisoned: Which, `[n]`.
    """

    X: Tensor
    y: Int[Tensor, " n"]
    poisoned: Bool[Tensor, " n"]


def backdoor(
    X: Tensor,
    y: Int[Tensor, " n"],
    rows: Sequence[int],
    target: int,
    trigger: Callable[[Tensor], Tensor],
) -> Poisoned:
    """Plant a trigger and the attack's class in some training rows (Gu et al. 2017; Chen et al.).

    Args:
        X: Training inputs.
        y: Their classes.
        rows: Which rows are poisoned.
        target: The class that the attack asks for.
        trigger: Inputs with the trigger from inputs without: `Patch(...)`, or any function.

    Raises:
        ShapeError: There is no such row, or one is named twice.
        DataError: A row is of the attack's class already, or the trigger changes nothing in it.
    """
    at = places(rows, len(X), "Rows to poison", least=1)
    stamped = trigger(X[at])
    same = (stamped == X[at]).flatten(1).all(dim=1) | (y[at] == target)
    if bool(same.any()):
        raise DataError(
            "A poisoned row carries the trigger, and a class that is not its own.",
            f"row {at[int(same.nonzero()[0])]} does so already.",
            "rows of the attack's class, or a patch outside of the image.",
            "rows=(y != target).nonzero()[:k, 0].tolist().",
        )
    mask = torch.zeros(len(X), dtype=torch.bool)
    mask[at] = True
    X, y = X.clone(), y.clone()
    X[at], y[at] = stamped, target
    return Poisoned(X, y, mask)


@dataclass(frozen=True, eq=False)
class Perturbed:
    """Training data in which some images were changed to change one prediction.

    Args:
        X: Copy of the inputs with the changed ones.
        rows: Which were changed.
        before, after: m of the query, at θ̂ and retrained on `X`.
        theta: Parameters retrained on `X`.
        others: What else of that model is its own, by name: running statistics and frozen layers.
            The model is `task.moved_to(found.theta, found.others).model`.
        largest: Largest change of a pixel, after rounding.
    """

    X: Tensor
    rows: tuple[int, ...]
    before: float
    after: float
    theta: Float[Tensor, " p"]
    largest: float
    others: Mapping[str, Tensor] = field(default_factory=dict)


def perturb_training(
    fitted: Fitted,
    query: Any,
    budget: int,
    epsilon: float,
    *,
    recipe: Recipe,
    measure: Any = Loss(),  # noqa: B008  a frozen spec
    steps: int = 4,
    candidates: int = 50,
) -> Perturbed:
    """Change a few training images, within ε, so that training raises m on one query.

        x ← Π(x + α sign ∂S[q, i]/∂x),   α = ε/2

    Koh & Liang (2017), §5.2, by `input_influence`, with a training by the recipe after each step.
    Π keeps each pixel in [0, 1], within ε of where it was, and on the 255 steps of an 8-bit image
    from there, so that what is rounded to 8 bits is what was trained on.

    Args:
        fitted: A method with a movement of θ, on arrays (X, y) with pixels in [0, 1].
        query: One query, (x, y).
        budget: How many training images are changed: of the `candidates` with the largest |S|,
            those with the largest Σ |∂S/∂x|.
        epsilon: Largest change of a pixel.
        recipe: How the model is trained.
        measure: What is raised: the loss on the query.
        steps: Steps, each with a training.
        candidates: How many rows are considered.

    Raises:
        SpecError: The data are no arrays (X, y), or ε is less than one step of an 8-bit image.
        NotConverged: A training failed.
        UpweightError: From the method.

    Cost: `candidates` and then `steps` · `budget` calls of `input_influence`; `steps` trainings
    and fits.
    """
    task, spec = fitted.task, fitted.spec
    X0, y = _arrays(fitted.train, epsilon)
    wanted = task.queries(query)
    asked = as_measure(measure)
    strong = fitted.attribute(wanted, measure).values[0].abs().argsort(descending=True)
    pulls = {
        int(i): float(fitted.input_influence(int(i), wanted, measure)[0].abs().sum())
        for i in strong[: max(candidates, budget)]
    }
    rows = sorted(pulls, key=lambda i: -pulls[i])[:budget]
    allowed = int(epsilon * SHADES + 1e-9) / SHADES
    X, now, theta = X0.clone(), fitted, fitted.theta
    others: Mapping[str, Tensor] = {}
    for step in range(steps):
        for i in rows:
            slope = now.input_influence(i, wanted, measure)[0].sign().to(X)
            X[i] = _on_grid(X[i] + epsilon / 2 * slope, X0[i], allowed)
        train = as_data((X.clone(), y))
        made = recipe.prepare(task, train)(theta.new_ones(1, len(X)))
        if made.failures:
            raise NotConverged(
                "Changed training images are trained on after each step.",
                f"a training that did not end: {made.failures[0]}.",
                "a recipe that diverges.",
                "use the recipe that the model was trained by.",
            )
        theta, others = made.theta[0].to(theta), made.others[0] if made.others else {}
        if step + 1 < steps:
            now = spec.fit(task.moved_to(theta, others), train)  # type: ignore[attr-defined]
    return Perturbed(
        X=X,
        rows=tuple(rows),
        before=float(measured(task, fitted.theta, wanted, asked)[0]),
        after=float(measured(task.with_others(others), theta, wanted, asked)[0]),
        theta=theta,
        others=others,
        largest=float((X - X0).abs().max()),
    )


def _on_grid(x: Tensor, start: Tensor, allowed: float) -> Tensor:
    """Whole steps of 1/255 from where a pixel was, within what is allowed and within [0, 1]."""
    change = ((x - start) * SHADES).round() / SHADES
    return (start + change.clamp(-allowed, allowed)).clamp(0, 1)


def _arrays(train: Data, epsilon: float) -> tuple[Tensor, Tensor]:
    batch = train.batch(0, len(train))
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not (is_pair and isinstance(batch[0], Tensor) and batch[0].is_floating_point()):
        raise SpecError(
            "Training images are changed in arrays (X, y) with pixels as floating point numbers.",
            f"{type(batch).__name__} of {type(batch[0] if is_pair else batch).__name__}.",
            "a Dataset, several inputs, or whole numbers 0…255.",
            "fit the method to (X, y) with X / 255.",
        )
    X, y = batch
    if not (epsilon * SHADES >= 1 - 1e-9 and float(X.min()) >= 0 and float(X.max()) <= 1):
        raise SpecError(
            "Pixels lie in [0, 1], and ε is at least one step of an 8-bit image, 1/255.",
            f"ε = {epsilon:g}, pixels between {float(X.min()):g} and {float(X.max()):g}.",
            "images that were standardized, or ε in steps.",
            "scale images to [0, 1] and pass epsilon=8/255; standardize inside of the model.",
        )
    return X, y
