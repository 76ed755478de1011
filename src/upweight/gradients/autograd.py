"""Derivatives of the whole model by plain autograd, where `torch.func` cannot run it.

    H v = ∂⟨∇F, v⟩/∂θ            Jᵀu = ∂⟨F, u⟩/∂θ,   J v = ∂⟨Jᵀu, v⟩/∂u

by double backward, one vector at a time. They need of each operation what training needs, and that
its backward pass has one itself. `attempted` finds out what runs; nothing here catches an error
that is the user's own, because plain autograd meets it again.
"""

import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.errors import UpweightError
from upweight.gradients.functional import as_dense
from upweight.gradients.hooks import inside
from upweight.task.data import Data, batch_size
from upweight.task.task import Task

PROBE = 4
"""Training examples with which ways of taking derivatives are compared."""


def few(task: Task, data: Data, count: int = PROBE) -> list[tuple[range, Batch]]:
    """Some examples from all over the data, in as few batches as they can be read in."""
    m = min(count, len(data))
    chosen = data.subset([k * len(data) // m for k in range(m)])
    return [(range(start, stop), task.to_device(batch)) for start, stop, batch in chosen.batches(m)]


def attempted(function: Callable[[], Tensor]) -> tuple[Tensor | None, Exception | None]:
    """function(), or the error that PyTorch raised in it. Running out of memory is none of those.

    For functions that are tried under `torch.func` and by plain autograd: an error of the model's
    own is raised by both.
    """
    try:
        return function(), None
    except (UpweightError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate" in str(error):  # the CPU's allocator raises a plain RuntimeError
            raise
        return None, error


def agrees(found: Tensor | None, expected: Tensor) -> bool:
    """Whether the same was found in two ways, but for rounding; what is not finite agrees."""
    if found is None:
        return False
    if not bool(found.isfinite().all() and expected.isfinite().all()):
        return True
    slack = torch.finfo(expected.dtype).eps ** 0.5
    return bool((found - expected).norm() <= slack * (expected.norm() + found.norm()))


def first_line(error: Exception | None) -> str:
    """What PyTorch says, for a note: the start of it."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 160, placeholder=" …") if lines else type(error).__name__


LARGE_BYTES = 2**17
"""Of what autograd keeps of a batch: from here on a backward pass keeps a processor busy by itself,
and taking vectors together by `torch.func` only adds to it. Measured on an MLP and a CNN."""


def saved_bytes(task: Task, theta: Float[Tensor, " p"], data: Data) -> int:
    """Bytes that autograd keeps of one example from the forward pass to the backward pass."""

    def held(count: int) -> int:
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return x

        batch = task.to_device(data.take([k % len(data) for k in range(count)]))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            graph = task.losses(task.leaves(theta), batch)
        del graph  # what it kept has lived, and so had an address of its own, until here
        return sum(kept.values())

    one = held(1)  # and what does not grow with the examples
    return max(1, one if data.together(3) == 1 else (held(3) - one) // 2)


def product_batch(saved: int) -> int:
    """Examples in a batch of products: four times what a forward pass of them keeps is at hand."""
    return batch_size(4, saved)


def one_by_one(theta: Float[Tensor, " p"], vectors: int, saved: int) -> bool:
    """Whether vectors are faster taken one at a time, by double backward, than together.

    Args:
        theta: θ, where it is.
        vectors: How many.
        saved: Bytes that autograd keeps of the batch.
    """
    return vectors == 1 or (theta.device.type == "cpu" and saved >= LARGE_BYTES)


def hessian_products(
    task: Task,
    theta: Float[Tensor, " p"],
    function: Callable[[Params], Tensor],
    v: Float[Tensor, "k p"],
) -> Float[Tensor, "k p"]:
    """∇²F v at θ for each vector, F the sum of what the function returns.

    Raises:
        RuntimeError: PyTorch's own, where an operation has no second derivative.
    """
    params = task.leaves(theta)
    with torch.enable_grad():
        total = function(params).sum()
        gradient = pulled_back(task, params, total, None, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like(v)
    return torch.stack([pulled_back(task, params, gradient, row) for row in v])


def is_cut(task: Task, theta: Float[Tensor, " p"], function: Callable[[Params], Tensor]) -> bool:
    """Whether ∇F at θ lacks a part of its graph, as `lacks_graph` tells."""
    params = task.leaves(theta)
    with torch.enable_grad():
        total = function(params).sum()
        gradient = pulled_back(task, params, total, None, create_graph=True)
    return lacks_graph(gradient)


def lacks_graph(gradient: Tensor) -> bool:
    """Whether a gradient went through an autograd function marked once_differentiable.

    PyTorch then leaves its part out of a second derivative without a word.
    """
    seen: set[Any] = set()
    left = [gradient.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if "Error" in node.name():
            return True
        seen.add(node)
        left.extend(other for other, _ in node.next_functions)
    return False


def gauss_newton_products(
    task: Task,
    theta: Float[Tensor, " p"],
    function: Callable[[Params], Float[Tensor, "b c"]],
    weigh: Callable[[Float[Tensor, "k b c"]], Float[Tensor, "k b c"]] | None,
    v: Float[Tensor, "k p"],
) -> Float[Tensor, "k p"]:
    """Σᵢ Jᵢᵀ Λᵢ Jᵢ v for each vector, J = ∂F/∂θ at θ, with u ↦ Λ u or None for the identity."""
    params = task.leaves(theta)
    with torch.enable_grad():
        values = function(params)
        u = torch.zeros_like(values, requires_grad=True)
        pulled = pulled_back(task, params, values, u, create_graph=True)
    rows = []
    for row in v:
        # Jᵀu is linear in u, so its derivative along v is J v.
        (jv,) = torch.autograd.grad(
            pulled, u, row, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        weighted = jv if weigh is None else weigh(jv[None])[0]
        rows.append(pulled_back(task, params, values, weighted))
    return torch.stack(rows)


def total_gradient(
    task: Task, theta: Float[Tensor, " p"], function: Callable[[Params], Tensor]
) -> Float[Tensor, " p"]:
    """∇F at θ; F the sum of what the function returns."""
    params = task.leaves(theta)
    with torch.enable_grad():
        total = function(params).sum()
    return pulled_back(task, params, total, None)


def data_gradient(
    task: Task, theta: Float[Tensor, " p"], data: Data, size: int = 512
) -> Float[Tensor, " p"]:
    """Σᵢ ∇ℓ(θ; zᵢ) over the data, without the penalty, so many examples at a time."""
    total = torch.zeros_like(theta)
    for _, _, batch in data.batches(size):
        total += total_gradient(task, theta, partial(task.losses, batch=task.to_device(batch)))
    return total


def pulled_back(
    task: Task,
    params: Params,
    values: Tensor,
    cotangents: Tensor | None,
    create_graph: bool = False,
) -> Float[Tensor, " p"]:
    """∂⟨cotangents, values⟩/∂θ as one flat vector; the graph is kept."""
    if not values.requires_grad:
        return task.layout.flatten({k: torch.zeros_like(p) for k, p in params.items()})

    def gradients() -> tuple[Any, ...]:
        return torch.autograd.grad(
            values,
            list(params.values()),
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )

    found = inside(task, params, gradients)
    return task.layout.flatten(
        {
            name: torch.zeros_like(p) if g is None else as_dense(g)
            for (name, p), g in zip(params.items(), found, strict=True)
        }
    )
