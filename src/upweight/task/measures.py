"""m(θ; q): what is asked of the model about each query.

A measure is `(task, params, batch) -> [q]`. Any function `(outputs, targets) -> [q]` may stand in
its place.
"""

import abc
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.errors import ShapeError, SpecError
from upweight.runtime.fingerprint import described
from upweight.task.task import Task


class Measure(abc.ABC):
    """m(θ; q) for each query of a batch."""

    @abc.abstractmethod
    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        """The measurement of each query."""


@dataclass(frozen=True)
class Loss(Measure):
    """m = ℓ(θ; q): the training loss on the query, without the penalty."""

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        return task.losses(params, batch)


@dataclass(frozen=True)
class LogProb(Measure):
    """m = log p(y | x; θ)."""

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        return task.loss.log_prob(*task.outputs(params, batch))


@dataclass(frozen=True)
class Margin(Measure):
    """m = log p(y | x; θ) − log(1 − p(y | x; θ)): positive where the model is right (Park 2023)."""

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        return task.loss.margin(*task.outputs(params, batch))


@dataclass(frozen=True)
class Logit(Measure):
    """m = f[index]: one output of the model; by default the one the integer target names.

    Args:
        index: Which output, or None for the target's class. Outputs `[q]` have only index 0.

    Raises:
        ShapeError: There is no such output; or, without an index, the target is not one class.
    """

    index: int | None = None

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        outputs, targets = task.outputs(params, batch)
        flat = outputs.reshape(len(outputs), -1)
        count = flat.shape[1]
        if self.index is not None and not 0 <= self.index < count:
            raise ShapeError(
                f"Logit's index must name one of the model's {count} outputs: 0…{count - 1}.",
                f"index={self.index}.",
                "a class counted from 1, or from the end.",
                "count from 0, over all outputs of one query in order.",
            )
        if self.index is not None or count == 1:
            return flat[:, self.index or 0]
        # A weighted loss has targets (y, v); the class is y.
        y = targets[0] if isinstance(targets, tuple | list) else targets
        if y.is_floating_point() or y.shape != (len(flat),):
            raise ShapeError(
                f"Logit() needs a class per query as its target: integers ({len(flat)},).",
                f"targets {tuple(y.shape)} of {y.dtype}.",
                "a regression, class probabilities or one class per position.",
                "name the output, Logit(index=0), or pass a function (outputs, targets) -> [q].",
            )
        return flat.gather(1, y[:, None].long())[:, 0]


@dataclass(frozen=True)
class OutputMeasure(Measure):
    """m = function(outputs, targets), any function that returns one number per query."""

    function: Callable[[Tensor, Any], Tensor]

    def __repr__(self) -> str:
        return f"OutputMeasure({described(self.function)})"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        return self.function(*task.outputs(params, batch))  # its shape is checked by the caller


def as_measure(measure: Measure | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A measure from what the user holds.

    A function of two arguments is `(outputs, targets) -> [q]`; one of three is already
    `(task, params, batch) -> [q]`.

    Raises:
        SpecError: It is a name or a class, not a measure.
    """
    if isinstance(measure, Measure):
        return measure
    if isinstance(measure, type) or not callable(measure):
        raise SpecError(
            "A measure is an object such as upweight.Margin(), or a function (outputs, "
            "targets) -> [q].",
            f"{measure!r}.",
            "a class that was not called." if isinstance(measure, type) else "a name.",
            "Loss(), Margin(), LogProb() (of the target's class) or Logit(index); of anything "
            "else a function, such as lambda outputs, targets: outputs.softmax(1)[:, 1].",
        )
    try:
        signature = inspect.signature(measure)
    except ValueError:  # a function of PyTorch's own, which does not say
        return OutputMeasure(measure)
    required = [
        p
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return measure if len(required) == 3 else OutputMeasure(measure)
