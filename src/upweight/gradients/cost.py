"""What does an example cost? Bytes while its gradient is taken, and positions of each weight."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.gradients.blocks import Plan
from upweight.gradients.factored import Tokens
from upweight.gradients.passes import GradientPass
from upweight.task.data import Data

SIZES = (1, 3)
"""Examples in the two runs that are compared, so that what does not grow with them cancels."""


@dataclass(frozen=True)
class Cost:
    """Measured on a few examples.

    Args:
        bytes_per_example: Activations that autograd keeps, and the factors.
        positions: t of each block; 0 for a block without positions.
        factor_bytes: The factors alone.
    """

    bytes_per_example: int
    positions: tuple[int, ...]
    factor_bytes: int = 0


def cost(plan: Plan, theta: Float[Tensor, " p"], data: Data) -> Cost:
    """Run a few examples at θ and count."""
    few, positions, factors = _held(plan, theta, data, SIZES[0])
    if data.together(SIZES[1]) == 1:
        return Cost(max(1, few), positions, factors)
    more, _, _ = _held(plan, theta, data, SIZES[1])
    return Cost(max(1, (more - few) // (SIZES[1] - SIZES[0])), positions, factors // SIZES[0])


def _held(
    plan: Plan, theta: Float[Tensor, " p"], data: Data, size: int
) -> tuple[int, tuple[int, ...], int]:
    held: dict[int, int] = {}

    def keep(x: Tensor) -> Any:
        storage = x.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return x

    task = plan.task
    batch = task.to_device(data.take([k % len(data) for k in range(size)]))
    runs = 0

    def losses(params: Params, examples: Batch) -> Tensor:
        nonlocal runs
        runs += 1
        if runs > 1:  # torch.func, which bears no such hooks, and single examples
            return task.loss(*task.call(params, examples))
        with task.saving(keep):
            return task.loss(*task.call(params, examples))

    with GradientPass(plan, theta) as passes:
        factors = passes.of(losses, batch, size)
    own = sum(x.nbytes for part in factors for x in part.tensors)
    full = 0  # with the one-hot factors of lookups, which some uses form
    for part in factors:
        tensors = (part.left, part.right) if isinstance(part, Tokens) else (part.values,)
        full += sum(x.nbytes for x in tensors)
    positions = tuple(part.positions if isinstance(part, Tokens) else 0 for part in factors)
    # Twice: besides the factors themselves, what is made from them on the way.
    return sum(held.values()) + 2 * full, positions, own
