"""m(θ; q): what is asked of the model about each query.

A measure is `(task, params, batch) -> [q]`. Any function `(outputs, targets) -> [q]` may stand in
its place.
"""

import abc
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.errors import ShapeError, SpecError, listed, message
from upweight.runtime.fingerprint import described
from upweight.task.data import Data
from upweight.task.task import Task

AT_ONCE = 1024
"""Queries in a forward pass."""


class Measure(abc.ABC):
    """m(θ; q) for each query of a batch."""

    @abc.abstractmethod
    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        """The measurement of each query."""


def measured(
    task: Task, theta: Float[Tensor, " p"], queries: Data, measure: Callable[..., Tensor]
) -> Float[Tensor, " q"]:
    """m_q(θ) of every query, in float64 on the device of the model. Nothing is checked."""
    params = task.named(theta.to(task.layout.device, task.layout.dtype))
    with torch.no_grad():
        parts = [
            measure(task, params, task.to_device(batch)).double()
            for _, _, batch in queries.batches(AT_ONCE)
        ]
    return torch.cat(parts)


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
        SpecError: It is a name or a class, not a measure, or a function of other arguments.
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
    if len(required) == 3:
        return measure
    try:
        signature.bind(None, None)
    except TypeError:
        raise SpecError(
            "A function that measures queries takes their outputs and their targets.",
            f"{described(measure)}{signature}.",
            "a function of the outputs alone, or with arguments of its own.",
            "lambda outputs, targets: ..., which returns one number per query; a function of "
            "(task, params, batch) has the inputs too.",
        ) from None
    return OutputMeasure(measure)


@dataclass(frozen=True)
class Functional:
    """φ(θ, w): one or several numbers of the whole model, not one of each query.

    A coefficient, a standard error, an accuracy on all queries together. One gradient and one solve
    answer for all of it, and where φ depends on the data weights by itself both parts of its
    derivative are taken:

        dφ/dwᵢ = ∂φ/∂wᵢ + ∂φ/∂θ · dθ̂/dwᵢ

    Args:
        function: `(task, params, queries, weights) -> [k]` or one number. `params` are θ by name,
            `queries` all of them as one batch (None where none were given), `weights` [n] those of
            the training data, which are 1.

    Example:
        >>> worst = Functional(lambda task, params, queries, w: task.losses(params, queries).max())
    """

    function: Callable[..., Tensor]

    def __repr__(self) -> str:
        return f"Functional({described(self.function)})"

    def __call__(self, task: Task, params: Params, queries: Any, weights: Tensor) -> Tensor:
        return self.function(task, params, queries, weights)


@dataclass(frozen=True)
class _Entries:
    """θ[which], as the function of a `Coefficient`."""

    which: int | str

    def __call__(self, task: Task, params: Params, queries: Any, weights: Tensor) -> Tensor:
        flat, layout = task.layout.flatten(params), task.layout
        if not isinstance(self.which, str):
            if -len(flat) <= self.which < len(flat):
                return flat[self.which]
            raise SpecError(self._unknown(f"{len(flat)} entries", params))
        known = {} if task.reads is None else task.reads.coefficients
        if self.which in known:
            owner, column = known[self.which]
            if self.which in layout.names:
                raise SpecError(
                    "A coefficient is named by one thing.",
                    f"Coefficient({self.which!r}), a column of the data and a parameter of the "
                    "model.",
                    "a column that is called as a parameter is.",
                    f"for the column Coefficient('{owner}[0, {column}]').",
                )
            return params[owner][..., column].reshape(-1)
        name, _, place = self.which.partition("[")
        if name not in layout.names:
            raise SpecError(self._unknown("no parameter of that name", params, list(known)))
        value = params[name]
        if not place:
            return value.reshape(-1)
        try:
            at = tuple(int(part) for part in place.removesuffix("]").split(","))
            return value[at].reshape(-1)
        except (ValueError, IndexError) as error:
            given = f"{name} of shape {tuple(value.shape)}"
            raise SpecError(self._unknown(given, params)) from error

    def _unknown(self, given: str, params: Params, columns: Sequence[str] = ()) -> str:
        if columns:
            return message(
                "A coefficient of this model is named by a column.",
                f"Coefficient({self.which!r}) of a task with {given}.",
                "a column that was renamed or transformed.",
                f"one of {listed(columns, 12)}, such as Coefficient({columns[-1]!r}).",
            )
        names, (first, value) = [*params], next(iter(params.items()))
        entry = f"{first}[{', '.join('0' * value.ndim)}]" if value.ndim else first
        return message(
            "A coefficient is named by a parameter, an entry of one, or a place in θ.",
            f"Coefficient({self.which!r}) of a task with {given}.",
            "a name of another model, or a place counted from 1.",
            f"one of {', '.join(map(repr, names[:8]))}{', …' if len(names) > 8 else ''}, such as "
            f"Coefficient({entry!r}).",
        )


class Coefficient(Functional):
    """φ = θ[which]: an entry of θ, by its place, or all entries of a parameter by its name.

    Of a model that was translated from statsmodels or scikit-learn also by the name of its column,
    as a frame or formula gave it: one entry for each output.

    Args:
        which: A place in θ, or a name such as "weight", or "weight[0, 2]" for one of its entries;
            or the name of a column.

    Raises:
        SpecError: There is no such parameter, entry or column; or a column and a parameter have
            that name.
    """

    def __init__(self, which: int | str) -> None:
        super().__init__(_Entries(which))

    def __repr__(self) -> str:
        return f"Coefficient({self.function.which!r})"  # type: ignore[attr-defined]
