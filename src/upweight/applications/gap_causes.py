"""Which training rows a gap between groups comes from.

    S_i = ∂m/∂wᵢ           what row i does to the soft gap m on validation rows
    share_g = Σ_{i ∈ g} Sᵢ / m      what the rows of a group do to it, to first order

A share of .4 says: without these rows the gap is predicted to be smaller by 40 % of itself. Shares
do not add up to 1. At a minimum of the objective upweighting every row alike changes nothing but
the penalty's part, so that all shares together are near 0: rows that widen a gap stand against
rows that narrow it.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.group_gaps import (
    Gap,
    counted,
    difference_error,
    differences,
    read,
    readings,
    require_gap,
)
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import Subject, subject_of
from upweight.errors import (
    AssumptionWarning,
    DataError,
    NotWritten,
    ShapeError,
    SpecError,
    StaleStore,
    UpweightError,
)
from upweight.evaluation.bootstrap import Estimate, around
from upweight.methods.reduce import GroupSums
from upweight.notation import count, percent
from upweight.plot import axes, reaches
from upweight.runtime.resources import Resources
from upweight.runtime.selection import labels_by_place
from upweight.scores import Scores
from upweight.task.data import Data
from upweight.task.recipe import Recipe, Trained
from upweight.training.kept import kept_trainer

FEW = 20
"""Validation rows of a group below which a gap may be chance, whatever else is known."""


@dataclass(frozen=True, eq=False)
class Cause:
    """The rows of one group.

    Args:
        name: Its label.
        rows: How many there are.
        share: Σ S/m over them, with an interval over validation rows.
        predicted: Change of the soft gap without them: by `fitted.removal`.
        actual: The same after refitting; None where it was not.
        hard: Change of the gap in decisions after refitting.
        failed: Why a refit gave nothing.
        taken: What the refit takes away of the gap, as a share of it, with an interval over
            validation rows; None where there is none.
    """

    name: str
    rows: int
    share: Estimate
    predicted: float | None
    actual: float | None
    hard: float | None
    failed: str = ""
    taken: Estimate | None = None


@dataclass(frozen=True, eq=False)
class GroupCauses(Outcome):
    """Which groups of training rows a gap comes from. Made by `Causes.by`.

    Args:
        gap: On the validation rows.
        soft: The soft gap of the model as it was.
        pair: Which groups are compared, in words.
        column: What the training rows were grouped by.
        causes: By share, the largest first.
    """

    gap: Gap
    soft: float
    pair: str
    column: str
    causes: tuple[Cause, ...]

    @property
    def title(self) -> str:
        return f"The {self.gap.words} by {self.column} of training rows"

    @property
    def top(self) -> Cause:
        """The group with the largest share."""
        return self.causes[0]

    @property
    def predicted(self) -> float | None:  # type: ignore[override]
        """Change of the soft gap without the top group."""
        return self.top.predicted

    @property
    def actual(self) -> float | None:  # type: ignore[override]
        """The same after refitting."""
        return self.top.actual

    @property
    def is_confirmed(self) -> bool:
        """Whether the gap is smaller without the top group, refitted, by at least half as much.

        As much as `predicted`, and as the share that the verdict names; by the lower end of the
        interval of what the refit takes away.
        """
        top, taken = self.top, self.top.taken
        if taken is None or top.predicted is None:
            return False
        least = min(top.share.value, -top.predicted / self.soft)
        most = max(top.share.value, -top.predicted / self.soft)
        return least > 0 and taken.low >= most / 2

    @property
    def verdict(self) -> str:
        top = self.top
        who = f"{top.rows:,} rows with {self.column} = {top.name}"
        what = f"the {self.gap.words} ({self.pair}, soft {self.soft:+.3f})"
        share = f"{_with_interval(top.share)} of {what}"
        if top.share.value <= 0:
            return f"No group by {self.column} widens the gap: the largest share is {share}."
        if top.actual is None or top.predicted is None or top.taken is None:
            why = f": the refit failed, {top.failed}" if top.failed else ""
            return f"The {who} are predicted to carry {share}; not refitted{why}."
        changed = (
            f"refitted without them it changes by {top.actual:+.3f} (predicted "
            f"{top.predicted:+.3f}), which takes away {_with_interval(top.taken)} of it"
        )
        if self.is_confirmed:
            return f"The {who} carry, to first order, {share}; {changed}."
        return f"The {who} are predicted to carry {share}, which is not confirmed: {changed}."

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "shares are of first order, and those of all rows add up to about 0, not to 1: rows "
            "that widen the gap stand against rows that narrow it; to leave many out does more",
            f"intervals are over the {len(self.gap.places):,} validation rows",
        )

    def frame(self) -> "DataFrame":
        """One row per group."""
        columns = ["rows", "share", "low", "high", "predicted", "actual", "hard"]
        rows = [(c.rows, *c.share, c.predicted, c.actual, c.hard) for c in self.causes]
        return as_table(rows, [c.name for c in self.causes], self.column, columns)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Shares with their intervals, and what refits gave."""
        ax = axes(ax)
        shown = self.causes[:12]
        y = range(len(shown))
        x = [c.share.value for c in shown]
        spread = reaches(c.share for c in shown)
        ax.errorbar(x, y, xerr=spread, fmt="o", color="#0072b2", label="predicted, first order")
        refitted = [(k, -c.actual / self.soft) for k, c in enumerate(shown) if c.actual is not None]
        ax.scatter(
            [v for _, v in refitted], [k for k, _ in refitted], marker="s", color="#b8480a",
            label="refitted",
        )  # fmt: skip
        ax.axvline(0, color="0.4", linewidth=1)
        ax.set_yticks(list(y), [f"{c.name} ({c.rows:,})" for c in shown])
        ax.invert_yaxis()
        ax.set(xlabel=f"share of the {self.gap.words}", ylabel=self.column)
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            **self._fields("soft", "pair", "predicted", "actual"),
            "causes": [vars(cause) for cause in self.causes],
        }


@dataclass(frozen=True, eq=False)
class Causes(Outcome):
    """Which training rows widen a gap. Made by `causes`.

    Args:
        gap: On the validation rows.
        scores: S of the largest difference, `[1, n]`.
        soft: That difference at θ̂.
        pair: Which groups, in words.
        place: Which entry of the gap.
        rows: The fewest rows, by score, without which `fitted.removal` predicts that the gap is
            gone; all that widen it where no number of them is predicted to do that.
        predicted: Change of the soft gap without them, by `fitted.removal`.
        actual: The same after refitting; None without a recipe.
        subject: What was asked about.
        validation: The validation rows.
        positive: Which of them have the positive label.
        failed: Why a refit gave nothing.
        resources: Of refits.
        sizes: How many validation rows the two groups have that are compared.
        left: What the refit leaves of the gap, as a share of it, with an interval over validation
            rows, which is NaN where a group has one; None without a refit.
    """

    gap: Gap
    scores: Scores
    soft: float
    pair: str
    place: int
    rows: tuple[int, ...]
    predicted: float | None
    actual: float | None
    subject: Subject
    validation: Data
    positive: Bool[Tensor, " q"]
    failed: str = ""
    resources: Resources = field(default_factory=Resources, repr=False)
    sizes: tuple[int, int] = (FEW, FEW)
    left: Estimate | None = None

    @property
    def title(self) -> str:
        return f"Training rows that the {self.gap.words} comes from"

    @property
    def is_confirmed(self) -> bool:
        """Whether at most half of the gap, of either sign, is left without them, refitted.

        By all of the interval of what is left.
        """
        return self.left is not None and -0.5 <= self.left.low <= self.left.high <= 0.5

    @property
    def verdict(self) -> str:
        n = self.scores.values.shape[1]
        what = f"the {self.gap.words} ({self.pair}, soft {self.soft:+.3f})"
        if not self.rows:
            return f"No training row is predicted to widen {what}."
        who = f"{len(self.rows):,} of {n:,} training rows ({percent(len(self.rows) / n)})"
        predicted = ""
        if self.actual is None or self.left is None:
            why = f": the refit failed, {self.failed}" if self.failed else ""
            if self.predicted is not None:
                predicted = f" (without them it is predicted to be {self._left(self.predicted)})"
            return (
                f"The {who} with the largest scores are predicted to account for {what}"
                f"{predicted}; not refitted{why}."
            )
        said = (
            "account for" if self.is_confirmed else "are predicted, not confirmed, to account for"
        )
        predicted = "" if self.predicted is None else f", predicted {self._left(self.predicted)}"
        return (
            f"The {who} with the largest scores {said} {what}: refitted without them it is "
            f"{self._left(self.actual)}, {_with_interval(self.left)} of it{predicted}."
        )

    def _left(self, change: float) -> str:
        return f"{self.soft + change:+.3f}"

    @property
    def notes(self) -> tuple[str, ...]:
        said = "a row that widens the gap need not be wrong: these are rows to look at"
        first, second = self.sizes
        if min(first, second) >= FEW:
            return (said,)
        return (
            said,
            f"the gap compares {count(first, 'validation row')} with {count(second, 'row')}: of so "
            "few it may be chance",
        )

    def by(self, column: Iterable[Any], name: str | None = None, *, refits: int = 1) -> GroupCauses:
        """How much of the gap the rows of each group carry: of an occupation, a source, a label.

            share_g = Σ_{i ∈ g} Sᵢ / m

        Its interval is over validation rows, by the standard error of a ratio of differences of
        means (the delta method): the training data are taken as given.

        Args:
            column: One label per training row.
            name: What they are; by default the name of a pandas column.
            refits: Without how many of the groups to fit again, where there is a recipe: those with
                the largest shares.

        Raises:
            ShapeError: There is not one label per training row, or only one group.
            SpecError: `refits` is no number of groups.

        Cost: scores of every validation row (with a curvature of all of θ a matrix product); one
        refit per group asked for, and one of all rows.
        """
        if self.soft == 0:
            raise DataError(
                "A share is one of a gap.",
                f"one of exactly 0: the {self.gap.words}.",
                "groups that the model cannot tell apart.",
                "look at causes.scores, which need no gap.",
            )
        fitted = self.subject.fitted
        n = len(fitted.train)
        labels = column if hasattr(column, "__len__") else list(column)
        names, at = labels_by_place(labels, n, "training example")
        if len(names) < 2:
            raise ShapeError(
                "Training rows are separated into at least two groups.",
                f"one label for all {n} rows: {names[0]!r}.",
                "a column of one value.",
                "group by another column.",
            )
        if refits < 0:
            raise SpecError(
                "refits counts groups, 0 or more.", f"refits={refits}.", "a sign slip.", "refits=1."
            )
        measure = _Score(self.gap.positive)
        sums = fitted.attribute(self.validation, measure, into=GroupSums(labels))
        sums.require_derivatives()
        T = sums.values[:].detach().cpu().double()  # [q, g]
        found = readings(fitted.task, fitted.theta, self.validation, self.gap.positive)
        where = torch.tensor(at)
        members = [(where == k).nonzero()[:, 0].tolist() for k in range(len(names))]

        def share_of(values: Float[Tensor, " q"]) -> Estimate:
            return _share(self.gap, self.place, values, found.scores, self.positive)

        shares = [share_of(T[:, k]) for k in range(len(names))]
        order = sorted(range(len(names)), key=lambda k: -shares[k].value)
        chosen = order[:refits] if self.subject.recipe is not None else []
        refitted = _without(
            self.subject, self.validation, self.gap, self.place, [members[k] for k in chosen],
            self.resources,
        )  # fmt: skip
        actual = dict(zip(chosen, refitted, strict=True))
        causes = []
        for k in order:
            done = actual.get(k, _NOT_REFITTED)
            taken = None if done.rows is None else share_of(-done.rows)
            predicted = -shares[k].value * self.soft
            if k in actual:
                predicted = _removal(
                    self.subject, self.validation, self.gap, self.place, members[k]
                )
            causes.append(
                Cause(
                    names[k], len(members[k]), shares[k], predicted,
                    done.soft, done.hard, done.failed, taken,
                )
            )  # fmt: skip
        column_name = name or str(getattr(column, "name", None) or "group")
        return GroupCauses(self.gap, self.soft, self.pair, column_name, tuple(causes))

    def frame(self) -> "DataFrame":
        """One row per training row, by what it does to the size of the gap."""
        size = self.scores.values[0].detach().cpu().double() * (1 if self.soft > 0 else -1)
        order = size.argsort(descending=True, stable=True)
        columns = {"widens": size[order], "share": size[order] / abs(self.soft)}
        return as_table(columns, order.numpy(), "example")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """All scores, sorted: how few rows hold how much."""
        ax = axes(ax)
        shares = self.frame()["share"].cumsum().to_numpy()
        ax.plot(range(1, len(shares) + 1), shares, color="#0072b2")
        ax.axhline(0, color="0.4", linewidth=1)
        ax.set(xlabel="training rows, by score", ylabel=f"sum of shares of the {self.gap.words}")
        return ax

    def numbers(self) -> dict[str, Any]:
        return self._fields("soft", "pair", "predicted", "actual", "left", "rows")


def causes(
    asked: Any,
    validation: Any,
    gap: Gap,
    *,
    train: Any = None,
    recipe: Recipe | None = None,
    resources: Resources | None = None,
) -> Causes:
    """Which training rows does the gap come from?

        Sᵢ = ∂m/∂wᵢ,    m the soft gap on the validation rows

    Of several differences (more than two groups, or equalized odds) it is the largest. Where there
    is a recipe the model is fitted again without the fewest rows, by score, without which removal
    predicts that the gap is gone; a refit is measured with its own running statistics, removal is
    predicted with those of θ̂.

    Args:
        asked: A fitted method whose scores are ∂m/∂w; or a fitted scikit-learn estimator or
            statsmodels results, with `train`.
        validation: Rows that the model was not fitted to, as for `as_data`.
        gap: With the groups of these rows.
        train: Of an estimator, (X, y) as given to its `fit`.
        recipe: How to fit again; an estimator fits itself.
        resources: With a `folder`, which keeps the refits, those of `by_group` as well: a call that
            was interrupted resumes. None: those of the fitted method.

    Raises:
        SpecError: No validation rows.
        DataError, ShapeError: As for `gap`.
        StaleStore: The folder holds refits of another model, recipe or training set.
        UpweightError: From the method: scores that only rank predict nothing.

    Cost: one `attribute` with k rows, about 2 log₂ k predicted removals of k rows; two refits where
    there is a recipe.
    """
    require_gap(gap, "Causes are those of a gap between groups.")
    subject = subject_of(asked, train, recipe)
    fitted = subject.fitted
    using = fitted.resources if resources is None else resources
    if validation is None:
        raise SpecError(
            "A gap is measured on rows that the model was not fitted to.",
            "no validation rows.",
            "a model that was fitted to all data.",
            "keep a part of the data aside and pass validation=(X, y).",
        )
    rows = fitted.task.queries(validation)
    every = fitted.attribute(rows, gap)
    every.require_derivatives()
    found = readings(fitted.task, fitted.theta, rows, gap.positive)
    soft = differences(gap, found.scores, found.positive)
    place = int(soft.abs().argmax())
    size = float(soft[place])
    scores = Scores(
        every.values[place : place + 1],
        every.unit,
        every.provenance,
        None if every.error is None else every.error[place : place + 1],
        None,
        every.context,
    )
    order = widening(scores.values[0].detach().cpu().double(), size)
    chosen, predicted = _fewest(subject, rows, gap, place, order, size)
    done, left = _NOT_REFITTED, None
    if chosen and subject.recipe is not None:
        done = _without(subject, rows, gap, place, [list(chosen)], using)[0]
    sizes = counted(gap, found.decided, found.positive, at=place).sizes
    if done.rows is not None:
        left = Estimate((size + done.soft) / size if size else math.nan, math.nan, math.nan)
        if size and min(sizes) > 1:  # of one row nothing says how much it varies
            left = _share(gap, place, found.scores + done.rows, found.scores, found.positive)
    return Causes(
        gap=gap,
        scores=scores,
        soft=size,
        pair=gap.pair(place),
        place=place,
        rows=chosen,
        predicted=predicted,
        actual=done.soft,
        subject=subject,
        validation=rows,
        positive=found.positive,
        failed=done.failed,
        resources=using,
        sizes=sizes,
        left=left,
    )


def _share(
    gap: Gap,
    place: int,
    values: Float[Tensor, " q"],
    scores: Float[Tensor, " q"],
    positive: Bool[Tensor, " q"],
) -> Estimate:
    """A difference of means as a share of the gap, with the delta method's interval of a ratio."""
    size = float(differences(gap, scores, positive)[place])
    value = float(differences(gap, values, positive)[place]) / size
    residual = (values - value * scores) / size
    return around(value, difference_error(gap, place, residual, positive))


def widening(scores: Float[Tensor, " n"], size: float) -> tuple[int, ...]:
    """The rows that widen the gap, by score; one fewer where these are all rows."""
    signed = scores * (1 if size > 0 else -1)
    order = signed.argsort(descending=True, stable=True)
    return tuple(order[signed[order] > 0].tolist()[: len(scores) - 1])


def _fewest(
    subject: Subject, rows: Data, gap: Gap, place: int, order: tuple[int, ...], size: float
) -> tuple[tuple[int, ...], float | None]:
    """The shortest part of the order without which the gap is predicted to be gone, by bisection.

    Scores that add up to the gap say too little: as rows leave that teach the same, what each of
    them does to the gap grows, and so many would turn it round.
    """
    found: dict[int, float] = {}

    def change(k: int) -> float:
        found[k] = _removal(subject, rows, gap, place, list(order[:k]))
        return found[k]

    if not order:
        return (), None
    low, high = 0, 1  # gone without the first `high`, and not without the first `low`
    while (size + change(high)) * size > 0:
        if high == len(order):
            return order, found[high]
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        if (size + change(middle)) * size > 0:
            low = middle
        else:
            high = middle
    return order[:high], found[high]


@dataclass(frozen=True, eq=False)
class _Change:
    """Change of the soft and of the hard gap, and of the score of every row; or why none is known.

    The change of the score is `[q]`.
    """

    soft: Any = None
    hard: Any = None
    rows: Any = None
    failed: str = ""


_NOT_REFITTED = _Change()


@dataclass(frozen=True)
class _Score:
    """s of each row, as a measure."""

    positive: Any

    def __call__(self, task: Any, params: Any, batch: Any) -> Tensor:
        return read(task, params, batch, self.positive)[0]


def _removal(subject: Subject, rows: Data, gap: Gap, place: int, group: list[int]) -> float:
    with warnings.catch_warnings():
        if subject.recipe is not None:  # the refit says how far the step was off
            warnings.simplefilter("ignore", AssumptionWarning)
        effects = subject.fitted.removal(rows, gap, [group], evaluate="plugin")
    return float(effects.values[place, 0])


def _without(
    subject: Subject,
    rows: Data,
    gap: Gap,
    place: int,
    groups: list[list[int]],
    resources: Resources,
) -> list["_Change"]:
    """What refits without each group change."""
    if not groups:
        return []
    task, train = subject.fitted.task, subject.fitted.train
    how_to_fit = subject.require_recipe("Confirming a cause")
    trainer = kept_trainer(how_to_fit, task, train, resources.within("causes"))
    weights = torch.ones(1 + len(groups), len(train), dtype=torch.float64)
    for k, group in enumerate(groups):
        weights[1 + k, group] = 0.0
    found: list[tuple[float, float, Tensor] | str] = []
    for w in weights:
        model = attempted(partial(trainer, w[None]))
        if isinstance(model, str):
            found.append(model)
            continue
        said = readings(model.task_of(task, 0), model.theta[0], rows, gap.positive)
        soft = float(differences(gap, said.scores, said.positive)[place])
        hard = counted(gap, said.decided, said.positive, at=place).value
        found.append((soft, hard, said.scores))
    base, *others = found
    if isinstance(base, str):
        return [_Change(failed=base)] * len(others)
    return [
        _Change(failed=each)
        if isinstance(each, str)
        else _Change(each[0] - base[0], each[1] - base[1], each[2] - base[2])
        for each in others
    ]


def attempted(fit: Callable[[], Trained]) -> Trained | str:
    """The one model of a refit, or in a line why there is none.

    An error of the folder is no such reason.
    """
    try:
        trained = fit()
    except (StaleStore, NotWritten):
        raise
    except UpweightError as error:
        return str(error).partition("\n")[0].rstrip(".")
    if trained.failures:
        return next(iter(trained.failures.values())).partition("\n")[0].rstrip(".")
    is_finite = bool(trained.theta.isfinite().all())
    return trained if is_finite else "parameters that are not finite"


def _percent(share: float) -> str:
    return f"{round(100 * share)} %".replace("-", "−") if math.isfinite(share) else "unknown"


def _with_interval(share: Estimate) -> str:
    value, low, high = map(_percent, share)
    return f"{value} [{low}, {high}]"
