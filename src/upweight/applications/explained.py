"""The number that a map explains, as a function of one input of one example, at one θ.

    m(x) = m(f(θ, x), y)

`Explained` is a plain copy of the model in float64: hooks may be set on it, and no function
transform is between them and the user's modules. `Followed` is the same by the task's own model and
parameters that derivatives are being taken in, for maps that are measures of θ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Batch, Params
from upweight.errors import NotDifferentiable
from upweight.methods.perturbation import with_part
from upweight.task.batches import mapped
from upweight.task.lent import differentiable
from upweight.task.measures import Loss
from upweight.task.task import Task

AT_ONCE = 256
"""Points in a forward pass."""

NODES = 32
"""Of the integral of ∂m/∂f between two outputs."""


class Function(Protocol):
    """m, its values and its gradients in x."""

    def values(self, points: Float[Tensor, "k *x"]) -> Float[Tensor, " k"]:
        """m(x) of each point."""
        ...

    def gradients(self, points: Float[Tensor, "k *x"]) -> Float[Tensor, "k *x"]:
        """∂m/∂x at each point."""
        ...


@dataclass(frozen=True, eq=False)
class _Answered:
    """A task whose outputs are there already: measures ask a task for them."""

    task: Task
    found: tuple[Any, Any]

    @property
    def loss(self) -> Any:
        return self.task.loss

    def outputs(self, params: Params, batch: Batch) -> tuple[Any, Any]:
        return self.found

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return self.task.losses_of(*self.found)


@dataclass(frozen=True, eq=False)
class Explained:
    """m(x) of one example, a batch of one in float64, at one θ; `key` is which input is x.

    `measure` is m, as for `Fitted.attribute`.
    """

    task: Task
    example: Batch
    key: int | str
    measure: Callable[..., Tensor] = field(default_factory=Loss)

    @classmethod
    def at(
        cls,
        task: Task,
        theta: Float[Tensor, " p"],
        example: Batch,
        key: int | str,
        measure: Callable[..., Tensor],
    ) -> "Explained":
        """At θ, on a copy of the model."""
        own = task.moved_to(task.theta())
        model = own.model.double()
        point = Task(model, task.loss, task.penalty, task.params, task.forward, task.reads)
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in point.layout.unflatten(theta.double()).items():
                named[name].copy_(value)
        return cls(point, in_double(example), key, measure)

    @property
    def model(self) -> nn.Module:
        """The copy."""
        return self.task.model

    @property
    def x(self) -> Float[Tensor, "1 *x"]:
        """The input as it is."""
        return self.example[self.key]

    def batch(self, points: Float[Tensor, "k *x"]) -> Batch:
        """The example with each point in turn as its input."""
        return _repeated(self.example, self.key, points)

    def outputs(self, points: Float[Tensor, "k *x"]) -> tuple[Tensor, Any]:
        """f(θ, x) of each point, and the targets."""
        with differentiable(self.model):
            return self.task.forward(self.model, self.batch(points))

    def measured(self, outputs: Any, targets: Any) -> Float[Tensor, " k"]:
        """m of outputs."""
        params = dict(self.model.named_parameters())
        return self.measure(_Answered(self.task, (outputs, targets)), params, None)

    def values(self, points: Float[Tensor, "k *x"]) -> Float[Tensor, " k"]:
        with torch.no_grad():
            return torch.cat(
                [self.measured(*self.outputs(p)) for p in torch.split(points, AT_ONCE)]
            )

    def gradients(self, points: Float[Tensor, "k *x"]) -> Float[Tensor, "k *x"]:
        found = []
        for part in torch.split(points, AT_ONCE):
            x = part.detach().clone().requires_grad_()
            with torch.enable_grad():
                total = self.measured(*self.outputs(x)).sum()
            if not total.requires_grad:
                raise no_gradient()
            found.append(torch.autograd.grad(total, x, materialize_grads=True)[0])
        return torch.cat(found)

    def slopes(self, baseline: Float[Tensor, "1 *x"] | None) -> Float[Tensor, "1 *c"]:
        """∂m/∂f at the example; with a baseline its mean on the line between both outputs.

        Then ⟨slopes, f(x) − f(x₀)⟩ = m(x) − m(x₀): whatever attributes outputs exactly attributes
        m exactly, and never meets the exponentials of a loss.
        """
        with torch.no_grad():
            end, targets = self.outputs(self.x)
            start = end if baseline is None else self.outputs(baseline)[0]
        where, weights = nodes(1 if baseline is None else NODES, end)
        total = torch.zeros_like(end)
        for t, weight in zip(where, weights, strict=True):
            f = (start + t * (end - start)).detach().requires_grad_()
            with torch.enable_grad():
                m = self.measured(f, targets).sum()
            total += weight * torch.autograd.grad(m, f, materialize_grads=True)[0]
        return total

    def weighted(self, weights: Float[Tensor, "1 *c"], offset: float = 0.0) -> "Weighted":
        """⟨weights, f(x)⟩ + offset as a module."""
        return Weighted(self, weights, offset)


class Weighted(nn.Module):
    """x ↦ ⟨weights, f(θ, x)⟩ + offset: what packages that set hooks are given."""

    def __init__(
        self, explained: Explained, weights: Float[Tensor, "1 *c"], offset: float = 0.0
    ) -> None:
        super().__init__()
        self.model = explained.model
        self._outputs, self._weights, self._offset = explained.outputs, weights, offset

    def forward(self, x: Float[Tensor, "k *x"]) -> Float[Tensor, " k"]:
        outputs, _ = self._outputs(x)
        return (outputs * self._weights).reshape(len(x), -1).sum(dim=1) + self._offset


@dataclass(frozen=True, eq=False)
class Followed:
    """The same with θ as a variable, by name, and in the model's own precision."""

    task: Task
    params: Params
    example: Batch
    key: int | str
    measure: Callable[..., Tensor]

    def values(self, points: Float[Tensor, "k *x"]) -> Float[Tensor, " k"]:
        batch = _repeated(self.example, self.key, points)
        return self.measure(self.task, self.params, batch)

    def gradients(self, points: Float[Tensor, "k *x"]) -> Float[Tensor, "k *x"]:
        return torch.func.grad(lambda x: self.values(x).sum())(points)


def in_double(batch: Batch) -> Batch:
    """Floating-point tensors in float64, all of them without a graph."""

    def double(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double() if floats else value

    return mapped(double, batch)


def _repeated(example: Batch, key: int | str, points: Float[Tensor, "k *x"]) -> Batch:
    k = len(points)
    rest = mapped(lambda v: v.expand(k, *v.shape[1:]) if isinstance(v, Tensor) else v, example)
    return with_part(rest, key, points)


def nodes(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Places and weights of Gauss-Legendre on [0, 1]."""
    places, weights = np.polynomial.legendre.leggauss(count)
    return like.new_tensor((places + 1) / 2), like.new_tensor(weights / 2)


def no_gradient() -> NotDifferentiable:
    """The output does not depend on the input by differentiable operations."""
    return NotDifferentiable(
        "A map by gradients needs a gradient of the output in the input.",
        "an output that is cut from it.",
        "a forward that detaches, rounds or looks up its input.",
        "a method of values alone: 'deletion', 'additive', 'lime' or 'shap'.",
    )
