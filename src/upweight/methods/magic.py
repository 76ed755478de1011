"""S[q, i] = ∂m_q(θ_T(w))/∂wᵢ of training itself: metagradients by replay.

    λ_T = ∇m_q(θ_T),    λ_t = (∂ state_{t+1}/∂ state_t)ᵀ λ_{t+1}
    S[q, i] = Σ_{t: i ∈ B_t} ⟨λ_{t+1}, ∂ state_{t+1}/∂wᵢ⟩

A state is θ_t and what the optimizer remembers. Ilyas & Engstrom (2025), "MAGIC: near-optimal data
attribution for deep learning", §3; the replay is that of Engstrom et al. (2025), "Optimizing ML
training with metagradient descent", §2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.errors import DtypeError, NonFinite, NotOffered, SpecError
from upweight.gradients.source import value_source
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, Job, Scorer, Work, gradients_in_groups
from upweight.runtime.memory import require_bytes, solved_bytes, working_bytes
from upweight.runtime.progress import progress
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.identity import contents, described
from upweight.task.task import Task
from upweight.training.adjoint import back_over, goes_together
from upweight.training.record import Recorded
from upweight.training.trainer import WeightedLosses
from upweight.training.training import Training
from upweight.training.trajectory import Trajectory, recorded

TOGETHER = 64
"""Queries that share a replay. It costs as much as half a query, so that more save nothing, and a
run that writes to disk can go on from the last of them."""

APART = 1e-3
"""‖θ_T − θ̂‖/‖θ̂‖ up to which a model counts as the end of a run: another number of threads, another
version of PyTorch."""

RECORD = "history=recipe.trajectory(task, train), or history=recipe with recipe = Training(…)"


@dataclass(frozen=True)
class MAGIC(Method):
    """The derivative of training in the data weights, by going backwards through its steps.

    `fit` takes `history=`, a `Trajectory` or the `Training` that gives one. Learning rates, weight
    decay, the penalty, momentum, Adam's averages, dropout (its draws belong to the step) and a last
    short batch are all part of the derivative; nothing is assumed of θ_T.

    Args:
        curvature: What stands for ∇²J_B in the transposed step. `Hessian()` is the derivative
            itself. `GGN()` leaves out the curvature of the model: adjoints then do not grow where
            the loss is convex in the outputs and the step size is below 2 / the largest eigenvalue.

    Exact when: always, with `Hessian()`, where training is differentiable along the run; a removal
    is −S to first order. With `GGN()` where the model is linear in θ.

    Raises:
        SpecError: The curvature is another; there is no history, or it is that of another model,
            of other data, another objective or weights that are not 1.
        DtypeError: Parameters in half precision.
        UnsupportedModel: An operation has no second derivative.
        NonFinite: An adjoint became infinite, at a step that is named: training so unstable that it
            has no derivative to speak of.

    Cost: some four trainings for each 64 queries, and between one and two more for each query.
    Memory: √T states of (1 + memories) · p numbers, as many again while a segment is replayed,
    (1 + memories) · p + n numbers per query, and the activations of 16 batches.
    """

    curvature: Hessian | GGN = field(default_factory=Hessian)

    takes_history = True
    takes_run = True
    of_all_data = True
    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, Hessian | GGN):
            raise SpecError(
                "MAGIC goes back through a step with the Hessian of its batch, or with the GGN.",
                f"curvature={self.curvature!r}.",
                "a curvature of all the data at one point, a class that was not called, or a name.",
                "MAGIC() or MAGIC(GGN()).",
            )

    def prepare(self, fitting: Fitting) -> "MagicScorer":
        if fitting.theta.dtype.itemsize < 4:
            raise DtypeError(
                "Derivatives of training need parameters in float32 or float64.",
                f"{fitting.theta.dtype}.",
                "a model trained in half precision, whose rounding would go through every step.",
                "train in float32, model.float(), and fit to that.",
            )
        run, notes = _run(fitting)
        total = len(run)
        state = run.state(total - 1)
        together, more = goes_together(run.trainer, run.step(total - 1), state, self.curvature)
        return MagicScorer(self.curvature, fitting.task, fitting.data, run, together, notes + more)


@dataclass(frozen=True, eq=False)
class MagicScorer(Scorer):
    """A run of training, ready to be gone through backwards.

    Args:
        curvature: As for `MAGIC`.
        task: What was trained, as it is asked.
        train: The training data.
        run: Its steps.
        together: Whether PyTorch takes several adjoints back together.
        notes: What was found on the way.
    """

    curvature: Hessian | GGN
    task: Task
    train: Data
    run: Trajectory
    together: bool
    notes: tuple[str, ...] = ()

    def settings(self, asked: Asked) -> dict[str, int]:
        theta = self.run.theta
        state = len(self.run.states[0].tensors) * len(theta)
        each = (state + len(self.train)) * theta.element_size()
        return {
            "memory_bytes": working_bytes(theta.device, asked.memory_bytes),
            "queries_together": max(
                1, min(TOGETHER, solved_bytes(theta.device, asked.memory_bytes) // each)
            ),
        }

    def jobs(self, asked: Asked) -> Iterator["MagicJob"]:
        if asked.functional is not None:
            yield MagicJob(self, 0, asked.functional.at(self.run.theta))
            return
        assert asked.queries is not None
        together = asked.together or self.settings(asked)["queries_together"]
        task, theta, measure = self.task, self.run.theta, asked.measure
        source = value_source(
            task, theta, asked.queries, lambda p, b: measure(task, p, b), self.train
        )
        for first, (rows,) in gradients_in_groups(asked, together, lambda q: (source.rows_of(q),)):
            yield MagicJob(self, first, rows)

    has_self_influence = False

    def self_influence(self) -> Float[Tensor, " n"]:
        raise NotOffered(
            "self_influence() of MAGIC is a run backwards for every training example.",
            f"{len(self.train)} of them.",
            "a question that influence by layer answers in one pass.",
            "ask some: attribute(as_data(train).subset(range(50))) has their own scores on its "
            "diagonal.",
        )

    def health(self) -> dict[str, Any]:
        return {"steps": len(self.run), "states_kept": len(self.run.kept)}

    def work(self, q: int, memory_bytes: int | None) -> Work:
        state = sum(x.nbytes for x in self.run.states[0].tensors)
        longest = max(end - begin for begin, end in self.run.segments())
        runs = -(-q // TOGETHER)
        return Work(
            f"some {4 * runs} trainings of {self.run.recipe.epochs} epochs, one or two more for "
            f"each of {q} queries; {len(self.run.kept)} states kept and {longest} replayed, "
            f"{state * (len(self.run.kept) + longest) / 1e6:.0f} MB",
            batch=self.run.recipe.batch,
        )

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        grown = [x for x in records if x is not None]
        return ({"adjoint_growth": max(grown)} if grown else {}), ()


@dataclass(eq=False)
class MagicJob(Job):
    """Some queries. Their run backwards is made when a block is asked for, once."""

    scorer: MagicScorer
    first: int
    gradients: Float[Tensor, "q p"]

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return len(self.scorer.train)

    def __len__(self) -> int:
        return len(self.gradients)

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        return self._backwards[0][:, start:stop]

    @property
    def record(self) -> float | None:
        """max_t ‖λ_t‖/‖λ_T‖, of θ; None where nothing was left to do."""
        return self._backwards[1] if "_backwards" in vars(self) else None

    @cached_property
    def _backwards(self) -> tuple[Float[Tensor, "q n"], float]:
        scorer, run = self.scorer, self.scorer.run
        adjoint = [self.gradients.clone()]
        adjoint += [torch.zeros_like(self.gradients) for _ in run.states[0].optimizer.memories]
        scores = self.gradients.new_zeros(len(self), len(scorer.train))
        first = torch.linalg.vector_norm(self.gradients, dim=1)
        growth = 1.0
        for _, _, (step, state) in progress(_reversed(run), len(run), "steps backwards"):
            slopes = back_over(run.trainer, step, state, adjoint, scorer.curvature, scorer.together)
            scores.index_add_(1, step.indices, slopes)
            norms = torch.linalg.vector_norm(adjoint[0], dim=1)
            if not bool(norms.isfinite().all() and slopes.isfinite().all()):
                raise NonFinite(*_exploded(step.number, len(run), scorer.curvature, growth))
            growth = max(growth, float(torch.where(first > 0, norms / first, 0.0).max()))
        return scores, growth


def _reversed(run: Trajectory) -> Iterator[tuple[int, int, Any]]:
    """(t', t' + 1, (step, state)) from the last step to the first, t' counted from the end."""
    for begin, end in reversed(run.segments()):
        for step, state in reversed(list(run.replay(begin, end))):
            done = len(run) - 1 - step.number
            yield done, done + 1, (step, state)


def _exploded(
    t: int, total: int, curvature: Hessian | GGN, growth: float
) -> tuple[str, str, str, str]:
    way_out = "train with a smaller step size, larger batches or fewer steps"
    if isinstance(curvature, Hessian):
        way_out += "; MAGIC(GGN()), whose steps back do not expand below the stable step size,"
        way_out += " is often finite"
    return (
        "The derivative of training must be finite.",
        f"adjoints that are infinite or NaN before step {t} of {total}, after growing to "
        f"{growth:.1e} times ∇m.",
        "training at the edge of stability: the parameters at the end depend on the weights so "
        "strongly that their derivative says nothing, whatever the loss looks like.",
        f"{way_out}.",
    )


# -- the history ----------------------------------------------------------------------------------


def _run(fitting: Fitting) -> tuple[Trajectory, tuple[str, ...]]:
    """The run that led to the model."""
    history = fitting.history
    if isinstance(history, Training):
        trainer = history.prepare(fitting.task, fitting.data)
        size = len(trainer.start().tensors) * fitting.theta.nbytes
        total = trainer.length(fitting.theta.new_ones(len(fitting.data)))
        root = int(total**0.5) + 1
        require_bytes(
            2 * root * size,
            f"{2 * root} states of training",
            fitting.theta.device,
            "record them to a folder: recipe.trajectory(task, train).save(folder) on a machine "
            "with more memory, then history=recipe.read_trajectory(task, train, folder).",
        )
        history = recorded(trainer, None, None)
    if isinstance(history, Recorded):
        raise SpecError(
            "MAGIC is the derivative of a run of training, and takes its steps again.",
            f"a recorded run of {len(history)} steps, which says what they did and not how.",
            "a loop of your own: its model, loss and draws cannot be run again.",
            "write the loop as a recipe, uw.Training(init, optimizer, epochs, batch), and pass "
            "history=recipe; SOURCE() and TracIn() take recorded runs.",
        )
    if not isinstance(history, Trajectory) or not isinstance(history.trainer.terms, WeightedLosses):
        raise SpecError(
            "MAGIC is the derivative of a run of training, and needs its steps.",
            "no history." if history is None else f"history={type(history).__name__}.",
            "a method for the model alone, such as Influence, replaced by this one; or a recipe "
            "that is no sequence of steps (Newton, FromFunction, PBRF).",
            f"fit(task, train, history=…): {RECORD}.",
        )
    _require_same(fitting, history)
    notes = []
    if history.recipe.skip_absent:
        notes.append(
            "the recipe has skip_absent=True: its scores are derivatives in the weights, as ever, "
            "but training without an example also lets others close ranks, which they do not show"
        )
    theta, gap = fitting.theta, history.theta - fitting.theta
    if bool(gap.any()):
        notes.append(
            f"replayed training ends ‖θ_T − θ̂‖ = {float(gap.norm()):.1e} from the model, with "
            f"‖θ̂‖ = {float(theta.norm()):.1e}"
        )
    return history, tuple(notes)


def _require_same(fitting: Fitting, run: Trajectory) -> None:
    """Refuse the run of another model, other data, another objective or other weights."""
    task, trained = fitting.task, run.trainer.task
    if not bool((run.weights == 1).all()):
        raise SpecError(
            "Scores are derivatives at w = 1.",
            "a trajectory recorded with other data weights.",
            "the run of a removal or of a subset.",
            "recipe.trajectory(task, train), without w.",
        )
    if run.trainer.train is not fitting.data and contents(run.trainer.train) != contents(
        fitting.data
    ):
        raise SpecError(
            "The history must be that of the training data.",
            f"{len(run.trainer.train)} examples trained on and {len(fitting.data)} to score, which "
            "differ, or come in another order.",
            "a subset, another split, or data shuffled since.",
            f"fit to the data of the run: {RECORD}.",
        )
    for what in ("loss", "penalty", "layout"):
        ours, theirs = getattr(task, what), getattr(trained, what)
        if ours is not theirs and ours != theirs and described(ours) != described(theirs):
            raise SpecError(
                "The history must be that of the task.",
                f"a {what} {theirs!r:.80} in training, and {ours!r:.80} in the task.",
                "another Task made for the question than for the training.",
                f"one task for both: {RECORD}.",
            )
    theta = fitting.theta
    gap, size = float((run.theta - theta).norm()), float(theta.norm())
    if not gap <= APART * size:
        raise SpecError(
            "The model must be the end of its history.",
            f"a trajectory that ends ‖θ_T − θ̂‖ = {gap:.1e} from the model, with ‖θ̂‖ = {size:.1e}.",
            "another seed, recipe or number of epochs; a model trained by another program; or a "
            "recipe with init=None, which starts from the trained model.",
            "make the model with the recipe, model = recipe.trained(task, train), or from the run, "
            "task.moved_to(trajectory.theta).",
        )
