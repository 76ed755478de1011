"""Per-example derivatives by `vmap` of `grad`: any model, the reference.

    gᵢ = ∇θ ℓ(θ; zᵢ)      ∇m_q = ∇θ m(θ; q)      Jᵢ = ∂f(θ, xᵢ)/∂θ

All are taken at one flat θ. Memory is b·p (b·c·p for Jacobians).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.task.batches import Listed, has_examples, mapped
from upweight.task.lent import unconverted
from upweight.task.task import Task


def value_gradients(
    function: Callable[[Tensor, Any], Float[Tensor, " b"]],
    theta: Float[Tensor, " p"],
    batch: Any,
    size: int,
) -> Float[Tensor, "b p"]:
    """∇θ function(θ, batch)ᵢ for each example of a batch."""

    def one(example: Any) -> Tensor:
        return torch.func.grad(lambda t: function(t, example)[0])(theta)

    found: Tensor = over_examples(one, batch, size)
    return found


def output_jacobians(
    task: Task, theta: Float[Tensor, " p"], batch: Batch, size: int
) -> Float[Tensor, "b c p"]:
    """∂f/∂θ for each example of a batch, with f flattened to c outputs."""

    def one(example: Batch) -> Tensor:
        return torch.func.jacrev(lambda t: task.outputs(t, example)[0].reshape(-1))(theta)

    found: Tensor = over_examples(one, batch, size)
    return found


def over_examples(function: Callable[[Any], Any], batch: Any, size: int) -> Any:
    """function(example) of each example of a batch, by `vmap`. It sees a batch of one.

    Raises:
        ValueError: A part of the batch is no tensor with an entry per example.
    """
    mapped_over: list[Tensor] = []

    def chosen(leaf: Any) -> Any:
        if not has_examples(leaf):
            return leaf
        if isinstance(leaf, Listed) or len(leaf) != size:
            what = f"of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else "a list"
            raise ValueError(
                f"vmap needs tensors with the {size} examples on their first axis; a part is {what}"
            )
        mapped_over.append(leaf)
        return _Place(len(mapped_over) - 1)

    places = mapped(chosen, batch)

    def one(parts: list[Tensor]) -> Any:
        return function(
            mapped(lambda x: parts[x.index][None] if isinstance(x, _Place) else x, places)
        )

    with unconverted():
        return torch.func.vmap(one)(mapped_over)


class _Place:
    """Where a tensor of a batch was. No dataclass: of these a batch's parts are looked for."""

    def __init__(self, index: int) -> None:
        self.index = index


def as_dense(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor: embeddings with sparse=True have sparse ones."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
