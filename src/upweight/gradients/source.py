"""How a method obtains gᵢ: what it may ask of a batch of training gradients.

A method needs inner products ⟨v, gᵢ⟩, sums Σ cᵢ gᵢ and, where it insists, the rows themselves.
`Direct` forms the rows: by `torch.func`, or as EK-FAC has them where `torch.func` cannot run the
model on a batch. `FactoredLinear` never forms them.
"""

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.gradients.autograd import agrees, attempted, few, first_line, total_gradient
from upweight.gradients.blocks import Plan
from upweight.gradients.factored import Factors, Tokens
from upweight.gradients.functional import value_gradients
from upweight.gradients.linear import LinearForm, linear_form
from upweight.gradients.passes import Function, GradientPass
from upweight.gradients.planning import plan
from upweight.task.batches import cut
from upweight.task.data import Data, batch_size
from upweight.task.task import Task


class GradientSource(abc.ABC):
    """The gradients of a batch of examples at θ, in the form a method needs."""

    task: Task
    theta: Float[Tensor, " p"]
    notes: tuple[str, ...] = ()
    """What was chosen on the way."""

    @property
    @abc.abstractmethod
    def values_per_example(self) -> int:
        """How many numbers are formed per example, which sets the batch size."""

    @abc.abstractmethod
    def rows(self, batch: Batch, size: int) -> Float[Tensor, "b p"]:
        """gᵢ as rows, of a batch of `size` examples."""

    @abc.abstractmethod
    def inner(self, vectors: Float[Tensor, "q p"], batch: Batch, size: int) -> Float[Tensor, "q b"]:
        """⟨v_q, gᵢ⟩ for every vector and example."""

    @abc.abstractmethod
    def total(self, batch: Batch) -> Float[Tensor, " p"]:
        """Σᵢ gᵢ over the batch."""

    def rows_of(self, data: Data) -> Float[Tensor, "n p"]:
        """gᵢ of all of the data, as rows."""
        layout = self.task.layout
        size = batch_size(layout.size, layout.dtype.itemsize)
        return torch.cat(
            [
                self.rows(self.task.to_device(batch), stop - start)
                for start, stop, batch in data.batches(size)
            ]
        )


@dataclass(frozen=True, eq=False)
class Direct(GradientSource):
    """gᵢ formed in full: by `vmap(grad)`, or by the rules of the layers where there is a plan.

    The values are those of `function`; None: the losses.
    """

    task: Task
    theta: Float[Tensor, " p"]
    function: Function | None = None
    plan: Plan | None = None
    notes: tuple[str, ...] = ()

    @property
    def values_per_example(self) -> int:
        return self.task.layout.size

    def rows(self, batch: Batch, size: int) -> Float[Tensor, "b p"]:
        if self.plan is not None:
            function = self.function or self.task.losses
            return planned_rows(self.plan, self.theta, function, batch, size)
        return value_gradients(self._values, self.theta, batch, size)

    def inner(self, vectors: Float[Tensor, "q p"], batch: Batch, size: int) -> Float[Tensor, "q b"]:
        return vectors @ self.rows(batch, size).T

    def total(self, batch: Batch) -> Float[Tensor, " p"]:
        if self.plan is not None:
            return total_gradient(self.task, self.theta, lambda params: self._values(params, batch))
        return torch.func.grad(lambda t: self._values(t, batch).sum())(self.theta)

    def _values(self, theta: Any, batch: Any) -> Tensor:
        return (self.function or self.task.losses)(self.task.named(theta), batch)


def planned_rows(
    plan: Plan, theta: Float[Tensor, " p"], function: Function, batch: Any, size: int
) -> Float[Tensor, "b p"]:
    """∇θ function(θ, batch)ᵢ as rows, by the layers' rules."""
    with GradientPass(plan, theta) as passes:
        return _laid_out(plan, passes.of(function, batch, size))


def entries(outputs: Tensor, _: Any) -> Iterator[tuple[Callable[..., Tensor], Tensor]]:
    """Heads for `GradientPass.of_heads`: one per entry of f, whose gradients are the rows of J."""
    flat = outputs.reshape(len(outputs), -1)
    for k in range(flat.shape[1]):
        pick = torch.zeros_like(flat)
        pick[:, k] = 1.0
        yield _entry, pick


def _entry(outputs: Tensor, _: Any, pick: Tensor) -> Tensor:
    return (outputs.reshape(len(outputs), -1) * pick).sum(dim=1)


def planned_jacobians(
    plan: Plan, theta: Float[Tensor, " p"], batch: Batch, size: int
) -> Float[Tensor, "b c p"]:
    """∂f/∂θ for each example of a batch, by the layers' rules: a backward pass per output."""
    with GradientPass(plan, theta) as passes:
        rows = [_laid_out(plan, found) for found in passes.of_heads(batch, size, entries)]
    return torch.stack(rows, dim=1)


def _laid_out(plan: Plan, factors: list[Factors]) -> Float[Tensor, "b p"]:
    layout = plan.task.layout
    rows = torch.empty(len(factors[0]), layout.size, dtype=layout.dtype, device=layout.device)
    for block, part in zip(plan.blocks, factors, strict=True):
        full = part.matrices() if isinstance(part, Tokens) else part.values
        rows[:, block.index(layout).to(layout.device)] = full.flatten(1).to(layout.dtype)
    return rows


@dataclass(frozen=True, eq=False)
class FactoredLinear(GradientSource):
    """gᵢ = δᵢ ⊗ zᵢ kept as its two factors, where the model is linear in θ."""

    task: Task
    theta: Float[Tensor, " p"]
    form: LinearForm

    @property
    def values_per_example(self) -> int:
        return self.form.width + self.form.outputs

    def factors(self, batch: Batch) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b i"]]:
        """(δ, z)."""
        with torch.no_grad():
            outputs, targets = self.task.outputs(self.theta, batch)
        delta = self.task.output_gradient(outputs, targets)
        return delta, self.form.features(self.task, batch)

    def rows(self, batch: Batch, size: int) -> Float[Tensor, "b p"]:
        delta, z = self.factors(batch)
        return self.form.flatten(delta[:, :, None] * z[:, None, :])

    def inner(self, vectors: Float[Tensor, "q p"], batch: Batch, size: int) -> Float[Tensor, "q b"]:
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


def gradient_source(task: Task, theta: Float[Tensor, " p"], data: Data) -> GradientSource:
    """The cheapest exact source of training gradients: factored where the model is linear in θ."""
    form = linear_form(task, theta, task.to_device(data.batch(0, data.together(min(4, len(data))))))
    if form is None:
        return value_source(task, theta, data, None)
    return FactoredLinear(task, theta, form)


def value_source(
    task: Task,
    theta: Float[Tensor, " p"],
    data: Data,
    function: Function | None,
    train: Data | None = None,
) -> GradientSource:
    """The gradients of any value per example: by `torch.func` where it can run the model.

    Raises:
        UnsupportedModel: There is neither a layer rule nor a gradient by autograd.

    Cost: gradients of a few examples, in two ways.
    """
    direct, values = Direct(task, theta, function), function or task.losses
    why = None
    for places, batch in few(task, data):
        found, error = attempted(partial(direct.rows, batch, len(places)))
        if found is None:
            why = f"torch.func cannot run the model: {first_line(error)}"
            break
        # Unequal weights, by which gradients of one example in the place of another would show.
        c = 1.0 + torch.arange(len(places)).to(found)
        singles = [cut(batch, slice(i, i + 1), len(places)) for i in range(len(places))]

        def weighted(params: Params, singles: Any = singles, c: Tensor = c) -> Tensor:
            return c * torch.cat([values(params, single) for single in singles])

        if not agrees(c @ found, total_gradient(task, theta, weighted)):
            why = "torch.func gives others than autograd does for the model"
            break
    if why is None:
        return direct
    note = f"per-example gradients by layer, because {why}"
    made = plan(task, theta, data if train is None else train)
    return Direct(task, theta, function, made, (note,))
