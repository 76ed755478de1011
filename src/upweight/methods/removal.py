"""Removals of a fitted method: Δm and Δθ of taking examples out, and the outputs without them.

by all of θ     one Newton step of the objective without them (`leverage.py`)
by layer        to first order, −Σ_U S[q, i]
evaluated       m(θ̂ + Δθ) − m(θ̂), whatever Δθ

How far first order is from a removal, of exact curvatures: `beyond_first_order`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
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

REMOVED_SHARES = 0.01, 0.1
"""Shares of the training data whose removal is looked at, beside single examples."""

QUERIES_LOOKED_AT = 4
"""Queries whose strongest examples are removed; one where a solve takes many products."""

ROUNDING = 64
"""Units of rounding of a measurement below which the difference of two says nothing."""

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


# -- how far first order is from that --------------------------------------------------------------


@dataclass(eq=False)
class SomeRows:
    """S[q, i] of a few queries, kept while the scores stream by.

    Args:
        at: The queries, in order.
        n: Training examples.
    """

    at: Sequence[int]
    n: int
    _rows: dict[int, Tensor] = field(default_factory=dict)
    _seen: dict[int, int] = field(default_factory=dict)

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:
        """Another block."""
        for q in self.at:
            if not job.first <= q < job.first + len(job):
                continue
            row = self._rows.setdefault(q, part.new_empty(self.n))
            row[start : start + part.shape[1]] = part[q - job.first]
            self._seen[q] = self._seen.get(q, 0) + part.shape[1]

    @property
    def whole(self) -> Float[Tensor, "q n"] | None:
        """The rows; None where not every block streamed by, as when a run was resumed."""
        if any(self._seen.get(q) != self.n for q in self.at):
            return None
        return torch.stack([self._rows[q] for q in self.at])


def beyond_first_order(
    at: Place, asked: Asked, places: Sequence[int], scores: Float[Tensor, "q n"]
) -> list[tuple[int, float | None]]:
    """How far −Σ_U S[q, i] is from what removing the strongest examples of a query does.

        ‖m(θ̂ + tΔθ) − m(θ̂) + Σ_U S‖ / ‖Σ_U S‖,    Δθ = (H + λI)⁻¹ (1/n) Σ_U gᵢ
        t = 1 / (1 − r),    r = Δθᵀ (1/n) Σ_U Hᵢ Δθ / Δθᵀ (H + λI) Δθ

    in the norm over the queries. tΔθ is the minimum along Δθ of the objective without U to second
    order: the Newton step for one example of a scalar output, whose leverage r is, and near it
    elsewhere. A measure of θ and w, ∂φ/∂w included, is evaluated at both.

    Args:
        at: Where, by a `DenseScorer` whose model is linear in θ.
        asked: The question.
        places: Queries whose examples are removed.
        scores: S of these.

    Returns:
        For 1, 1 % and 10 % of the examples (those whose removal moves the query most in one
        direction): how many, and the largest for any of these queries; None where the others do not
        determine a minimum.

    Cost: a solve and a gradient for each, and one measurement of these queries.
    """
    scorer, n = at.scorer, len(at.train)
    assert isinstance(scorer, DenseScorer) and scorer.linear is not None
    if asked.queries is not None and asked.functional is None:
        asked = replace(asked, queries=asked.queries.subset(places))
        chosen = list(range(len(places)))
    else:
        chosen = list(places)
    counts = sorted({1, *(max(1, round(share * n)) for share in REMOVED_SHARES)})
    groups = [_strongest(row, k) for k in counts for row in scores]
    pulls = torch.stack([scorer.total(group) for group in groups]) * scorer.share
    solution = scorer.solver.solve(scorer.state, pulls)
    if not solution.is_answer:  # the queries' own were solved, and this only judges their scores
        return []
    steps = solution.value
    before = _measured(at, asked, at.theta, [])[chosen]
    noise = ROUNDING * torch.finfo(before.dtype).eps * float(before.norm())
    found: list[float | None] = []
    for group, pull, step in zip(groups, pulls, steps, strict=True):
        predicted = -scores[:, group].sum(dim=1).to(before)
        if not bool(predicted.any()):
            found.append(0.0)
            continue
        whole = float(pull.double() @ step.double())
        left = 1 - scorer.linear.curvature_along(group, step) / whole if whole else 1.0
        if not left > torch.finfo(step.dtype).eps ** 0.5:
            found.append(None)
            continue
        direct = torch.zeros_like(predicted)
        if asked.direct is not None:
            direct = first_order(asked.direct, [group])[chosen, 0].to(predicted)
        linear = (predicted - direct) / left + direct
        reached = _measured(at, asked, at.theta + step / left, group)[chosen] - before
        if float((reached - linear).norm()) <= noise:
            reached = linear
        off = float((reached - predicted).norm() / predicted.norm())
        found.append(off if math.isfinite(off) else None)
    by_count = [found[k : k + len(scores)] for k in range(0, len(found), len(scores))]
    return [(k, _largest(some)) for k, some in zip(counts, by_count, strict=True)]


def _largest(found: Sequence[float | None]) -> float | None:
    known = [off for off in found if off is not None]
    return max(known) if len(known) == len(found) else None


def _strongest(scores: Float[Tensor, " n"], k: int) -> list[int]:
    """The k examples that together move a query most, all of them in one direction if they can."""
    ends = (scores.topk(k, largest=largest).indices for largest in (False, True))
    chosen: list[int] = max(ends, key=lambda at: float(scores[at].sum().abs())).tolist()
    return chosen


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
