"""Both parts of dφ/dw of a `Functional` φ(θ(w), w), before θ moves: ∂φ/∂θ and ∂φ/∂w."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonDeterministic, NonFinite, NotDifferentiable, ScalarLoss, message
from upweight.task.measures import Functional
from upweight.task.task import Task


@dataclass(frozen=True, eq=False)
class Derivatives:
    """φ at θ̂ and w = 1, and how it moves with each alone.

    Args:
        value: φ.
        by_theta: ∂φ/∂θ.
        by_weights: ∂φ/∂w.
        elsewhere: θ -> ∂φ/∂θ there; None: `by_theta`, wherever that was taken.
    """

    value: Float[Tensor, " k"]
    by_theta: Float[Tensor, "k p"]
    by_weights: Float[Tensor, "k n"]
    elsewhere: Callable[[Tensor], Tensor] | None = None

    def at(self, theta: Float[Tensor, " p"]) -> Float[Tensor, "k p"]:
        """∂φ/∂θ at the point of a method, which need not be θ̂."""
        return self.by_theta if self.elsewhere is None else self.elsewhere(theta)


def evaluated(
    functional: Functional,
    task: Task,
    theta: Float[Tensor, " p"],
    queries: Any,
    weights: Float[Tensor, " n"],
) -> Float[Tensor, " k"]:
    """φ(θ, w)."""
    with torch.no_grad():
        found = functional(task, task.named(theta), queries, weights)
    return found.reshape(-1)


def derivatives(
    functional: Functional, task: Task, theta: Float[Tensor, " p"], queries: Any, n: int
) -> Derivatives:
    """φ and its derivatives, by autograd.

    Args:
        functional: φ.
        task: What was trained.
        theta: θ̂.
        queries: All queries as one batch, or None.
        n: Training examples.

    Raises:
        ScalarLoss: φ is no number or list of numbers.
        NonFinite: φ or a derivative is NaN or infinite.
        NonDeterministic: φ differs when it is computed again.
        NotDifferentiable: φ depends neither on θ nor on w.

    Cost: a forward pass over the queries, and a backward pass for each entry of φ.
    """
    flat = theta.clone().requires_grad_()
    weights = theta.new_ones(n).requires_grad_()
    with torch.enable_grad():
        value = functional(task, task.named(flat), queries, weights)
    if not isinstance(value, Tensor) or value.ndim > 1 or value.numel() == 0:
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ScalarLoss(
            "A Functional returns one number, or several as a vector.",
            f"{functional!r} returned {shape}.",
            "a matrix, or a number of Python's that autograd cannot follow.",
            "return a tensor of shape [k], made from params by operations of PyTorch.",
        )
    value = value.reshape(-1)
    _require_finite(functional, "value", value)
    again = evaluated(functional, task, theta, queries, theta.new_ones(n))
    # Some devices add in any order.
    rounding = 1e3 * torch.finfo(theta.dtype).eps * float(value.detach().abs().max())
    gap = float((again - value.detach()).abs().max())
    if not gap <= rounding:
        raise NonDeterministic(
            "A Functional gives the same numbers each time.",
            f"{functional!r}, off by {gap:.2g} the second time.",
            "a random draw in it.",
            "draw with a generator that it seeds itself.",
        )
    if not value.requires_grad:
        raise NotDifferentiable(_constant(functional))
    by_theta, by_weights = [], []
    for entry in value:
        rows = torch.autograd.grad(
            entry, (flat, weights), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        by_theta.append(rows[0])
        by_weights.append(rows[1])

    def elsewhere(other: Tensor) -> Tensor:
        if torch.equal(other, theta):
            return found.by_theta
        return derivatives(functional, task, other, queries, n).by_theta

    found = Derivatives(value.detach(), torch.stack(by_theta), torch.stack(by_weights), elsewhere)
    for what, part in (("derivative in θ", found.by_theta), ("one in w", found.by_weights)):
        _require_finite(functional, what, part)
    if not bool(found.by_theta.any()) and not bool(found.by_weights.any()):
        raise NotDifferentiable(_constant(functional))
    return found


def _require_finite(functional: Functional, what: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NonFinite(
            "A Functional and its derivatives must be finite.",
            f"{functional!r}, whose {what} is not.",
            "a division by 0, or a square root or logarithm of 0.",
            "write it so that it is finite at these parameters.",
        )


def _constant(functional: Functional) -> str:
    return message(
        "A Functional must depend on θ or on the weights through differentiable steps.",
        f"derivatives of exactly 0 for {functional!r}.",
        "a count (accuracy, argmax, a threshold), or parameters of the model in place of those "
        "that are passed.",
        "compute it from `params`, and from smooth values: margins or losses in place of counts.",
    )
