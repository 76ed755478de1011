"""Is a training row answered right, and which rows are the same: what memorization is measured by.

probability    p(y | f(x))             what one model is asked, and many models' mean
correct        1 where the class of largest output is y, else 0     (Feldman & Zhang 2020)
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight._typing import Batch, Params
from upweight.applications.outcome import Outcome
from upweight.errors import SpecError
from upweight.runtime.fingerprint import digest, row_checksums
from upweight.task.data import Data
from upweight.task.losses import Loss
from upweight.task.measures import AT_ONCE, Measure
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.subset_models import reseeded

Asked: TypeAlias = Literal["correct", "probability"]
"""What memorization is a difference of."""


@dataclass(frozen=True)
class Probability(Measure):
    """m = p(y | x; θ)."""

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        return probability(task.loss, *task.outputs(params, batch))


@dataclass(frozen=True)
class Correct(Measure):
    """m = 1 where the model's answer is the target, else 0: no derivative in θ."""

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        outputs, targets = task.outputs(params, batch)
        y = targets[0] if isinstance(targets, tuple | list) else targets  # a weighted loss: (y, v)
        one_class = isinstance(y, Tensor) and not y.is_floating_point() and y.ndim == 1
        if one_class and outputs.ndim == 2 and outputs.shape[1] > 1:
            return (outputs.argmax(dim=1) == y).to(outputs.dtype)
        if isinstance(y, Tensor) and y.numel() == outputs.numel():  # logits of yes and no
            right = (outputs > 0).reshape(len(outputs), -1) == (y > 0.5).reshape(len(outputs), -1)
            return right.all(dim=1).to(outputs.dtype)
        raise SpecError(
            "Right or wrong needs one class per example, or logits of yes and no.",
            f"outputs {tuple(outputs.shape)} and targets of type {type(y).__name__}"
            + (f" {tuple(y.shape)}." if isinstance(y, Tensor) else "."),
            "sequences, class probabilities as targets, or a regression.",
            "ask measure='probability', which is the probability of all of an example's target.",
        )


def measure_of(measure: Asked) -> Measure:
    """The measure of that name.

    Raises:
        SpecError: There is none.
    """
    found: dict[str, Measure] = {"correct": Correct(), "probability": Probability()}
    if measure not in found:
        raise SpecError(
            "Memorization is a difference of right answers or of their probability.",
            f"measure={measure!r}.",
            "a measure such as Loss(), of which no share of right answers is made.",
            "measure='correct' or measure='probability'.",
        )
    return found[measure]


def probability(loss: Loss, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
    """p(y | f) of each example, in float64 where the loss allows.

    Raises:
        UnsupportedModel: The loss is none of classes: a density is no probability.
    """
    loss.margin(outputs, targets)  # which losses of classes alone have
    return loss.log_prob(outputs, targets).exp()


def equal_examples(data: Data) -> list[list[int]]:
    """Sets of examples that are equal, input and target; those of one left out.

    By checksums of 64 bits: two examples that differ are taken for equal in one case of 2⁶⁴.

    Cost: one reading of the data.
    """
    places: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, name in enumerate(names_of(data)):
        places[name].append(i)
    return [rows for rows in places.values() if len(rows) > 1]


def names_of(data: Data) -> Iterator[tuple[Any, ...]]:
    """Of each example a name, which those have in common that are equal to the last bit."""
    for start, stop, batch in data.batches(AT_ONCE):
        leaves = tree_leaves(batch)
        if all(isinstance(x, Tensor) and x.shape[:1] == (stop - start,) for x in leaves):
            yield from zip(*(row_checksums(x).tolist() for x in leaves), strict=True)
        else:
            yield from (_name(tree_leaves(data.take([i]))) for i in range(start, stop))


def _name(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(digest(x) if isinstance(x, Tensor) else repr(x) for x in leaves)


def by_row(given: Any) -> Float[Tensor, "..."]:
    """The values of an outcome, or values as they are, in float64."""
    values = getattr(given, "values", None) if isinstance(given, Outcome) else given
    return torch.as_tensor(values).detach().cpu().double()


def by_seed(recipe: Recipe, seeds: int) -> list[Recipe]:
    """The recipe, and again from further seeds.

    Raises:
        SpecError: It has no seed, and more than one is asked for.
    """
    found = [recipe, *(reseeded(recipe, k) for k in range(1, seeds))]
    if not found[:seeds] or (seeds > 1 and found[1] is recipe):
        raise SpecError(
            "Several seeds need a recipe that has one.",
            f"seeds={seeds} with {recipe!r}.",
            "a recipe that minimizes, whose models do not differ by a seed.",
            "seeds=1, or uw.Training(...).",
        )
    return found


def told_duplicates(sets: list[list[int]] | tuple[tuple[int, ...], ...], together: bool) -> str:
    """How many rows are copies, and what was done about it."""
    rows = sum(map(len, sets))
    done = (
        "the rows of a set leave together"
        if together
        else "each hides the others, because one that leaves is still there as its copy "
        "(duplicates='together' removes them together)"
    )
    are = "set of equal rows" if len(sets) == 1 else "sets of equal rows"
    return f"{len(sets)} {are}, {rows} rows in all: {done}"


def require_duplicates(duplicates: str) -> bool:
    """Whether equal rows leave together.

    Raises:
        SpecError: It is neither of the two.
    """
    if duplicates not in ("apart", "together"):
        raise SpecError(
            "Equal rows are removed apart or together.",
            f"duplicates={duplicates!r}.",
            "a word of another library, such as 'drop'.",
            "duplicates='apart' or duplicates='together'.",
        )
    return duplicates == "together"
