"""What every adapter answers with: yes or no with the reason, and how its tasks read data.

A translated model is known to its user by other rows and labels than it computes with. Its task
takes data as the user knows them, or what the adapter's own `data` made of them; features that
somebody else made look like rows, and are refused wherever they can be told from them.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from upweight._typing import Batch
from upweight.errors import DataError
from upweight.task.data import ArrayData, Data, Joined, Subset
from upweight.task.recipe import Trained
from upweight.task.rows import Rows
from upweight.task.task import Reader, Task


@dataclass(frozen=True)
class Support:
    """Whether an estimator has a translation, and why not or with what reservation.

    True where `ok` is. The reason for a no has its way out; for a yes it is what is minimized.
    """

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, eq=False, repr=False)
class TranslatedData(ArrayData):
    """Arrays as a translated model's task takes them, with what to know about them.

    Args:
        notes: What to know.
        origin: A hash of the fitted model that they were translated for.
    """

    notes: tuple[str, ...] = field(default=())
    given: Rows | None = field(default=None, repr=False)
    origin: str = ""


@dataclass(frozen=True, eq=False)
class AdapterReader(Reader):
    """How a translated task reads data: `Task.reads`.

    Args:
        train: The training data of the task.
        call: How the adapter's `data` is called, for messages.
    """

    train: TranslatedData
    call: str

    fits_own_data = True

    def label(self, target: Tensor) -> Any:
        """The target of one example, as the user knows it; None: it is what the loss takes."""
        return None

    @abc.abstractmethod
    def translate(self, given: Any) -> TranslatedData:
        """Examples from what the user holds."""

    @abc.abstractmethod
    def relabeled(self, example: Batch, label: Any) -> Batch:
        """A batch of one training example with another label, given as the user knows it."""

    def queries(self, given: Any) -> Data:
        """Queries as the user knows them, or as the adapter's `data` made them for this model."""
        return self._own(given) if isinstance(given, Data) else self.translate(given)

    def training(self, given: Any) -> Data:
        """The training data that the model was translated with, from any form of them.

        Others are refused: the objective, its weights and penalty, is that of these.
        """
        if isinstance(given, Data):
            return self._own(given)
        found = self.translate(given)
        # Weights of the objective are not among what is compared: data have none of their own.
        kept, read = (_without_weights(data.arrays) for data in (self.train, found))
        same = len(kept) == len(read) and all(map(torch.equal, kept, read))
        if not same:
            raise DataError(
                "The training data of a translated model are those that it was fitted on.",
                f"{len(found)} examples that are not the {len(self.train)} it was translated "
                "with, in their order.",
                "another split, rows in another order, or train and queries the wrong way round.",
                "attribute(model, train, queries), with train as it was given to fit (of "
                "statsmodels None); of a task the `train` that was returned with it.",
            )
        return self.train

    def _own(self, data: Data) -> Data:
        whole: Data = data
        while isinstance(whole, Subset):
            whole = whole.data
        if isinstance(whole, Joined):
            for part in (whole.first, whole.second):
                self._own(part)
            return data
        if not isinstance(whole, TranslatedData):
            raise DataError(
                "Data of a translated model must be translated as it was.",
                f"a {type(whole).__name__}, which may hold rows or the features made of them.",
                "data that were put together without the adapter.",
                f"use {self.call}, or pass (X, y) as they were given to fit.",
            )
        if whole.origin != self.train.origin:
            raise DataError(
                "Data of a translated model must be translated for the same fitted model.",
                "data translated for a model with other coefficients or steps.",
                "another model, a part of it, or one that was fitted again since.",
                f"make task and data anew: {self.call} with the model that the task is of.",
            )
        return data


def _without_weights(arrays: Any) -> list[Tensor]:
    *inputs, targets = arrays
    y = targets[0] if isinstance(targets, tuple) else targets
    return [*tree_leaves(inputs), y]


def require_same_index(X: Any, y: Any, one: str, other: str) -> None:
    """Refuse a frame and a series that hold the same rows in another order."""
    if not (hasattr(X, "columns") and hasattr(X, "index") and hasattr(y, "index")):
        return
    if callable(y.index) or len(X.index) != len(y.index) or X.index.equals(y.index):
        return
    if X.index.is_unique and y.index.is_unique and not len(X.index.symmetric_difference(y.index)):
        raise DataError(
            f"{one} and {other} must hold their rows in one order.",
            f"the same row labels in two orders: {list(X.index[:3])}… and {list(y.index[:3])}….",
            "one of them was sorted or shuffled.",
            f"pass {other}.loc[{one}.index].",
        )


def numbers(values: Any, required: str, cause: str, way_out: str) -> np.ndarray:
    """A copy as an array of float64; a DataError where there is something that is no number."""
    try:
        return np.array(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    except (TypeError, ValueError) as error:
        given = f"{type(values).__name__}: {error}."
        raise DataError(required, given, cause, way_out) from error


def linear_map(weight: Float[Tensor, "c i"], bias: Float[Tensor, " c"] | None) -> nn.Linear:
    """W x + b in float64, in eval mode."""
    outputs, inputs = weight.shape
    model = nn.Linear(inputs, outputs, bias=bias is not None, dtype=torch.float64).eval()
    with torch.no_grad():
        model.weight.copy_(weight)
        if bias is not None:
            model.bias.copy_(bias)
    return model


@dataclass(frozen=True, eq=False)
class RefitTrainer:
    """w ↦ θ(w) by another package's own fit, one model after the other. Made by `Refit.prepare`.

    Args:
        task: Lays out θ.
        fit: w `[n]` to θ(w), or to None and why there is none.
        objective: ∇J(θ, w), or None where J is not smooth.
    """

    task: Task
    fit: Callable[[Float[Tensor, " n"]], tuple[Float[Tensor, " p"] | None, str]]
    objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    at_once: int = 1

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """θ(w) for each row, with the package's own words where there is none."""
        theta = self.task.theta().expand(len(weights), -1).clone().fill_(torch.nan)
        norms, failures = torch.full((len(weights),), torch.nan, dtype=torch.float64), {}
        for row, w in enumerate(weights.to(theta)):
            found, reason = self.fit(w)
            if found is None:
                failures[row] = reason
                continue
            theta[row] = found
            if self.objective is not None:
                norms[row] = self.objective(theta[row : row + 1], w[None])[1].norm()
        return Trained(theta, norms, failures)
