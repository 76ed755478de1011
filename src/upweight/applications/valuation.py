"""What are training examples worth, and what would dropping or buying some of them do?

    v_i      = −(1/q) Σ_q S[q, i]            of a measure that is better when lower, as a loss
    Δm(B)    = m(θ̂ + Δθ(B)) − m(θ̂)           predicted of a batch B, dropped or bought
             = m(θ(w_B)) − m(θ(1))           refitted

`values` reads the worth of every example, or of every contributor, off the scores of any method
whose unit adds up: Shapley values are shares of a total, derivatives are first-order effects of
leaving the example out. `worth` asks what a batch does to the validation points and fits again.
`compare` holds several valuations against each other and against refits.

Jia et al. (2019), Efficient task-specific data valuation for nearest neighbor algorithms; Ghorbani
& Zou (2019), Data Shapley.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from upweight._typing import Axes, Batch, DataFrame, Params
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import Subject, subject_of
from upweight.effects import Groups, as_groups
from upweight.errors import DataError, ShapeError, SpecError
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import NORMAL, Bootstrap, Estimate, means
from upweight.gradients.autograd import data_gradient
from upweight.notation import bracketed, count, readable
from upweight.plot import axes
from upweight.provenance import Provenance
from upweight.runtime.resources import Resources
from upweight.scores import Scores, Unit
from upweight.task.check import require_answerable
from upweight.task.data import ArrayData, Data, Subset, as_data
from upweight.task.measures import Loss, Measure, as_measure, measured
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.retrain import retrain
from upweight.training.weights import removal_weights

__all__ = ["Comparison", "Correct", "Values", "Worth", "compare", "values", "worth"]

LOWER = ("Loss()",)
HIGHER = ("LogProb()", "Margin()", "Logit(", "Correct()")
"""Measures, as provenance writes them, of which it is known which way is better."""

WORDS = {"Loss()": "loss", "Correct()": "accuracy"}

SHOWN = 30
"""Bars of a figure."""


# -- what each is worth ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Values(Outcome):
    """What each training example, or each contributor, is worth: the mean over validation points.

    Args:
        scores: S, a column per example or contributor.
        sign: What makes worth of a score: −1 where a lower measure is better.
        bootstrap: How the interval of the total is made.
    """

    scores: Scores
    sign: float
    bootstrap: Bootstrap

    @cached_property
    def by_point(self) -> Float[Tensor, "q m"]:
        """What each is worth to each validation point."""
        return self.sign * self.scores.values[:].detach().cpu().double()

    @cached_property
    def predicted(self) -> Float[Tensor, " m"]:
        """v of each, in the unit of the scores."""
        return self.by_point.mean(dim=0)

    @property
    def actual(self) -> None:
        """None: a value is no claim about a refit; `worth` and `payout.statement` fit again."""
        return None

    @cached_property
    def standard_errors(self) -> Float[Tensor, " m"]:
        """Of each value over validation points, s/√q: what a bootstrap of a mean goes to.

        NaN for one validation point. The noise of a method that draws is not in it.
        """
        values = self.scores.values[:].detach().cpu()
        if len(values) == 1:
            return torch.full((values.shape[1],), torch.nan, dtype=torch.float64)
        return values.std(dim=0).double() / len(values) ** 0.5

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the columns: contributors, or places of examples."""
        columns = self.scores.columns
        return tuple(map(str, range(len(self.predicted)))) if columns is None else columns

    @cached_property
    def total(self) -> Estimate:
        """Σ v, with its interval over validation points."""
        return means(self.by_point.sum(dim=1, keepdim=True), self.bootstrap)[0]

    @property
    def owed(self) -> float | None:
        """What Σ v must be; None where the method does not say.

        Of Shapley values v(D) − v(∅), from the votes or models themselves. Of influence
        ±∇mᵀ H⁻¹ ∇R: the penalty's share, 0 without one, since upweighting everything alike changes
        nothing else. Such values are worth beside the average, not shares of a whole.
        """
        expected = self.scores.provenance.health.get("row_sum_expected")
        return None if expected is None else self.sign * float(expected)

    @property
    def below(self) -> int:
        """How many are worth less than 0 by more than 1.96 standard errors."""
        return int((self.predicted + NORMAL * self.standard_errors < 0).sum())

    @property
    def above(self) -> int:
        """How many are worth more than 0 by more than 1.96 standard errors."""
        return int((self.predicted - NORMAL * self.standard_errors > 0).sum())

    @property
    def title(self) -> str:
        return f"What {self._of} are worth"

    @property
    def _of(self) -> str:
        by_example = self.scores.columns is None
        return count(len(self.names), "training example" if by_example else "contributor")

    @property
    def verdict(self) -> str:
        made = self.scores.provenance
        unit = "shares" if self.scores.unit is Unit.VALUE else "first-order changes"
        owed = "" if self.owed is None else f" (by the method's own account {readable(self.owed)})"
        sure = (
            "with one validation point there is no interval"
            if len(self.scores) == 1
            else f"{self.above:,} are worth more than 0 and {self.below:,} less beyond 1.96 "
            "standard errors"
        )
        return (
            f"By {method_name(made.method)} {self._of} are worth {bracketed(*self.total)} together"
            f"{owed}, in {unit} of {_measured(made)} over "
            f"{count(len(self.scores), 'validation point')}; "
            f"{sure}; no refit stands behind this."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        said = ["values are relative to these validation points: others would value otherwise"]
        if len(self.scores) > 1:
            said.append("of values that are 0, 2.5 % lie below and 2.5 % above by chance")
        sizes = float(self.predicted.abs().sum())
        if self.scores.unit is Unit.DERIVATIVE and abs(self.total.value) < 0.1 * sizes:
            said.append(
                "derivatives compare with the average: they add up to "
                f"{readable(self.total.value)} where their sizes add up to {readable(sizes)}, so a "
                "negative value is no harm in itself"
            )
        if self.scores.unit is Unit.VALUE:
            said.append(
                "copies of an example share or repeat its value; that is no new information"
            )
        return tuple(said)

    def frame(self) -> "DataFrame":
        """A row per example or contributor, the most valuable first."""
        value, error = self.predicted, self.standard_errors
        columns = {
            "value": value,
            "standard error": error,
            "low": value - NORMAL * error,
            "high": value + NORMAL * error,
        }
        what = "example" if self.scores.columns is None else "contributor"
        index = range(len(value)) if self.scores.columns is None else self.names
        return as_table(columns, index, what).sort_values("value", ascending=False, kind="stable")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Values in order with their intervals; of many examples the curve alone."""
        ax = axes(ax)
        table = self.frame()
        if len(table) <= SHOWN:
            bars(ax, [*map(str, table.index)], table[["value", "low", "high"]].to_numpy())
            ax.set_xlabel("worth")
            return ax
        ax.fill_between(range(len(table)), table["low"], table["high"], alpha=0.3, linewidth=0)
        ax.plot(range(len(table)), table["value"])
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        ax.set(xlabel="examples, most valuable first", ylabel="worth")
        return ax

    def numbers(self) -> dict[str, Any]:
        shown = self.frame().head(SHOWN)
        return {
            "total": vars(self.total),
            **self._fields("owed", "above", "below"),
            "most valuable": {str(k): v for k, v in shown["value"].items()},
        }


def values(
    scores: Scores,
    *,
    contributors: Iterable[Any] | None = None,
    better: Literal["lower", "higher"] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> Values:
    """The worth of every training example, v_i = ∓(1/q) Σ_q S[q, i], or of every contributor.

    Args:
        scores: Of validation points, in ∂m/∂w or values. Ranks add up to nothing and are refused.
        contributors: Who each training example is from: one label each. Worth is summed by label.
        better: Whether the measure is better "lower", as a loss, or "higher". None: what is known
            of Loss, LogProb, Margin, Logit and Correct.
        bootstrap: How the interval of the total is made.

    Raises:
        SpecError: The scores only rank, or nobody knows which way their measure is better.
        ShapeError: There is not one contributor per example, or no validation point.
        DataError: Contributors that differ have one text.

    Exact when: the scores are. Cost: two passes over the scores.
    """
    if scores.unit is Unit.RANK:
        raise SpecError(
            "A value is a sum of scores in ∂m/∂w or of shares of a total.",
            f"scores that only rank, of {method_name(scores.provenance.method)}.",
            "a similarity or an uncalibrated projection, whose rows have no common unit.",
            "scores of Influence(...), KNNShapley(...) or DataShapley(...).",
        )
    if not len(scores):
        raise ShapeError(
            "A value is a mean over validation points.",
            "scores of none.",
            "a filter that matched nothing.",
            "attribute to a validation set of at least two points.",
        )
    if better not in (None, "lower", "higher"):
        raise SpecError(
            'A measure is better "lower" or "higher".',
            f"better={better!r}.",
            "a number or a direction in other words.",
            'better="lower" for losses and errors, better="higher" for scores of success.',
        )
    measure = scores.provenance.measure
    if better is None and measure.startswith((*LOWER, *HIGHER)):
        better = "lower" if measure.startswith(LOWER) else "higher"
    if better is None:
        raise SpecError(
            "Worth needs to know which way the measure is better.",
            f"measure {measure}, better=None.",
            "a function of your own, of which only you know it.",
            'better="lower" where it is a loss or an error, else better="higher".',
        )
    if contributors is not None:
        scores.require_examples()
        scores = scores.group(contributors)
    return Values(scores, -1.0 if better == "lower" else 1.0, bootstrap)


# -- what a batch does ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Correct(Measure):
    """m = 1 where the largest output is the target's class, else 0: its mean is the accuracy.

    Of one output, as of `Bernoulli`, the class is 1 where it is positive. It has no gradient: it is
    for models that are measured, as `worth` does.
    """

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        outputs, targets = task.outputs(params, batch)
        y = targets[0] if isinstance(targets, tuple | list) else targets
        flat = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
        if not isinstance(y, Tensor) or y.numel() != len(flat):
            raise DataError(
                "Accuracy needs one class per query.",
                f"targets {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}.",
                "a sequence, or class probabilities.",
                "a measure of your own: a function (outputs, targets) -> [q].",
            )
        chosen = flat.argmax(dim=1) if flat.shape[1] > 1 else (flat[:, 0] > 0).long()
        return (chosen == y.flatten()).to(outputs.dtype)


@dataclass(frozen=True, eq=False)
class Worth(Outcome):
    """What dropping or buying batches does to a measure of validation points.

    Args:
        action: "drop" or "buy".
        names: Of the batches.
        groups: Their rows, of the training data or of the pool.
        measure: What was measured, in words.
        before: m_q(θ̂) of the model as it is.
        predicted: Δm of each batch and validation point, `[b, q]`.
        actual: The same after fitting again; None where nothing was.
        bootstrap: How intervals over validation points are made.
        cautions: What to know of the refits.
    """

    action: Literal["drop", "buy"]
    names: tuple[str, ...]
    groups: Groups
    measure: str
    before: Float[Tensor, " q"]
    predicted: Float[Tensor, "b q"]
    actual: Float[Tensor, "b q"] | None
    bootstrap: Bootstrap
    cautions: tuple[str, ...] = ()

    @cached_property
    def predicted_means(self) -> tuple[Estimate, ...]:
        """Mean Δm of each batch as predicted, with its interval."""
        return means(self.predicted.T, self.bootstrap)

    @cached_property
    def actual_means(self) -> tuple[Estimate, ...] | None:
        """The same as refitted."""
        return None if self.actual is None else means(self.actual.T, self.bootstrap)

    @cached_property
    def agreement(self) -> Estimate | None:
        """Pearson correlation of predicted and refitted means over batches.

        None for fewer than three, or where all are alike.
        """
        if self.actual is None:
            return None
        return correlation(self.predicted.mean(dim=1), self.actual.mean(dim=1), self.bootstrap)

    @property
    def _largest(self) -> int:
        return int(self.predicted.mean(dim=1).abs().argmax())

    @property
    def title(self) -> str:
        done = "Dropping" if self.action == "drop" else "Buying"
        return f"{done} {count(len(self.names), 'batch').replace('batchs', 'batches')}"

    @property
    def is_confirmed(self) -> bool:
        """Whether the refit moves the measure to the predicted side, beyond its interval."""
        if self.actual_means is None:
            return False
        refitted, said = self.actual_means[self._largest], self.predicted_means[self._largest].value
        beyond = refitted.low > 0 if said > 0 else refitted.high < 0
        return said != 0 and beyond

    @property
    def verdict(self) -> str:
        k = self._largest
        said = self.predicted_means[k]
        done = "Dropping" if self.action == "drop" else "Buying"
        rows = count(len(self.groups[k]), "example")
        text = (
            f"{done} {self.names[k]} ({rows}) is predicted to change the mean {self.measure} by "
            f"{bracketed(*said, signed=True)} from {readable(float(self.before.mean()))}"
        )
        if self.actual_means is None:
            return f"{text}; no refit stands behind this."
        text += f"; refitted it changes by {bracketed(*self.actual_means[k], signed=True)}"
        if not self.is_confirmed:
            text += ", which does not confirm it"
        if self.agreement is not None:
            text += f"; over {len(self.names)} batches r = {bracketed(*self.agreement)}"
        return f"{text}."

    @property
    def notes(self) -> tuple[str, ...]:
        said = list(self.cautions)
        if self.action == "buy":
            said.append(
                "bought batches are predicted to first order: one that is not small beside the "
                "training data is predicted to do more than it does"
            )
        if len(self.names) > 1:
            said.append(f"the sentence is about the largest of {len(self.names)} predictions")
        return tuple(said)

    def frame(self) -> "DataFrame":
        """A row per batch."""
        table: dict[str, Any] = {"examples": [len(group) for group in self.groups]}
        for word, every in (("predicted", self.predicted_means), ("refitted", self.actual_means)):
            if every is not None:
                table |= columns_of(every, word, f"{word} low", f"{word} high")
        return as_table(table, self.names, "batch")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Refitted against predicted, or the predictions as bars."""
        ax = axes(ax)
        if self.actual is None:
            some = sorted(range(len(self.names)), key=lambda k: -abs(self.predicted_means[k].value))
            some = some[:SHOWN]
            every = [self.predicted_means[k] for k in some]
            bars(ax, [self.names[k] for k in some], every)
            ax.set_xlabel(f"predicted change of {self.measure}")
            return ax
        predicted, actual = self.predicted.mean(dim=1), self.actual.mean(dim=1)
        ax.scatter(predicted, actual, s=16)
        both = torch.cat([predicted, actual])
        ends = [float(both.min()), float(both.max())]
        ax.plot(ends, ends, color="0.6", linewidth=0.8)
        what = f"change of {self.measure}"
        ax.set(xlabel=f"predicted {what}", ylabel=f"refitted {what}")
        return ax

    def numbers(self) -> dict[str, Any]:
        actual = self.actual_means
        return {
            "action": self.action,
            "before": float(self.before.mean()),
            "predicted": dict(zip(self.names, map(vars, self.predicted_means), strict=True)),
            "actual": actual and dict(zip(self.names, map(vars, actual), strict=True)),
            "pearson": self.agreement and vars(self.agreement),
        }


def worth(
    asked: Any,
    batches: Mapping[str, Any] | Iterable[Any],
    validation: Any,
    measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    *,
    train: Any = None,
    pool: Any = None,
    recipe: Recipe | None = None,
    refit: bool = True,
    bootstrap: Bootstrap = Bootstrap(),
    resources: Resources | None = None,
) -> Worth:
    """What dropping batches of the training data, or buying batches of a pool, does to a measure.

        drop    Δm = m(θ̂ + Δθ) − m(θ̂),  Δθ by `removal_step`: a Newton step, by layer first order
        buy     Δm = m(θ̂ + Δθ) − m(θ̂),  Δθ = −(1/n) P Σ_{z ∈ B} ∇ℓ(θ̂; z)

    and the same after fitting again with wᵢ = 0 of what is dropped, or with the batch added at
    w = 1. The objective keeps its 1/n and its penalty. m is evaluated, not linearized, so it may be
    `Correct()`.

    Args:
        asked: A fitted method that says where θ̂ moves, a fitted scikit-learn estimator, or
            statsmodels results.
        batches: Rows of each batch (indices or a mask), by name or in order.
        validation: The points that are measured, as for `as_data`.
        measure: What is measured: `Loss()`, `Correct()`, or a function (outputs, targets) -> [q].
        train: Of an estimator, (X, y).
        pool: What can be bought, as for `as_data`; None: the batches are dropped.
        recipe: How to fit again. None: a library's own fit where it is its model; of a network
            nothing is fitted again, and nothing is confirmed.
        refit: Whether to fit again where it is known how.
        bootstrap: How intervals over validation points are made.
        resources: Of the refits: `folder` keeps them, `jobs` shares them out.

    Raises:
        NotOffered: The method does not say where θ̂ moves, as Shapley values.
        ShapeError: A batch is empty, names rows twice or that do not exist, or is everything.
        DataError: The pool does not have the form of the training data.
        NotConverged: A refit failed; see `retrain`.

    Cost: a step and a forward pass over the validation points for each batch; b + 1 trainings.
    """
    subject = subject_of(asked, train, recipe)
    fitted = subject.fitted
    task, n = fitted.task, len(fitted.train)
    queries = task.queries(validation)
    of = as_measure(measure)
    names, groups = _named(batches, n if pool is None else len(task.training(pool)))
    offered = None if pool is None else task.training(pool)
    if offered is None:
        removal_weights(n, groups)  # refuses to drop everything
        steps: Iterable[Tensor] = (
            task.layout.flatten(fitted.removal_step(list(group))) for group in groups
        )
    else:
        steps = _bought(subject, offered, groups)
    before = measured(task, fitted.theta, queries, of).cpu()
    predicted = torch.stack(
        [measured(task, fitted.theta + step, queries, of).cpu() - before for step in steps]
    )
    _require_finite(predicted, names)
    actual: Tensor | None = None
    cautions: tuple[str, ...] = ()
    if refit and subject.recipe is not None:
        refitted = _refitted(subject, offered, groups, queries, of, resources).cpu()
        actual, cautions = refitted[1:] - refitted[:1], _cautions(before, refitted)
    action: Literal["drop", "buy"] = "drop" if offered is None else "buy"
    words = WORDS.get(repr(of), repr(of))
    return Worth(action, names, groups, words, before, predicted, actual, bootstrap, cautions)


def _bought(subject: Subject, pool: Data, groups: Groups) -> Iterable[Float[Tensor, " p"]]:
    """−(1/n) P Σ ∇ℓ of each batch of the pool."""
    fitted = subject.fitted
    fitted.parameter_influence(0)  # what does not say where θ̂ moves says so
    require_answerable(fitted.task, pool, "pool")
    gradients = [data_gradient(fitted.task, fitted.theta, pool.subset(group)) for group in groups]
    solved: Tensor = fitted.scorer.solve(torch.stack(gradients))
    return -solved / len(fitted.train)


def _refitted(
    subject: Subject,
    pool: Data | None,
    groups: Groups,
    queries: Data,
    measure: Callable[..., Tensor],
    resources: Resources | None,
) -> Float[Tensor, "b_1 q"]:
    """m of the model as trained, and of that after each batch."""
    fitted, n = subject.fitted, len(subject.fitted.train)
    recipe = subject.require_recipe("worth(...)")
    if pool is None:
        weights = removal_weights(n, groups)
        found = retrain(
            recipe, fitted.task, fitted.train, weights, queries, measure, resources=resources
        )
        return torch.cat([found.baseline[None], found.values])
    both = joined(fitted.train, pool)
    rows = torch.zeros(len(groups) + 1, len(both), dtype=torch.float64)
    rows[:, :n] = len(both) / n  # the mean is over all rows, and the objective keeps its 1/n
    for k, group in enumerate(groups):
        rows[k + 1, [n + place for place in group]] = len(both) / n
    return retrain(recipe, fitted.task, both, rows, queries, measure, resources=resources).values


def _cautions(before: Float[Tensor, " q"], refitted: Float[Tensor, "b_1 q"]) -> tuple[str, ...]:
    drift = float((refitted[0] - before).mean())
    typical = float((refitted[1:] - refitted[:1]).mean(dim=1).abs().median())
    if abs(drift) <= 0.1 * typical:
        return ()
    return (
        "the recipe makes another model than the one that was asked about: the measure differs by "
        f"{readable(drift, signed=True)} before anything is dropped or bought",
    )


def joined(first: Data, second: Data) -> Data:
    """The examples of both, one after the other.

    Raises:
        DataError: They are not tensors of one form.
    """
    parts = [data.take(range(len(data))) for data in (first, second)]
    trees = [tree_leaves(part) for part in parts]
    alike = len(trees[0]) == len(trees[1]) and all(
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape[1:] == b.shape[1:]
        and len(a) == len(first)
        for a, b in zip(*trees, strict=True)
    )
    if not alike:
        forms = [", ".join(str(tuple(getattr(x, "shape", ()))) for x in tree) for tree in trees]
        raise DataError(
            "Data that are joined are tensors of one form, with the examples on their first axis.",
            f"leaves of shape {forms[0]}, and of {forms[1]}.",
            "a pool without labels or with other columns, or examples of several sizes.",
            "give the pool as the training data were given: (X, y) with the same columns.",
        )
    arrays, like = tree_map(lambda a, b: torch.cat([a, b.to(a)]), *parts), first
    while isinstance(like, Subset):
        like = like.data
    # Of the same kind: data that an adapter translated say for which model.
    if isinstance(like, ArrayData):
        return replace(like, arrays=arrays, given=None)
    return as_data(arrays)


def _named(batches: Any, size: int) -> tuple[tuple[str, ...], Groups]:
    """Names and rows of each batch."""
    by_name = batches if isinstance(batches, Mapping) else None
    rows = [*by_name.values()] if by_name is not None else [*batches]
    if by_name is None and rows and all(not hasattr(row, "__len__") for row in rows):
        rows = [rows]  # one batch
    groups = as_groups(rows, size)
    names = map(str, by_name) if by_name is not None else (f"batch {k}" for k in range(len(rows)))
    return tuple(names), groups


def _require_finite(predicted: Float[Tensor, "b q"], names: Sequence[str]) -> None:
    bad = (~predicted.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise DataError(
            "A measure must be finite with and without a batch.",
            f"{float(predicted[row, column])} for {names[row]} at validation point {column}.",
            "a step so long that the measure overflows, or a validation point without a value.",
            "a smaller batch, a penalty, or leave that validation point out.",
        )


# -- several valuations ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison(Outcome):
    """How valuations agree, with each other and with refitted removals.

    Args:
        names: Of the valuations.
        orders: Spearman correlation of each pair, `{(a, b): ρ}`.
        predicted: V of each batch by each valuation, `[k, b]`; None without refits.
        actual: By how much really dropping each batch worsens the measure, `[b]`.
        agreement: Pearson correlation of each valuation with the refits; None where there is none.
        batches: Names of the batches.
    """

    names: tuple[str, ...]
    orders: Mapping[tuple[str, str], Estimate]
    predicted: Float[Tensor, "k b"] | None
    actual: Float[Tensor, " b"] | None
    agreement: Mapping[str, Estimate | None]
    batches: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{count(len(self.names), 'valuation')} compared"

    @property
    def is_confirmed(self) -> bool:
        """Whether some valuation agrees with refits beyond its interval."""
        return any(e is not None and e.low > 0 for e in self.agreement.values())

    @property
    def verdict(self) -> str:
        pairs = "; ".join(
            f"{a} and {b} order alike to ρ = {bracketed(*e)}"
            for (a, b), e in [*self.orders.items()][:2]
        )
        if self.actual is None:
            return f"{_capital(pairs)}; no refit stands behind either."
        known = {name: e for name, e in self.agreement.items() if e is not None}
        if not known:
            return f"{_capital(pairs)}; too few or equal removals to say which refits agree with."
        best = max(known, key=lambda name: known[name].value)
        end = f"refitted removals of {len(self.batches)} batches agree most with {best}"
        text = f"{end}, r = {bracketed(*known[best])}" + (f"; {pairs}" if pairs else "")
        return f"{_capital(text)}."

    notes = ("intervals draw examples, or batches, not validation points",)

    def frame(self) -> "DataFrame":
        """A row per valuation: its rank correlation with the others, and its r with refits."""
        table: dict[str, Any] = {}
        for other in self.names:
            table[f"ρ with {other}"] = [
                1.0
                if name == other
                else self.orders.get((name, other), self.orders.get((other, name))).value  # type: ignore[union-attr]
                for name in self.names
            ]
        if self.actual is not None:
            every = [self.agreement[name] for name in self.names]
            known = [Estimate(math.nan, math.nan, math.nan) if e is None else e for e in every]
            table |= columns_of(known, "r with refits", "r low", "r high")
        return as_table(table, self.names, "valuation")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Refitted removals against each valuation, each in units of its own deviation."""
        ax = axes(ax)
        if self.predicted is None or self.actual is None:
            bars(ax, [f"{a} – {b}" for a, b in self.orders], self.orders.values())
            ax.set_xlabel("Spearman correlation")
            return ax
        for name, row in zip(self.names, self.predicted, strict=True):
            deviation = float(row.std()) if len(row) > 1 else 0.0
            ax.scatter((row / (deviation or 1.0)).numpy(), self.actual.numpy(), s=14, label=name)
        ax.set(xlabel="value of the batch, in standard deviations", ylabel="refitted without it")
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "spearman": {f"{a} – {b}": vars(e) for (a, b), e in self.orders.items()},
            "pearson with refits": {name: e and vars(e) for name, e in self.agreement.items()},
        }


def compare(
    valuations: Mapping[str, Values],
    removals: Worth | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> Comparison:
    """How the orders of valuations agree, and which of them refitted removals agree with.

    Args:
        valuations: By name, each of every training example.
        removals: What `worth` gave for batches that were dropped; with refits it decides.
        bootstrap: How intervals over examples, and over batches, are made: for 60,000 examples
            Bootstrap(resamples=100) takes seconds.

    Raises:
        SpecError: There are fewer than two valuations and no removals, or batches were bought.
        ShapeError: The valuations are of other examples, or of contributors.
        DataError: All values of one are equal.
    """
    if len(valuations) < (1 if removals is not None else 2):
        raise SpecError(
            "A comparison is of two valuations, or of one with refits.",
            f"{len(valuations)} of them, removals={'given' if removals else None}.",
            "a list that was filtered.",
            "compare({'neighbours': values(a), 'influence': values(b)}).",
        )
    if removals is not None and removals.action != "drop":
        raise SpecError(
            "Valuations of training examples compare with batches that were dropped.",
            "batches that were bought.",
            "a pool, which has no values yet.",
            "worth(fitted, batches, validation, recipe=recipe) without pool=.",
        )
    names = tuple(valuations)
    every = [valuations[name] for name in names]
    for each in every:
        each.scores.require_examples()
    sizes = [len(each.predicted) for each in every]
    if len(set(sizes)) > 1:
        raise ShapeError(
            "Valuations that are compared are of the same training examples.",
            f"{dict(zip(names, sizes, strict=True))} examples.",
            "scores of two versions of the data.",
            "values of scores of one training set.",
        )
    orders = {
        (names[a], names[b]): metrics.spearman(every[a].predicted, every[b].predicted, bootstrap)
        for a in range(len(names))
        for b in range(a + 1, len(names))
    }
    if removals is None or removals.actual is None:
        return Comparison(names, orders, None, None, dict.fromkeys(names))
    predicted = torch.stack(
        [torch.stack([each.predicted[list(g)].sum() for g in removals.groups]) for each in every]
    )
    if removals.measure not in WORDS.values():
        raise SpecError(
            "A value is held against a refitted change of which it is known which way is better.",
            f"removals measured by {removals.measure}.",
            "a measure of your own.",
            "worth(…, measure=Loss()) or worth(…, measure=Correct()).",
        )
    harm = removals.actual.mean(dim=1) * (1.0 if removals.measure == "loss" else -1.0)
    agreement = {
        name: correlation(row, harm, bootstrap) for name, row in zip(names, predicted, strict=True)
    }
    return Comparison(names, orders, predicted, harm, agreement, removals.names)


# -- shared ---------------------------------------------------------------------------------------


def correlation(
    predicted: Float[Tensor, " b"], actual: Float[Tensor, " b"], bootstrap: Bootstrap
) -> Estimate | None:
    """Pearson's r; None of fewer than three, or where one side is constant."""
    if len(predicted) < 3 or float(predicted.std()) == 0 or float(actual.std()) == 0:
        return None
    return metrics.pearson(predicted.double(), actual.double(), bootstrap)


def method_name(method: str) -> str:
    """The name of a method without its settings."""
    return method.partition("(")[0]


def _measured(made: Provenance) -> str:
    """What was measured, in words."""
    if made.method.startswith("KNNShapley"):
        return "what its neighbours get right"
    return f"the {WORDS[made.measure]}" if made.measure in WORDS else made.measure


def columns_of(every: Iterable[Estimate], *names: str) -> dict[str, tuple[float, ...]]:
    """Values and ends of intervals as three columns of a table."""
    return dict(zip(names, zip(*every, strict=True), strict=True))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def bars(ax: "Axes", names: Sequence[str], ends: Iterable[Iterable[float]]) -> None:
    """Bars from the top with the ends of their intervals: (value, low, high) of each."""
    places = range(len(names) - 1, -1, -1)
    found = torch.tensor([[*each] for each in ends], dtype=torch.float64).reshape(-1, 3).numpy()
    ax.barh(places, found[:, 0], color="#0072b2")
    ax.hlines(places, found[:, 1], found[:, 2], color="0.2", linewidth=1.0)
    ax.axvline(0.0, color="0.6", linewidth=0.8)
    ax.set_yticks(list(places), [name[:40] for name in names])
