"""Which labels are wrong, what they should be, and what correcting them would gain.

Rows are ranked by the outputs of the model without each, see `upweight.applications.suspicion`, or
with validation data by harm: S[q, i] > 0 of their mean loss. Validation data whose labels are
trusted also calibrate the outputs.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight._typing import Axes, Batch, DataFrame, Params
from upweight.applications.confident import FlaggedLabels, flagged_labels
from upweight.applications.labels import Classes, IsRight, outputs_at, plain, with_labels
from upweight.applications.misprediction import Misprediction, explain_error
from upweight.applications.outcome import SHOWN, Outcome, as_table
from upweight.applications.repair import (
    DROP,
    KEEP,
    TOO_LONG,
    Repaired,
    changed_gradient,
    decided,
    movement,
    refitted,
    repaired,
    shortened,
)
from upweight.applications.subject import Subject, subject_of
from upweight.applications.suspicion import by_refit, own_losses, suspicions
from upweight.errors import AssumptionWarning, DataError, MissingPackage, SpecError
from upweight.evaluation.bootstrap import Bootstrap, Estimate, mean
from upweight.methods.fitted import Fitted
from upweight.methods.functionals import derivatives
from upweight.methods.scorer import Asked, not_offered
from upweight.plot import axes
from upweight.runtime import callers
from upweight.runtime.resources import Resources
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.identity import contents
from upweight.task.losses import Bernoulli, CrossEntropy
from upweight.task.measures import Functional, Loss, as_measure, measured
from upweight.task.recipe import Recipe, Trained
from upweight.task.task import Task
from upweight.training.kept import Kept, training_identity

__all__ = [
    "DROP",
    "KEEP",
    "FlaggedLabels",
    "Misprediction",
    "Path",
    "Repaired",
    "Suspects",
    "explain_error",
    "flagged_labels",
    "suspects",
]

LOSS = Loss()

STEPS = 12
"""Points on the path of predicted gains."""

SIZE_UNKNOWN = "nothing supports the size of this predicted change"
"""How the warning of a prediction begins."""

MEASURED_BY = "suspects.apply(decisions, test) fits again and measures it"
"""The way out."""


@dataclass(frozen=True, eq=False)
class Path:
    """What the validation data are predicted to say once the first k suspects are corrected.

    Args:
        counts: k, from 0 up.
        values: Mean measure (loss) at θ̂ + Δθ of each.
        accuracies: Share of validation rows that are right there.
        gain: Change of the mean measure from none to `best`, in pairs of validation rows.
    """

    counts: tuple[int, ...]
    values: tuple[float, ...]
    accuracies: tuple[float, ...]
    gain: Estimate

    @property
    def best(self) -> int:
        """The place where the mean measure is lowest; 0 where nothing lowers it."""
        return min(range(len(self.values)), key=self.values.__getitem__)


@dataclass(frozen=True, eq=False)
class Suspects(Outcome):
    """Training rows in the order in which to look at their labels. Made by `suspects`.

    Args:
        subject: The fitted method, and how to fit again.
        classes: The labels that there are.
        by: "label" or "harm", which the rows are ranked by.
        order: Rows, the most suspicious first.
        suspicion: Of every row, larger for more suspicious; in the unit of the loss for "label", of
            the measure per weight for "harm".
        labels: Class of every row, as its place in `classes.names`.
        proposals: The class that is proposed; that of the label where none is.
        relabelling: Predicted change of the mean validation measure by giving each row, alone, its
            proposed label; 0 where there is none; None without validation data.
        removing: The same by removing the row: −S.
        predicted: The path of corrections in order, on the validation data.
        validation: Those data.
        losses: ℓ(f(xᵢ), yᵢ) of every row, of the model as it is: to compare with.
        notes: What to know before the numbers.
        left_out: Without how many rows a model was fitted to rank them; 0 where none was.
        measured: What is asked of the validation rows, in words.
    """

    subject: Subject
    classes: Classes
    by: Literal["label", "harm"]
    order: Int[Tensor, " n"]
    suspicion: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    proposals: Int[Tensor, " n"]
    relabelling: Float[Tensor, " n"] | None
    removing: Float[Tensor, " n"] | None
    predicted: Path | None
    validation: Data | None
    losses: Float[Tensor, " n"]
    notes: tuple[str, ...] = ()
    left_out: int = 0
    measured: str = "loss"
    actual: None = None

    def __len__(self) -> int:
        return len(self.labels)

    # -- decisions --------------------------------------------------------------------------------

    def proposed(self, k: int) -> dict[int, Any]:
        """The proposed label of each of the first k suspects that has one, by row.

        A proposal is a guess: accepted unseen it also gives rows that are merely hard a wrong
        label. `Path.best` says how many the validation data are predicted to bear.
        """
        return {
            i: self.classes.names[int(self.proposals[i])]
            for i in self.order[:k].tolist()
            if self.proposals[i] != self.labels[i]
        }

    def label(self, row: int) -> Any:
        """The label of a row, as the user knows it."""
        return self.classes.names[int(self.labels[row])]

    def data(self, decisions: Mapping[int, Any]) -> Data:
        """The training data with the decisions: new labels, and without the rows dropped.

        Raises:
            UpweightError: As for `apply`.
        """
        fitted, made = self.subject.fitted, decided(decisions, self.classes, self.labels)
        task, train = fitted.task, fitted.train
        data = with_labels(task, train, made.labels) if made.labels else train
        if not made.dropped:
            return data
        gone = set(made.dropped)
        return data.subset([i for i in range(len(train)) if i not in gone])

    def predict(self, decisions: Mapping[int, Any], queries: Any) -> tuple[float, float]:
        """(mean loss, accuracy) on some data that the decisions are predicted to give, at θ̂ + tΔθ.

        Where nothing supports the size of what the method predicts, as of a network, or where t is
        not 1, an `AssumptionWarning` says why; the numbers are the same. `apply` measures.

        Raises:
            UpweightError: As for `apply`.

        Cost: a solve and some passes over the training data; the first time one `attribute` more.
        """
        fitted, made = self.subject.fitted, decided(decisions, self.classes, self.labels)
        step, share = movement(fitted, made)
        data, theta = fitted.task.queries(queries), fitted.theta + step
        both = (LOSS, IsRight(self.classes))
        loss, accuracy = (float(measured(fitted.task, theta, data, m).mean()) for m in both)
        against = self._against_sizes or (TOO_LONG.format(share=share) if share < 1 else "")
        if against:
            callers.warn(f"{SIZE_UNKNOWN}: {against}. {MEASURED_BY}", AssumptionWarning)
        return loss, accuracy

    @cached_property
    def _against_sizes(self) -> str:
        """What scores of the method say against their sizes, as derivatives; here of one row."""
        fitted = self.subject.fitted
        with warnings.catch_warnings():  # what it warns of is in what is said against sizes
            warnings.simplefilter("ignore", AssumptionWarning)
            scores = fitted.attribute(fitted.train.subset([0]))
        return str(scores.provenance.against_sizes)

    def apply(
        self,
        decisions: Mapping[int, Any],
        test: Any,
        recipe: Recipe | None = None,
        *,
        bootstrap: Bootstrap = Bootstrap(),
        resources: Resources | None = None,
    ) -> Repaired:
        """Fit again with the decisions, and compare loss and accuracy on test data.

        A dropped row has wᵢ = 0 and the objective keeps its 1/n. The model before is refitted by
        the same recipe, so that nothing but the decisions differs. Refits by a function have their
        own running statistics; what is predicted has those of the model that was asked about.

        Args:
            decisions: By row a label as the fit was given it, "keep" or "drop"; as from `proposed`,
                or from `upweight.report.decisions`.
            test: Data that chose nothing: neither trained on nor the validation data.
            recipe: How to fit. None: as was said to `suspects`, or the library's own fit.
            bootstrap: Of the intervals, over test rows.
            resources: With a `folder`, which keeps the refits, also those of other decisions. None:
                those of the fitted method.

        Raises:
            DataError: A row or a label does not exist, nothing changes, or the test data are the
                training data.
            SpecError: There is no recipe, or it holds data of its own.
            NotConverged: The recipe failed.
            StaleStore: The folder keeps the refits of something else.

        Cost: two fits, and one solve.
        """
        subject = self.subject if recipe is None else Subject(self.subject.fitted, recipe)
        made = decided(decisions, self.classes, self.labels)
        data, notes = subject.fitted.task.queries(test), tuple[str, ...]()
        if contents(data) == contents(subject.fitted.train):
            raise DataError(
                "A repair is judged on data that were not trained on.",
                f"the {len(data)} training rows as test data, with the labels that are in doubt.",
                "one data set for both.",
                "hold some rows out before the fit, and pass them as test=(X_test, y_test).",
            )
        if self.validation is not None and contents(data) == contents(self.validation):
            notes = (
                "the test data are those that ranked or predicted: the gain is likely to be less "
                "on others",
            )
        using = subject.fitted.resources if resources is None else resources
        return repaired(subject, self.classes, made, data, bootstrap, using.within("apply"), notes)

    # -- the answer -------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Rows for which another label is proposed."""
        return int((self.proposals != self.labels).sum())

    title = "Which labels to look at first"

    @property
    def verdict(self) -> str:
        n = len(self)
        start = (
            f"For {self.count} of {n} rows ({self.count / n:.1%}) a model without them is "
            "predicted to favour another label"
        )
        if 2 * self.count > n:
            start = (
                f"There is no cut-off: {start[0].lower()}{start[1:]}, more than can be wrong, so "
                "that the method does not know what the model is without a row"
            )
        path, again = self.predicted, "nothing was fitted again"
        if self.left_out:
            again = f"the only fit was one without {self.left_out} rows, by which they are ranked"
        if path is None:
            return f"{start}; which of them are wrong is not known, and {again}."
        best, gain = path.best, path.gain
        by = f", by {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        by = by if len(path.values) > 1 and gain.low == gain.low else ""  # NaN of a single row
        if best == 0:
            return (
                f"{start}; accepting the proposals is not predicted to lower the validation "
                f"{self.measured} of {path.values[0]:.4f} at any of {len(path.counts) - 1} numbers "
                "of rows."
            )
        return (
            f"{start}; correcting the first {path.counts[best]} as proposed is predicted to take "
            f"the validation {self.measured} from {path.values[0]:.4f} to "
            f"{path.values[best]:.4f}{by}, and the accuracy from {path.accuracies[0]:.4f} to "
            f"{path.accuracies[best]:.4f}; {again}."
        )

    def frame(self) -> "DataFrame":
        """A row per training row in order: its label, the proposal, suspicion, predicted changes.

        `suspected` says for which a model without the row favours another label: the cut-off.
        `loss` is that of the row under the model as it is, to compare with.
        `id` is the row's label in the index of the data, where they have one. `relabelling` and
        `removing` are predicted changes of the mean validation measure.
        """
        order, names = self.order.tolist(), self.classes.names
        columns: dict[str, Any] = {
            "label": [names[int(self.labels[i])] for i in order],
            "proposed": [names[int(self.proposals[i])] for i in order],
            "suspicion": self.suspicion[self.order].cpu(),
            "suspected": (self.proposals != self.labels)[self.order].cpu(),
            "loss": self.losses[self.order].cpu(),
        }
        rows = self.subject.fitted.train.given
        if rows is not None and rows.ids is not None:
            columns = {"id": [rows.ids[i] for i in order], **columns}
        for name in ("relabelling", "removing"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = values[self.order].cpu()
        return as_table(columns, order, "row")

    def __repr__(self) -> str:
        try:
            some = self.frame().head(min(SHOWN, max(1, self.count))).to_string()
        except MissingPackage:  # without pandas the sentence alone
            return super().__repr__()
        return f"{super().__repr__()}\n{some}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Predicted validation accuracy as suspects are corrected; without: the suspicion."""
        ax = axes(ax)
        if self.predicted is None:
            ax.plot(self.suspicion[self.order].cpu().numpy())
            ax.axhline(0, color="0.6", linewidth=0.8)
            ax.set(xlabel="rows, most suspicious first", ylabel="suspicion")
            return ax
        path = self.predicted
        ax.plot(path.counts, path.accuracies, marker="o")
        ax.set(xlabel="suspects corrected as proposed", ylabel="predicted validation accuracy")
        return ax

    def numbers(self) -> dict[str, Any]:
        path = self.predicted
        gain = None if path is None else path.gain
        return {
            "rows": len(self),
            "by": self.by,
            "proposals": self.count,
            "order": self.order,
            "predicted": None
            if path is None or gain is None
            else {
                "corrected": path.counts,
                "loss": path.values,
                "accuracy": path.accuracies,
                "gain": gain,
            },
        }


def suspects(
    asked: Any,
    train: Any = None,
    validation: Any = None,
    *,
    measure: Callable[..., Tensor] = LOSS,
    by: Literal["label", "harm"] | None = None,
    recipe: Recipe | None = None,
    refit: bool = False,
) -> Suspects:
    """Rank training rows by how likely their label is wrong, or by the harm that they do.

    Args:
        asked: A fitted method, or a fitted scikit-learn classifier, or statsmodels results.
        train: Of an estimator (X, y), as given to its `fit`.
        validation: Held-out rows whose labels you trust. With them each row has the change of the
            validation measure that correcting or removing it is predicted to cause, and labels are
            judged by probabilities that agree with them: see `upweight.applications.calibration`.
        measure: What is asked of the validation rows, one number of each; the less the better.
        by: "label": by the model without the row; see `suspicion`. "harm": by S[q, i],
            what weight on the row adds to the mean validation measure. None: "harm" with
            validation data, else "label".
        recipe: How the model is fitted, for `Suspects.apply`. None: the library's own fit.
        refit: Fit once without the rows for which another label is proposed, and judge by that
            model in place of a step: for networks, whose steps fall short.

    Returns:
        All rows in order.

    Raises:
        UnsupportedModel: The targets are no classes.
        DataError: A label is none of the classes.
        NonFinite: Without a row the minimum is not determined.
        SpecError: `by` is another word, or "harm" without validation data; or a refit without a
            recipe.
        NotConverged: The refit failed.
        MissingPackage: SciPy is not installed, which the validation data need.
        NotOffered: The method has no outputs without a row, or no movement of θ.

    Exact when: J is quadratic in θ; otherwise Newton steps, by layer first-order ones.
    Cost: `loo_outputs`, a group removal (p³/3 where it is larger than θ); with validation data one
    `attribute` of their mean, a pass over relabelled rows and some solves; with `refit` one fit.

    Koh & Liang (2017), §5.4, rank by self-influence; Pregibon (1981) and Rad & Maleki (2020) are
    the outputs without a row; the proposal follows Brodley & Friedl (1999), who filter by the votes
    of models that did not see the row.
    """
    if by not in (None, "label", "harm") or (by == "harm" and validation is None):
        raise SpecError(
            'Rows are ranked by "label", or with validation data by "harm".',
            f"by={by!r}, {'no validation data' if validation is None else 'validation data'}.",
            "another word, or harm to data that were not given.",
            "suspects(fitted, validation=(X, y)) ranks by harm, suspects(fitted) by label.",
        )
    subject = subject_of(asked, train, recipe)
    fitted = subject.fitted
    task = fitted.task
    classes = Classes.of(task, fitted.train)
    if not _moves(fitted):
        raise not_offered("suspects(...)", "a method that says where θ̂ moves to")
    outputs, targets = outputs_at(task, fitted.theta, fitted.train)
    labels = torch.cat([classes.indices(each) for each in targets])
    held = None if validation is None else task.queries(validation)
    losses, suspicion, notes = suspicions(fitted, classes, outputs, labels, held)
    proposals, left_out = losses.argmin(dim=1), 0
    if refit:
        denied = proposals != labels
        model, left_out = _without(subject, denied), int(denied.sum())
        losses, suspicion, notes = by_refit(fitted, classes, labels, model, held)
        proposals = losses.argmin(dim=1)
    harm = relabelling = removing = None
    if held is not None:
        measure = as_measure(measure)
        harm, relabelling, against = _changes(fitted, classes, held, measure, labels, proposals)
        removing = -harm
    chosen: Literal["label", "harm"] = by or ("label" if held is None else "harm")
    if chosen == "harm":
        assert harm is not None
        suspicion = harm
    order = suspicion.argsort(descending=True, stable=True)
    path = None
    if held is not None:
        path, share = _path(fitted, classes, held, measure, order, labels, proposals)
        if share < 1:
            notes += (TOO_LONG.format(share=share),)
        if against:
            notes += (f"nothing supports the sizes of predicted changes: {against}",)
        notes += ("the path is predicted on the data that may have ranked it: test on others",)
    return Suspects(
        subject, classes, chosen, order, suspicion, labels, proposals, relabelling, removing,
        path, held, own_losses(labels, classes.losses(outputs)), notes, left_out,
        _in_words(measure),
    )  # fmt: skip


def _in_words(measure: Callable[..., Tensor]) -> str:
    if isinstance(measure, Loss):
        return "loss"
    said = repr(measure)
    return "measure" if "<" in said else said  # of a function the address says nothing


def _without(subject: Subject, denied: Bool[Tensor, " n"]) -> Trained:
    """One fit without some rows."""
    recipe, fitted = subject.require_recipe("A refit"), subject.fitted
    task, train = fitted.task, fitted.train
    kept = Kept.of(
        fitted.resources.within("suspects"), lambda: training_identity(recipe, task, train)
    )
    return refitted(kept, recipe, task, train, (~denied).double())


def has_suspects(fitted: Fitted) -> bool:
    """Whether `suspects` has an answer, as far as is known without the model's outputs."""
    task = fitted.task
    is_named = task.reads is not None and task.reads.classes is not None
    return _moves(fitted) and (is_named or isinstance(plain(task.loss), CrossEntropy | Bernoulli))


def _moves(fitted: Fitted) -> bool:
    """Whether the method says where θ moves to."""
    return fitted.spec.unit is Unit.DERIVATIVE and not fitted.scorer.by_refits


def _changes(
    fitted: Fitted,
    classes: Classes,
    held: Data,
    measure: Callable[..., Tensor],
    labels: Int[Tensor, " n"],
    proposals: Int[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], str]:
    """Of the mean measure: S of every row, its change by relabelling it, and what is against sizes.

    The new label of each row is the one that is proposed.
    """
    task, train, n = fitted.task, fitted.train, len(fitted.train)

    def mean(task: Task, params: Params, queries: Batch, weights: Tensor) -> Tensor:
        return measure(task, params, queries).mean()

    functional = Functional(mean)
    scores = fitted.attribute(held, functional)
    harm, against = scores.values[0], str(scores.against_sizes)
    places = (proposals != labels).nonzero()[:, 0].tolist()
    relabelling = torch.zeros_like(harm)
    if not places:
        return harm, relabelling, against
    new = {i: classes.names[int(proposals[i])] for i in places}
    data = with_labels(task, train, new).subset(places)
    batch = task.to_device(held.batch(0, len(held)))
    found = derivatives(functional, task, fitted.theta, batch, n)
    asked = Asked(held, functional, fitted.resources.memory_bytes, functional=found, exact=True)
    parts = []
    for job in fitted.scorer.jobs(asked):
        with job:
            for start, stop, each in data.batches(job.at_once):
                parts.append(job.scores_of(task.to_device(each), stop - start)[0])
    relabelling[places] = torch.cat(parts).to(harm) - harm[places]
    return harm, relabelling, against


def _path(
    fitted: Fitted,
    classes: Classes,
    held: Data,
    measure: Callable[..., Tensor],
    order: Int[Tensor, " n"],
    labels: Int[Tensor, " n"],
    proposals: Int[Tensor, " n"],
) -> tuple[Path, float]:
    """The mean measure and the accuracy at θ̂ + tΔθ of correcting the first k, and the least t."""
    last = int((proposals != labels).sum())
    counts = sorted({round(k * last / STEPS) for k in range(STEPS + 1)})
    total, totals, least = torch.zeros_like(fitted.theta), [], 1.0
    so_far, decided_at = dict[int, Any](), []
    for begin, end in pairwise(counts):
        some = [i for i in order[begin:end].tolist() if proposals[i] != labels[i]]
        new = {i: classes.names[int(proposals[i])] for i in some}
        total = total + changed_gradient(fitted, new)
        totals.append(total)
        so_far = so_far | new
        decided_at.append(so_far)
    thetas = [fitted.theta]
    if totals:
        steps = fitted.scorer.solve(torch.stack(totals) / len(fitted.train))
        for step, given in zip(steps, decided_at, strict=True):
            taken, share = shortened(fitted, -step.to(fitted.theta), given, ())
            thetas.append(fitted.theta + taken)
            least = min(least, share)
    values = [measured(fitted.task, theta, held, measure).cpu() for theta in thetas]
    right = [float(measured(fitted.task, theta, held, IsRight(classes)).mean()) for theta in thetas]
    means = [float(each.mean()) for each in values]
    best = values[means.index(min(means))]
    gain = mean((best - values[0]).double(), Bootstrap())
    return Path(tuple(counts), tuple(means), tuple(right), gain), least
