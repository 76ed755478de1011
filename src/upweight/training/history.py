"""What a method asks of a training run, whoever recorded it, and how far each step reached.

    θ_{t+1} = θ_t − η_t · direction(∇J_B(θ_t))          t = 0 … T − 1

A `Trajectory` (of a recipe) and a `Recorded` run (of a loop of the user's own) are histories. A
recipe stands for the run that it makes, which is then trained for.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError
from upweight.task.data import Data
from upweight.task.penalties import L2, NoPenalty
from upweight.task.task import Task
from upweight.training.optimizers import SGD, AdamW, Optimizer
from upweight.training.steps import Step, TrainingState
from upweight.training.training import Training
from upweight.training.trajectory import Trajectory

MOST_APART = 1e-2
"""‖θ_T − θ̂‖/‖θ̂‖ up to which a history is taken for that of the model: another number of threads
rounds otherwise, which training amplifies."""


@runtime_checkable
class History(Protocol):
    """One run of training: its steps, and some of its states."""

    @property
    def optimizer(self) -> Optimizer:
        """The update rule."""
        ...

    @property
    def kept(self) -> tuple[int, ...]:
        """Each t of which the state is at hand, in order; T is the last."""
        ...

    def __len__(self) -> int:
        """T, the number of steps."""
        ...

    def steps(self, begin: int = 0, end: int | None = None) -> Iterator[Step]:
        """Steps begin … end − 1: batches and learning rates."""
        ...

    def state(self, t: int) -> TrainingState:
        """The state before step t, for a t that is kept; of T, the end."""
        ...


def as_history(given: Any, task: Task, train: Data, theta: Float[Tensor, " p"]) -> History:
    """A history of the model with parameters θ; a recipe is trained.

    Raises:
        SpecError: It is none, of another model or of other data, or of training that no formula
            of trajectories describes.
    """
    history = given
    if isinstance(given, Training):
        history = given.trajectory(task, train)
    if isinstance(history, Trajectory):
        _require_plain(history)
    if not isinstance(history, History):
        raise _no_history(given)
    _require_examples(history, len(train))
    end = history.state(len(history)).theta
    away = float((end.to(theta) - theta).norm()) / max(float(theta.norm()), 1e-300)
    if not away <= MOST_APART:
        raise SpecError(
            "A history must end at the parameters of the task's model.",
            f"a run whose end is away from them by {away:.2g} of their norm; the mean loss there "
            f"is {_mean_loss(task, train, end.to(theta)):.3g}, and "
            f"{_mean_loss(task, train, theta):.3g} of the model.",
            "a model that was trained on, averaged or rounded since; a recipe with another seed, "
            "or with other settings where the losses differ much; or a recipe without init=, which "
            "starts from the trained model.",
            "attribute the model that this run ended with: recipe.trained(task, train), or the "
            "one in the loop that was recorded.",
        )
    return history


def _mean_loss(task: Task, train: Data, theta: Float[Tensor, " p"]) -> float:
    """Of the first examples, to tell another seed from other settings."""
    with torch.no_grad():
        batch = task.to_device(train.batch(0, train.together(min(256, len(train)))))
        return float(task.losses(theta, batch).mean())


def trained_on(history: History) -> list[int] | None:
    """The examples that training was on, where these are not all: those with a weight."""
    if not isinstance(history, Trajectory):
        return None
    present = history.weights != 0
    return None if bool(present.all()) else present.nonzero()[:, 0].tolist()


def rates(history: History) -> Float[Tensor, " T"]:
    """How far the gradient of each step moved θ_T in all, through momentum too.

    η_t;   Σ_{s ≥ t} η_s μ^{s−t} with momentum μ, which is η/(1 − μ) but at the end

    Without the factors of `factors`.
    """
    etas = [step.lr for step in history.steps()]
    return history.optimizer.reached(torch.tensor(etas, dtype=torch.float64))


def factors(history: History) -> Float[Tensor, " T"]:
    """The mean over each step of what its losses are multiplied with: of clipping, of tokens."""
    found = [1.0 if s.factors is None else float(s.factors.mean()) for s in history.steps()]
    return torch.tensor(found, dtype=torch.float64)


def resolved_damping(given: Any, task: Task, train: Data) -> float:
    """λ = 1/(Σ_t η_t), with momentum of rates η/(1 − μ), plus the optimizer's weight decay.

    Raises:
        SpecError: There is no history, or its optimizer has no one step size.
    """
    if isinstance(given, Training):
        given.prepare(task, train)  # refuses what cannot be trained
    elif not isinstance(given, History):
        raise _no_history(given)
    optimizer = given.optimizer
    if not isinstance(optimizer, SGD):
        raise SpecError(
            "λ = 1/(step size × steps) is for training with one step size for all parameters.",
            f"training by {type(optimizer).__name__}, which has one for each.",
            "a model trained by Adam.",
            "use SOURCE(), which takes the step of each parameter; or Relative(0.1).",
        )
    if isinstance(optimizer.weight_decay, Tensor):
        raise SpecError(
            "One λ for all parameters needs one weight decay of them.",
            "a run with a weight decay for each group of parameters.",
            "no weight decay for biases.",
            "use SOURCE(), which takes the decay of each parameter; or Relative(0.1).",
        )
    found = resolved_by(given, task, len(train))
    if found is None:
        raise SpecError(
            "λ = 1/(step size × steps) needs steps that move θ.",
            "step sizes or factors of losses that are 0 at every step.",
            "a learning rate of 0.",
            "Relative(0.1), which needs no history.",
        )
    return found


def resolved_by(given: Training | History, task: Task, n: int) -> float | None:
    """λ of `resolved_damping`, for n examples; None where there is no one λ, or no step."""
    optimizer, shrunk = given.optimizer, torch.ones((), dtype=torch.float64)
    if isinstance(given, Training):
        count = given.epochs * -(-n // given.batch)
        etas = [optimizer.lr * given.schedule(t, count) for t in range(count)]
        reached = optimizer.reached(torch.tensor(etas, dtype=torch.float64))
    else:
        reached, shrunk = rates(given), factors(given)
    moved = float((reached * shrunk).sum())
    decay = optimizer.weight_decay
    if not isinstance(optimizer, SGD) or isinstance(decay, Tensor) or not moved > 0:
        return None
    # Of decay λ beside steps that were shrunk by s, η (s H + λ), there is λ/s beside H.
    counted = decay if is_penalty(given, task) else 0.0
    return (1 + float(reached.sum()) * decay) / moved - counted


def is_penalty(given: Training | History, task: Task) -> bool:
    """Whether the task's penalty is the weight decay of the optimizer, said once more.

    Of a recorded loop nobody knows what its loss had; a penalty as large as the decay is taken to
    be it. A recipe trains with both.
    """
    optimizer, penalty = given.optimizer, task.penalty
    if isinstance(given, Training | Trajectory) or isinstance(optimizer, AdamW):
        return False
    if not isinstance(penalty, L2) or not penalty.strength:
        return False
    theta = task.theta()
    entries = penalty.gradient(torch.ones_like(theta), task.layout)
    decay = torch.as_tensor(optimizer.weight_decay).to(entries).expand_as(entries)
    return torch.allclose(entries, decay, rtol=1e-6, atol=0)


def decay_notes(history: History, task: Task) -> tuple[str, ...]:
    """What is to be known where a loop has a weight decay and its task a penalty."""
    decays = torch.as_tensor(history.optimizer.weight_decay)
    if isinstance(history, Trajectory) or isinstance(task.penalty, NoPenalty) or not decays.any():
        return ()
    if is_penalty(history, task):
        return ("the task's penalty is the weight decay of the recorded optimizer: counted once",)
    return (
        "the task's penalty was counted beside the weight decay of the recorded optimizer; leave "
        "penalty= out if the loss of the loop had no such term",
    )


def unused_notes(history: History, n: int) -> tuple[str, ...]:
    """What is to be known where a loop never used some examples, and scores weigh all by 1/n."""
    if isinstance(history, Trajectory):
        return ()
    used = torch.zeros(n, dtype=torch.bool)
    for step in history.steps():
        used[step.indices] = True
    if bool(used.all()):
        return ()
    return (
        f"{n - int(used.sum())} of {n} examples are in no step of the recorded run, and are scored "
        "as if they were in one batch of each epoch; TracIn(batches=True) counts each example with "
        "its own steps",
    )


def _require_plain(history: Trajectory) -> None:
    spec, w = history.recipe, history.weights.double()
    # A subset's mean loss: weights that are all the same on it, and 1 on the average.
    present = w[w != 0]
    is_mean = torch.allclose(present, torch.full_like(present, len(w) / len(present)), rtol=1e-5)
    if not is_mean or spec.proximity or not isinstance(spec, Training):
        raise SpecError(
            "A history is of plain training on all of the data, or on the mean loss of a subset.",
            f"a trajectory of {spec!r} with data weights from {float(history.weights.min()):g} to "
            f"{float(history.weights.max()):g}.",
            "weights of a subset that are not n/(its size), or a run that is held near θ̂.",
            "record recipe.trajectory(task, train) with w= left out, or a row of "
            "subset_weights(..., renormalize=True), and proximity=0.",
        )


def _require_examples(history: History, n: int) -> None:
    largest = max((int(s.indices.max()) for s in history.steps()), default=-1)
    of = len(history.weights) if isinstance(history, Trajectory) else n
    if largest >= n or of != n:
        raise SpecError(
            f"The steps of a history are of these {n} training examples.",
            f"a step with example {largest}." if largest >= n else f"a run on {of} examples.",
            "a history of other data, or indices of a larger data set.",
            "give the data that the run trained on, in their order.",
        )


def _no_history(given: Any) -> SpecError:
    return SpecError(
        "This needs to know how the model was trained.",
        f"history={given if given is None else type(given).__name__}.",
        "a fit without history=, or with something that has no steps.",
        "fit(task, train, history=recipe) with a uw.Training; its trajectory, "
        "recipe.trajectory(task, train); or run.history(task) of a loop with uw.record(...).",
    )
