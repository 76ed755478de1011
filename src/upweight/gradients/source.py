"""How a method obtains gᵢ: what it may ask of a batch of training gradients.

A method needs inner products ⟨v, gᵢ⟩, sums Σ cᵢ gᵢ and, where it insists, the rows themselves.
`Direct` forms the rows; `FactoredLinear` never does.
"""

import abc
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.gradients.functional import per_sample_gradients
from upweight.gradients.linear import LinearForm, linear_form
from upweight.task.data import Data
from upweight.task.task import Task


class GradientSource(abc.ABC):
    """The gradients of a batch of examples at θ̂, in the form a method needs."""

    task: Task

    @property
    @abc.abstractmethod
    def values_per_example(self) -> int:
        """How many numbers are formed per example, which sets the batch size."""

    @abc.abstractmethod
    def rows(self, batch: Batch) -> Float[Tensor, "b p"]:
        """gᵢ as rows."""

    @abc.abstractmethod
    def inner(self, vectors: Float[Tensor, "q p"], batch: Batch) -> Float[Tensor, "q b"]:
        """⟨v_q, gᵢ⟩ for every vector and example."""

    @abc.abstractmethod
    def total(self, batch: Batch) -> Float[Tensor, " p"]:
        """Σᵢ gᵢ over the batch."""


@dataclass(frozen=True)
class Direct(GradientSource):
    """gᵢ formed by `vmap(grad)`, for any model."""

    task: Task

    @property
    def values_per_example(self) -> int:
        return self.task.layout.size

    def rows(self, batch: Batch) -> Float[Tensor, "b p"]:
        return per_sample_gradients(self.task, self.task.theta(), batch)

    def inner(self, vectors: Float[Tensor, "q p"], batch: Batch) -> Float[Tensor, "q b"]:
        return vectors @ self.rows(batch).T

    def total(self, batch: Batch) -> Float[Tensor, " p"]:
        return torch.func.grad(lambda t: self.task.losses(t, batch).sum())(self.task.theta())


@dataclass(frozen=True)
class FactoredLinear(GradientSource):
    """gᵢ = δᵢ ⊗ zᵢ kept as its two factors, where the model is linear in θ."""

    task: Task
    form: LinearForm

    @property
    def values_per_example(self) -> int:
        return self.form.width + self.form.outputs

    def factors(self, batch: Batch) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b i"]]:
        """(δ, z)."""
        with torch.no_grad():
            outputs, targets = self.task.outputs(self.task.theta(), batch)
        delta = self.task.output_gradient(outputs, targets)
        return delta, self.form.features(self.task, batch)

    def rows(self, batch: Batch) -> Float[Tensor, "b p"]:
        delta, z = self.factors(batch)
        return self.form.flatten(delta[:, :, None] * z[:, None, :])

    def inner(self, vectors: Float[Tensor, "q p"], batch: Batch) -> Float[Tensor, "q b"]:
        delta, z = self.factors(batch)
        return contract(self.form.matrix(vectors), delta, z)

    def total(self, batch: Batch) -> Float[Tensor, " p"]:
        delta, z = self.factors(batch)
        return self.form.flatten(delta.T @ z)


def contract(
    vectors: Float[Tensor, "q c i"], delta: Float[Tensor, "b c"], z: Float[Tensor, "b i"]
) -> Float[Tensor, "q b"]:
    """⟨V_q, δ_b ⊗ z_b⟩, one output at a time so that nothing of size q·b·c is formed."""
    result = vectors.new_zeros(len(vectors), len(z))
    for c in range(delta.shape[1]):
        result.addcmul_(vectors[:, c] @ z.T, delta[:, c])
    return result


def gradient_source(task: Task, data: Data) -> GradientSource:
    """The cheapest exact source for this task: factored where the model is linear in θ."""
    form = linear_form(task, task.to_device(data.batch(0, min(4, len(data)))))
    return Direct(task) if form is None else FactoredLinear(task, form)
