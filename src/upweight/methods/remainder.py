"""Does a removal's Newton step end where it was sent: at the minimum without the examples?

    r = ‖∇J₋U(θ̂ + Δθ) − ∇J(θ̂) + λΔθ‖ / ‖(1/n) Σ_U gᵢ‖          in the norm of (H + λI)⁻¹

is 0 where J is quadratic. In general it is the length of the next step on the same curvature over
that of this one, the quantity by which the convergence of Newton's method is told (Deuflhard 2011,
§2.1): about the relative error of Δθ while it is small. Far above 1 the step overshot to where the
curvature is another. ∇J(θ̂), which is 0 at a minimum, is no fault of the removal.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.gradients.autograd import total_gradient
from upweight.gradients.source import FactoredLinear
from upweight.task.data import Data, batch_size
from upweight.task.task import Task

if TYPE_CHECKING:
    from upweight.methods.dense import DenseScorer

LIMIT = 0.2
"""r from which a removal is noted: Δθ is off by about a fifth, or by far more. Removals that were
right to a tenth had r up to 0.12, and no group of removals off by a fifth was without one above."""

WORK = 5 * 10**7
"""Operations for the gradients of a call, in which all removals from some 700 examples are looked
at: a few tenths of a second."""

FEWEST = 16
"""Removals that are looked at whatever that takes: those with the longest steps."""

SHOWN = 5


def looked_at(
    fitted: "DenseScorer",
    groups: Sequence[list[int]],
    steps: Float[Tensor, "e p"] | None = None,
    lengths: Float[Tensor, " e"] | None = None,
) -> tuple[list[int], Float[Tensor, "k p"]]:
    """Which removals are looked at, the longest first where not all are, and their Δθ.

    Args:
        fitted: (H + λI)⁻¹ at θ̂.
        groups: What each removal takes out.
        steps: Δθ of each; None where the model is linear in θ, whose steps are computed again.
        lengths: Of the steps, in any unit, where each removes one example from such a model.
    """
    linear, few = fitted.linear_removals, _looked_at(fitted, len(groups))
    at = list(range(len(groups)))
    if lengths is not None and few < len(groups):
        at = lengths.topk(few).indices.tolist()
    if steps is None:
        assert linear is not None
        steps = (
            torch.stack([linear.step(groups[k]) for k in at])
            if lengths is None
            else linear.steps([groups[k][0] for k in at])
        )
    if few < len(at):
        chosen = steps.norm(dim=1).topk(few).indices.tolist()
        at, steps = [at[k] for k in chosen], steps[chosen]
    return at, steps


def missed(
    fitted: "DenseScorer",
    groups: Sequence[list[int]],
    steps: Float[Tensor, "k p"],
    count: int,
) -> list[str]:
    """Notes on removals whose step does not end at the minimum.

    Args:
        fitted: (H + λI)⁻¹ at θ̂.
        groups: What each removal that is looked at takes out.
        steps: Δθ of each.
        count: How many there are.

    Cost: one gradient of J per removal; where f is linear in θ, one pass over the data for all.
    """
    task, train = fitted.task, fitted.train
    if isinstance(fitted.source, FactoredLinear):
        after = _linear_gradients(fitted.source, train, groups, steps)
    else:
        after = torch.stack(
            [
                _gradient(task, train, fitted.theta + step, group)
                for step, group in zip(steps, groups, strict=True)
            ]
        )
    if all(len(group) == 1 for group in groups):
        removed = fitted.source.rows_of(train.subset([group[0] for group in groups]))
    else:
        removed = torch.stack([fitted.total(group) for group in groups])
    left = after - fitted.gradient + fitted.damping * steps
    # Not thrown: what a solver says of a vector as good as it can will do to judge by.
    ratios = remainders(
        left, fitted.share * removed, lambda v: fitted.solver.solve(fitted.state, v).value
    )
    return _notes(
        "the Newton step does not end at the minimum without the examples, and Δm may be further "
        "off than −S. What is left of the gradient there, over what removing takes away",
        ratios, groups, count,
    )  # fmt: skip


def curved(
    fitted: "DenseScorer",
    name: str,
    measured: Callable[[Float[Tensor, " p"], list[int]], Float[Tensor, " q"]],
    values: Float[Tensor, "q k"],
    groups: Sequence[list[int]],
    steps: Float[Tensor, "k p"],
    count: int,
) -> list[str]:
    """Notes on removals over whose step the measurements are not linear.

    Where Δθ is right, m(θ̂ + Δθ) − m(θ̂) is; ∇mᵀ Δθ is its first order, and of the loss of a query
    in least squares may have another sign.

    Args:
        fitted: (H + λI)⁻¹ at θ̂.
        name: What m is called.
        measured: (θ, what is gone) ↦ m of every query.
        values: ∇m_qᵀ Δθ of each query and removal that is looked at.
        groups: What each takes out.
        steps: Δθ of each.
        count: How many there are.

    Cost: one measurement of all queries per removal, for `FEWEST` at least of the longest steps.
    """
    few = max(FEWEST, WORK // (len(values) * len(fitted.theta)))
    at = steps.norm(dim=1).topk(min(few, len(steps))).indices.tolist()
    before = measured(fitted.theta, [])
    found = [measured(fitted.theta + steps[k], groups[k]) - before for k in at]
    moved = torch.stack(found, dim=1).to(values)
    off, whole = (moved - values[:, at]).norm(dim=0), moved.norm(dim=0)
    # What moves nothing beside the others leaves only rounding.
    moves = torch.maximum(whole, values[:, at].norm(dim=0))
    counts = moves > torch.finfo(moves.dtype).eps ** 0.5 * moves.max()
    return _notes(
        f"{name} is not linear over the step, and Δm is its first order. How far it is from "
        "m(θ̂ + Δθ) − m(θ̂), over that",
        torch.where(counts, off / whole, 0.0), [groups[k] for k in at], count,
        'Pass evaluate="plugin", which measures there; or refit',
    )  # fmt: skip


def _looked_at(fitted: "DenseScorer", count: int) -> int:
    source = fitted.source
    # A loss takes some 50 operations per output.
    outputs = source.form.outputs if isinstance(source, FactoredLinear) else 1
    each = len(fitted.train) * (len(fitted.theta) + 50 * outputs)
    return min(count, max(FEWEST, WORK // each))


def _linear_gradients(
    source: FactoredLinear,
    train: Data,
    groups: Sequence[Sequence[int]],
    steps: Float[Tensor, "k p"],
) -> Float[Tensor, "k p"]:
    """∇J₋U(θ̂ + Δθ) of each group: f(θ̂ + Δθ) = f(θ̂) + ΔW z takes no other pass."""
    task, form, matrices = source.task, source.form, source.form.matrix(steps)
    totals = torch.zeros_like(matrices)
    gone = torch.tensor([(row, i) for row, group in enumerate(groups) for i in group]).mT
    gone = gone.to(steps.device)
    width = form.width + form.outputs * len(groups)
    for start, stop, some in train.batches(batch_size(width, steps.itemsize)):
        batch = task.to_device(some)
        with torch.no_grad():
            outputs, targets = task.outputs(source.theta, batch)
        z = form.features(task, batch)
        kept = steps.new_ones(len(groups), stop - start)
        rows, places = gone[:, (gone[1] >= start) & (gone[1] < stop)]
        kept[rows, places - start] = 0.0
        for k, matrix in enumerate(matrices):
            moved = outputs + (z @ matrix.T).reshape(outputs.shape)
            slope = task.output_gradient(moved, targets).reshape(len(z), -1)
            totals[k] += (kept[k, :, None] * slope).T @ z
    theta = source.theta
    penalties = [task.penalty.gradient(theta + step, task.layout) for step in steps]
    return form.flatten(totals) / len(train) + torch.stack(penalties)


def _gradient(
    task: Task, train: Data, theta: Float[Tensor, " p"], gone: list[int]
) -> Float[Tensor, " p"]:
    """∇J₋U(θ), a batch at a time, by autograd: it runs every model that was trained."""
    weights, total = theta.new_ones(len(train)), torch.zeros_like(theta)
    weights[gone] = 0.0
    for start, stop, batch in train.batches(batch_size(task.layout.size, theta.itemsize)):
        some, w = task.to_device(batch), weights[start:stop]

        def kept(params: Params, some: Batch = some, w: Tensor = w) -> Tensor:
            return w * task.losses(params, some)

        total += total_gradient(task, theta, kept)
    return total / len(train) + task.penalty.gradient(theta, task.layout)


def remainders(
    left: Float[Tensor, "k p"],
    gone: Float[Tensor, "k p"],
    solve: Callable[[Float[Tensor, "k p"]], Float[Tensor, "k p"]],
) -> Float[Tensor, " k"]:
    """r of each removal.

    Args:
        left: ∇J₋U(θ̂ + Δθ) − ∇J(θ̂) + λΔθ.
        gone: (1/n) Σ_U gᵢ.
        solve: v ↦ (H + λI)⁻¹ v.
    """
    finite = left.isfinite().all(dim=1)
    vectors = torch.cat([torch.where(finite[:, None], left, 0.0), gone])
    after, before = (vectors * solve(vectors)).sum(dim=1).abs().sqrt().reshape(2, -1)
    # What moves nothing beside the others leaves only rounding.
    moves = before > torch.finfo(before.dtype).eps ** 0.5 * before.max()
    ratio = torch.where(moves, after / before, 0.0)
    return torch.where(finite, ratio, torch.inf)


def _notes(
    what: str,
    ratios: Float[Tensor, " k"],
    groups: Sequence[Sequence[int]],
    count: int,
    way_out: str = "Refit",
) -> list[str]:
    """Which of the removals that were looked at, out of `count`, are further off than the limit."""
    bad = [int(k) for k in ratios.argsort(descending=True) if not ratios[k] <= LIMIT]
    if not bad:
        return []
    named = ", ".join(
        f"{'+'.join(map(str, list(groups[k])[:SHOWN]))}{'+…' if len(groups[k]) > SHOWN else ''}"
        f" ({float(ratios[k]):.2g})"
        for k in bad[:SHOWN]
    )
    of = f"{len(groups)}" + (f" with the longest steps of {count}" if len(groups) < count else "")
    return [
        f"removal: for {len(bad)} of {of} {what} (limit {LIMIT:g}): "
        f"{named}{', …' if len(bad) > SHOWN else ''}. "
        f"{way_out} without these: "
        "evaluation.leave_one_out(Newton(), task, train, examples, queries)"
    ]
