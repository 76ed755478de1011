"""Which examples of a pool to label next: the order, before anyone labels.

    S_c(x) = −(1/n) ∇Lᵀ P ∇ℓ(x, c)          L: the mean validation loss
    expected gain   Σ_c p_c(x) (−S_c(x))₊
    pseudo-label    −S_ŷ(x),  ŷ = argmax_c p_c(x)           (Gudovskiy et al. 2020)

Where ℓ is the negative log-likelihood itself, Σ_c p_c S_c = 0: by the model's own belief no label
is expected to help. The expected gain is then half of the expected size, ½ Σ_c p_c |S_c|.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.held_out import MEAN_LOSS
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.right_answers import probability
from upweight.applications.subject import subject_of
from upweight.errors import DataError, NonFinite, SpecError, UnsupportedModel
from upweight.methods.fitted import Fitted
from upweight.methods.perturbation import every_label
from upweight.plot import LOWERED, NEUTRAL, axes
from upweight.scores import Unit
from upweight.task.arrays import is_array
from upweight.task.data import Data
from upweight.task.measures import AT_ONCE, measured
from upweight.task.measures import Loss as LossOf
from upweight.task.task import Task

Labels = Literal["expected", "pseudo"]

SHORTLIST = 10
"""Batches of the highest gain from which a diverse batch is chosen."""


@dataclass(frozen=True, eq=False)
class Ranking(Outcome):
    """The order in which to label a pool, as one model predicts it.

    Args:
        predicted: Change of the mean validation loss that the label of each pool example is
            expected to bring: minus the expected gain, or S under the predicted label.
        chosen: Which to label next, the first choice first.
        probabilities: p_c of each pool example.
        labels: "expected" or "pseudo".
        loss: Mean validation loss of the model.
        diverse: Whether the batch was chosen to be diverse.
        is_derivative: Whether the method's scores have the unit of the validation loss.
        actual: None: nobody has labelled yet. `curve` fits again.
    """

    predicted: Float[Tensor, " k"]
    chosen: Int[Tensor, " b"]
    probabilities: Float[Tensor, "k c"]
    labels: Labels
    loss: float
    diverse: bool
    is_derivative: bool = True
    actual: None = None

    @property
    def title(self) -> str:
        return f"Which {len(self.chosen)} of {len(self.predicted)} examples to label next"

    @property
    def order(self) -> Int[Tensor, " k"]:
        """All pool examples, the largest predicted gain first."""
        return self.predicted.argsort(stable=True)

    @property
    def verdict(self) -> str:
        k, b = len(self.predicted), len(self.chosen)
        gain = -self.predicted
        best, typical = float(gain[self.chosen].sum()), b * float(gain.mean())
        how = "in expectation over labels" if self.labels == "expected" else "by predicted labels"
        if not self.is_derivative:
            return (
                f"{b} of {k} pool examples are to be labelled first by the order of their scores "
                f"{how}; nothing is labelled or fitted again."
            )
        return (
            f"The {b} of {k} pool examples to label first are predicted to lower the mean "
            f"validation loss of {self.loss:.3g} by {best:.3g} {how}, {b} at random by "
            f"{typical:.3g}; nothing is labelled or fitted again."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        found = ["to first order, each example by itself: gains of a batch do not add up"]
        if not self.diverse:
            found.append("copies of one example all rank high")
        if self.labels == "pseudo":
            found.append(
                "the predicted label is wrong most often for classes that the model has not seen"
            )
        if not self.is_derivative:
            found.append("scores of this method order examples and have no unit")
        return tuple(found)

    def frame(self) -> "DataFrame":
        """One row per pool example, the largest predicted gain first."""
        top = self.probabilities.max(dim=1)
        is_chosen = torch.zeros(len(self.predicted), dtype=torch.bool)
        is_chosen[self.chosen] = True
        columns = {
            "predicted": self.predicted,
            "predicted_label": top.indices,
            "probability": top.values,
            "chosen": is_chosen,
        }
        return as_table(columns, name="example").iloc[self.order.numpy()]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The predicted gain of every pool example, sorted, and those that were chosen."""
        ax = axes(ax)
        gain = -self.predicted[self.order]
        rank = self.order.argsort() + 1
        ax.plot(range(1, len(gain) + 1), gain.numpy(), color=NEUTRAL)
        ax.scatter(
            rank[self.chosen].numpy(), -self.predicted[self.chosen].numpy(),
            s=14, color=LOWERED, label="label next",
        )  # fmt: skip
        ax.set(xlabel="pool example, by rank", ylabel="predicted gain", xscale="log")
        ax.legend(frameon=False)
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "pool": len(self.predicted),
            "chosen": self.chosen,
            "predicted": self.predicted[self.chosen],
            "labels": self.labels,
            "diverse": self.diverse,
            "validation_loss": self.loss,
        }


def rank(
    asked: Any,
    pool: Any,
    validation: Any,
    labels: Labels = "expected",
    batch: int = 25,
    *,
    diverse: bool = False,
    train: Any = None,
) -> Ranking:
    """Which examples of an unlabelled pool to label next.

    The expected gain Σ_c p_c (−S_c)₊ counts the labels that would lower the mean validation loss L,
    each with the probability that the model gives it: who labels an example finds out which it is.
    `labels="pseudo"` takes the predicted label for the true one, as Gudovskiy et al. (2020) do.

    A diverse batch is chosen greedily: the next example has the largest gain(x)² d²(x), where d²(x)
    is what is left of its direction by those before it,

        u(x)_v = Σ_c p_c S_c(v, x) over the labels with S_c(x) < 0,     mean_v u(x)_v = −gain(x)
        d²(x) = 1 − ‖projection of u(x)/‖u(x)‖ on the span of the chosen u‖²

    and v are the validation examples: the greedy determinantal choice of Chen, Zhang & Zhou (2018,
    Alg. 1) with the gain as quality. It is taken among the ten batches of largest gain.

    Args:
        asked: A fitted method, or a fitted scikit-learn classifier.
        pool: One array of inputs; or data as for `as_data`, whose targets are not used.
        validation: Labelled examples of the distribution that matters. They guide, so they cannot
            also say how good the model became.
        labels: "expected" or "pseudo".
        batch: How many to label next.
        diverse: Whether examples that act alike are kept out of one batch.
        train: Of an estimator, (X, y) as given to its `fit`.

    Raises:
        SpecError: `labels` is neither, or the pool has no `batch` examples.
        DataError: The pool or the validation data are empty.
        UnsupportedModel: The loss is none of classes, one per example.
        NonFinite: A score or a probability is NaN.
        NotOffered: The method scores training examples only.

    Cost: one solve for L (diverse: one for each validation example as well), then a gradient for
    each pool example and class.
    """
    if labels not in ("expected", "pseudo"):
        raise SpecError(
            "The unknown label is taken in expectation or as predicted.",
            f"labels={labels!r}.",
            "the labels themselves, which a ranking does not use.",
            'labels="expected" or labels="pseudo".',
        )
    fitted = subject_of(asked, train).fitted
    held = fitted.task.queries(validation)
    data = pool_data(fitted.task, pool, held)
    if len(held) == 0 or len(data) == 0:
        raise DataError(
            "A ranking needs a pool and validation examples.",
            f"{len(data)} examples in the pool, {len(held)} for validation.",
            "a pool of which all is labelled.",
            "stop labelling, or add examples to the pool.",
        )
    if not 1 <= batch <= len(data):
        raise SpecError(
            "A batch holds at least one example, and no more than the pool.",
            f"batch={batch} of a pool of {len(data)}.",
            "the last batch of a pool that is almost all labelled.",
            f"batch={min(25, len(data))}.",
        )
    classes = classes_of(fitted.task, fitted.theta, data)
    p = probabilities(fitted.task, fitted.theta, data, classes)
    scores = _finite(_scores(fitted, data, classes, held, MEAN_LOSS)[0])
    weights = _weights(p, scores, labels)
    predicted = (weights * scores).sum(dim=1)
    order = predicted.argsort(stable=True)
    chosen = order[:batch]
    if diverse:
        short = order[: SHORTLIST * batch]
        each = _scores(fitted, data.subset(short.tolist()), classes, held, LossOf())
        directions = (weights[short] * _finite(each)).sum(dim=2).mT  # [short, v]
        chosen = short[_greedy(-predicted[short], directions, batch)]
    loss = float(measured(fitted.task, fitted.theta, held, LossOf()).mean())
    unit = fitted.spec.unit is Unit.DERIVATIVE
    return Ranking(predicted, chosen, p, labels, loss, diverse, unit)


def pool_data(task: Task, pool: Any, labelled: Data) -> Data:
    """The pool as data. Inputs alone get the first target of `labelled`, which nobody reads."""
    if task.reads is None and is_array(pool):
        first = labelled.take([0])
        if not isinstance(first, tuple):
            raise DataError(
                "Inputs alone are for models that are given as (X, y).",
                f"one array for a model with batches of type {type(first).__name__}.",
                "a model with named inputs.",
                "give the pool in the form of the validation data, with any targets.",
            )
        if len(pool) == 0:
            return labelled.subset([])
        target = first[-1][0] if isinstance(first[-1], tuple | list) else first[-1]
        return task.queries((pool, target.expand(len(pool), *target.shape[1:]).clone()))
    return task.queries(pool)


def classes_of(task: Task, theta: Float[Tensor, " p"], data: Data) -> Sequence[int]:
    """The labels that an example may have: one for each output, or yes and no for a single one.

    Raises:
        UnsupportedModel: The outputs are no logits of one label.
    """
    with torch.no_grad():
        outputs, _ = task.outputs(theta, task.to_device(data.take([0])))
    if not isinstance(outputs, Tensor) or outputs.ndim > 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UnsupportedModel(
            "A ranking of a pool needs one label per example.",
            f"outputs {shape}.",
            "a model of sequences or images, with a label for each position.",
            "rank by a head with one label, such as that of the whole sequence.",
        )
    return range(max(2, outputs[0].numel()))


def probabilities(
    task: Task, theta: Float[Tensor, " p"], data: Data, classes: Sequence[int]
) -> Float[Tensor, "k c"]:
    """p_c of every example, in float64 on the CPU.

    Raises:
        UnsupportedModel: The loss is none of classes.
        NonFinite: One of them is NaN.
    """
    parts: list[Tensor] = []
    with torch.no_grad():
        for start, stop, batch in data.batches(AT_ONCE):
            new = every_label(task.to_device(batch), stop - start, classes)
            outputs, targets = task.outputs(theta, new)
            if not parts:
                task.loss.check(outputs, targets)
            found = probability(task.loss, outputs, targets)
            parts.append(found.double().cpu().reshape(stop - start, len(classes)))
    p = _finite(torch.cat(parts))
    off = float((p.sum(dim=1) - 1).abs().max())
    if off > 1e-3:
        raise UnsupportedModel(
            "The probabilities of an example's labels must add up to 1.",
            f"{task.loss!r}, where they are off by up to {off:.2g}.",
            "a loss that is no negative log-likelihood of one label.",
            "use CrossEntropy(), or Bernoulli() with one logit.",
        )
    return p


def _scores(
    fitted: Fitted, data: Data, classes: Sequence[int], held: Data, measure: Any
) -> Float[Tensor, "q k c"]:
    return fitted.label_influence(data, classes, held, measure).double().cpu()


def _weights(
    p: Float[Tensor, "k c"], scores: Float[Tensor, "k c"], labels: Labels
) -> Float[Tensor, "k c"]:
    """How much each label of each example counts."""
    if labels == "expected":
        return p * (scores < 0)
    return torch.nn.functional.one_hot(p.argmax(dim=1), p.shape[1]).double()


def _greedy(
    gain: Float[Tensor, " k"], directions: Float[Tensor, "k v"], batch: int
) -> Int[Tensor, " b"]:
    """Places with the largest gain² d², one after the other (pivoted Gram–Schmidt).

    Where the chosen span all directions, the rest follow by gain alone.
    """
    size = directions.norm(dim=1, keepdim=True)
    left = torch.where(size > 0, directions / size, 0.0)
    open_ = torch.ones(len(gain), dtype=torch.bool)
    chosen = []
    for _ in range(min(batch, len(gain))):
        d2 = (left * left).sum(dim=1)
        # A negative gain (of a predicted label that hurts) stays below every other.
        value = torch.where(gain > 0, gain * gain * d2, gain)
        if not bool((value[open_] > 1e-12 * gain.max() ** 2).any()):
            value = gain
        best = int(torch.where(open_, value, -torch.inf).argmax())
        chosen.append(best)
        open_[best] = False
        norm = left[best].norm()
        if float(norm) > 1e-8:
            unit = left[best] / norm
            left = left - (left @ unit)[:, None] * unit
    return torch.tensor(chosen)


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        bad = (~values.isfinite()).nonzero()
        raise NonFinite(
            "Every pool example needs probabilities and scores that are numbers.",
            f"{len(bad)} of {values.numel()} are NaN or infinite.",
            "a pool example with NaN among its inputs.",
            "leave such examples out of the pool.",
        )
    return values
