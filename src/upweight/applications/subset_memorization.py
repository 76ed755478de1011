"""Memorization and influence by many models of random samples (Feldman & Zhang 2020).

    mem(i)     = mean over models with i − mean over models without i,  of "row i is right"
    infl(i, j) = the same of "test row j is right"                       Eqs. 1 and 2, Alg. 1

With models of a share of the data, what is estimated is memorization of a *sample* of that size.
Of m models the standard error of a row is √(s²₁/m₁ + s²₀/m₀), about σ/√(m share (1 − share)).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.right_answers import (
    Asked,
    by_row,
    by_seed,
    equal_examples,
    measure_of,
    require_duplicates,
    told_duplicates,
)
from upweight.errors import NotConverged, ShapeError, SpecError
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import Bootstrap, Estimate, estimate, mean
from upweight.plot import NEUTRAL, axes
from upweight.runtime.resources import Resources
from upweight.runtime.streams import stream
from upweight.task.data import Joined
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.retrain import retrain
from upweight.training.weights import subset_weights

MEMORIZED = 0.25
INFLUENTIAL = 0.15
"""From which on Feldman & Zhang (2020, §3) call a row memorized, and its influence on a test row
significant."""

SPLITS = 10
"""Ways of halving the models that the ceiling is a mean of."""

PAIRED = 10_000
"""Pairs whose answers by every model are held at once."""

LEAST_EACH = 2
"""Models with a row, and without it, that a standard error needs."""

SHOWN = 200
"""Training rows whose influence is formed at once."""


@dataclass(frozen=True, eq=False)
class SubsetMemorization(Outcome):
    """How far each training row is known by heart, by models with and without it.

    Args:
        actual: mem(i) of every training row.
        standard_error: Of each; 0 where the models with the row agree, and those without it do.
        inside: Which rows each model was trained on.
        right: What was measured of each training row by each model, mean over seeds.
        right_queries: The same of the queries; None where none were given.
        share: Of the data, what each model was trained on.
        measure: "correct" or "probability".
        seeds: From how many seeds of the recipe each sample was trained.
        predicted: memᵢ by other means, for comparison; None: none were given.
        duplicates: Sets of rows that are equal.
        bootstrap: How the intervals are made; training rows are drawn with replacement.
        notes: What to know before the numbers.
    """

    actual: Float[Tensor, " n"]
    standard_error: Float[Tensor, " n"]
    inside: Bool[Tensor, "s n"]
    right: Float[Tensor, "s n"]
    right_queries: Float[Tensor, "s q"] | None
    share: float
    measure: str
    seeds: int = 1
    predicted: Float[Tensor, " n"] | None = None
    duplicates: tuple[tuple[int, ...], ...] = ()
    bootstrap: Bootstrap = field(default_factory=lambda: Bootstrap(resamples=400))
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> Float[Tensor, " n"]:
        """mem(i) of every row: `actual`."""
        return self.actual

    @property
    def title(self) -> str:
        return f"Memorization, by {len(self.inside)} models of random samples"

    @property
    def is_confirmed(self) -> bool:
        """Whether one half of the models orders the rows as the other does."""
        return self.ceiling is not None and self.ceiling.low > 0

    @cached_property
    def ceiling(self) -> Estimate | None:
        """The rank correlation that as many further models would have with these.

        Models are halved at random, ρ of the two halves' mem is averaged over ten ways, and
        2ρ/(1 + ρ) is what twice as many would get (Spearman 1910; Brown 1910; for ranks an
        approximation). What knew mem without noise would get up to about √ceiling. None where the
        values of a half are all the same.
        """
        halves = [pair for pair in map(self._halves, range(SPLITS)) if pair is not None]
        if not halves:
            return None

        def statistic(counts: Float[Tensor, "r n"]) -> Float[Tensor, " r"]:
            rho = torch.stack([metrics.rank_correlation(a, b, counts) for a, b in halves]).mean(0)
            return 2 * rho / (1 + rho.abs())  # |ρ|: noise about zero stays about zero

        return estimate(statistic, [len(self.actual)], self.bootstrap)

    @cached_property
    def agreement(self) -> Estimate | None:
        """Rank correlation of `predicted` with these values; None where nothing was predicted."""
        if self.predicted is None or self._is_flat(self.predicted) or self._is_flat(self.actual):
            return None
        return metrics.spearman(self.predicted, self.actual, self.bootstrap)

    def beside(self, predicted: Any) -> "SubsetMemorization":
        """The same, with memorization predicted by other means beside it.

        Args:
            predicted: An outcome of `scores`, or one value per training row.

        Raises:
            ShapeError: There is not one value per training row.
        """
        values = by_row(predicted)
        if values.shape != self.actual.shape:
            raise ShapeError(
                "A prediction has one value per training row.",
                f"shape {tuple(values.shape)} for {len(self.actual)} rows.",
                "scores of another data set, or a matrix of scores.",
                "pass what memorization.scores(fitted) gave for the same training data.",
            )
        return replace(self, predicted=values)

    def influence(self, rows: Any = None) -> Float[Tensor, "e q"]:
        """infl(i, j) of training rows on every query.

        Args:
            rows: Which training rows; None: all of them, n·q numbers.

        Raises:
            SpecError: No queries were given to `by_subsets`.
        """
        right = self._require_queries()
        inside = self.inside if rows is None else self.inside[:, torch.as_tensor(rows)]
        return _contrast(inside) @ right

    @property
    def verdict(self) -> str:
        n, s = len(self.actual), len(self.inside)
        high = self.actual >= MEMORIZED
        sure = int((self.actual - 2 * self.standard_error >= MEMORIZED).sum())
        top = self.ceiling
        repeat = (
            "their halves cannot be compared"
            if top is None
            else f"as many models again would order the rows with ρ = {top:.2f}"
        )
        # With words of their own the two kinds of measurement are not taken for one another.
        asked = "are right more often" if self.measure == "correct" else "give more probability"
        said = (
            f"{int(high.sum())} of {n} training rows ({float(high.double().mean()):.1%}) are "
            f"memorized, {sure} of them by two standard errors: models of {self.share:.0%} "
            f"samples {asked} with the row than without it, by {MEMORIZED} or more; {s} models, "
            f"{repeat}"
        )
        if self.agreement is None:
            return f"{said}."
        return f"{said}; one model's prediction has ρ = {self.agreement:.2f}."

    def frame(self) -> "DataFrame":
        """One row per training row, the most memorized first."""
        columns = {
            "memorization": self.actual,
            "standard_error": self.standard_error,
            "right_with": _mean(self.right, self.inside),
            "right_without": _mean(self.right, ~self.inside),
            "models_with": self.inside.sum(dim=0),
        }
        if self.predicted is not None:
            columns["predicted"] = self.predicted
        return sorted_table(columns)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The long tail: mem(i) sorted, with two standard errors."""
        return sorted_values(self.actual, ax, self.standard_error)

    def numbers(self) -> dict[str, Any]:
        return {
            "rows": len(self.actual),
            "models": len(self.inside),
            "seeds": self.seeds,
            "share_of_data": self.share,
            "measure": self.measure,
            "memorized": int((self.actual >= MEMORIZED).sum()),
            "mean_standard_error": float(self.standard_error.mean()),
            "ceiling": self.ceiling,
            "spearman_of_predicted": self.agreement,
            "duplicate_sets": len(self.duplicates),
        }

    def _halves(self, seed: int) -> tuple[Tensor, Tensor] | None:
        """mem(i) by two halves of the models; None where either is the same for all rows."""
        pair = tuple(_difference(self.right[half], self.inside[half]) for half in self._split(seed))
        # A row that no model of a half has, or all have, says nothing there.
        known = pair[0].isfinite() & pair[1].isfinite()
        a, b = (torch.where(known, half, 0.0) for half in pair)
        return None if self._is_flat(a) or self._is_flat(b) else (a, b)

    def _split(self, seed: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(self.inside), generator=stream("halves of models", seed))
        return order[::2], order[1::2]

    @staticmethod
    def _is_flat(values: Tensor) -> bool:
        return bool((values == values[0]).all())

    def _require_queries(self) -> Float[Tensor, "s q"]:
        if self.right_queries is None:
            raise SpecError(
                "Influence on test rows needs every model's answers on them.",
                "memorization by subsets without queries.",
                "queries left out where the models were trained.",
                "by_subsets(recipe, task, train, queries=(X_test, y_test)); with the same "
                "queries and Resources(folder=...) it goes on where it was.",
            )
        return self.right_queries


def by_subsets(
    recipe: Recipe,
    task: Task,
    train: Any,
    queries: Any = None,
    *,
    models: int = 200,
    share: float = 0.7,
    seeds: int = 1,
    measure: Asked = "correct",
    duplicates: Literal["apart", "together"] = "apart",
    seed: int = 2,
    resources: Resources | None = None,
) -> SubsetMemorization:
    """Memorization of every training row, and its influence on queries, by models of samples.

    Feldman & Zhang (2020), Alg. 1. Samples have a fixed size, and are the same for every seed.

    Args:
        recipe: The learning algorithm. `uw.Training` trains many models at once.
        task: What is trained.
        train: On what.
        queries: Test rows, whose influences are wanted too; None: none are.
        models: How many samples.
        share: Of the data, what each holds. What is estimated is memorization of a sample of that
            size, which is more than that of all of the data where copies of a pattern are few.
        seeds: From how many seeds of the recipe a model is trained on each sample. 1: all models
            start alike, and the mean is over samples alone.
        measure: Right or wrong, as in the paper, or the probability of the label, of less noise.
        duplicates: Whether equal rows are in samples by themselves or all together.
        seed: Of the samples.
        resources: `folder` to go on in after an interruption, `jobs`.

    Raises:
        SpecError: Some row would be in fewer than two samples, or out of fewer than two; the
            recipe has no seed.
        NotConverged: More than half of the models failed. Fewer are left out, and a note says so.
        UpweightError: As for `retrain`.

    Cost: (`models` + 1) × `seeds` fits; s × (n + q) numbers are kept.
    """
    together = require_duplicates(duplicates)
    asked = measure_of(measure)
    data = task.training(train)
    n = len(data)
    sets = equal_examples(data)
    weights = _weights(n, sets if together else [], models, share, seed)
    inside = weights > 0
    _require_enough(inside)
    to_ask = data if queries is None else Joined(data, task.queries(queries))
    kept, notes, per_seed = torch.ones(models, dtype=torch.bool), [], []
    for k, own in enumerate(by_seed(recipe, seeds)):
        using = None if resources is None else resources.within(f"seed-{k}")
        try:
            found = retrain(own, task, data, weights, to_ask, asked, resources=using)
        except NotConverged as error:
            found = error.solution
            if found is None or float(found.values.isfinite().all(dim=1).double().mean()) < 0.5:
                raise
        kept &= found.values.isfinite().all(dim=1)
        per_seed.append(found.values)
    if not bool(kept.all()):
        notes.append(
            f"{int((~kept).sum())} of {models} models did not train and are left out, as if their "
            "samples had not been drawn: if some rows make training fail, their values are off"
        )
        _require_enough(inside[kept])
    values = torch.stack(per_seed).mean(dim=0)[kept]
    inside, right = inside[kept], values[:, :n]
    if sets:
        notes.append(told_duplicates(sets, together))
    notes.append(
        f"what is estimated is memorization of a sample of {share:.0%} of the data"
        + ("" if seeds > 1 else "; all models are trained from one seed of the recipe")
    )
    return SubsetMemorization(
        _difference(right, inside),
        _standard_error(right, inside),
        inside,
        right,
        None if queries is None else values[:, n:],
        share,
        measure,
        seeds,
        duplicates=tuple(map(tuple, sets)),
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class Pairs(Outcome):
    """Training rows that are memorized, and the test rows that they help.

    Args:
        train, query: The rows of each pair, the largest influence first.
        actual: infl(i, j) of each pair, by all models.
        standard_error: Of each.
        memorization: mem(i) of the training row of each.
        least: What infl(i, j) was to reach.
        errors: How many standard errors it was to reach as well.
        rows: How many training rows are memorized.
        opposite: How many pairs are that far below 0: if that is noise, so are as many of `actual`.
        predicted: infl(i, j) by one half of the models, of the pairs that this half chooses: above
            the truth, because it chose.
        repeated: infl(i, j) of those pairs by the other half, which did not choose.
    """

    train: Int[Tensor, " k"]
    query: Int[Tensor, " k"]
    actual: Float[Tensor, " k"]
    standard_error: Float[Tensor, " k"]
    memorization: Float[Tensor, " k"]
    least: float
    errors: float
    rows: int
    opposite: int
    predicted: Float[Tensor, " h"]
    repeated: Float[Tensor, " h"]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __len__(self) -> int:
        return len(self.train)

    title = "Memorized training rows and the test rows that they help"

    @cached_property
    def again(self) -> Estimate | None:
        """Mean infl(i, j) by the models that did not choose; None where fewer than two pairs."""
        return mean(self.repeated, self.bootstrap) if len(self.repeated) > 1 else None

    @property
    def is_confirmed(self) -> bool:
        """Whether the models that did not choose the pairs see half of what was asked, or more."""
        return self.again is not None and self.again.low >= self.least / 2

    @property
    def verdict(self) -> str:
        if not len(self):
            return (
                f"No pair of a memorized training row ({self.rows} of them) and a test row has "
                f"an influence of {self.least} or more by {self.errors:g} standard errors."
            )
        said = (
            f"{len(self)} pairs of a memorized training row and a test row have an influence of "
            f"{self.least} or more by {self.errors:g} standard errors, and {self.opposite} "
            f"one of −{self.least} or less"
        )
        if self.again is None:
            return f"{said}; too few to hold one half of the models against the other."
        return (
            f"{said}; pairs that half of the models chooses with a mean of "
            f"{float(self.predicted.mean()):.2f} have {self.again:.2f} by the other half."
        )

    notes = (
        "the largest of many noisy values are too large: believe what the models say that did "
        "not choose the pairs",
        "the interval takes pairs for independent, and those of one test row are not",
    )

    def frame(self) -> "DataFrame":
        """One row per pair, the largest influence first."""
        return as_table(
            {
                "train": self.train,
                "query": self.query,
                "influence": self.actual,
                "standard_error": self.standard_error,
                "memorization": self.memorization,
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Influence of each pair over the memorization of its training row."""
        ax = axes(ax)
        ax.errorbar(
            self.memorization.numpy(), self.actual.numpy(), 2 * self.standard_error.numpy(),
            fmt="o", markersize=3, linewidth=0.6, color=NEUTRAL,
        )  # fmt: skip
        ax.set(xlabel="memorization of the training row", ylabel="influence on the test row")
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "pairs": len(self),
            **self._fields("opposite", "least", "errors"),
            "memorized_rows": self.rows,
            "chosen_mean": float(self.predicted.mean()) if len(self.predicted) else None,
            "repeated_mean": self.again,
        }


def pairs(
    outcome: SubsetMemorization,
    least: float = INFLUENTIAL,
    memorized: float = MEMORIZED,
    errors: float = 5.0,
) -> Pairs:
    """Pairs of a training row with mem(i) ≥ memorized and a query with infl(i, j) ≥ least.

    Feldman & Zhang (2020), §3.2. The pairs are chosen again by each half of the models, and
    measured by the other half.

    Args:
        outcome: Of `by_subsets`, with queries.
        least: What the influence is to reach.
        memorized: What the memorization of the training row is to reach.
        errors: How many standard errors the influence is to reach as well. Among millions of pairs
            noise alone reaches four; with thousands of models, as in the paper, 0 will do.

    Raises:
        SpecError: The outcome has no queries.
    """
    if not isinstance(outcome, SubsetMemorization):
        raise SpecError(
            "Pairs are taken from models with and without each row.",
            f"a {type(outcome).__name__}.",
            "the outcome of scores(...), which is of one model and no test rows.",
            "pairs(by_subsets(recipe, task, train, queries)); of one model, "
            "fitted.removal(queries, measure, groups) tells what each removal does.",
        )
    right, inside = outcome._require_queries(), outcome.inside
    at = (least, memorized, errors)
    rows, columns, values, opposite = _above(outcome.actual, right, inside, *at)
    chosen, repeated = [], []
    first, second = outcome._split(0)
    for a, b in ((first, second), (second, first)):
        mem = _difference(outcome.right[a], inside[a])
        i, j, there, _ = _above(mem, right[a], inside[a], *at)
        other, _ = _of_pairs(right[b], inside[b], i, j)
        known = other.isfinite()
        chosen.append(there[known])
        repeated.append(other[known])
    order = values.argsort(descending=True, stable=True)
    rows, columns = rows[order], columns[order]
    return Pairs(
        rows,
        columns,
        values[order],
        _of_pairs(right, inside, rows, columns)[1],
        outcome.actual[rows],
        least,
        errors,
        int((outcome.actual >= memorized).sum()),
        opposite,
        torch.cat(chosen),
        torch.cat(repeated),
    )


def sorted_table(columns: Mapping[str, Tensor]) -> "DataFrame":
    """A row per training row, the most memorized first."""
    found = as_table(columns, name="row")
    return found.sort_values("memorization", ascending=False, kind="stable")


def sorted_values(
    values: Float[Tensor, " n"], ax: "Axes | None", error: Float[Tensor, " n"] | None = None
) -> "Axes":
    """Values from the largest on, and the share of .25 or more."""
    ax = axes(ax)
    order = values.argsort(descending=True)
    place = torch.arange(1, len(values) + 1)
    if error is not None:
        low, high = (values[order] + s * 2 * error[order] for s in (-1, 1))
        ax.fill_between(place, low, high, color=NEUTRAL, alpha=0.2, linewidth=0)
    ax.plot(place, values[order], color=NEUTRAL)
    ax.axhline(MEMORIZED, color="0.5", linewidth=0.8)
    share = float((values >= MEMORIZED).double().mean())
    ax.set(
        xscale="log", xlabel="training rows, sorted", ylabel="memorization",
        title=f"{share:.1%} of the rows at {MEMORIZED} or more",
    )  # fmt: skip
    return ax


def _weights(
    n: int, sets: list[list[int]], models: int, share: float, seed: int
) -> Float[Tensor, "s n"]:
    """Samples as data weights of mean 1; the rows of a set are in all together."""
    first = torch.arange(n)
    for rows in sets:
        first[rows] = rows[0]
    _, unit = torch.unique(first, return_inverse=True)
    inside = subset_weights(int(unit.max()) + 1, models, share, seed) > 0
    held = inside[:, unit].double()
    return held * (n / held.sum(dim=1, keepdim=True))  # the mean over what is there


def _require_enough(inside: Bool[Tensor, "s n"]) -> None:
    least = torch.minimum(inside.sum(dim=0), (~inside).sum(dim=0))
    few = (least < LEAST_EACH).nonzero()[:, 0].tolist()
    if few:
        raise SpecError(
            f"Every row must be in {LEAST_EACH} models or more, and out of as many.",
            f"{len(inside)} models, of which {len(few)} of {inside.shape[1]} rows, first "
            f"{few[:3]}, are in or out of fewer.",
            "too few models for the share of the data that each holds.",
            "more models, such as models=200, or share=0.5.",
        )


def _contrast(inside: Bool[Tensor, "s e"]) -> Float[Tensor, "e s"]:
    """Mean over models with the row less mean over models without, as a matrix; 0/0 = NaN."""
    with_row = inside.T.double()
    return with_row / with_row.sum(1, True) - (1 - with_row) / (1 - with_row).sum(1, True)


def _mean(values: Float[Tensor, "s n"], chosen: Bool[Tensor, "s n"]) -> Float[Tensor, " n"]:
    return (values * chosen).sum(dim=0) / chosen.sum(dim=0)


def _difference(values: Float[Tensor, "s n"], inside: Bool[Tensor, "s n"]) -> Float[Tensor, " n"]:
    return _mean(values, inside) - _mean(values, ~inside)


def _standard_error(
    values: Float[Tensor, "s n"], inside: Bool[Tensor, "s n"]
) -> Float[Tensor, " n"]:
    """√(s²₁/m₁ + s²₀/m₀)."""
    total = torch.zeros_like(values[0])
    for chosen in (inside, ~inside):
        count = chosen.sum(dim=0)
        off = (values - _mean(values, chosen)) * chosen
        total = total + off.square().sum(dim=0) / (count - 1) / count
    return total.sqrt()


def _above(
    mem: Float[Tensor, " n"],
    right: Float[Tensor, "s q"],
    inside: Bool[Tensor, "s n"],
    least: float,
    memorized: float,
    errors: float,
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"], Float[Tensor, " k"], int]:
    """Pairs at or above `least` by so many errors, their influence, and how many are opposite."""
    high = (mem >= memorized).nonzero()[:, 0]
    rows, columns, values = [], [], []
    for some in torch.split(high, SHOWN):
        infl = _contrast(inside[:, some]) @ right
        i, j = (infl.abs() >= least).nonzero(as_tuple=True)
        rows.append(some[i])
        columns.append(j)
        values.append(infl[i, j])
    i, j, infl = torch.cat(rows), torch.cat(columns), torch.cat(values)
    sure = infl.abs() >= errors * _of_pairs(right, inside, i, j)[1]
    up = sure & (infl > 0)
    return i[up], j[up], infl[up], int((sure & ~up).sum())


def _of_pairs(
    right: Float[Tensor, "s q"],
    inside: Bool[Tensor, "s n"],
    i: Int[Tensor, " k"],
    j: Int[Tensor, " k"],
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """infl(i, j) of some pairs, and its standard error."""
    values, errors = [], []
    for a, b in zip(torch.split(i, PAIRED), torch.split(j, PAIRED), strict=True):
        values.append(_difference(right[:, b], inside[:, a]))
        errors.append(_standard_error(right[:, b], inside[:, a]))
    return torch.cat(values), torch.cat(errors)
