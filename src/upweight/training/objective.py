"""J(θ, w) and ∇J for many models at once.

    J(θ_s, w_s) = (1/n) Σᵢ w_{s,i} ℓᵢ(θ_s) + R(θ_s)          ∇J by automatic differentiation

One model is one row of θ beside one row of weights. Where f is linear in θ the outputs of all
models are one matrix product, f = f(0) + Z Θᵀ, and so are their gradients, (∂J/∂f)ᵀ Z.

Convention: the mean keeps its 1/n whatever the weights.
"""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from upweight._typing import Batch
from upweight.gradients.autograd import PROBE, attempted, few
from upweight.gradients.functional import as_dense
from upweight.gradients.linear import LinearForm, linear_form
from upweight.linalg.finite_sum import mean_of
from upweight.task.data import Data, batch_size
from upweight.task.task import Task


class WeightedObjective(abc.ABC):
    """(θ, w) ↦ (J, ∇J), one row a model."""

    @property
    @abc.abstractmethod
    def at_once(self) -> int:
        """How many models fit in working memory."""

    @abc.abstractmethod
    def __call__(
        self, theta: Float[Tensor, "s p"], weights: Float[Tensor, "s n"]
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, "s p"]]:
        """J and ∇J of each model."""


@dataclass(frozen=True, eq=False)
class GeneralObjective(WeightedObjective):
    """J of any model, by `vmap` over models where `torch.func` can run it, else one by one."""

    task: Task
    batches: tuple[tuple[range, Batch], ...]
    size: int
    by_func: bool = True

    @property
    def at_once(self) -> int:
        return batch_size(self.size + 64 * self.task.layout.size, 8, most=32)

    def __call__(
        self, theta: Float[Tensor, "s p"], weights: Float[Tensor, "s n"]
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, "s p"]]:
        if self.by_func:
            both = torch.func.vmap(torch.func.grad_and_value(self._one), chunk_size=self.at_once)
            gradient, value = both(theta, weights)
            return value, gradient
        values, gradients = [], []
        for t, w in zip(theta, weights, strict=True):
            params = {k: x.clone().requires_grad_() for k, x in self.task.named(t).items()}
            with torch.enable_grad():
                value = self._one(params, w)
                parts = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
            values.append(value.detach())
            named = {k: as_dense(g) for k, g in zip(params, parts, strict=True)}
            gradients.append(self.task.layout.flatten(named))
        return torch.stack(values), torch.stack(gradients)

    def _one(self, theta: Any, weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        params = self.task.named(theta)
        parts = [
            (weights[places.start : places.stop] * self.task.losses(params, batch)).sum()
            for places, batch in self.batches
        ]
        total = torch.stack(parts).sum() if len(parts) > 1 else parts[0]
        return mean_of(total, self.size) + self.task.penalty(params, self.task.layout)


@dataclass(frozen=True, eq=False)
class LinearObjective(WeightedObjective):
    """J of a model that is linear in θ, by matrix products.

    Args:
        task: What is trained.
        form: Where its linear map lies in θ.
        z: Features of all examples, `[n i]`.
        offset: f(0), `[n ...]`: what parts of the linear map outside of θ add to the outputs.
        targets: Of all examples, as the loss takes them.
    """

    task: Task
    form: LinearForm
    z: Float[Tensor, "n i"]
    offset: Float[Tensor, "n *c"]
    targets: Any

    @property
    def at_once(self) -> int:
        # Outputs, their gradient and three temporaries of the loss; 10 pairs of L-BFGS vectors.
        values = 5 * self.offset.numel() + 25 * self.task.layout.size
        return batch_size(values, self.z.dtype.itemsize, most=128)

    def __call__(
        self, theta: Float[Tensor, "s p"], weights: Float[Tensor, "s n"]
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, "s p"]]:
        matrix = self.form.matrix(theta)
        s, n = len(theta), len(self.z)
        linear = (self.z @ matrix.flatten(0, 1).T).reshape(n, s, -1)

        def mean_loss(f: Tensor, w: Tensor) -> Tensor:
            outputs = self.offset + f.reshape(self.offset.shape)
            return (w * self.task.loss(outputs, self.targets)).mean()

        both = torch.func.vmap(
            torch.func.grad_and_value(mean_loss), in_dims=(1, 0), out_dims=(1, 0)
        )
        slope, value = both(linear, weights)
        gradient = self.form.flatten((slope.reshape(n, -1).T @ self.z).reshape(matrix.shape))
        layout, penalty = self.task.layout, self.task.penalty
        value = value + torch.func.vmap(lambda t: penalty(layout.unflatten(t), layout))(theta)
        return value, gradient + torch.func.vmap(lambda t: penalty.gradient(t, layout))(theta)


def weighted_objective(task: Task, data: Data) -> WeightedObjective:
    """J of this task on these data: by matrix products where the model is linear in θ."""
    probe = task.to_device(data.batch(0, data.together(min(4, len(data)))))
    form = linear_form(task, task.theta(), probe)
    if form is None:
        batches = tuple(
            (range(start, stop), task.to_device(batch))
            for start, stop, batch in data.batches(len(data))
        )
        some = GeneralObjective(task, tuple(few(task, data)), min(PROBE, len(data)))
        theta = task.theta()[None]
        refused = attempted(lambda: some(theta, theta.new_ones(1, some.size))[1])[1]
        return GeneralObjective(task, batches, len(data), refused is None)
    origin = torch.zeros_like(task.theta())
    z, offsets, leaves = [], [], []
    structure = tree_flatten(data.batch(0, 1))[1]
    for _, _, batch in data.batches(batch_size(form.width + form.outputs, 8)):
        batch = task.to_device(batch)
        with torch.no_grad():
            outputs, targets = task.outputs(origin, batch)
        z.append(form.features(task, batch))
        offsets.append(outputs)
        parts, structure = tree_flatten(targets)
        leaves.append(parts)
    targets = tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], structure)
    return LinearObjective(task, form, torch.cat(z), torch.cat(offsets), targets)
