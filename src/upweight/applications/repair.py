"""Change some labels and leave out some rows: what that is predicted to do, and what it does.

With the relabelled rows R and the rows that are left out U,

    Δθ = −(1/n) P Σ_R [∇ℓ(xᵢ, ỹᵢ) − ∇ℓ(xᵢ, yᵢ)]  +  Δθ of removing U

predicts the loss and the accuracy at θ̂ + Δθ (Koh & Liang 2017, §2.2, for several rows at once).
Where the loss is a softmax or logistic one its Hessian does not look at the labels, so that the
first term is a whole Newton step. Either term is exact where J is quadratic; the two together leave
out how they change each other. A step that is too long, as those of a curvature by layer often are,
is halved as long as that lowers the objective of the changed data,

    J̃(θ̂ + tΔθ),  J̃(θ) = (1/n) Σ_{i∉U} ℓ(θ; xᵢ, ỹᵢ) + R(θ),      t = 1, ½, ¼, …

and the prediction is that of θ̂ + tΔθ, with the running statistics of θ̂; where J is quadratic t = 1.
The refit by the recipe, measured with its own, says what comes of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.labels import Classes, IsRight, with_labels
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import Subject
from upweight.errors import DataError, NotConverged, SpecError
from upweight.evaluation import bootstrap as intervals
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.gradients.autograd import data_gradient
from upweight.methods.fitted import Fitted
from upweight.plot import axes, reaches
from upweight.runtime.resources import Resources
from upweight.task.data import Data
from upweight.task.identity import contents
from upweight.task.measures import Loss, measured
from upweight.task.recipe import Recipe, Trained
from upweight.task.task import Task
from upweight.training.function import FromFunction
from upweight.training.kept import Kept, training_identity

LEAST = 1 / 64
"""The share of a step at which it is halved no more."""

TOO_LONG = "a whole step is too long: the prediction is that of {share:g} of it"
"""What is said where a step was halved."""

KEEP, DROP = "keep", "drop"
"""Decisions that are no labels."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """What is to become of some rows. Made by `decided`.

    Args:
        labels: The new label by row, as the user knows labels.
        dropped: Rows that are left out, in order.
        kept: Rows that stay as they are.
    """

    labels: Mapping[int, Any]
    dropped: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def words(self) -> str:
        """`Giving 93 rows another label and leaving out 7`."""
        given, gone = len(self.labels), len(self.dropped)
        one = f"giving {given} row{'s' * (given != 1)} another label"
        other = f"leaving out {gone}{'' if given else ' row' + 's' * (gone != 1)}"
        said = " and ".join([one] * (given > 0) + [other] * (gone > 0))
        return said[0].upper() + said[1:]


def decided(decisions: Mapping[int, Any], classes: Classes, labels: Tensor) -> Decisions:
    """Decisions by row, each a label, "keep" or "drop", checked.

    Raises:
        DataError: A row or a label does not exist, or nothing is to be changed.
        SpecError: A class is called as a decision is.
    """
    taken = {KEEP, DROP} & {name for name in classes.names if isinstance(name, str)}
    if taken:
        raise SpecError(
            'Classes must not be called "keep" or "drop", which are decisions.',
            f"a class {sorted(taken)[0]!r}.",
            "a data set about keeping and dropping.",
            "rename the class and fit again.",
        )
    n, new, dropped, kept = len(labels), {}, [], []
    for row, decision in decisions.items():
        i = int(row)
        if not 0 <= i < n or i != row:
            raise DataError(
                f"Decisions are about training rows 0…{n - 1}.",
                f"row {row!r}.",
                "rows of another split, or counted from 1.",
                "use the rows of suspects.order or suspects.frame().",
            )
        if isinstance(decision, str) and decision == DROP:
            dropped.append(i)
        elif (isinstance(decision, str) and decision == KEEP) or classes.index(decision) == int(
            labels[i]
        ):
            kept.append(i)
        else:
            new[i] = classes.names[classes.index(decision)]
    if not new and not dropped:
        raise DataError(
            "A repair needs at least one row that is relabelled or dropped.",
            f"{len(kept)} rows, all kept as they are." if kept else "no decision.",
            "a page on which nothing was clicked, or proposals that agree with the labels.",
            'decide on a row: {suspects.order[0]: "drop"}, or suspects.proposed(20).',
        )
    return Decisions(new, tuple(sorted(dropped)), tuple(sorted(kept)))


def changed_gradient(fitted: Fitted, labels: Mapping[int, Any]) -> Float[Tensor, " p"]:
    """Σ [∇ℓ(xᵢ, ỹᵢ) − ∇ℓ(xᵢ, yᵢ)] over the rows with new labels ỹ."""
    task, train, places = fitted.task, fitted.train, sorted(labels)
    if not places:
        return torch.zeros_like(fitted.theta)
    changed = with_labels(task, train, {i: labels[i] for i in places})
    new, old = (data_gradient(task, fitted.theta, x.subset(places)) for x in (changed, train))
    return new - old


def movement(fitted: Fitted, decisions: Decisions) -> tuple[Float[Tensor, " p"], float]:
    """tΔθ that the decisions are predicted to cause, and t; see the top of this file."""
    step = torch.zeros_like(fitted.theta)
    if decisions.labels:
        total = changed_gradient(fitted, decisions.labels)
        step -= fitted.scorer.solve(total[None] / len(fitted.train))[0].to(step)
    if decisions.dropped:
        removed = fitted.removal_step(decisions.dropped)
        step += fitted.task.layout.flatten(removed).to(step)
    return shortened(fitted, step, decisions.labels, decisions.dropped)


def shortened(
    fitted: Fitted, step: Float[Tensor, " p"], labels: Mapping[int, Any], dropped: Sequence[int]
) -> tuple[Float[Tensor, " p"], float]:
    """tΔθ and t: halved as long as that lowers the objective of the changed data."""
    task = fitted.task
    data = with_labels(task, fitted.train, labels) if labels else fitted.train
    weights = torch.ones(len(data), dtype=torch.float64, device=step.device)
    weights[list(dropped)] = 0.0

    def objective(share: float) -> float:
        theta = fitted.theta + share * step
        penalty = task.penalty(task.named(theta), task.layout)
        return float((weights * measured(task, theta, data, Loss())).mean() + penalty)

    share, value = 1.0, objective(1.0)
    while share > LEAST:
        half = objective(share / 2)
        if half >= value:
            break
        share, value = share / 2, half
    return share * step, share


@dataclass(frozen=True)
class Change:
    """A change of loss and accuracy on the test data, with intervals over its rows."""

    loss: Estimate
    accuracy: Estimate


@dataclass(frozen=True, eq=False)
class Repaired(Outcome):
    """What changed labels and dropped rows did to the model, on data that chose none of them.

    Args:
        decisions: What was changed.
        rows: Training rows.
        tested: Test rows.
        before: Loss and accuracy of the model refitted to the data as they were.
        after: The same with the decisions.
        predicted: Change that one fitted model predicts, without fitting again.
        actual: Change from `before` to `after`, in pairs of test rows.
        level: Of the intervals.
        notes: What to know before the numbers.
    """

    decisions: Decisions
    rows: int
    tested: int
    before: tuple[float, float]
    after: tuple[float, float]
    predicted: Change
    actual: Change
    level: float
    notes: tuple[str, ...] = ()

    title = "What the corrected labels change"

    @property
    def is_confirmed(self) -> bool:
        """Whether the refitted accuracy is higher, by an interval above zero."""
        return self.actual.accuracy.low > 0

    @property
    def verdict(self) -> str:
        gain = self.actual.accuracy
        if self.is_confirmed:
            end = "a refit confirms the gain"
        elif gain.high < 0:
            end = "this did harm, and is not an improvement"
        else:
            end = "no gain is shown"
        return (
            f"{self.decisions.words} of {self.rows} took the accuracy on {self.tested} test rows "
            f"from {self.before[1]:.4f} to {self.after[1]:.4f}, by {gain:+.4f} "
            f"(predicted {self.predicted.accuracy.value:+.4f}): {end}."
        )

    def frame(self) -> "DataFrame":
        """A row for loss and accuracy: before, after, the change with its interval, predicted."""
        names, rows = ("loss", "accuracy"), []
        for k, name in enumerate(names):
            actual, predicted = getattr(self.actual, name), getattr(self.predicted, name)
            rows.append(
                {
                    "before": self.before[k],
                    "after": self.after[k],
                    "predicted": predicted.value,
                    "actual": actual.value,
                    "low": actual.low,
                    "high": actual.high,
                }
            )
        return as_table(rows, names, "measure")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Predicted and actual change of the accuracy, with intervals."""
        ax = axes(ax)
        for k, change in enumerate((self.predicted, self.actual)):
            e = change.accuracy
            ax.errorbar([k], [e.value], reaches([e]), fmt="o", capsize=4)
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.set_xticks([0, 1], ["predicted", "refitted"])
        ax.set(xlim=(-0.6, 1.6), ylabel="change of test accuracy")
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "tested": self.tested,
            "relabelled": len(self.decisions.labels),
            "dropped": len(self.decisions.dropped),
            "before": {"loss": self.before[0], "accuracy": self.before[1]},
            "after": {"loss": self.after[0], "accuracy": self.after[1]},
            "predicted": vars(self.predicted),
            "actual": vars(self.actual),
            "level": self.level,
        }


def repaired(
    subject: Subject,
    classes: Classes,
    decisions: Decisions,
    test: Data,
    bootstrap: Bootstrap,
    resources: Resources,
    notes: tuple[str, ...] = (),
) -> Repaired:
    """Refit with the decisions, and compare with the prediction.

    Raises:
        SpecError: There is no recipe, or it holds its own labels.
        NotConverged: The recipe failed.
        StaleStore: The folder keeps the refits of something else.
    """
    recipe, fitted = subject.require_recipe("A repair"), subject.fitted
    task, train = fitted.task, fitted.train
    if decisions.labels and isinstance(recipe, FromFunction):
        raise SpecError(
            "A recipe must fit the data that it is given: their labels have changed.",
            f"{recipe!r}, a function of the weights alone.",
            "a training loop that holds its own data.",
            "train on suspects.data(decisions) yourself; or only drop rows.",
        )
    here = _values(task, classes, fitted.theta, test)
    step, share = movement(fitted, decisions)
    moved = _values(task, classes, fitted.theta + step, test)
    if share < 1:
        notes = (*notes, TOO_LONG.format(share=share))
    weights = torch.ones(len(train), dtype=torch.float64)
    kept = Kept.of(resources, lambda: training_identity(recipe, task, train))
    first = refitted(kept, recipe, task, train, weights)
    weights[list(decisions.dropped)] = 0.0
    changed = with_labels(task, train, decisions.labels) if decisions.labels else train
    second = refitted(kept, recipe, task, changed, weights)
    if torch.equal(first.theta, second.theta):
        raise SpecError(
            "A recipe must fit the data that it is given: their labels have changed.",
            f"{recipe!r}, which gave the same parameters for both, bit for bit.",
            "a recipe that holds its own data.",
            "train on suspects.data(decisions) yourself.",
        )
    before, after = (
        _values(each.task_of(task, 0), classes, each.theta[0], test) for each in (first, second)
    )
    drift = float((before[1] - here[1]).mean())
    if abs(drift) > 0.01:
        notes = (
            *notes,
            f"refitted to the data as they were, the accuracy differs by {drift:+.4f} from that of "
            "the model asked about: the prediction is of that one",
        )
    return Repaired(
        decisions,
        len(train),
        len(test),
        (float(before[0].mean()), float(before[1].mean())),
        (float(after[0].mean()), float(after[1].mean())),
        _change(here, moved, bootstrap),
        _change(before, after, bootstrap),
        bootstrap.level,
        notes,
    )


def _values(
    task: Task, classes: Classes, theta: Float[Tensor, " p"], data: Data
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Loss, and whether it is right, of every row."""
    return (
        measured(task, theta, data, Loss()).cpu(),
        measured(task, theta, data, IsRight(classes)).cpu(),
    )


def _change(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], bootstrap: Bootstrap
) -> Change:
    pairs = zip(before, after, strict=True)
    return Change(*(intervals.mean(new - old, bootstrap) for old, new in pairs))


def refitted(
    kept: Kept,
    recipe: Recipe,
    task: Task,
    data: Data,
    weights: Float[Tensor, " n"],
) -> Trained:
    """The one model of the recipe's fit to some data under some weights.

    Raises:
        NotConverged: The recipe failed.
    """
    # One folder serves all decisions: their labels tell the models apart.
    trained = kept.trainer(recipe.prepare(task, data), task, contents(data))(weights[None])
    if trained.failures:
        raise NotConverged(
            "The corrected data must be ones that the recipe can fit.",
            f"{recipe!r}: {trained.failures[0]}.",
            "a class of which no row is left, or too few steps.",
            "drop fewer rows, or loosen the recipe.",
        )
    return trained
