"""Training: epochs over batches, from a seed, as a pure function of the data weights.

    J_B(θ, w) = (1/|B|) Σ_{i∈B} wᵢ ℓᵢ(θ) + R(θ)          in expectation over the order, J(θ, w)
    θ ← optimizer.step(θ, ∇J_B(θ, w))                     for each batch of each epoch

The order of the examples depends on the seed alone: a removed example (wᵢ = 0) leaves its place in
its batch empty, so that two runs differ by the weights and nothing else. With `skip_absent` the
others close ranks instead, as when rows are deleted from the data set: an epoch is then shorter.

With `proximity` λ the objective gains (λ/2) ‖θ − θ̂‖², which keeps a warm start near θ̂; `PBRF`
(`pbrf.py`) trains with other terms in place of wᵢ ℓᵢ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Folder
from upweight.errors import SpecError
from upweight.task.check import require_targets
from upweight.task.data import Data
from upweight.task.lent import copied
from upweight.task.params import Layout
from upweight.task.task import Task
from upweight.training.optimizers import SGD, Optimizer
from upweight.training.schedules import Constant, Schedule
from upweight.training.trainer import TrainingTrainer, WeightedLosses, trainer_for
from upweight.training.trajectory import Trajectory, read, recorded


@dataclass(frozen=True)
class Training:
    """Mini-batch training of a model from its initialization.

    Args:
        init: Makes the untrained model, for instance the model's class. It is called with PyTorch's
            generators seeded, and trained in the mode it comes in (a new module: with dropout on).
            What is not among the task's parameters is taken from the task's model. None starts
            from the task's own parameters, in the task's own mode: a warm start.
        optimizer: The update rule.
        epochs: Passes over the data.
        batch: Examples per step; the last batch of an epoch holds what is left.
        schedule: The learning rate over the run.
        seed: Of the initialization, the order of the examples and dropout.
        skip_absent: Whether examples of weight 0 are left out of the epochs, which saves their
            cost, rather than contribute 0.
        proximity: λ of (λ/2) ‖θ − θ̂‖², with θ̂ the task's own parameters.

    Raises:
        SpecError: A number that cannot be meant.

    Cost: `epochs` forward and backward passes over the data (the examples with weights, with
    `skip_absent`) per model. Memory: 3 to 5 times the parameters of the models that train at once.
    """

    init: Callable[[], nn.Module] | None = None
    optimizer: Optimizer = field(default_factory=SGD)
    epochs: int = 10
    batch: int = 64
    schedule: Schedule = field(default_factory=Constant)
    seed: int = 0
    skip_absent: bool = False
    proximity: float = 0.0

    def __post_init__(self) -> None:
        if not (self.epochs >= 1 and self.batch >= 1 and self.proximity >= 0):
            raise SpecError(
                "Training needs at least one epoch, one example per batch and proximity ≥ 0.",
                f"{self!r}.",
                "0 meant as 'all', or a share of the data.",
                "batch=len(train) is full-batch training.",
            )

    def prepare(self, task: Task, train: Data) -> TrainingTrainer:
        """The initial model, and whether many can train at once.

        Raises:
            UnsupportedModel: A layer keeps statistics of its batches while training.
            SpecError: `init` makes another model than the task's.
            ShapeError: The targets do not fit the outputs.
            DataError: There are no examples, or targets are out of range, as far as a few examples
                say.
        """
        start = self.untrained(task)
        trainer = trainer_for(self, start, train, task.theta(), WeightedLosses())
        require_targets(start, train, "training data")  # they would be broadcast in silence
        return trainer

    def trained(self, task: Task, train: Any) -> nn.Module:
        """The task's model as this recipe trains it on all of the data: a copy, in eval mode.

        Raises:
            NotConverged: Its parameters became NaN or infinite.
            UpweightError: As for `prepare`.
        """
        found = self.trajectory(task, train, every=[])
        return task.moved_to(found.theta).model.eval()

    def trajectory(
        self,
        task: Task,
        train: Any,
        w: Float[Tensor, " n"] | None = None,
        *,
        every: int | Sequence[int] | None = None,
    ) -> Trajectory:
        """Train, and hand out the steps.

        Args:
            task: As for `trained`.
            train: As for `as_data`.
            w: The data weights; None: all 1.
            every: The states to keep: every k-th, or a list of step numbers. The first and the last
                are always kept. None: every ⌈√T⌉-th, so that any other is at most √T steps away.

        Raises:
            ShapeError: There is not one weight per example.
            SpecError: The states to keep are not of the run.
            NotConverged: The parameters became NaN or infinite.
            UpweightError: As for `prepare`.

        Cost: one training. Memory: a copy of the parameters and of what the optimizer remembers
        for each state that is kept (`Trajectory.nbytes`).
        """
        return recorded(self.prepare(task, task.training(train)), w, every)

    def read_trajectory(self, task: Task, train: Any, folder: Folder) -> Trajectory:
        """What `Trajectory.save` wrote. Its states are read when they are asked for.

        Raises:
            FileNotFoundError: There is none.
            StaleStore: It is of another recipe, task or data, or damaged.
        """
        return read(self.prepare(task, task.training(train)), folder)

    def untrained(self, task: Task) -> Task:
        """The task with the model that training starts from.

        Raises:
            SpecError: `init` makes another model than the task's.
        """
        if self.init is None:
            return task
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.seed)
            model = self.init()
        model = copied(model).to(task.layout.device, task.layout.dtype)
        given = dict(task.model.named_parameters())
        for name, p in model.named_parameters():
            p.requires_grad_(name not in given or given[name].requires_grad)
        made = Layout.of(model, task.params)
        if (made.names, made.shapes) != (task.layout.names, task.layout.shapes):
            raise SpecError(
                "init must make the task's model, untrained.",
                f"parameters {_first_difference(made, task.layout)}.",
                "another width or depth than the trained model's.",
                "pass the function that built it: Training(init=lambda: Net(width=128)).",
            )
        with torch.no_grad():
            theirs = dict(model.named_parameters()) | dict(model.named_buffers())
            for name, value in (given | dict(task.model.named_buffers())).items():
                if name in theirs and name not in made.names:
                    theirs[name].copy_(value)
        return Task(model, task.loss, task.penalty, task.params, task.forward)


def _first_difference(made: Layout, given: Layout) -> str:
    theirs = list(zip(made.names, made.shapes, strict=True))
    ours = list(zip(given.names, given.shapes, strict=True))
    for a, b in zip(theirs, ours, strict=False):
        if a != b:
            return f"{a[0]} {list(a[1])} where the task has {b[0]} {list(b[1])}"
    return f"{len(theirs)} in number where the task has {len(ours)}"
