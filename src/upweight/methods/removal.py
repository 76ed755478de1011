"""Removals of a fitted method: Δm and Δθ of taking examples out, and the outputs without them.

by all of θ     one Newton step of the objective without them (`leverage.py`)
by layer        to first order, −Σ_U S[q, i]
evaluated       m(θ̂ + Δθ) − m(θ̂), whatever Δθ
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError, SpecError, message
from upweight.gradients.autograd import total_gradient
from upweight.methods import health, remainder
from upweight.methods.dense import DenseScorer
from upweight.methods.functionals import evaluated
from upweight.methods.leverage import corrected_output_gradients
from upweight.methods.reduce import Answer, Reducer, Sink, Sweep
from upweight.methods.scorer import Asked, Job
from upweight.runtime.memory import require_room
from upweight.runtime.progress import progress
from upweight.scores import Scores, Unit
from upweight.task.data import batch_size
from upweight.task.measures import Functional

if TYPE_CHECKING:
    from upweight.methods.fitted import Fitted

FIRST_ORDER = (
    "removal: to first order, minus the sum of the scores, with the curvature of all the data"
)


def removal(fitted: "Fitted", queries: Any, measure: Any, groups: Any, evaluate: str) -> Scores:
    """See `Fitted.removal`."""
    started = time.perf_counter()
    if evaluate not in ("linear", "plugin"):
        raise SpecError(
            message(
                'A removal is evaluated as "linear" or as "plugin".',
                f"evaluate={evaluate!r}.",
                "another word for one of them.",
                '"linear" gives ∇m · Δθ; "plugin" gives m(θ̂ + Δθ) − m(θ̂).',
            )
        )
    named = None if groups is None else [fitted._group(group) for group in groups]
    if named is not None and not named:
        raise ShapeError(
            message(
                "A removal needs something to remove.",
                "groups=[], no group at all.",
                "a filter that matched nothing.",
                "leave groups out to remove each example by itself, or pass groups=[[0, 1]].",
            )
        )
    every = [[i] for i in range(len(fitted.train))] if named is None else named
    columns = None if named is None else tuple(",".join(map(str, g)) for g in named)
    if not isinstance(fitted.scorer, DenseScorer):
        scores: Scores = fitted.attribute(queries, measure, into=_Without(every, columns))
        if evaluate == "linear":
            return scores
        asked = fitted._asked(queries, measure)
        values = _plugin(fitted, asked, every)
        made = replace(scores.provenance, notes=(*scores.provenance.notes, _PLUGIN))
        return replace(scores, values=values, provenance=made)
    scorer, count = fitted.scorer, 1
    if queries is not None and not isinstance(measure, Functional):
        queries = fitted.task.queries(queries)
        count = len(queries)
    require_room(
        count, len(every), scorer.theta.dtype, scorer.theta.device,
        "ask some queries at a time, as_data(queries).subset(range(100)), or some groups.",
    )  # fmt: skip
    asked = fitted._asked(queries, measure)
    values, records, doubts = _by_newton_step(fitted, scorer, asked, every)
    notes: tuple[str, ...] = ()
    if evaluate == "plugin":
        values, notes = _plugin(fitted, asked, every), (_PLUGIN,)
        doubts = [note for note in doubts if "is not linear over the step" not in note]
    seconds = {**fitted.seconds, "attribute": time.perf_counter() - started}
    judged, said = fitted._judged(records, None, None)
    denied, noted = fitted._minimum_denied(judged)
    zero = health.zero_rows(values.abs().sum(dim=1), fitted.losses)
    said = [
        *health.warned([*denied, *health.solved(judged), *zero, *doubts]), *noted, *said, *notes,
        *health.zero_columns(values),
    ]  # fmt: skip
    made = fitted._provenance(asked, judged, said, seconds)
    context = fitted._context(asked)
    return Scores(values, Unit.DIFFERENCE, made, columns=columns, context=context)


_PLUGIN = "removal: measured at θ̂ + Δθ, m(θ̂ + Δθ) − m(θ̂)"


def _by_newton_step(
    fitted: "Fitted", scorer: DenseScorer, asked: Asked, every: Sequence[list[int]]
) -> tuple[Float[Tensor, "q e"], list[Any], list[str]]:
    """∇m_qᵀ Δθ of every removal, the records of the solves, and what is to be doubted."""
    linear, records, parts = scorer.linear_removals, [], []
    steps: Float[Tensor, "e p"] | None = None
    lengths: Float[Tensor, " e"] | None = None
    if linear is None:
        steps = torch.stack([scorer.newton_step(group) for group in every])
    singles = all(len(group) == 1 for group in every)
    for job in scorer.jobs(asked):
        if linear is None:
            assert steps is not None
            # ∇m_q = (H + λI) v_q.
            part = scorer.operator.mv(job.vectors()) @ steps.T
        elif singles:
            part, lengths = linear.each(job.vectors(), [group[0] for group in every])
        else:
            part = torch.stack([linear.together(job.vectors(), g) for g in every], dim=1)
        if job.direct is not None:
            part = part - torch.stack([job.direct[:, g].sum(dim=1) for g in every], dim=1)
        parts.append(part)
        records.append(job.record)
    values = torch.cat(parts)
    at, moves = remainder.looked_at(scorer, every, steps, lengths)
    some = [every[k] for k in at]
    doubts = remainder.missed(scorer, some, moves, len(every))
    if asked.queries is not None and asked.functional is None:
        doubts += remainder.curved(
            scorer, asked.queries, asked.measure, values[:, at], some, moves, len(every)
        )
    return values, records, doubts


def _plugin(fitted: "Fitted", asked: Asked, every: Sequence[list[int]]) -> Float[Tensor, "q e"]:
    """m(θ̂ + Δθ) − m(θ̂) of every removal."""
    columns = []
    before = _measured(fitted, asked, fitted.theta, [])
    groups = ((k, k + 1, group) for k, group in enumerate(every))
    for _, _, group in progress(groups, len(every), "removals"):
        after = _measured(fitted, asked, fitted.theta + fitted.scorer.step(group), group)
        columns.append(after - before)
    return torch.stack(columns, dim=1)


def _measured(
    fitted: "Fitted", asked: Asked, theta: Float[Tensor, " p"], gone: list[int]
) -> Float[Tensor, " q"]:
    task, measure, queries = fitted.task, asked.measure, asked.queries
    if asked.functional is not None:
        weights = theta.new_ones(len(fitted.train))
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


def checked_step(fitted: "Fitted", group: list[int]) -> tuple[Float[Tensor, " p"], list[str]]:
    """Δθ of removing a group, and what is to be doubted of it."""
    scorer = fitted.scorer
    step = scorer.step(group)
    if not isinstance(scorer, DenseScorer):
        return step, []
    return step, remainder.missed(scorer, [group], step[None], 1)


def total_gradient_of(fitted: "Fitted", group: list[int]) -> Float[Tensor, " p"]:
    """Σ gᵢ of some training examples."""
    task, batch = fitted.task, fitted.task.to_device(fitted.train.take(group))
    return total_gradient(task, fitted.theta, lambda params: task.losses(params, batch))


def loo_outputs(fitted: "Fitted") -> Float[Tensor, "n *c"]:
    """See `Fitted.loo_outputs`."""
    task, scorer, n = fitted.task, fitted.scorer, len(fitted.train)
    found = []
    for start, stop, _ in progress(_ranges(fitted), n, "outputs without each example"):
        batch = task.to_device(fitted.train.batch(start, stop))
        leverage = scorer.leverages(start, stop)
        with torch.no_grad():
            outputs, targets = task.outputs(fitted.theta, batch)
        delta = task.output_gradient(outputs, targets).reshape(stop - start, -1)
        c = delta.shape[1]
        lambdas = task.output_hessian(outputs, targets).reshape(stop - start, c, c)
        u = corrected_output_gradients(delta, lambdas, leverage.to(delta))
        moved = (leverage.to(delta) @ u[:, :, None])[:, :, 0]
        found.append(outputs + moved.reshape(outputs.shape))
    return torch.cat(found)


def _ranges(fitted: "Fitted") -> Iterator[tuple[int, int, None]]:
    """Batches small enough for a Jacobian of each example."""
    task, n = fitted.task, len(fitted.train)
    with torch.no_grad():
        outputs, _ = task.outputs(fitted.theta, task.to_device(fitted.train.batch(0, 1)))
    values = outputs[0].numel() * 2 * task.layout.size
    size = fitted.train.together(batch_size(values, task.layout.dtype.itemsize))
    return ((start, min(start + size, n), None) for start in range(0, n, size))


# -- to first order -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Without(Reducer):
    """−Σ_U S[q, i] of every group, as the scores stream by."""

    groups: Sequence[Sequence[int]]
    columns: tuple[str, ...] | None

    def require_room(self, sweep: Sweep) -> None:
        way_out = "ask some queries or groups at a time."
        require_room(sweep.q, len(self.groups), sweep.dtype, sweep.device, way_out)

    def begin(self, sweep: Sweep) -> Sink:
        pairs = torch.tensor([(i, k) for k, group in enumerate(self.groups) for i in group])
        pairs = pairs[pairs[:, 0].argsort(stable=True)].to(sweep.device)
        shape = (sweep.q, len(self.groups))
        total = torch.zeros(shape, dtype=sweep.dtype, device=sweep.device)
        return _Removed(pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), total, self.columns)


@dataclass(eq=False)
class _Removed(Sink):
    examples: Tensor
    columns: Tensor
    total: Float[Tensor, "q e"]
    names: tuple[str, ...] | None

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:
        edges = torch.tensor([start, start + part.shape[1]], device=self.examples.device)
        first, last = torch.searchsorted(self.examples, edges).tolist()
        rows = self.total[job.first : job.first + len(job)]
        chosen = part[:, self.examples[first:last] - start]
        rows.index_add_(1, self.columns[first:last], -chosen)

    def result(self, answer: Answer) -> Scores:
        scores = answer.scores(self.total, self.names, (FIRST_ORDER,))
        return replace(scores, unit=Unit.DIFFERENCE)
