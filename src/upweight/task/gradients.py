"""Do gradients reach the parameters, and are those of an example its own?"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import (
    NonDeterministic,
    NonFinite,
    NotDifferentiable,
    UnsupportedModel,
    listed,
)
from upweight.runtime.progress import progress
from upweight.task.data import Data
from upweight.task.precision import coarsest, dtypes_in
from upweight.task.probe import MARGIN, PROBE_EXAMPLES, nudged
from upweight.task.task import Task

WITH_GRADIENT = 8
"""One in so many examples of the probe is asked for its gradient alone."""

APART = 1e-2
"""Difference of gradients, over their norms, that is no rounding: that of an output near a kink
gives one unit another slope."""


def require_recording() -> None:
    """Refuse, by a NotDifferentiable, inference mode, which cannot be lifted as `no_grad` can."""
    if torch.is_inference_mode_enabled():
        raise NotDifferentiable(
            "Gradients must be taken where autograd can record.",
            "a call inside torch.inference_mode().",
            "a whole script run in inference mode, or a decorated function.",
            "leave inference mode for this call; torch.no_grad() may stay.",
        )


def unreached_notes(
    task: Task, theta: Float[Tensor, " p"], probe: Batch, at: Sequence[int], role: str
) -> tuple[str, ...]:
    """Notes of the parameters that no gradient reaches, after asking that some are reached."""
    require_recording()
    # Unequal weights: at a minimum without a penalty the plain sum of all gradients is 0.
    losses, gradients = _weighted_gradients(task, theta, probe, range(1, len(at) + 1))
    unreached = [k for k, g in gradients.items() if g is None]
    if len(unreached) == len(gradients):
        raise NotDifferentiable(
            "The loss must depend on the chosen parameters through differentiable steps.",
            f"no gradient reaches {listed(unreached)} from {len(losses)} examples.",
            "layers that forward does not use, .detach(), no_grad(), argmax or rounding.",
            'choose the parameters that forward uses with Task(params="pattern"), or replace '
            "the step that cuts the gradient.",
        )
    silent = all(not bool(g.any()) for g in gradients.values() if g is not None)
    if silent and bool((losses != 0).any()) and bool(losses.isfinite().all()):
        raise NotDifferentiable(
            "Some example must have a gradient that is not exactly zero.",
            f"{len(losses)} examples with losses up to {float(losses.abs().max()):.3g} and "
            "gradients of exactly 0.",
            "a rounding, sign or threshold step (its derivative is 0), or a loss saturated in "
            "this dtype.",
            "replace the step by a smooth one, or use float64.",
        )
    if not unreached:
        return ()
    # Experts, heads of one domain and adapters are reached by some examples only; a step that cuts
    # the gradient looks the same.
    return (
        f"no gradient reaches {listed(unreached)} from {len(at)} of the {role}: where that is so, "
        "it counts as zero",
    )


def _weighted_gradients(
    task: Task, theta: Float[Tensor, " p"], batch: Batch, weights: Sequence[float]
) -> tuple[Float[Tensor, " b"], dict[str, Tensor | None]]:
    """ℓ of each example of a batch, and Σᵢ wᵢ gᵢ by parameter; None where no graph reaches."""
    params = task.leaves(theta)
    with torch.enable_grad():
        # A checkpoint runs its part again in the backward pass, where `outputs` has lifted its
        # choice of kernels.
        losses = task.losses_of(*task.call(params, batch))
        if not losses.requires_grad:
            return losses, dict.fromkeys(params)
        total = losses @ torch.tensor(list(weights)).to(losses)
        try:
            with task.backwards(params):
                found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedModel(
                "Gradients must be had for chosen tensors, which a reentrant checkpoint does not "
                "allow.",
                f"PyTorch says: {str(error).splitlines()[0]}",
                "gradient checkpointing with use_reentrant=True.",
                "use checkpoint(..., use_reentrant=False), or switch checkpointing off: gradients "
                "here take no more memory than a batch allows.",
            ) from error
    return losses.detach(), dict(zip(params, found, strict=True))


def require_own_gradients(
    task: Task, theta: Float[Tensor, " p"], data: Data, batch: Batch, at: Sequence[int], role: str
) -> None:
    """Refuse gradients of examples that depend on the others where the losses do not.

    Σᵢ cᵢ gᵢ of a few examples, from a batch with others and from each alone.
    """
    if len(at) == 1:  # it has no others
        return
    weights = [float(k % WITH_GRADIENT == 0) for k in range(len(at))]

    def gradients(t: Tensor, batch: Batch, weights: Sequence[float]) -> list[Tensor]:
        found = _weighted_gradients(task, t, batch, weights)[1].values()
        return [torch.zeros(()) if g is None else g.to_dense().double() for g in found]

    def each(t: Tensor) -> list[list[Tensor]]:
        return [gradients(t, task.to_device(data.batch(i, i + 1)), [1.0]) for i in chosen]

    together = gradients(theta, batch, weights)
    chosen = [i for i, weight in zip(at, weights, strict=True) if weight]
    alone = each(theta)
    gaps = torch.tensor(
        [float((a - sum(b)).norm()) for a, *b in zip(together, *alone, strict=True)]
    )
    sizes = torch.tensor([sum(float(g.norm()) for g in b) for b in zip(*alone, strict=True)])
    # By parameter, for some have far smaller gradients; what is zero but for rounding has none.
    floor = torch.finfo(theta.dtype).eps ** 0.5 * float(sizes.norm())
    apart = gaps > APART * sizes + floor
    if not bool(apart.any()):
        return
    with torch.no_grad():
        eps = coarsest(dtypes_in(lambda: task.call(theta, batch)))
    apart = gaps > eps**0.5 * (sizes + sizes.norm())
    if not bool(apart.any()):
        return
    # At a perfect fit residuals are rounding, and so are gradients: what does one rounding of θ do?
    eps = max(eps, torch.finfo(theta.dtype).eps)
    for near in nudged(task, theta, eps):
        moved = [
            [float((g - h).norm()) for g, h in zip(*pair, strict=True)]
            for pair in zip(each(near), alone, strict=True)
        ]
        apart &= gaps > min(MARGIN, eps**-0.5) * torch.tensor(moved).sum(dim=0)
    if bool(apart.any()):
        worst = int((gaps / sizes.clamp_min(floor)).argmax())
        raise NonDeterministic(
            "The gradient of an example must not depend on the other examples of its batch.",
            f"examples {', '.join(map(str, chosen))} of the {role}, whose losses do not: their "
            f"summed gradient in {task.layout.names[worst]} is "
            f"{float(gaps[worst] / sizes[worst]):.1%} off beside others.",
            "a backward pass that looks at the batch as a whole: a hook or an autograd "
            "function that normalizes, clips or centers gradients.",
            "take that step out of forward, such as handle.remove() of a hook; clip in the "
            "optimizer.",
        )


def require_finite_gradients(task: Task, data: Data) -> None:
    """Name, by a NonFinite, the first example whose gradient is not finite, if there is one.

    Cost: a backward pass over the data, and one an example over the batch where it is found.
    """

    def is_finite(start: int, stop: int) -> bool:
        batch, ones = task.to_device(data.batch(start, stop)), [1.0] * (stop - start)
        _, found = _weighted_gradients(task, task.held_theta(), batch, ones)
        return all(bool(g.isfinite().all()) for g in found.values() if g is not None)

    batches = data.batches(PROBE_EXAMPLES)
    for start, stop, _ in progress(batches, len(data), "looking for the example"):
        if is_finite(start, stop):
            continue
        bad = next((i for i in range(start, stop) if not is_finite(i, i + 1)), None)
        if bad is not None:
            raise NonFinite(
                "Every training example must have a finite gradient.",
                f"NaN or infinity in that of example {bad}, whose loss is finite.",
                "a step without a finite derivative there (a square root or norm of 0, a "
                "clamped logarithm), or gradients that overflow in this dtype.",
                "make the step smooth (sqrt(x + 1e-12)), use model.float(), or leave the "
                "example out.",
            )
