"""Which gradients are too small for float16? It ends at 6e-8, and what is smaller is 0.

Gradients are taken twice on one forward pass, of the loss and of a large multiple of it, as loss
scaling does in training. Where nothing underflows the second are that multiple of the first.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.gradients.blocks import Plan
from upweight.gradients.passes import GradientPass

SCALE = 2.0**10
"""A multiple that is exact, and leaves room below the largest number of float16."""

LOST = 0.1
"""Of the length of an example's gradient, what underflow may take without a word."""


def underflowing(plan: Plan, theta: Float[Tensor, " p"], batch: Batch, size: int) -> dict[str, int]:
    """Blocks in which some examples lose more than a tenth of their gradient: of how many."""

    def multiple(scale: float) -> Callable[[Tensor, Any, Any], Tensor]:
        return lambda outputs, targets, _: scale * plan.task.loss(outputs, targets)

    def heads(outputs: Tensor, _: Any) -> Iterator[tuple[Callable[..., Tensor], Any]]:
        for scale in (1.0, SCALE):
            yield multiple(scale), outputs.new_zeros(len(outputs))

    with GradientPass(plan, theta) as passes:
        plain, scaled = passes.of_heads(batch, size, heads)
    found = {}
    for block, part, larger in zip(plan.blocks, plain, scaled, strict=True):
        expected = larger.squared_norm().sqrt() / SCALE
        # Where the multiple itself overflows nothing is too small.
        lost = expected.isfinite() & (part.squared_norm().sqrt() < (1 - LOST) * expected)
        if bool(lost.any()):
            found[block.name] = int(lost.sum())
    return found
