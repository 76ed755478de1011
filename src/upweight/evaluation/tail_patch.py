"""Tail-patch: does one more training step on what is ranked first help the query?

    Δ[q, i] = m_q(step(θ̂, ∇ℓᵢ(θ̂))) − m_q(θ̂)        step: one of the optimizer, from a fresh state

Chang, Rajagopal, Bolukbasi, Dixon & Tenney (2024, "Scalable influence and fact tracing for large
language model pretraining"), with log p of the query's target as m. The examples are the first k of
each query's ranking, each taken by itself. Beside it stand the same steps on examples drawn at
random: a step on any text makes most texts a little likelier.

A cheap check, not a retraining: it asks what an example would do once more, at the end of training,
and not what it did. For a small step of plain SGD it is the gradient dot product,

    Δ[q, i] / η → −⟨∇m_q, ∇ℓᵢ⟩ = n S[q, i] of `GradientDot()`      as η → 0

so it favours methods near that one; `lds` and `removal_curve` do not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.evaluation.bootstrap import Bootstrap, Estimate, mean, summarized
from upweight.runtime.progress import progress
from upweight.scores import Scores, TopScores
from upweight.task.check import checked_measurements
from upweight.task.data import Data
from upweight.task.gradients import require_recording
from upweight.task.measures import Loss, as_measure, measured
from upweight.task.task import Task
from upweight.training.optimizers import Optimizer

LOSS = Loss()
End = Literal["lowers", "raises"]


@dataclass(frozen=True, eq=False)
class TailPatch:
    """Changes of each query's measurement by one step on each of its examples.

    Args:
        chosen: Training examples, the first of each query's ranking.
        change: Δ of each, in the unit of m.
        control: Δ by steps on r examples drawn at random, the same for every query.
        end: The end of the ranking that they are from, which says the sign that is wanted:
            "lowers" Δ < 0, "raises" Δ > 0.
        bootstrap: How the intervals are made; queries are drawn with replacement.
    """

    chosen: Int[Tensor, "q k"]
    change: Float[Tensor, "q k"]
    control: Float[Tensor, "q r"]
    end: End
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @cached_property
    def mean(self) -> Estimate:
        """Δ, mean over examples and queries."""
        return mean(self.change.mean(dim=1), self.bootstrap)

    @cached_property
    def random(self) -> Estimate:
        """The same of the examples drawn at random."""
        return mean(self.control.mean(dim=1), self.bootstrap)

    @cached_property
    def advantage(self) -> Estimate:
        """Mean over queries of Δ − Δ at random; an interval without 0 says that ranking helped."""
        return mean(self.change.mean(dim=1) - self.control.mean(dim=1), self.bootstrap)

    @cached_property
    def wanted(self) -> Estimate:
        """Share of the steps that move m to the side that the ranking says."""
        sign = -1 if self.end == "lowers" else 1
        return mean((sign * self.change > 0).double().mean(dim=1), self.bootstrap)

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them; intervals under `intervals`."""
        names = ("mean", "random", "advantage", "wanted")
        estimates = {name: getattr(self, name) for name in names}
        q, k = self.change.shape
        return summarized(estimates, self.bootstrap.level) | {
            "end": self.end,
            "queries": q,
            "k": k,
            "control": self.control.shape[1],
        }

    def __str__(self) -> str:
        q, k = self.change.shape
        side = self.end.removesuffix("s")
        return (
            f"tail-patch of {k} that are said to {side} m, over {q} "
            f"{'query' if q == 1 else 'queries'} ({self.bootstrap.level:.0%} intervals)\n"
            f"  Δm by a step on one of them  {self.mean}\n"
            f"  on one drawn at random       {self.random}\n"
            f"  difference                   {self.advantage}\n"
            f"  to the side that was said    {self.wanted}"
        )


def tail_patch(
    task: Task,
    train: Any,
    queries: Any,
    ranked: Scores | TopScores | Int[Tensor, "q k"],
    optimizer: Optimizer,
    k: int = 10,
    measure: Callable[..., Tensor] = LOSS,
    *,
    end: End | None = None,
    control: int = 10,
    seed: int = 0,
    bootstrap: Bootstrap = Bootstrap(),
) -> TailPatch:
    """Take one step on each of the first k training examples of every query, and undo it.

    The step is from θ̂, on ℓᵢ alone: the penalty would move every example's step alike. `Adam` and
    `AdamW` begin without a memory, so that their step is near η sign(∇ℓᵢ).

    Args:
        task: The trained model; it is not changed.
        train: Training data, as for `fit`.
        queries: As for `attribute`; scores must be of them.
        ranked: Scores, `into=Top(k)` of them, or indices of training examples, best first.
        optimizer: Its step. η should be the last that training took, or less.
        k: How many of each query.
        measure: m; that of the scores.
        end: Which end of the ranking: the examples that lower m, or that raise it. None: "lowers"
            for `Loss()`, "raises" for all else.
        control: How many examples are drawn at random.
        seed: Of that draw.
        bootstrap: How the intervals are made.

    Raises:
        ShapeError: There is not one ranking per query, fewer than k are ranked, or an index names
            no training example.
        SpecError: k or control is not from 1 to n, or `end` is neither end.
        NonFinite: A measurement is NaN or infinite, before a step or after it.
        ScalarLoss: The measure does not return one value per query.

    Cost: a backward pass over every example that is chosen for some query, once, and
    q (k + control) forward passes of a query. Memory: four times θ.
    """
    require_recording()
    examples, asked, m = task.training(train), task.queries(queries), as_measure(measure)
    n, q = len(examples), len(asked)
    for name, size in (("k", k), ("control", control)):
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= n:
            raise SpecError(
                f"Tail-patch steps on 1 to {n} training examples of each query.",
                f"{name}={size!r}.",
                "a share in place of a number, or more than there are.",
                "tail_patch(..., k=10, control=10), or fewer where n is smaller.",
            )
    end = ("lowers" if isinstance(m, Loss) else "raises") if end is None else end
    if end not in ("lowers", "raises"):
        raise SpecError(
            'The end of a ranking is "lowers" or "raises".',
            f"end={end!r}.",
            "another word for it.",
            'end="lowers" for the examples that lower m, as with Loss(); else end="raises".',
        )
    chosen = _first(ranked, k, end, n, q)
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:control]
    theta = task.theta()
    before = checked_measurements(task, m, asked).double().cpu()
    change = torch.empty(q, k, dtype=torch.float64)
    beside = torch.empty(q, control, dtype=torch.float64)
    places = {i: (chosen == i).nonzero() for i in set(chosen.flatten().tolist())}
    columns = {int(i): column for column, i in enumerate(drawn)}
    every = sorted({*places, *columns})
    steps = ((place, place + 1, i) for place, i in enumerate(every))
    for _, _, i in progress(steps, len(every), "tail-patch"):
        moved = _moved(task, theta, examples, i, optimizer)
        rows = list(range(q)) if i in columns else places[i][:, 0].tolist()
        found = measured(task, moved, asked.subset(rows), m).cpu() - before[rows]
        if not bool(found.isfinite().all()):
            _refuse(i, rows[int((~found.isfinite()).nonzero()[0])], optimizer)
        of = dict(zip(rows, found.tolist(), strict=True))
        for row, column in places[i].tolist() if i in places else ():
            change[row, column] = of[row]
        if i in columns:
            beside[:, columns[i]] = found
    return TailPatch(chosen, change, beside, end, bootstrap)


def _first(
    ranked: Scores | TopScores | Int[Tensor, "q k"], k: int, end: End, n: int, q: int
) -> Int[Tensor, "q k"]:
    """The first k training examples of each query, checked."""
    if isinstance(ranked, Scores):
        ranked.require_examples()
        values = ranked.values[:]
        found = values.argsort(dim=1, descending=end == "raises", stable=True)
        is_of_these = found.shape == (q, n)
    else:
        top = isinstance(ranked, TopScores)
        found = torch.as_tensor(getattr(ranked, end) if top else ranked)
        is_of_these = (
            found.ndim == 2
            and len(found) == q
            and found.shape[1] >= k
            and not (found.is_floating_point() or found.dtype == torch.bool)
            and bool(((found >= 0) & (found < n)).all())
        )
    if not is_of_these:
        raise ShapeError(
            f"A ranking names at least {k} of the {n} training examples for each of {q} queries.",
            f"{type(ranked).__name__} of shape {tuple(found.shape)}, {found.dtype}.",
            "scores of other queries or data, fewer kept by Top(k) than are asked for, or a matrix "
            "of numbers in place of indices.",
            f"attribute(queries, into=Top({k})), or a smaller k.",
        )
    return found[:, :k].detach().cpu().long()


def _moved(
    task: Task, theta: Float[Tensor, " p"], data: Data, i: int, optimizer: Optimizer
) -> Float[Tensor, " p"]:
    """θ̂ after one step on example i."""
    params = {name: v.clone().requires_grad_() for name, v in task.layout.unflatten(theta).items()}
    with torch.enable_grad():
        loss = task.losses_of(*task.call(params, task.to_device(data.batch(i, i + 1)))).sum()
        found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    gradient = {name: g.to_dense() for name, g in zip(params, found, strict=True)}
    flat = task.layout.flatten(gradient).detach()
    return optimizer.step(theta, flat, optimizer.init(theta), optimizer.lr)[0]


def _refuse(i: int, query: int, optimizer: Optimizer) -> None:
    raise NonFinite(
        "Measurements must be finite after a step.",
        f"NaN or infinity for query {query} after {optimizer!r} on training example {i}.",
        "a step that is too long, or a gradient that overflows.",
        "a smaller lr, such as the last that training took; or a float64 model.",
    )
