"""TracIn: what the steps of training on an example did to a measurement, added up.

    θ_{t+1} = θ_t − η_t (1/|B_t|) Σ_{i ∈ B_t} wᵢ gᵢ(θ_t)
    S[q, i] = −Σ_t c_t [i ∈ B_t]/|B_t| ⟨∇m_q(θ_t), gᵢ(θ_t)⟩       TracInIdeal, every step
            ≈ −(1/n) Σ_k a_k ⟨∇m_q(θ_k), gᵢ(θ_k)⟩                 TracInCP, a_k = Σ_{t near k} c_t

An example is in one batch of each epoch: a batch weighs it by 1/|B|, which over the steps is 1/n.
c_t is how far the gradient of a step moves θ in all: η_t, with momentum η_t/(1 − μ).

Pruthi, Liu, Kale & Sundararajan (2020), Eq. 1 and §3.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import NotOffered, SpecError, listed
from upweight.gradients.autograd import total_gradient
from upweight.methods import layered
from upweight.methods.fitting import Fitting
from upweight.methods.layered import LayeredScorer
from upweight.methods.method import Method
from upweight.methods.points import AddedScorers, SumOfScorers
from upweight.methods.scorer import Asked, JobOf, Scorer, TokenScores, Work
from upweight.scores import Unit
from upweight.task.point import Point
from upweight.training.history import History, as_history, factors, rates, unused_notes
from upweight.training.optimizers import Adam

NEVER_SEEN = 1e3
"""|gradient| over √v̂ + ε from which on Adam has not seen such gradients. Of a gradient that it saw
every few thousand steps alone it remembers 1/400."""


@dataclass(frozen=True)
class TracIn(Method):
    """S[q, i] = −(1/n) Σ_k a_k ⟨P_k ∇m_q(θ_k), gᵢ(θ_k)⟩ over states θ_k of training.

    Each step counts with the kept state nearest to it: a_k is the sum of their η_t, with momentum
    of Σ_{s ≥ t} η_s μ^{s−t}, each times what clipping left of its gradient where that was recorded.
    P_k is the identity, for Adam diag(1/(√v̂ + ε)), and 0 where a batch has a gradient of more than
    1000 (√v̂ + ε): no step has moved θ by such a gradient, and 1/ε would make it the whole score.
    That is so of a bias before batch normalization, which takes it out again in training and not
    in eval mode, and of tokens that no step had met; a note says which. It takes
    `fit(..., history=)`: a trajectory, a recorded run, or a recipe, which is then trained.

    Args:
        states: So many states, in the middles of as many equal parts of training; None: all kept.
        batches: Whether an example counts only with the steps whose batch held it: TracInIdeal
            where every state is kept. Else with all of them, each by 1/n.

    Exact when: to first order in the step sizes, with `batches` and every state kept, by SGD with
    or without momentum; so for one step from any θ_0 and a measure that is linear over it. What
    later steps do with what an earlier one did is left out: that is `SOURCE`. With Adam the change
    of v̂ is left out as well.
    Cost: gradients of queries and a pass over the training data for each state; with Adam another.

    Raises:
        SpecError: There is no history, it is of another model, or it keeps no such states.
    """

    states: int | None = None
    batches: bool = False

    takes_history = True
    takes_run = True
    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        require_count("states", self.states)

    def prepare(self, fitting: Fitting) -> Scorer:
        history = as_history(fitting.history, fitting.task, fitting.data, fitting.theta)
        reached = rates(history)
        moved = reached * factors(history)
        left_out = torch.zeros_like(fitting.theta, dtype=torch.bool)
        scorers: list[LayeredScorer] = []
        columns: list[Tensor] = []
        for t, steps in nearest_states(history, self.states):
            weight = float(moved[steps].sum())
            point = Point(history.state(t).theta.to(fitting.theta), 1.0 if self.batches else weight)
            scale = scale_at(history, t, fitting.theta)
            if scale is not None:
                unseen = never_seen(fitting, history, point.theta, scale)
                scale, left_out = torch.where(unseen, 0, scale), left_out | unseen
            scorer = layered.identity(fitting, point, scale=scale)
            scorers.append(scorer)
            if self.batches:
                held = _columns(history, steps, reached, len(fitting.data))
                columns.append(held.to(fitting.theta))
        notes = left_out_note(fitting, left_out)
        if not self.batches:
            notes += unused_notes(history, len(fitting.data))
        scorers[-1] = replace(scorers[-1], notes=scorers[-1].notes + notes)
        parts: list[Scorer] = [*scorers]
        if self.batches:
            pairs = zip(scorers, columns, strict=True)
            parts = [OfColumns((scorer,), held) for scorer, held in pairs]
        return parts[0] if len(parts) == 1 else SumOfScorers(tuple(parts))


def require_count(name: str, count: int | None) -> None:
    """Refuse, by a SpecError, what is no number of parts of training."""
    is_whole = isinstance(count, int) and not isinstance(count, bool)
    if count is not None and not (is_whole and count >= 1):
        raise SpecError(
            f"{name} is a whole number of at least 1.",
            f"{name}={count!r}.",
            "a share of training, or a list of steps.",
            f"{name}=5; which states there are is said where training is recorded: every=.",
        )


def usable_states(history: History) -> list[int]:
    """The kept states with all that an optimizer divides by: Adam has no v̂ before a step."""
    return [t for t in history.kept if t > 0 or not isinstance(history.optimizer, Adam)]


def nearest_states(history: History, count: int | None) -> list[tuple[int, Tensor]]:
    """States, each with the steps that it stands for; every step is with one of them."""
    usable = torch.tensor(usable_states(history))
    every = torch.arange(len(history))
    if count is None:
        where = every.double()
    else:  # the middle of the part that a step is in
        part = every * count // len(history)
        first, last = torch.searchsorted(part, part), torch.searchsorted(part, part, right=True) - 1
        where = (first + last) / 2
    # Ties go to the earlier one.
    chosen = (where[:, None] - usable).abs().argmin(dim=1)
    return [(int(usable[k]), every[chosen == k]) for k in sorted(set(chosen.tolist()))]


def scale_at(history: History, t: int, theta: Float[Tensor, " p"]) -> Float[Tensor, " p"] | None:
    """What the optimizer multiplies the entries of a gradient with at state t; None: 1."""
    found = history.optimizer.scale(history.state(t).optimizer)
    return None if found is None else found.to(theta)


def never_seen(
    fitting: Fitting, history: History, theta: Float[Tensor, " p"], scale: Float[Tensor, " p"]
) -> Bool[Tensor, " p"]:
    """Where the data have gradients that the optimizer has never seen.

    Cost: a forward and a backward pass over the training data, in batches of the size of training.
    """
    task, largest = fitting.task, torch.zeros_like(theta)
    for start, stop, batch in fitting.data.batches(len(next(history.steps()).indices)):
        on_device = task.to_device(batch)
        total = total_gradient(
            task,
            theta,
            lambda p, b=on_device: task.losses_of(*task.call(p, b)),  # type: ignore[misc]
        )
        largest = torch.maximum(largest, total.abs() / (stop - start))
    return largest * scale > NEVER_SEEN


def left_out_note(fitting: Fitting, unseen: Bool[Tensor, " p"]) -> tuple[str, ...]:
    """Which parameters are left out, or nothing where none is."""
    if not bool(unseen.any()):
        return ()
    names = fitting.task.layout.unflatten(unseen)
    return (
        f"{int(unseen.sum())} of {len(unseen)} parameters are left out at one state or more, in "
        f"{listed([name for name, x in names.items() if bool(x.any())])}: Adam had seen no "
        "gradients there as large as those of the data, in eval mode (a bias before batch "
        "normalization, a token that no step had met)",
    )


def _columns(
    history: History, steps: Tensor, reached: Float[Tensor, " T"], n: int
) -> Float[Tensor, " n"]:
    """n Σ_t c_t [i ∈ B_t]/|B_t| over some steps."""
    found, wanted = torch.zeros(n, dtype=torch.float64), set(steps.tolist())
    for step in history.steps(min(wanted), max(wanted) + 1):
        if step.number in wanted:
            b = len(step.indices)
            share = float(reached[step.number]) * step.share * n / b
            each = torch.full((b,), share, dtype=torch.float64)
            if step.factors is not None:
                each *= step.factors
            found.index_add_(0, step.indices.cpu(), each)
    return found


@dataclass(frozen=True, eq=False)
class _OfColumns(JobOf):
    """The scores of another job, each column times a number."""

    columns: Float[Tensor, " n"]

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        some = self.columns[start:stop]
        if not bool(some.any()):  # no batch of this state held any of them
            return some.new_zeros(len(self), stop - start)
        part = self.job.block(start, stop)
        return part * some.to(part)

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        parts = self.job.by_layer(start, stop)
        return {name: part * self.columns[start:stop].to(part) for name, part in parts.items()}

    def tokens(self, examples: Sequence[int]) -> TokenScores:
        shares, rest = self.job.tokens(examples)
        some = self.columns[list(examples)].to(rest)
        return TokenScores(shares * some[:, None], rest * some)

    def scores_of(self, batch: Batch, size: int) -> Float[Tensor, "q b"]:
        raise NotOffered(
            "relabel_influence(...) needs a method that weighs all examples alike.",
            "TracIn(batches=True), which weighs each by the steps that it was in.",
            "an example that no step has seen.",
            "use TracIn(), of the same states.",
        )


@dataclass(frozen=True, eq=False)
class OfColumns(AddedScorers):
    """One scorer's scores, each column times a number: how much training used the example."""

    columns: Float[Tensor, " n"]

    @property
    def dtype(self) -> torch.dtype | None:
        return self.scorers[0].dtype

    def jobs(self, asked: Asked) -> Iterator[_OfColumns]:
        for job in self.scorers[0].jobs(asked):
            yield _OfColumns(job, self.columns)

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        return self.scorers[0].summary(records)

    def work(self, q: int, memory_bytes: int | None) -> Work:
        return self.scorers[0].work(q, memory_bytes)

    def self_influence(self) -> Float[Tensor, " n"]:
        found = self.scorers[0].self_influence()
        return found * self.columns.to(found)
