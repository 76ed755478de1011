"""Per-example derivatives by `vmap` of `grad`: any model, the reference.

    gᵢ = ∇θ ℓ(θ; zᵢ)      ∇m_q = ∇θ m(θ; q)      Jᵢ = ∂f(θ, xᵢ)/∂θ

All are taken at one flat θ. Memory is b·p (b·c·p for Jacobians).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from upweight._typing import Batch
from upweight.task.task import Task


def per_sample_gradients(
    task: Task, theta: Float[Tensor, " p"], batch: Batch
) -> Float[Tensor, "b p"]:
    """∇θ ℓ(θ; zᵢ) for each example of a batch."""
    return _per_sample(torch.func.grad, lambda t, b: task.losses(t, b)[0], theta, batch)


def measure_gradients(
    task: Task, measure: Callable[..., Tensor], theta: Float[Tensor, " p"], batch: Batch
) -> Float[Tensor, "b p"]:
    """∇θ m(θ; q) for each query of a batch."""
    return _per_sample(
        torch.func.grad, lambda t, b: measure(task, task.named(t), b)[0], theta, batch
    )


def output_jacobians(
    task: Task, theta: Float[Tensor, " p"], batch: Batch
) -> Float[Tensor, "b c p"]:
    """∂f/∂θ for each example of a batch, with f flattened to c outputs."""
    return _per_sample(
        torch.func.jacrev, lambda t, b: task.outputs(t, b)[0].reshape(-1), theta, batch
    )


def _per_sample(
    transform: Callable[..., Callable[..., Tensor]],
    function: Callable[[Tensor, Batch], Tensor],
    theta: Float[Tensor, " p"],
    batch: Batch,
) -> Tensor:
    def one(example: Batch) -> Tensor:
        as_batch = tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, example)
        return transform(function)(theta, as_batch)

    return torch.func.vmap(one)(batch)
