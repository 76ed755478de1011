"""The least change of the training data that closes a gap, by a linear program, refitted.

    min Σⱼ xⱼ    subject to   E_gap x closes a share β of the soft gap
                              E_loss x ≤ 0                         0 ≤ x ≤ 1

x is how much each training row is changed, and E what a whole change of it is predicted to do: with
weights ±S[·, i] (up to 2, down to 0: Li & Liu 2022, Eq. 5), with removals −S[·, i], with other
labels the relabel influence of Koh & Liang (2017, §2.2). β is then searched by refitting, because
the soft gap that scores know closes at another place than the hard one that is reported, and
because a loss that is predicted to stay may rise: whether a point keeps accuracy, its refit says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.gap_causes import attempted
from upweight.applications.group_gaps import (
    Gap,
    HardGap,
    Readings,
    counted,
    difference_error,
    differences,
    read,
    readings,
    require_gap,
)
from upweight.applications.least_change import cheapest_change, least_change
from upweight.applications.other_labels import relabel_factor, with_other_labels
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import subject_of
from upweight.errors import NotConverged, SpecError
from upweight.evaluation.bootstrap import NORMAL, Estimate, around, standard_error
from upweight.methods.fitted import Fitted
from upweight.notation import loss_in_words, percent
from upweight.plot import axes
from upweight.runtime.resources import Resources
from upweight.runtime.selection import labels_by_place
from upweight.task.data import Data
from upweight.task.identity import contents
from upweight.task.measures import AT_ONCE, Functional
from upweight.task.recipe import Recipe, Trained, Trainer
from upweight.task.task import Task
from upweight.training.function import FromFunction
from upweight.training.kept import Kept, training_identity

How = Literal["weights", "remove", "relabel"]

STEP = 0.2
"""Of the soft gap, between two refits of the search."""

FARTHEST = 3.0
"""Shares of the soft gap that the search takes away at most."""

FAILURES = 3
"""Refits that fail before the search gives up: farther changes of the data fare no better."""

HALVINGS = 4
"""Refits between the last point on one side of a closed gap and the first on the other."""


@dataclass(frozen=True, eq=False)
class Point:
    """One change of the training data, refitted.

    Args:
        share: β, the share of the soft gap that the linear program took away.
        weights: Of the training rows; all 1 where labels were changed.
        changed: Rows whose weight or label differs.
        moved: Σ|w − 1|/n; where labels were changed their share of the rows.
        feasible: Whether the linear program keeps the predicted validation loss.
        within: Whether the refit keeps the accuracy: its paired change on validation, with the
            upper end of its interval, is at least −budget.
        predicted: The soft gap on the validation rows, by the scores.
        actual: The same after refitting.
        loss_predicted: Change of the mean validation loss, by the scores.
        loss_actual: The same after refitting.
        validation: The hard gap there, which the choice looks at.
        validation_accuracy: Accuracy there.
        test: The hard gap on rows that no choice has seen.
        accuracy: Accuracy there.
        price: Change of that accuracy against the model as it was, paired.
        loss_price: Change of the mean loss there, paired.
        closed: Change of the size of the test gap against the model as it was, paired; below 0
            where it became smaller.
    """

    share: float
    weights: Float[Tensor, " n"]
    changed: tuple[int, ...]
    moved: float
    feasible: bool
    within: bool
    predicted: float
    actual: float
    loss_predicted: float
    loss_actual: float
    validation: HardGap
    validation_accuracy: float
    test: HardGap
    accuracy: float
    price: Estimate
    loss_price: Estimate
    closed: Estimate


@dataclass(frozen=True, eq=False)
class Repair(Outcome):
    """What closing a gap costs: gap × accuracy × weight moved, each point refitted.

    Args:
        gap: The gap on the validation rows.
        how: What was changed.
        budget: Largest loss of accuracy, as a share, that a point within it may have.
        target: Size of the hard gap on validation that counts as closed.
        frontier: Points by share; the first is the model as it was, refitted.
        chosen: The place of the point within the budget that validation chose; 0 where none is
            better than the model as it was.
        cheapest: The place of the point with the smallest validation gap at any price.
        rows: Who is changed: group and label of each training row.
        loss: What the loss is called.
        told: What was met on the way.
    """

    gap: Gap
    how: str
    budget: float
    target: float
    frontier: tuple[Point, ...]
    chosen: int
    cheapest: int
    rows: tuple[str, ...]
    loss: str = "of the objective"
    told: tuple[str, ...] = ()

    @property
    def point(self) -> Point:
        """The point that the verdict is about: within the budget if one closes the gap."""
        return self.frontier[self.cheapest if self.is_infeasible else self.chosen]

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """Of the training rows at the chosen point."""
        return self.frontier[self.chosen].weights

    @property
    def predicted(self) -> float:  # type: ignore[override]
        """The soft gap on validation at the point of the verdict, by the scores."""
        return self.point.predicted

    @property
    def actual(self) -> float:  # type: ignore[override]
        """The same after refitting."""
        return self.point.actual

    @property
    def title(self) -> str:
        how = {"weights": "weights", "remove": "removals", "relabel": "other labels"}[self.how]
        return f"Closing the {self.gap.words} by {how} of training rows"

    @property
    def is_closed(self) -> bool:
        """Whether the chosen point has |hard gap| ≤ target on validation."""
        return abs(self.frontier[self.chosen].validation.value) <= self.target

    @property
    def is_infeasible(self) -> bool:
        """Whether no change within the budget closes the gap, and one beyond it comes closer."""
        return not self.is_closed and not self.frontier[self.cheapest].within

    @property
    def is_confirmed(self) -> bool:
        """Whether the test rows say the same after refitting: smaller, with an interval below 0."""
        base, point = self.frontier[0], self.point
        smaller = abs(point.test.value) < abs(base.test.value)  # also where another pair is largest
        return point is not base and smaller and point.closed.high < 0

    @property
    def is_repaired(self) -> bool:
        """Closed on validation, smaller on test beyond noise, and there not distinct from 0."""
        test = self.point.test
        small = test.holds_zero or abs(test.value) <= self.target
        return self.is_confirmed and self.is_closed and small

    @property
    def correlation(self) -> float | None:
        """Pearson's r of predicted and refitted soft gap along the path; None for two points."""
        if len(self.frontier) < 3:
            return None
        pair = torch.tensor([[p.predicted, p.actual] for p in self.frontier]).T
        return float(torch.corrcoef(pair)[0, 1]) if bool((pair.std(dim=1) > 0).all()) else None

    @property
    def verdict(self) -> str:
        base, point, words = self.frontier[0], self.point, self.gap.words
        other = "" if point.test.pair == base.test.pair else f" (now {point.test.pair})"
        numbers = (
            f"on test rows the {words} ({base.test.pair}) went from {base.test.value:+.3f} to "
            f"{point.test:+.3f}{other}, accuracy changed by {100 * point.price:+.2f} points and "
            f"the mean loss ({self.loss}) by {point.loss_price:+.3g}, refitted with "
            f"{percent(point.moved)} "
            f"{'of the labels changed' if self.how == 'relabel' else 'of the weight moved'}"
        )
        if self.is_closed and self.chosen == 0:
            return (
                f"Nothing to do: on validation rows the {words} is "
                f"{base.validation.value:+.3f}, no more than {self.target:g}."
            )
        if self.is_infeasible:
            no = "at no loss" if self.budget == 0 else f"at {100 * self.budget:g} points"
            kept = self.frontier[self.chosen].test
            reached = abs(point.validation.value) <= self.target
            what = "the refit that closes it" if reached else "the refit that comes closest"
            return (
                f"Infeasible {no} by {_MEANS[self.how]}: refits that keep the accuracy leave the "
                f"{words} ({base.test.pair}) at {kept.value:+.3f} on test rows, from "
                f"{base.test.value:+.3f}; {what} costs {-100 * point.price:+.2f} points of test "
                f"accuracy, changes the mean loss ({self.loss}) by {point.loss_price:+.3g}, with "
                f"{percent(point.moved)} changed, and leaves {point.test:+.3f}{other}."
            )
        if point is base:
            return (
                f"Not repaired: no change within the budget gave a smaller {words} on validation "
                f"rows than {base.validation.value:+.3f} after refitting."
            )
        if self.is_repaired:
            return f"Repaired: {numbers}."
        if self.is_confirmed:
            return f"Made smaller, not repaired: {numbers}."
        return f"Not repaired beyond the noise of the test rows: {numbers}."

    @property
    def notes(self) -> tuple[str, ...]:
        base = self.frontier[0]
        found = list(self.told)
        if base.validation.holds_zero:
            found.append(
                f"the gap on validation rows, {base.validation}, is not distinct from 0 to begin "
                "with"
            )
        if self.is_infeasible:
            found.append("the price is that of the changes tried here; other changes may cost less")
        elif self.point.price.high < -self.budget:
            found.append(
                f"on test rows accuracy changed by {100 * self.point.price:+.2f} points: more than "
                "the validation rows could tell"
            )
        if base.test.error > 0.02:
            found.append(
                f"the gap on test rows has a standard error of {base.test.error:.3f} "
                f"({base.test.sizes[0]:,} and {base.test.sizes[1]:,} rows): a single split says "
                "little about its last hundredths"
            )
        found.append(
            "accuracy is measured on the labels as they are; where they are themselves biased it "
            "is not the goal"
        )
        return tuple(found)

    def frame(self) -> "DataFrame":
        """One row per point of the frontier."""
        rows = [
            {
                "share": p.share,
                "moved": p.moved,
                "changed": len(p.changed),
                "feasible": p.feasible,
                "within": p.within,
                "predicted": p.predicted,
                "actual": p.actual,
                "loss_predicted": p.loss_predicted,
                "loss_actual": p.loss_actual,
                "validation_gap": p.validation.value,
                "validation_accuracy": p.validation_accuracy,
                "test_gap": p.test.value,
                "test_low": p.test.low,
                "test_high": p.test.high,
                "accuracy": p.accuracy,
                "price": p.price.value,
                "loss_price": p.loss_price.value,
                "chosen": k == self.chosen,
            }
            for k, p in enumerate(self.frontier)
        ]
        return as_table(rows, name="point")

    def who(self) -> "DataFrame":
        """Who is changed at the point of the verdict: a row per group and label."""
        change = self.point.weights - 1
        changed = torch.zeros(len(change), dtype=torch.bool)
        changed[list(self.point.changed)] = True
        columns = {
            "who": self.rows,
            "rows": 1,
            "changed": changed,
            "removed": change == -1,
            "down": change < 0,
            "up": change > 0,
            "weight": change,
        }
        return as_table(columns).groupby("who").sum()

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Accuracy against the size of the gap on test rows, each point refitted."""
        ax = axes(ax)
        x = [abs(p.test.value) for p in self.frontier]
        y = [p.accuracy for p in self.frontier]
        ax.plot(x, y, color="0.7", linewidth=1)
        for within, color, label in ((True, "#0072b2", "within budget"), (False, "#b8480a", "not")):
            kept = [k for k, p in enumerate(self.frontier) if p.within == within]
            if kept:
                ax.scatter([x[k] for k in kept], [y[k] for k in kept], color=color, label=label)
        at = self.frontier.index(self.point)
        ax.errorbar(
            x[at], y[at], xerr=NORMAL * self.point.test.error, color="0.2", marker="s",
            label="chosen on validation",
        )  # fmt: skip
        ax.set(xlabel=f"|{self.gap.words}|, test rows", ylabel="accuracy, test rows")
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        base, point = self.frontier[0], self.point
        return {
            "repaired": self.is_repaired,
            "infeasible": self.is_infeasible,
            **self._fields("how", "budget", "target", "predicted", "actual"),
            "gap_before": vars(base.test),
            "gap": vars(point.test),
            "accuracy_before": base.accuracy,
            "accuracy": point.accuracy,
            "price": point.price,
            "loss": self.loss,
            "loss_price": point.loss_price,
            "moved": point.moved,
            "correlation": self.correlation,
            "frontier": [
                {
                    "share": p.share,
                    "moved": p.moved,
                    "feasible": p.feasible,
                    "within": p.within,
                    "predicted": p.predicted,
                    "actual": p.actual,
                    "validation": p.validation.value,
                    "test": vars(p.test),
                    "accuracy": p.accuracy,
                }
                for p in self.frontier
            ],
        }


_MEANS = {
    "weights": "training weights in [0, 2]",
    "remove": "removing training rows",
    "relabel": "changing training labels",
}


def repair(
    asked: Any,
    validation: Any,
    gap: Gap,
    *,
    test: Any,
    test_groups: Any,
    train: Any = None,
    train_groups: Any = None,
    recipe: Recipe | None = None,
    how: How = "weights",
    budget: float = 0.0,
    target: float = 0.01,
    resources: Resources | None = None,
) -> Repair:
    """Close a gap by the least change of the training data, and say what that costs.

        min Σᵢ |wᵢ − 1|    s.t.  S_gap·(w − 1) ≤ −β · gap,  S_loss·(w − 1) ≤ 0,  0 ≤ w ≤ 2

    (Li & Liu 2022; signs for a positive gap.) Scores are taken once, at θ̂ and on the validation
    rows. For β = 0.2, 0.4, … the program is solved and the model fitted again, until the *hard* gap
    on validation is closed or changes its sign; β is then halved between the two. Where nothing
    keeps the predicted loss, the change that raises it least is refitted instead. Of the refits
    whose accuracy on validation falls by no more than the budget (beyond noise) the one with the
    least change that has |hard gap| ≤ target there is chosen, or else the smallest gap. If only a
    refit beyond the budget closes the gap the verdict is "infeasible", with what that one costs.
    The test rows are measured and choose nothing. Where the recipe is a function that trains
    running statistics, each refit is measured with its own; scores take those of θ̂ for constants.

    With several differences (more than two groups, or equalized odds) all of them are bounded by
    (1 − β) times the largest, and β ends at 1.

    Args:
        asked: A fitted method whose scores are ∂m/∂w; or a fitted scikit-learn estimator or
            statsmodels results, with `train`.
        validation: Rows that the model was not fitted to, as for `as_data`.
        gap: What to close, with the groups of the validation rows.
        test: Other such rows, for the report.
        test_groups: Their groups.
        train: Of an estimator, (X, y) as given to its `fit`.
        train_groups: The groups of the training rows: who is changed, by group and label.
        recipe: How to fit again; an estimator fits itself.
        how: "weights", "remove" or "relabel" (two classes).
        budget: Largest loss of accuracy on validation, as a share: .003 is .3 points. 0: none
            beyond the noise of a paired comparison.
        target: Size of the hard gap on validation that counts as closed.
        resources: With a `folder`, which keeps the refits: an interrupted search resumes. None:
            those of the fitted method.

    Raises:
        SpecError: No validation or test rows, the same for both, no recipe, or another `how`;
            other labels for a function, which holds its own.
        DataError, ShapeError: As for `gap`, for either split.
        NotConverged: The model as it was cannot be fitted again.
        MissingPackage: SciPy is not installed, which solves the program.
        StaleStore: The folder holds refits of another model, recipe or training set.
        UpweightError: From the method or the recipe.

    Cost: one `attribute` of k + 1 rows; then up to 20 linear programs of 2n variables and refits.
    Where the search is interrupted (Ctrl-C) what was refitted so far is returned, with a note.
    """
    _require_choices(gap, how, budget, target)
    subject = subject_of(asked, train, recipe)
    how_to_fit = subject.require_recipe("repair(...)")
    if how == "relabel" and isinstance(how_to_fit, FromFunction):
        raise SpecError(
            "A recipe must fit the data that it is given: their labels have changed.",
            f"{how_to_fit!r}, a function of the weights alone.",
            "a training loop that holds its own data.",
            'how="weights" or how="remove".',
        )
    task = subject.fitted.task
    for name, rows in (("validation", validation), ("test", test)):
        if rows is None:
            raise SpecError(
                "A repair is chosen on validation rows and reported on test rows.",
                f"no {name} rows.",
                "a data set that was split into two.",
                f"keep a third part of the data aside and pass {name}=(X, y).",
            )
    splits = Splits(task, task.queries(validation), task.queries(test), gap, gap.of(test_groups))
    fitted = subject.fitted
    using = (fitted.resources if resources is None else resources).within("repair")
    kept = Kept.of(using, lambda: training_identity(how_to_fit, task, fitted.train))
    return _Search(fitted, how_to_fit, splits, how, budget, target, kept).run(train_groups)


@dataclass(frozen=True, eq=False)
class Splits:
    """Validation rows, which choose, and test rows, which do not."""

    task: Task
    validation: Data
    test: Data
    gap: Gap
    test_gap: Gap

    def __post_init__(self) -> None:
        if len(self.validation) == len(self.test) and contents(self.validation) == contents(
            self.test
        ):
            raise SpecError(
                "Test rows must be others than the validation rows, which choose the point.",
                "the same rows for both.",
                "a data set that was split into two.",
                "keep a third part of the data aside for test=.",
            )

    def at(self, model: Trained) -> tuple[Readings, Readings]:
        """What a retrained model, with its own running statistics, says of both."""
        task, theta, positive = model.task_of(self.task, 0), model.theta[0], self.gap.positive
        return (
            readings(task, theta, self.validation, positive),
            readings(task, theta, self.test, positive),
        )


@dataclass(frozen=True, eq=False)
class _Effects:
    """What changing each candidate wholly is predicted to do, and to which rows.

    Args:
        gaps: One row per pair.
        loss: On the mean validation loss.
        rows: The training row of each candidate.
        direction: +1 where its weight rises, −1 where it falls or its label changes.
    """

    gaps: Float[Tensor, "k m"]
    loss: Float[Tensor, " m"]
    rows: Tensor
    direction: Tensor


@dataclass(eq=False)
class _Search:
    """Of β, by refitting."""

    fitted: Fitted
    recipe: Recipe
    splits: Splits
    how: How
    budget: float
    target: float
    kept: Kept
    trainer: Trainer | None = None
    """Of the data with their own labels, prepared once."""

    def run(self, train_groups: Any) -> Repair:
        task, train = self.fitted.task, self.fitted.train
        who = _who(task, train, self.splits.gap, train_groups)
        effects, notes = self._effects()
        first = self._fit(torch.ones(len(train), dtype=torch.float64), ())
        if isinstance(first, str):
            raise NotConverged(
                "A repair is held against the model as it was, fitted again by the same recipe.",
                f"the recipe did not train it: {first}",
                "a step size that diverges, or another recipe than the model's.",
                "recipe.trained(task, train) shows the same failure by itself.",
            )
        self.base = self.splits.at(first)
        # Predictions start from the model of the scores, which the recipe's may differ from.
        mine = readings(task, self.fitted.theta, self.splits.validation, self.splits.gap.positive)
        self.soft = differences(self.splits.gap, mine.scores, mine.positive)
        self.pair = int(self.soft.abs().argmax())
        base = self._point(0.0, first, torch.zeros(len(effects.rows)), effects, True)
        points = [base]
        drift = abs(base.actual - float(self.soft[self.pair]))
        if drift > 0.1 * abs(float(self.soft[self.pair])):
            notes.append(
                f"the recipe makes another model than the one scored: its soft gap is "
                f"{base.actual:+.3f}, not {float(self.soft[self.pair]):+.3f}"
            )
        try:
            if abs(base.validation.value) > self.target:
                self._walk(points, effects, notes)
        except KeyboardInterrupt:
            notes.append("the search was stopped: points that it did not reach are missing")
        points.sort(key=lambda p: p.share)
        chosen = self._best([k for k, p in enumerate(points) if p.within], points)
        cheapest = self._best(range(len(points)), points)
        return Repair(
            gap=self.splits.gap,
            how=self.how,
            budget=self.budget,
            target=self.target,
            frontier=tuple(points),
            chosen=chosen,
            cheapest=cheapest,
            rows=who,
            loss=loss_in_words(task.loss),
            told=tuple(dict.fromkeys(notes)),
        )

    def _best(self, places: Sequence[int] | range, points: Sequence[Point]) -> int:
        closed = [k for k in places if abs(points[k].validation.value) <= self.target]
        if closed:
            return min(closed, key=lambda k: points[k].moved)
        return min(places, key=lambda k: abs(points[k].validation.value))

    def _walk(self, points: list[Point], effects: _Effects, notes: list[str]) -> None:
        """Along β until the gap is closed or beyond, then halves between."""
        several = len(self.soft) > 1
        end = 1.0 if several else FARTHEST
        sign = points[0].validation.value
        below, above, share, failed = 0.0, None, 0.0, 0
        while share < end - 1e-9 and above is None:
            share = min(share + STEP, end)
            point = self._at(share, effects, notes)
            if point is None:
                return
            if isinstance(point, str):
                notes.append(point)
                failed += 1
                if failed == FAILURES:
                    return
                continue
            points.append(point)
            value = point.validation.value
            if abs(value) <= self.target:
                return
            if several or value * sign > 0:
                below = share
            else:
                above = share
        for _ in range(HALVINGS):
            if above is None:
                return
            middle = (below + above) / 2
            point = self._at(middle, effects, notes)
            if point is None or isinstance(point, str):
                return
            points.append(point)
            value = point.validation.value
            if abs(value) <= self.target:
                return
            below, above = (middle, above) if value * sign > 0 else (below, middle)

    def _at(self, share: float, effects: _Effects, notes: list[str]) -> Point | str | None:
        """The refit of the least change for β; why it failed; None where there is no change."""
        found = least_change(effects.gaps, effects.loss, self.soft, share, 0.0)
        feasible = found is not None
        if found is None:
            found = cheapest_change(effects.gaps, effects.loss, self.soft, share)
        if found is None:
            notes.append(
                f"no change of these rows is predicted to take away {share:.0%} of the soft gap, "
                "at any loss"
            )
            return None
        if self.how != "weights":
            found = (found >= 0.5).double()  # a basic solution: all but a few are 0 or 1
        change = torch.zeros(len(self.fitted.train), dtype=torch.float64)
        change.index_add_(0, effects.rows, found * effects.direction)
        flips = tuple(effects.rows[found > 0].tolist()) if self.how == "relabel" else ()
        weights = torch.ones_like(change) if flips else 1 + change
        if not float(weights.sum()) > 0:
            notes.append(f"taking away {share:.0%} of the soft gap would leave no training row")
            return None
        model = self._fit(weights, flips)
        if isinstance(model, str):
            return f"the refit for {share:.0%} of the soft gap failed: {model}"
        return self._point(share, model, found, effects, feasible)

    def _point(
        self, share: float, model: Trained, x: Tensor, effects: _Effects, feasible: bool
    ) -> Point:
        splits, (before, shown) = self.splits, self.base
        here, there = splits.at(model)
        x = x.to(effects.gaps)
        change = torch.zeros(len(self.fitted.train), dtype=torch.float64)
        change.index_add_(0, effects.rows, x * effects.direction)
        kept = self.how == "relabel"
        held = counted(splits.gap, here.decided, here.positive)
        first = counted(splits.test_gap, shown.decided, shown.positive)
        test = counted(splits.test_gap, there.decided, there.positive)
        # The two models decide on the same rows: what differs is measured pair by pair.
        again = counted(splits.test_gap, there.decided, there.positive, at=first.place)
        difference = there.decided.double() - shown.decided.double()
        error = difference_error(splits.test_gap, first.place, difference, there.positive)
        right = there.correct.double() - shown.correct.double()
        rise = there.losses.double() - shown.losses.double()
        kept_here = here.correct.double() - before.correct.double()
        soft = differences(splits.gap, here.scores, here.positive)[self.pair]
        return Point(
            share=share,
            weights=torch.ones_like(change) if kept else 1 + change,
            changed=tuple((change != 0).nonzero()[:, 0].tolist()),
            moved=float(change.abs().mean()),
            feasible=feasible,
            within=around(float(kept_here.mean()), standard_error(kept_here)).high >= -self.budget,
            predicted=float(self.soft[self.pair] + effects.gaps[self.pair] @ x),
            actual=float(soft),
            loss_predicted=float(effects.loss @ x),
            loss_actual=float((here.losses - before.losses).mean()),
            validation=held,
            validation_accuracy=here.accuracy,
            test=test,
            accuracy=there.accuracy,
            price=around(float(right.mean()), standard_error(right)),
            loss_price=around(float(rise.mean()), standard_error(rise)),
            closed=around(abs(again.value) - abs(first.value), error),
        )

    def _fit(self, weights: Float[Tensor, " n"], flips: tuple[int, ...]) -> Trained | str:
        """The model of the changed data, or why there is none."""
        task, train = self.fitted.task, self.fitted.train

        def trainer() -> Trainer:
            data = with_other_labels(train, flips) if flips else train
            key = f"labels changed of {sorted(flips)}"
            return self.kept.trainer(self.recipe.prepare(task, data), task, key)

        def fit() -> Trained:
            if flips:
                return trainer()(weights[None])
            if self.trainer is None:
                self.trainer = trainer()
            return self.trainer(weights[None])

        return attempted(fit)

    def _effects(self) -> tuple[_Effects, list[str]]:
        """E of every candidate, from one pass over the training data."""
        fitted, splits, notes = self.fitted, self.splits, list[str]()
        both = Functional(_GapsAndLoss(splits.gap))
        scores = fitted.attribute(splits.validation, both)
        scores.require_derivatives()
        values = scores.values[:].detach().cpu().double()
        gaps, loss = values[:-1], values[-1]
        rows = torch.arange(len(fitted.train))
        ones = torch.ones(len(rows), dtype=torch.float64)
        if self.how == "weights":
            return _Effects(
                torch.cat([gaps, -gaps], dim=1),
                torch.cat([loss, -loss]),
                rows.repeat(2),
                torch.cat([ones, -ones]),
            ), notes
        if self.how == "remove":
            return _Effects(-gaps, -loss, rows, -ones), notes
        factor = relabel_factor(fitted.task, fitted.theta, fitted.train)
        known = factor.isfinite()
        if not bool(known.all()):
            notes.append(
                f"{int((~known).sum())} training rows without a loss gradient keep their label"
            )
        rows, factor = rows[known], factor[known]
        return _Effects(gaps[:, known] * factor, loss[known] * factor, rows, -ones[known]), notes


@dataclass(frozen=True)
class _GapsAndLoss:
    """Every soft gap and the mean loss, as one function of θ."""

    gap: Gap

    def __call__(self, task: Task, params: Any, queries: Any, weights: Tensor) -> Tensor:
        gaps = self.gap(task, params, queries, weights)
        return torch.cat([gaps, task.losses(params, queries).mean()[None]])


# -- in words -------------------------------------------------------------------------------------


def _who(task: Task, train: Data, gap: Gap, groups: Any) -> tuple[str, ...]:
    """Group and label of each training row."""
    labels = []
    with torch.no_grad():
        for _, _, batch in train.batches(AT_ONCE):
            moved = task.to_device(batch)
            labels.append(read(task, task.named(task.theta()), moved, gap.positive)[2].cpu())
    positive = torch.cat(labels).tolist()
    told = ["positive" if label else "negative" for label in positive]
    if groups is None:
        return tuple(told)
    names, at = labels_by_place(groups, len(told), "training example")
    return tuple(f"{names[k]}, {label}" for k, label in zip(at, told, strict=True))


def _require_choices(gap: Any, how: str, budget: float, target: float) -> None:
    require_gap(gap, "A repair closes a gap between groups.")
    if how not in _MEANS:
        raise SpecError(
            'A repair changes "weights", removes rows ("remove") or changes labels ("relabel").',
            f"how={how!r}.",
            "another word for one of them.",
            'how="weights".',
        )
    if not (0 <= budget < 1 and 0 <= target < 1):
        raise SpecError(
            "The budget is a share of accuracy in [0, 1), the target a gap in [0, 1).",
            f"budget={budget!r}, target={target!r}.",
            "percent, or points of accuracy.",
            "budget=0.003 for three tenths of a point, target=0.01 for one point.",
        )
