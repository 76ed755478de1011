"""Removals of a fitted method: Δm and Δθ of taking examples out, and the outputs without them.

by all of θ     one Newton step of the objective without them (`leverage.py`)
by layer        to first order, −Σ_U S[q, i]
evaluated       m(θ̂ + Δθ) − m(θ̂), whatever Δθ
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.effects import FIRST_ORDER, Effects, Groups, first_order, without
from upweight.methods import remainder
from upweight.methods.dense import DenseScorer
from upweight.methods.functionals import evaluated
from upweight.methods.leverage import corrected_output_gradients, largest_share
from upweight.methods.reduce import Answer, Reducer, Sink, Sweep
from upweight.methods.scorer import Asked, Job, Scorer
from upweight.runtime.memory import require_bytes, require_room
from upweight.runtime.progress import progress
from upweight.task.data import Data, batch_size
from upweight.task.task import Task

MEASURED = "removal: measured at θ̂ + Δθ, m(θ̂ + Δθ) − m(θ̂)"

SUMMED = "removal: to first order, minus the sum of the scores, with the curvature of all the data"


@dataclass(frozen=True, eq=False)
class Place:
    """A scorer, and what it was fitted to at θ̂."""

    task: Task
    train: Data
    theta: Float[Tensor, " p"]
    scorer: Scorer


def by_newton_step(
    at: Place, asked: Asked, every: Sequence[list[int]], is_measured: bool = False
) -> tuple[Float[Tensor, "q e"], Float[Tensor, "q e"] | None, list[Any], list[str]]:
    """∇m_qᵀ Δθ of every removal, m(θ̂ + Δθ) − m(θ̂), the records of the solves, and the doubts.

    Args:
        at: Where, by a `DenseScorer`.
        asked: The question.
        every: What each removal takes out.
        is_measured: Whether m(θ̂ + Δθ) − m(θ̂) is asked for too.
    """
    scorer = at.scorer
    assert isinstance(scorer, DenseScorer)
    linear = scorer.linear_removals
    singles = linear is not None and all(len(group) == 1 for group in every)
    steps: Float[Tensor, "e p"] | None = None
    lengths: Float[Tensor, " e"] | None = None
    records, parts = [], []
    if not singles:
        steps = scorer.steps(every)
    elif is_measured:
        assert linear is not None
        steps = linear.steps([group[0] for group in every])
    for job in scorer.jobs(asked):
        if steps is None:
            assert linear is not None
            part, lengths = linear.each(job.vectors(), [group[0] for group in every])
        else:
            # ∇m_q = (H + λI) v_q.
            part = scorer.operator.mv(job.vectors()) @ steps.T
        parts.append(part)
        records.append(job.record)
    values = torch.cat(parts)
    if (direct := asked.direct) is not None:
        values = values + first_order(direct, every)
    measured = None
    if is_measured:
        assert steps is not None
        measured = plugin(at, asked, every, steps)
    places, moves = remainder.looked_at(scorer, every, steps, lengths)
    some = [every[k] for k in places]
    doubts = remainder.missed(scorer, some, moves, len(every))
    if not is_measured:
        of = partial(_measured, at, asked)
        doubts += remainder.curved(
            scorer, repr(asked.measure), of, values[:, places], some, moves, len(every)
        )
    return values, measured, records, doubts


def plugin(
    at: Place, asked: Asked, every: Sequence[list[int]], steps: Iterable[Float[Tensor, " p"]]
) -> Float[Tensor, "q e"]:
    """m(θ̂ + Δθ) − m(θ̂) of every removal, from Δθ of each."""
    columns = []
    before = _measured(at, asked, at.theta, [])
    moved = ((k, k + 1, step) for k, step in enumerate(steps))
    for k, _, step in progress(moved, len(every), "removals"):
        columns.append(_measured(at, asked, at.theta + step, every[k]) - before)
    return torch.stack(columns, dim=1)


def _measured(
    at: Place, asked: Asked, theta: Float[Tensor, " p"], gone: list[int]
) -> Float[Tensor, " q"]:
    """m(θ), or φ(θ, w) with w = 0 for what is gone."""
    task, measure, queries = at.task, asked.measure, asked.queries
    if asked.functional is not None:
        weights = theta.new_ones(len(at.train))
        weights[gone] = 0.0
        batch = None if queries is None else task.to_device(queries.batch(0, len(queries)))
        return evaluated(measure, task, theta, batch, weights)
    assert queries is not None
    size = batch_size(task.layout.size, theta.element_size())
    with torch.no_grad():
        return torch.cat(
            [
                measure(task, task.named(theta), task.to_device(batch))
                for _, _, batch in queries.batches(size)
            ]
        )


def checked_step(scorer: Scorer, group: list[int]) -> tuple[Float[Tensor, " p"], list[str]]:
    """Δθ of removing a group, and what is to be doubted of it."""
    step = scorer.step(group)
    if not isinstance(scorer, DenseScorer):
        return step, []
    return step, remainder.missed(scorer, [group], step[None], 1)


def without_each(
    at: Place, with_own: bool = True
) -> tuple[Float[Tensor, "n *c"], Float[Tensor, " n"]]:
    """See `Fitted.loo_outputs` and `Fitted.leverage`: the two share their Jacobians.

    `with_own`: whether H has the example's own curvature in it.
    """
    task, n = at.task, len(at.train)
    found, shares = [], []
    batches = at.train.batches(_at_once(at))
    for start, stop, examples in progress(batches, n, "outputs without each example"):
        batch = task.to_device(examples)
        leverage = at.scorer.leverages(start, stop)
        with torch.no_grad():
            outputs, targets = task.outputs(at.theta, batch)
        delta = task.output_gradient(outputs, targets).reshape(stop - start, -1)
        c = delta.shape[1]
        lambdas = task.output_hessian(outputs, targets).reshape(stop - start, c, c)
        u = delta
        if with_own:
            u = corrected_output_gradients(delta, lambdas, leverage.to(delta))
        moved = (leverage.to(delta) @ u[:, :, None])[:, :, 0]
        found.append(outputs + moved.reshape(outputs.shape))
        share = largest_share(lambdas, leverage.to(delta))
        shares.append(share if with_own else share / (1 + share))
    return torch.cat(found), torch.cat(shares)


def _at_once(at: Place) -> int:
    """So few examples that each may have its Jacobian."""
    task = at.task
    with torch.no_grad():
        outputs, _ = task.outputs(at.theta, task.to_device(at.train.batch(0, 1)))
    c, p, each = outputs[0].numel(), task.layout.size, task.layout.dtype.itemsize
    require_bytes(
        (3 * c * p + 2 * c * c) * each,
        f"the Jacobian of one example, {c} outputs by {p} parameters",
        task.layout.device,
        "ask what a measure is without some examples, which takes no Jacobian: "
        "removal(queries, groups=[[0]]).",
    )
    return batch_size(c * 2 * p, each)


# -- to first order -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Without(Reducer):
    """−Σ_U S[q, i] of every group, as the scores stream by."""

    groups: Groups

    def require_room(self, sweep: Sweep) -> None:
        way_out = "ask some queries or groups at a time."
        require_room(sweep.q, len(self.groups), sweep.dtype, sweep.device, way_out)

    def begin(self, sweep: Sweep) -> Sink:
        pairs = torch.tensor([(i, k) for k, group in enumerate(self.groups) for i in group])
        pairs = pairs[pairs[:, 0].argsort(stable=True)].to(sweep.device)
        shape = (sweep.q, len(self.groups))
        total = torch.zeros(shape, dtype=sweep.dtype, device=sweep.device)
        return _Removed(pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), total, self.groups)


@dataclass(eq=False)
class _Removed(Sink):
    examples: Tensor
    columns: Tensor
    total: Float[Tensor, "q e"]
    groups: Groups

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:
        edges = torch.tensor([start, start + part.shape[1]], device=self.examples.device)
        first, last = torch.searchsorted(self.examples, edges).tolist()
        rows = self.total[job.first : job.first + len(job)]
        chosen = part[:, self.examples[first:last] - start]
        rows.index_add_(1, self.columns[first:last], without(chosen))

    def result(self, answer: Answer) -> Effects:
        made = answer.provenance((SUMMED,))
        return Effects(self.total, self.groups, FIRST_ORDER, made, context=answer.context)
