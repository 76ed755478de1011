"""Which training rows are known by heart, and does that help on others?

    memᵢ = p(yᵢ | f(xᵢ)) − p(yᵢ | f₋ᵢ(xᵢ))         f₋ᵢ: the model without row i

Feldman (2020); Feldman & Zhang (2020), Eq. 1. `scores` takes f₋ᵢ from one fitted model,
`by_subsets` from many models of random samples, `pairs` says which test rows a memorized row helps,
and `removal_experiment` what happens without the most memorized.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.long_tail import RemovalExperiment, removal_experiment
from upweight.applications.outcome import Outcome
from upweight.applications.right_answers import (
    Probability,
    equal_examples,
    probability,
    require_duplicates,
    told_duplicates,
)
from upweight.applications.subject import curvature_left_out, subject_of
from upweight.applications.subset_memorization import (
    MEMORIZED,
    Pairs,
    SubsetMemorization,
    by_subsets,
    pairs,
    sorted_table,
    sorted_values,
)
from upweight.errors import DataError, SpecError, UnsupportedModel
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.methods.fitted import Fitted
from upweight.runtime.streams import stream
from upweight.task.recipe import Recipe
from upweight.training.retrain import Retrained, retrain
from upweight.training.weights import removal_weights
from upweight.verdict import CALIBRATED

__all__ = [
    "Memorization",
    "Pairs",
    "RemovalExperiment",
    "SubsetMemorization",
    "by_subsets",
    "pairs",
    "removal_experiment",
    "scores",
]

FEWEST = 8
"""Refits from which a correlation says anything."""

DRIFT = 0.05
"""From which difference of p(y) on the recipe's model is noted to be another than was asked."""


@dataclass(frozen=True, eq=False)
class Memorization(Outcome):
    """How far each training row is known by heart, by one model.

    Args:
        predicted: memᵢ of every training row, between −1 and 1.
        probability: p(yᵢ | f(xᵢ)), with the row in the data.
        rows: The rows that were left out in turn and the model fitted again; None: none were.
        actual: memᵢ of those, p by the recipe's model of all rows − p by its model without row i.
        highest: How many of `rows` have the largest predictions; the others are drawn at random.
        duplicates: Sets of rows that are equal.
        bootstrap: How the intervals are made; rows are drawn with replacement.
        notes: What to know before the numbers.
    """

    predicted: Float[Tensor, " n"]
    probability: Float[Tensor, " n"]
    rows: Int[Tensor, " k"] | None = None
    actual: Float[Tensor, " k"] | None = None
    highest: int = 0
    duplicates: tuple[tuple[int, ...], ...] = ()
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> Float[Tensor, " n"]:
        """memᵢ of every row: `predicted`."""
        return self.predicted

    title = "Memorization, by one model"

    @property
    def share(self) -> float:
        """Share of the rows with memᵢ of .25 or more."""
        return float((self.predicted >= MEMORIZED).double().mean())

    @cached_property
    def pearson(self) -> Estimate | None:
        """Linear correlation of predicted and refitted; None without refits."""
        return None if self._pair is None else metrics.pearson(*self._pair, self.bootstrap)

    @cached_property
    def slope(self) -> Estimate | None:
        """Slope of refitted on predicted: 1 where sizes are right; None without refits."""
        return None if self._pair is None else metrics.slope(*self._pair, self.bootstrap)

    @property
    def _pair(self) -> tuple[Tensor, Tensor] | None:
        if self.rows is None or self.actual is None:
            return None
        return self.predicted[self.rows], self.actual

    @property
    def is_confirmed(self) -> bool:
        """Whether refits order the rows the same and give half to twice the size."""
        r, b = self.pearson, self.slope
        if r is None or b is None:
            return False
        return r.low > 0 and CALIBRATED[0] <= b.low and b.high <= CALIBRATED[1]

    @property
    def verdict(self) -> str:
        n = len(self.predicted)
        count = int((self.predicted >= MEMORIZED).sum())
        said = (
            f"{count} of {n} training rows ({self.share:.1%}) are memorized by the prediction of "
            f"one model: without such a row the probability of its label falls by {MEMORIZED} or "
            "more"
        )
        r, b = self.pearson, self.slope
        if r is None or b is None:
            return f"{said}; nothing was fitted again."
        assert self.rows is not None
        agree = "agree" if self.is_confirmed else "do not agree"
        return (
            f"{said}; refits without one row, {len(self.rows)} in turn, {agree}: Pearson {r:.4f}, "
            f"slope {b:.3f}."
        )

    def frame(self) -> "DataFrame":
        """One row per training row, the most memorized first; `actual` where it was refitted."""
        actual = torch.full_like(self.predicted, torch.nan)
        if self.rows is not None and self.actual is not None:
            actual[self.rows] = self.actual.to(actual)
        return sorted_table(
            {"memorization": self.predicted, "probability": self.probability, "actual": actual}
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The long tail: memᵢ sorted, and refitted values on it."""
        ax = sorted_values(self.predicted, ax)
        if self.rows is not None and self.actual is not None:
            rank = self.predicted.argsort(descending=True).argsort() + 1
            ax.scatter(rank[self.rows], self.actual, s=14, color="#b8480a", label="refitted")
            ax.legend(frameon=False)
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "rows": len(self.predicted),
            "memorized": int((self.predicted >= MEMORIZED).sum()),
            "share": self.share,
            "refits": 0 if self.rows is None else len(self.rows),
            "pearson": self.pearson,
            "slope": self.slope,
            "duplicate_sets": len(self.duplicates),
        }


def scores(
    asked: Any,
    train: Any = None,
    *,
    confirm: int = 0,
    recipe: Recipe | None = None,
    duplicates: Literal["apart", "together"] = "apart",
    seed: int = 0,
) -> Memorization:
    """memᵢ of every training row from one model, p(yᵢ | f(xᵢ)) − p(yᵢ | f₋ᵢ(xᵢ)).

    f₋ᵢ(xᵢ) are the outputs of `fitted.loo_outputs()`: one Newton step of the objective without the
    row, taken through the outputs and not linearized in p, so that every value is between −1 and 1.
    A curvature by layer is taken for that of the other rows, f₋ᵢ = f + K δ with K = J Ĥ⁻¹ Jᵀ/n: a
    block approximation does not hold the row's own leverage below 1, and correcting by it fails.

    Args:
        asked: A fitted method that offers `loo_outputs`, or a fitted scikit-learn classifier or
            statsmodels results.
        train: Of an estimator, (X, y) as given to its `fit`.
        confirm: How many rows to leave out in turn and fit again: half of them those with the
            largest predictions, half drawn at random from the others. 0: none.
        recipe: How to fit again; None: the library's own fit where it is its model.
        duplicates: Whether a row that has equal copies is removed by itself, or with its copies.
        seed: Of the rows drawn.

    Raises:
        NotOffered: The method does not say where θ moves to.
        UnsupportedModel: The loss is none of classes.
        NonFinite: Without a row the minimum is not determined (leverage 1).
        SpecError: `confirm` is no such number, or there is no recipe to confirm with.
        NotConverged: A refit failed.

    Exact when: the objective is quadratic in θ and outputs are linear in it. Otherwise one Newton
    step: on softmax regression the error is about 1 % of the size; by layer, of a network, order
    at best.
    Cost: one pass over the training data (c backward passes per example by layer), and
    `confirm` + 1 fits.
    """
    about = subject_of(asked, train, recipe)
    together = require_duplicates(duplicates)
    fitted = about.fitted
    n = len(fitted.train)
    if confirm and not FEWEST <= confirm <= n:
        raise SpecError(
            f"Refits of {FEWEST} rows or more say whether a prediction holds.",
            f"confirm={confirm} of {n} training rows.",
            "a share in place of a number, or a small data set.",
            f"confirm={min(60, n)}, or 0 for none.",
        )
    outputs = fitted.loo_outputs(curvature_left_out(fitted))
    try:
        inside, without = _probabilities(fitted, outputs)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            "Memorization is of the probability of a row's class.",
            f"{fitted.task.loss!r}.",
            "a regression or counts, whose density is no probability.",
            "ask what a row does to its own prediction: fitted.leverage(), or the loss without it, "
            "cross_validation.loo(...).",
        ) from error
    values = inside - without
    sets = equal_examples(fitted.train)
    if together and sets:
        values = _together(fitted, values, sets)
    notes = _notes(fitted, sets, together)
    made = Memorization(values, inside, duplicates=tuple(map(tuple, sets)), notes=notes)
    if not confirm:
        return made
    # Of equal rows that leave together one stands for all.
    chosen = values.argsort(descending=True, stable=True)
    if together:
        copies = {i for rows in sets for i in rows[1:]}
        chosen = torch.tensor([i for i in chosen.tolist() if i not in copies])
    count = min(confirm, len(chosen))
    highest = count // 2
    draw = torch.randperm(len(chosen) - highest, generator=stream("rows left out", seed))
    rows = torch.cat([chosen[:highest], chosen[highest:][draw[: count - highest]]])
    with_copies = {rows[0]: rows for rows in sets} if together else {}
    groups = [with_copies.get(i, [i]) for i in rows.tolist()]
    again = retrain(
        about.require_recipe("scores(confirm=...)"),
        fitted.task,
        fitted.train,
        removal_weights(n, groups),
        fitted.train.subset(rows.tolist()),
        Probability(),
        resources=fitted.resources.within("refits"),
    )
    said = (
        f"the {highest} rows of largest prediction and {count - highest} drawn at random from the "
        "others were left out in turn and the model fitted again",
        *_drifted(again),
    )
    actual = again.baseline - again.values.diagonal()
    return replace(made, rows=rows, actual=actual, highest=highest, notes=(*said, *notes))


def _probabilities(
    fitted: Fitted, outputs: Float[Tensor, "n *c"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """p(y) with every row and without it, in float64 on the CPU."""
    task, parts = fitted.task, []
    size = max(1, 1 + 2**20 // max(1, outputs[0].numel()))
    with torch.no_grad():
        for start, stop, batch in fitted.train.batches(min(size, 1024)):
            there, targets = task.outputs(fitted.theta, task.to_device(batch))
            both = (there, outputs[start:stop].to(there))
            parts.append([probability(task.loss, f.double(), targets).cpu() for f in both])
    inside, without = (torch.cat(side).double() for side in zip(*parts, strict=True))
    bad = (~(inside - without).isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            "Every training row needs a probability with it and without it.",
            f"{len(bad)} rows of {len(inside)} have NaN, first {bad[:5]}.",
            "a model whose outputs are NaN, or infinite without the row.",
            "leave these rows out of the data, or train with a penalty.",
        )
    return inside, without


def _together(
    fitted: Fitted, values: Float[Tensor, " n"], sets: list[list[int]]
) -> Float[Tensor, " n"]:
    """The same, with equal rows removed at once."""
    values = values.clone()
    first = fitted.train.subset([rows[0] for rows in sets])
    found = fitted.removal(first, Probability(), sets, evaluate="plugin")
    for rows, change in zip(sets, found.values.diagonal().cpu().double().tolist(), strict=True):
        values[rows] = -change
    return values


def _notes(fitted: Fitted, sets: list[list[int]], together: bool) -> tuple[str, ...]:
    notes = []
    if sets:
        notes.append(told_duplicates(sets, together))
    if curvature_left_out(fitted) == "others":
        notes.append(
            "by layer: one step with the curvature of a block at a time, which orders rows better "
            "than it sizes them; hold it against by_subsets(...)"
        )
    return tuple(notes)


def _drifted(again: Retrained) -> tuple[str, ...]:
    most = float(again.drift.abs().max())
    if most <= DRIFT:
        return ()
    return (
        "the recipe's model of all the data is another than the one that was asked: p(y) of the "
        f"refitted rows differs by up to {most:.2f}",
    )
