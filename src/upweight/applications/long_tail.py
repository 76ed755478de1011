"""Does the model need the rows that it knows by heart? Train without them, and without others.

    cost = accuracy without as many random rows − accuracy without the first of an order

Feldman & Zhang (2020), §3.1: without the most memorized rows test accuracy falls by more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.right_answers import Correct, by_row, by_seed
from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.evaluation.bootstrap import FEW, Bootstrap, Estimate, estimate, mean
from upweight.plot import LOWERED, NEUTRAL, axes
from upweight.runtime.resources import Resources
from upweight.runtime.streams import stream
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.retrain import retrain
from upweight.training.weights import removal_weights


@dataclass(frozen=True, eq=False)
class RemovalExperiment(Outcome):
    """Test accuracy without the first rows of an order, and without as many at random.

    Args:
        actual: Right (1) or wrong (0) on each test row without the first rows, one line per seed.
        random: The same without random rows, of each draw.
        full: The same with all rows.
        rows: The rows of the order that were left out.
        share: Of the training rows, how many that is.
        predicted: None: an order says which rows matter, not how much.
        bootstrap: How the intervals are made; test rows, draws and seeds are drawn with
            replacement, each by itself.
    """

    actual: Float[Tensor, "k t"]
    random: Float[Tensor, "k d t"]
    full: Float[Tensor, "k t"]
    rows: Int[Tensor, " m"]
    share: float
    predicted: None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @property
    def title(self) -> str:
        return f"Test accuracy without {len(self.rows)} training rows"

    @property
    def is_confirmed(self) -> bool:
        """Whether the interval of the cost leaves 0 out; all models here are refitted."""
        return self.cost.low > 0 or self.cost.high < 0

    @cached_property
    def cost(self) -> Estimate:
        """Accuracy without random rows − accuracy without the first rows, paired by test row."""
        gap = self.random - self.actual[:, None]  # [k, d, t]
        k, d, t = gap.shape

        def statistic(rows: Tensor, draws: Tensor, seeds: Tensor) -> Float[Tensor, " r"]:
            by_seed = torch.einsum("rt,kdt->rkd", rows / rows.sum(1, keepdim=True), gap)
            by_draw = by_seed * (draws / draws.sum(1, keepdim=True))[:, None]
            return (by_draw.sum(dim=2) * (seeds / seeds.sum(1, keepdim=True))).sum(dim=1)

        return estimate(statistic, [t, d, k], self.bootstrap, width=k * d)

    def accuracy(self, of: str) -> Estimate:
        """Test accuracy, mean over seeds: of "all rows", "without the first" or "at random"."""
        found = {"all rows": self.full, "without the first": self.actual, "at random": self.random}
        right = found[of]
        return mean(right.reshape(-1, right.shape[-1]).mean(dim=0), self.bootstrap)

    @property
    def verdict(self) -> str:
        full, first, drawn = map(self.accuracy, ("all rows", "without the first", "at random"))
        c = self.cost
        told = (
            f"test accuracy is {full.value:.2%} with all rows, {first.value:.2%} without the "
            f"first {self.share:.0%} and {drawn.value:.2%} without as many at random "
            f"({self.random.shape[1]} draws)"
        )
        said = f"{c:+.2%}"
        if c.low > 0:
            return f"The first rows of the order are needed more than others: {told}; cost {said}."
        if c.high < 0:
            return f"The first rows of the order are needed less than others: {told}; cost {said}."
        return f"No difference can be told between the first rows and others: {told}; cost {said}."

    @property
    def notes(self) -> tuple[str, ...]:
        k, d, _ = self.random.shape
        few = [f"{d} draws"] if d < FEW else []
        few += [] if k >= FEW else [f"{k} seed{'s' if k > 1 else ''}"]
        return (f"{' and '.join(few)}: the interval is somewhat too narrow",) if few else ()

    def frame(self) -> "DataFrame":
        """One row per model: its removal, its seed and its test accuracy."""
        lines = []
        for k in range(len(self.full)):
            lines.append(("all rows", k, float(self.full[k].mean())))
            lines.append(("without the first", k, float(self.actual[k].mean())))
            lines += [("at random", k, float(draw.mean())) for draw in self.random[k]]
        return as_table(lines, columns=["trained", "seed", "accuracy"])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Accuracy of every model: all rows, random removals, and the first of the order."""
        ax = axes(ax)
        drawn = self.random.mean(dim=(0, 2))
        ax.hist(drawn.numpy(), bins=max(3, len(drawn) // 2), color="0.75", label="random rows")
        for value, color, label in (
            (self.full.mean(), NEUTRAL, "all rows"),
            (self.actual.mean(), LOWERED, "without the first"),
        ):
            ax.axvline(float(value), color=color, label=label)
        ax.set(xlabel="test accuracy", ylabel="draws")
        ax.legend(frameon=False)
        return ax

    def numbers(self) -> dict[str, Any]:
        names = ("all rows", "without the first", "at random")
        return {
            "removed": len(self.rows),
            "accuracy": {name: self.accuracy(name).value for name in names},
            "cost": self.cost,
            "draws": self.random.shape[1],
            "seeds": len(self.full),
        }


def removal_experiment(
    recipe: Recipe,
    task: Task,
    train: Any,
    test: Any,
    order: Any,
    share: float = 0.1,
    *,
    draws: int = 10,
    seeds: int = 1,
    seed: int = 3,
    resources: Resources | None = None,
) -> RemovalExperiment:
    """Train without the rows of largest order, and without as many at random, and test.

    Args:
        recipe: The learning algorithm.
        task: What is trained.
        train: On what.
        test: What accuracy is measured on; nothing may have been chosen by it.
        order: An outcome of `scores` or `by_subsets`, or one value per training row: those of
            largest value leave.
        share: Of the training rows, how many leave.
        draws: How many random removals of that size.
        seeds: From how many seeds of the recipe each model is trained.
        seed: Of the random removals.
        resources: As for `retrain`.

    Raises:
        ShapeError: There is not one value per training row.
        NonFinite: A value is NaN.
        SpecError: The share removes none or all, or there are fewer than two draws.
        UpweightError: As for `retrain`.

    Cost: (`draws` + 2) × `seeds` fits. Rows are deleted: the mean is taken over what is left.
    """
    data = task.training(train)
    n = len(data)
    values = by_row(order)
    if values.shape != (n,):
        raise ShapeError(
            "An order of removal has one value per training row.",
            f"shape {tuple(values.shape)} for {n} rows.",
            "row numbers in place of values, or values of another data set.",
            "pass an outcome of memorization.scores(...), or values by row.",
        )
    if bool(values.isnan().any()):
        raise NonFinite(
            "An order of removal needs numbers.",
            f"{int(values.isnan().sum())} of {n} values are NaN.",
            "rows that were never measured.",
            "give them the value that is to leave last, such as -torch.inf.",
        )
    count = round(share * n) if 0 < share < 1 else 0
    if not 0 < count < n or draws < 2:
        raise SpecError(
            "A removal experiment leaves out some rows, not all, and two random draws or more.",
            f"share={share} of {n} rows, draws={draws}.",
            "a share in percent, or a single comparison.",
            "share=0.1, draws=10.",
        )
    first = values.argsort(descending=True, stable=True)[:count]
    groups: list[Sequence[int]] = [first.tolist()]
    orders = (torch.randperm(n, generator=stream(f"removal {k}", seed)) for k in range(draws))
    groups += [order[:count].tolist() for order in orders]
    weights = removal_weights(n, groups, renormalize=True)
    full, found = [], []
    for k, own in enumerate(by_seed(recipe, seeds)):
        using = None if resources is None else resources.within(f"removals-{k}")
        trained = retrain(own, task, data, weights, test, Correct(), resources=using)
        full.append(trained.baseline)
        found.append(trained.values)
    every = torch.stack(found)
    return RemovalExperiment(every[:, 0], every[:, 1:], torch.stack(full), first, count / n)
