"""Which training rows made the model get this one wrong, and what happens without them?

The margin m = log p(y | x) − log(1 − p(y | x)) of a wrong prediction is negative. Rows with
S[q, i] < 0 lower it. Without the k that lower it most,

    m(θ̂ + Δθ_U) − m(θ̂)      U the first k

is predicted by one Newton step (by layer to first order), and a refit says what comes of it. A set
that does not turn the prediction is no proof that none does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upweight._typing import Axes, DataFrame
from upweight.applications.labels import Classes, outputs_at
from upweight.applications.outcome import Outcome, as_table
from upweight.errors import DataError, MissingContext, SpecError
from upweight.methods.fitted import Fitted
from upweight.plot import axes
from upweight.runtime.resources import Resources
from upweight.scores import Scores
from upweight.task.measures import Margin
from upweight.task.recipe import Recipe
from upweight.training.retrain import retrain
from upweight.training.weights import removal_weights

COUNTS = (1, 2, 5, 10, 20, 50)
"""Rows taken out together, unless other numbers are asked for."""


@dataclass(frozen=True, eq=False)
class Misprediction(Outcome):
    """What a wrong prediction owes to training rows. Made by `explain_error`.

    Args:
        query: Which row of the scores.
        label, taken_for: What it is, and what the model says, as the user knows labels.
        margin: m at θ̂, negative.
        lowers, lowers_by: The rows that lower the margin most, first the most, with their scores.
        raises, raises_by: The rows that raise it most.
        labels: The label of each row of `lowers`, then of `raises`.
        counts: How many of `lowers` are taken out together.
        predicted: Margin without them, by one fitted model.
        actual: Margin without them, refitted; None where there is no recipe.
        notes: What to know before the numbers.
    """

    query: int
    label: Any
    taken_for: Any
    margin: float
    lowers: tuple[int, ...]
    lowers_by: tuple[float, ...]
    raises: tuple[int, ...]
    raises_by: tuple[float, ...]
    labels: tuple[Any, ...]
    counts: tuple[int, ...]
    predicted: tuple[float, ...]
    actual: tuple[float, ...] | None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"Why query {self.query} is taken for {self.taken_for!r}"

    @property
    def is_confirmed(self) -> bool:
        """Whether, in a refit, the label is more likely than not without some of the rows."""
        return self._turned(self.actual) is not None

    def _turned(self, margins: Sequence[float] | None) -> int | None:
        """The place of the fewest rows without which the margin is positive."""
        return next((k for k, m in enumerate(margins or ()) if m > 0), None)

    @property
    def verdict(self) -> str:
        start = (
            f"Query {self.query}, a {self.label!r}, is taken for {self.taken_for!r} "
            f"(margin {self.margin:+.3f})"
        )
        if not self.counts:
            return f"{start}; no training row lowers its margin."
        k = self._turned(self.actual if self.actual is not None else self.predicted)
        at = len(self.counts) - 1 if k is None else k
        rows = _rows(self.counts[at])
        if self.actual is None:
            return (
                f"{start}; without the {rows} its margin is predicted to be "
                f"{self.predicted[at]:+.3f}, and nothing was fitted again."
            )
        told = f"{self.actual[at]:+.3f} in a refit (predicted {self.predicted[at]:+.3f})"
        if k is None:
            return f"{start}; without the {rows} it is {told}, which does not turn it."
        return f"{start}; without the {rows} it is {told}, and the prediction is right."

    def frame(self) -> "DataFrame":
        """A row per training row: its label, its score, and whether it lowers or raises m."""
        rows, scores = (*self.lowers, *self.raises), (*self.lowers_by, *self.raises_by)
        effect = ["lowers"] * len(self.lowers) + ["raises"] * len(self.raises)
        columns = {"label": list(self.labels), "score": list(scores), "effect": effect}
        return as_table(columns, rows, "row")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The margin as rows are taken out, predicted and refitted."""
        ax = axes(ax)
        counts = [0, *self.counts]
        ax.plot(counts, [self.margin, *self.predicted], marker="o", label="predicted")
        if self.actual is not None:
            ax.plot(self.counts, self.actual, marker="s", linestyle="", label="refitted")
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.set(xlabel="rows taken out", ylabel=f"margin of query {self.query}")
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            **self._fields("query", "label", "taken_for", "margin", "lowers", "raises"),
            "removed": self.counts,
            "predicted": self.predicted,
            "actual": self.actual,
        }


def explain_error(
    scores: Scores,
    query: Any,
    *,
    counts: Sequence[int] = COUNTS,
    recipe: Recipe | None = None,
    resources: Resources | None = None,
) -> Misprediction:
    """Why one query is predicted wrongly: the rows that lower its margin, and the margin without.

    Args:
        scores: Of any measure, with the fitted method that made them.
        query: Which of their rows, by its place or by its id.
        counts: How many of the rows that lower the margin most are taken out together.
        recipe: How the model is fitted. None: nothing is fitted again.
        resources: For the refits, as for `retrain`.

    Raises:
        MissingContext: The scores were loaded without their model and data.
        DataError: The prediction is right.
        SpecError: A count is below 1.
        UnsupportedModel: The loss has no likelihood, or the targets are no classes.
        NotOffered: The method has no movement of θ.

    Cost: one `attribute` of a query, a removal for each count, and as many refits and one more.
    """
    if any(count < 1 for count in counts):
        raise SpecError(
            "At least one row is taken out.",
            f"counts={tuple(counts)}.",
            "0 for the model as it is, whose margin is part of the answer.",
            "counts=(1, 5, 20).",
        )
    fitted = _fitted(scores)
    task, train = fitted.task, fitted.train
    queries = scores.context.queries if scores.context is not None else None
    query = scores.place(query) if isinstance(query, str | tuple) else query
    if queries is None or not 0 <= query < len(queries):
        raise DataError(
            "A query is a row of the scores.",
            f"query {query} of {0 if queries is None else len(queries)}.",
            "an index of the full test set where only some rows were attributed, or scores of a "
            "Functional.",
            "attribute the queries, and count them from 0.",
        )
    one, classes = queries.subset([query]), Classes.of(task, train)
    outputs, (targets,) = outputs_at(task, fitted.theta, one)
    given, said = int(classes.indices(targets)[0]), int(classes.losses(outputs).argmin())
    if given == said:
        raise DataError(
            "An error to explain is a query whose prediction is not its label.",
            f"query {query}, which is a {classes.names[given]!r} and predicted as that.",
            "another row of the test set, or scores for predicted labels.",
            "look for rows where the prediction differs; a right one is explained by "
            "scores.top(query).",
        )
    row = fitted.attribute(one, Margin())
    ranking = row.top(max(10, *counts))
    lowers, raises = ranking.lowers, ranking.raises[:10]
    sizes = tuple(sorted({count for count in counts if count <= min(len(lowers), len(train) - 1)}))
    groups = [list(lowers[:size]) for size in sizes]
    margin = float(Margin()(task, task.named(fitted.theta), task.to_device(one.batch(0, 1)))[0])
    predicted: tuple[float, ...] = ()
    actual = None
    notes: tuple[str, ...] = ()
    if groups:
        effects = fitted.removal(one, Margin(), groups, evaluate="plugin")
        predicted = tuple(margin + float(v) for v in effects.values[0])
        if recipe is not None:
            weights = removal_weights(len(train), groups)
            again = retrain(recipe, task, train, weights, one, Margin(), resources=resources)
            actual = tuple(float(v) for v in again.values[:, 0])
            if abs(float(again.drift[0])) > 0.1 * abs(margin):
                notes = (
                    f"refitted to all rows the margin is {float(again.baseline[0]):+.3f}, not the "
                    f"{margin:+.3f} of the model asked about",
                )
    shown = (*lowers, *raises)
    some = outputs_at(task, fitted.theta, train.subset(shown))[1] if shown else []
    ids = torch.cat([classes.indices(y) for y in some]).tolist() if some else []
    return Misprediction(
        query, classes.names[given], classes.names[said], margin,
        lowers, ranking.lowers_by, raises, ranking.raises_by[:10],
        tuple(classes.names[i] for i in ids), sizes, predicted, actual, notes,
    )  # fmt: skip


def _fitted(scores: Scores) -> Fitted:
    """The method that made the scores."""
    found = None if scores.context is None else scores.context.fitted
    if not isinstance(found, Fitted):
        raise MissingContext(
            "Explaining an error asks the fitted method again.",
            "scores without it.",
            "scores that were loaded from disk.",
            "attribute again: scores = fitted.attribute(queries).",
        )
    return found


def _rows(count: int) -> str:
    return "row that lowers it most" if count == 1 else f"{count} rows that lower it most"
