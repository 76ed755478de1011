"""What is there to know of a task before a method is chosen; timed on a few examples."""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import SpecError, UpweightError
from upweight.front.choice import PATIENCE, Facts
from upweight.gradients.linear import linear_form
from upweight.gradients.planning import plan
from upweight.runtime.hardware import product_seconds
from upweight.runtime.memory import free_bytes
from upweight.task.check import require_answerable
from upweight.task.data import Data, batch_size
from upweight.task.losses import AbsoluteError, Bernoulli, CrossEntropy, Loss, Weighted
from upweight.task.model_loss import targets_in
from upweight.task.task import Task
from upweight.task.torch_losses import Rescaled, draws_labels
from upweight.training.function import FromFunction
from upweight.training.history import History, resolved_by
from upweight.training.seeds import rows_together
from upweight.training.subset_models import fitting_weights, reseeded
from upweight.training.trainer import TrainingTrainer
from upweight.training.training import Training

TIMED = 32
"""Examples in a timed pass, at first."""

GROWTH, SHORT = 4, 2e-3
"""So many times as many are timed next, where to read them and to pass takes so few seconds."""

STEPS = 8
"""Of training that are timed."""

BESIDE = 8
"""Models of halves that are timed together."""

SLOW = 10.0
"""Seconds past which a first training is taken as it is: one or two of it go into imports."""

SHARE = 0.5
"""Of the free memory, what a matrix and its factor may take."""

SIZE = 384
"""Of the matrices whose product is timed."""


def facts_of(
    task: Task,
    train: Data,
    queries: int,
    recipe: Any = None,
    trajectory: Any = None,
    budget_seconds: float = PATIENCE,
    memory_bytes: int | None = None,
    by_query: bool = True,
) -> Facts:
    """What `choose` asks for.

    Raises:
        UpweightError: The task cannot be answered on these data; see `upweight.task.check`.

    Cost: a plan of how gradients are obtained; some forward and backward passes over 32 examples,
    or over up to 2 048 until a pass takes 2 ms; eight steps of a recipe, and of eight models at
    once where the budget allows to train anew; and a small matrix product. Of a function, where the
    budget allows to train anew, two trainings on half of the data; one that takes more than ten
    seconds, or three of less than one together.
    """
    require_answerable(task, train, "training data")
    theta = task.theta()
    few = task.to_device(train.batch(0, min(4, len(train))))
    with torch.no_grad():
        outputs, targets = task.call(theta, few)
    free = free_bytes(task.layout.device) if memory_bytes is None else memory_bytes
    epoch = epoch_seconds(task, theta, train)
    is_linear = linear_form(task, theta, few) is not None
    # A trajectory of ours knows the recipe that it is of; a recorded loop has none.
    known = recipe if recipe is not None else getattr(trajectory, "recipe", None)
    again = known if _trains_anew(known) else None
    full, half, refused = 0.0, 0.0, ""
    try:
        if again is not None:
            full = training_seconds(again, task, train)
            half = full / 2 if again.skip_absent else full
            if by_query and budget_seconds > PATIENCE:
                half = min(half, beside_others(again, task, train))
        elif isinstance(known, FromFunction) and by_query and budget_seconds > PATIENCE:
            half = half_seconds(known, task, train)
    except UpweightError as error:
        full = half = math.inf
        refused = str(error).partition("\n")[0]
    return Facts(
        parameters=task.layout.size,
        outputs=outputs[0].numel(),
        examples=len(train),
        queries=queries,
        linear=is_linear,
        convex=task.loss.convex,
        curved=not isinstance(_base(task.loss), AbsoluteError),
        likelihood=draws_labels(task.loss),
        epoch_seconds=epoch,
        slower=1.0 if is_linear else slower(task, theta, train, epoch),
        products_per_second=_products_per_second(),
        memory_bytes=int(SHARE * free),
        budget_seconds=budget_seconds,
        recipe=again is not None,
        function=isinstance(known, FromFunction),
        trajectory=trajectory is not None,
        training_seconds=full,
        half_seconds=half,
        layers=len({name.rpartition(".")[0] for name in task.layout.names}),
        labels=_labels(task.loss, outputs, targets),
        directions=_directions(task),
        by_query=by_query,
        refused=refused,
        resolved=resolved(known if trajectory is None else trajectory, task, len(train)),
    )


def _trains_anew(recipe: Any) -> TypeGuard[Training]:
    """Whether a recipe says how to get from an initialization to the model."""
    return isinstance(recipe, Training) and recipe.init is not None and recipe.proximity == 0


def training_seconds(recipe: Training, task: Task, train: Data) -> float:
    """Of one training, from some steps of it.

    Raises:
        UpweightError: The recipe cannot train this model.
    """
    return _run_seconds(recipe.prepare(task, train), torch.ones(len(train)))


def beside_others(recipe: Training, task: Task, train: Data) -> float:
    """Of one of several trainings on halves, each of a seed of its own, that go on at once.

    Infinite where they go on one after the other, or there are not so many halves.
    """
    try:
        halves = fitting_weights(len(train), BESIDE, 0.5)
    except SpecError:  # said by the method that needs them
        return math.inf
    recipes, rows = [reseeded(recipe, k) for k in range(BESIDE)], torch.arange(BESIDE)
    trainer, together = next(rows_together(recipes, task, train, rows))
    if len(together) == 1 or not isinstance(trainer, TrainingTrainer):
        return math.inf
    try:
        return _run_seconds(trainer, halves[together]) / len(together)
    except RuntimeError:  # no memory for so many
        return math.inf


def _run_seconds(trainer: TrainingTrainer, weights: Float[Tensor, "*s n"]) -> float:
    """Of all steps, from some of them."""
    weights = trainer.placed(weights)
    total = trainer.length(weights)
    ends = [time.perf_counter()]
    for _ in trainer.states(weights, range(1, min(STEPS, total) + 1)):
        ends.append(time.perf_counter())
    return total * statistics.median(b - a for a, b in itertools.pairwise(ends))


def half_seconds(recipe: FromFunction, task: Task, train: Data) -> float:
    """Of one training on half of the data by a function, which is made to know.

    Raises:
        UpweightError: It is not the task's model that comes back, or there are too few halves.
    """
    trainer = replace(recipe, twice=False).prepare(task, train)
    half = fitting_weights(len(train), 1, 0.5)
    return least_seconds(lambda: trainer(half), SLOW)


def resolved(training: Any, task: Task, n: int) -> float | None:
    """λ of `FromTraining()`, where training by SGD is known; None for any other.

    Gradient descent from 0 on an eigenvalue h goes about 1 − exp(−h/λ) of the way: below λ it
    resolves nothing.

    Args:
        training: A recipe, or a history of its steps.
        task: What was trained.
        n: Training examples.
    """
    known = _trains_anew(training) or isinstance(training, History)
    return resolved_by(training, task, n) if known else None


def epoch_seconds(task: Task, theta: Tensor, train: Data) -> float:
    """A plain forward and backward pass over the training data, from a few of them.

    From more of them where these take next to nothing: passes over the data take many at once, and
    of a few most of the time is what a call costs.
    """
    m = min(TIMED, len(train))
    most = min(len(train), batch_size(task.layout.size, theta.element_size()))
    while True:
        started = time.perf_counter()
        batch = task.to_device(train.batch(0, m))
        read = time.perf_counter() - started
        seconds = least_seconds(partial(_passed, task, theta, batch))
        if max(read, seconds) > SHORT or m >= most:
            return seconds * len(train) / m
        m = min(GROWTH * m, most)


def slower(task: Task, theta: Tensor, train: Data, epoch: float) -> float:
    """What a pass takes that forms gradients of examples one at a time, in plain epochs; else 1.

    A recurrent network has no gradients of several examples in one pass.
    """
    try:
        if not plan(task, theta, train).one_by_one:
            return 1.0
    except UpweightError:  # said by the method that needs the plan
        return 1.0
    one = task.to_device(train.batch(0, 1))
    return max(1.0, least_seconds(partial(_passed, task, theta, one)) * len(train) / epoch)


def _passed(task: Task, theta: Tensor, batch: Batch) -> None:
    point = theta.detach().requires_grad_()
    with torch.enable_grad():
        losses = task.losses_of(*task.call(point, batch))
        float(torch.autograd.grad(losses.sum(), point)[0].norm())


def least_seconds(call: Callable[[], Any], alone: float = 1.0) -> float:
    """Of one call, the least of three; of two, where these take more than a second.

    Of one where it takes more seconds than `alone`.
    """
    taken = list[float]()
    while len(taken) < 3 and sum(taken) <= (alone if len(taken) == 1 else 1.0):  # the first is slow
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _products_per_second() -> float:
    """Multiply-adds of float64 on this machine's processor."""
    a = torch.ones(SIZE, SIZE, dtype=torch.float64)
    taken = min(product_seconds(a) for _ in range(4))  # others may be at work on the machine
    return SIZE**3 / max(taken, 1e-6)


def _labels(loss: Loss, outputs: Tensor, targets: Any) -> float | None:
    """Of an example, by the first few; None where their loss is no −log p of classes."""
    base = _base(loss)
    if not isinstance(base, CrossEntropy | Bernoulli):
        return None
    scale = loss.scale(outputs) if isinstance(loss, Rescaled) else 1.0
    return scale * targets_in(base, targets) / len(outputs)


def _directions(task: Task) -> float:
    """Of the widest side of a chosen weight; infinite with experts."""
    if any(name.rpartition(".")[2] == "experts" for name, _ in task.model.named_modules()):
        return math.inf  # some of them may see few examples
    chosen = task.layout.names
    shapes = [p.shape for name, p in task.model.named_parameters() if name in chosen]
    sides = (max(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1)
    return float(max(sides, default=1))


def _base(loss: Loss) -> Loss:
    return _base(loss.base) if isinstance(loss, Weighted | Rescaled) else loss
