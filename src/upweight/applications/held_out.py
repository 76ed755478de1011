"""Held-out data that choose, held-out data that judge, and models fitted again under other weights.

A validation set that has chosen something says nothing more about it. Two halves of it can still
predict: what one half chooses is measured on the other (cross-fitting; Chernozhukov et al. 2018,
§3). What is reported comes from a third split, the test data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Axes, Batch, Params
from upweight.applications.subject import Subject
from upweight.errors import DataError, NonFinite, NotOffered, UnsupportedModel
from upweight.evaluation import bootstrap as intervals
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.methods.fitted import Fitted
from upweight.methods.method import Method
from upweight.runtime.resources import Resources
from upweight.runtime.streams import stream
from upweight.task.check import checked_losses
from upweight.task.data import Data
from upweight.task.identity import contents
from upweight.task.losses import Loss, Weighted
from upweight.task.measures import AT_ONCE, Functional, Measure, measured
from upweight.task.measures import Loss as LossMeasure
from upweight.task.recipe import Trained, Trainer
from upweight.task.task import Task
from upweight.training.kept import kept_trainer

LEAST = 4
"""Validation examples: two in each half."""


# -- splits ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Splits:
    """What chooses, and what reports: `test`, which is None where nobody asked."""

    validation: Data
    halves: tuple[Data, Data]
    test: Data | None


def splits(fitted: Fitted, validation: Any, test: Any, seed: int) -> Splits:
    """The splits, checked, with the validation set cut in two at random.

    Raises:
        DataError: There is no validation set or too small a one, or two of the three hold the same
            examples.
        UpweightError: As for `checked_losses` of the validation and the test data.
    """
    task, train = fitted.task, fitted.train
    if validation is None:
        raise DataError(
            "What is chosen is chosen for held-out data.",
            "no validation set.",
            "training data meant as validation, of which every row would vote for itself.",
            "hold some rows out: validation=(X_val, y_val), and others for test=(X_test, y_test).",
        )
    guide = task.queries(validation)
    judge = None if test is None else task.queries(test)
    if len(guide) < LEAST:
        raise DataError(
            f"A validation set needs at least {LEAST} examples: one half chooses, the other "
            "predicts.",
            f"{len(guide)} validation examples.",
            "a single query.",
            "hold out more; some hundred are needed for an interval that says anything.",
        )
    named = {"training": train, "validation": guide} | ({} if judge is None else {"test": judge})
    seen: dict[str, str] = {}
    for name, data in named.items():
        other = seen.setdefault(contents(data), name)
        if other != name:
            raise DataError(
                "Training, validation and test data are three splits: what was chosen on one is "
                "reported on another.",
                f"the same {len(data)} examples as {other} and as {name} data.",
                "one held-out set used twice.",
                f"cut it in two, and pass one part as validation={'' if judge is None else ' and '}"
                f"{'' if judge is None else 'the other as test='}.",
            )
    for name, data in named.items():
        if data is not train:  # before the trainings, which a missing value would waste
            checked_losses(task, data, f"{name} data")
    order = torch.randperm(len(guide), generator=stream("halves", seed)).tolist()
    half = len(order) // 2
    return Splits(guide, (guide.subset(order[:half]), guide.subset(order[half:])), judge)


# -- measurements ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Held:
    """A model on held-out data: means with intervals, and by example; accuracy of classes alone."""

    loss: Estimate
    accuracy: Estimate | None
    losses: Float[Tensor, " q"]
    right: Float[Tensor, " q"] | None

    def change_of_loss(self, other: "Held", bootstrap: Bootstrap) -> Estimate:
        """This loss less another model's on the same examples, paired."""
        return intervals.mean(self.losses - other.losses, bootstrap)

    def change_of_accuracy(self, other: "Held", bootstrap: Bootstrap) -> Estimate | None:
        """This accuracy less another model's on the same examples, paired."""
        if self.right is None or other.right is None:
            return None
        return intervals.mean(self.right - other.right, bootstrap)


@dataclass(frozen=True)
class IsRight(Measure):
    """m = 1 where the class of largest output is the target, else 0."""

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        outputs, targets = task.outputs(params, batch)
        y = class_of(task.loss, outputs, targets)
        if y is None:
            raise UnsupportedModel(
                "Accuracy needs one class per example.",
                f"{task.loss!r} with outputs {tuple(outputs.shape)}.",
                "a regression, sequences, or class probabilities as targets.",
                "ask about the loss.",
            )
        given = outputs.argmax(dim=1) if outputs[0].numel() > 1 else outputs.reshape(-1) > 0
        return (given == y).to(outputs.dtype)


def class_of(loss: Loss, outputs: Tensor, targets: Any) -> Int[Tensor, " b"] | None:
    """The class of each example; None where the loss knows none, or several per example."""
    y = targets
    while isinstance(y, tuple | list):  # a weighted loss: (y, v)
        y = y[0]
    try:
        loss.margin(outputs, targets)
    except UnsupportedModel:
        return None
    b = len(outputs)
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return None if y.shape != (b,) or y.is_floating_point() else y.long()
    return (y.reshape(-1) > 0.5).long() if outputs.numel() == y.numel() == b else None


def classes_of(task: Task, data: Data) -> Int[Tensor, " n"] | None:
    """The class of every example, counted from 0 without gaps; None where there are none."""
    theta, parts = task.theta(), []
    for _, _, batch in data.batches(AT_ONCE):
        with torch.no_grad():
            found = class_of(task.loss, *task.outputs(theta, task.to_device(batch)))
        if found is None:
            return None
        parts.append(found.cpu())
    return torch.unique(torch.cat(parts), return_inverse=True)[1]  # type: ignore[no-untyped-call]


def held(task: Task, theta: Float[Tensor, " p"], data: Data, bootstrap: Bootstrap) -> Held:
    """A model of the task on held-out data.

    Raises:
        NonFinite: A loss is NaN or infinite.
    """
    losses = measured(task, theta, data, LossMeasure()).cpu()
    if not bool(losses.isfinite().all()):
        bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
        raise NonFinite(
            "A mean loss on held-out data needs finite losses.",
            f"{float(losses[bad[0]])} for example {bad[0]}, and {len(bad) - 1} more.",
            "a missing value in an input, or a target that the model gives no probability.",
            "leave these examples out of the test data, or fill their missing values.",
        )
    try:
        right = measured(task, theta, data, IsRight()).cpu()
    except UnsupportedModel:
        right = None
    accuracy = None if right is None else intervals.mean(right, bootstrap)
    return Held(intervals.mean(losses, bootstrap), accuracy, losses, right)


def draw_intervals(ax: Axes, found: Mapping[str, Estimate], label: str) -> None:
    """Estimates with their intervals, one below the other."""
    for place, each in enumerate(found.values()):
        ax.plot([each.low, each.high], [place, place], color="0.4")
        ax.plot(each.value, place, "o", color="#0072b2")
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set_xlabel(label)


def columns(model: Held | None) -> dict[str, float | None]:
    """Loss and accuracy with their bounds, as columns of a table; None where there are none."""
    found: dict[str, float | None] = {}
    for name in ("loss", "accuracy"):
        value: Estimate | None = None if model is None else getattr(model, name)
        titles = (f"test_{name}", f"{name}_low", f"{name}_high")
        found |= zip(titles, (None, None, None) if value is None else value, strict=True)
    return found


# -- scores of the mean loss ----------------------------------------------------------------------


def _mean_loss(task: Task, params: Params, queries: Any, weights: Tensor) -> Tensor:
    return task.losses(params, queries).mean()


MEAN_LOSS = Functional(_mean_loss)
"""(1/q) Σ ℓ(θ; z_q): one solve for all of a validation set."""


def mean_loss_scores(fitted: Fitted, data: Data) -> Float[Tensor, " n"]:
    """φᵢ = ∂/∂wᵢ of the mean loss on the data."""
    scores: Tensor = fitted.attribute(data, MEAN_LOSS).values[0]
    return scores.detach().cpu().double()


# -- fitting again --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Refits:
    """Models of a subject under other data weights, and methods fitted to those models.

    `what` is who fits again, for messages. A `folder` of the resources keeps the models.
    """

    subject: Subject
    what: str
    resources: Resources = field(default_factory=Resources)

    @property
    def fitted(self) -> Fitted:
        return self.subject.fitted

    @cached_property
    def trainer(self) -> Trainer:
        """The recipe, bound to the training data.

        Raises:
            SpecError: There is no recipe.
            StaleStore: The folder holds models of something else.
            UpweightError: It cannot train this task.
        """
        recipe = self.subject.require_recipe(self.what)
        return kept_trainer(recipe, self.fitted.task, self.fitted.train, self.resources)

    def attempted(self, weights: Float[Tensor, " n"]) -> Trained | str:
        """The one model of these weights, or why the recipe did not train."""
        trained = self.trainer(weights[None])
        if trained.failures:
            return trained.failures[0]
        is_finite = bool(trained.theta.isfinite().all())
        return trained if is_finite else "parameters that are not finite"

    def held(self, model: Trained, data: Data, bootstrap: Bootstrap) -> Held:
        """One retrained model on held-out data, with its own running statistics.

        Raises:
            NonFinite: A loss is NaN or infinite.
        """
        return held(model.task_of(self.fitted.task, 0), model.theta[0], data, bootstrap)

    def at_weights(
        self, model: Trained, weights: Float[Tensor, " n"], method: Method | None
    ) -> Fitted:
        """A method, fitted to θ(w) with w as part of the objective: of wᵢ ℓᵢ in place of ℓᵢ.

        Running statistics are the model's own, as constants. Its scores are
        ∂m/∂log wᵢ = wᵢ ∂m/∂wᵢ; its queries are `weighing_one`.
        """
        at = model.task_of(self.fitted.task, 0).moved_to(model.theta[0])
        task = Task(at.model, Weighted(at.loss), at.penalty, at.params, _WithWeights(at.forward))
        data = _Weighed(self.fitted.train, weights.to(at.layout.dtype))
        chosen = self._method() if method is None else method
        return chosen.fit(task, data, resources=self.fitted.resources)

    def _method(self) -> Method:
        """The method of the subject, to be fitted elsewhere.

        Raises:
            NotOffered: It has seen a run of training that other weights would not have had.
        """
        spec = self.fitted.spec
        if not isinstance(spec, Method) or self.fitted.history is not None:
            raise NotOffered(
                f"{self.what} fits the method again, to the model of other data weights.",
                f"{spec!r}, with the history of one run of training.",
                "a method that looks at how the model was trained.",
                "fit Influence(...) to the task, or choose from one model: rule='drop'.",
            )
        return spec


@dataclass(frozen=True)
class _WithWeights:
    """Outputs and (targets, v) of a batch (batch, v)."""

    forward: Callable[..., Any]

    def __call__(self, model: Any, batch: Any) -> tuple[Any, Any]:
        inner, weights = batch
        outputs, targets = self.forward(model, inner)
        return outputs, (targets, weights)


@dataclass(frozen=True, eq=False)
class _Weighed(Data):
    """Examples beside their weights: batches (batch, v)."""

    data: Data
    weights: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.data)

    def take(self, indices: Any) -> Batch:
        at = [int(i) for i in indices]
        return self.data.take(at), self.weights[at]


def weighing_one(fitted: Fitted, queries: Data) -> Data:
    """Queries of weight 1, for a method fitted by `Refits.at_weights`."""
    return _Weighed(queries, torch.ones(len(queries), dtype=fitted.task.layout.dtype))
