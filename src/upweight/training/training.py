"""Training: epochs over batches, from a seed, as a pure function of the data weights.

    J_B(θ, w) = (1/|B|) Σ_{i∈B} wᵢ ℓᵢ(θ) + R(θ)          in expectation over the order, J(θ, w)
    θ ← optimizer.step(θ, ∇J_B(θ, w))                     for each batch of each epoch

The order of the examples depends on the seed alone: a removed example (wᵢ = 0) leaves its place in
its batch empty, so that two runs differ by the weights and nothing else. With `skip_absent` the
others close ranks instead, as when rows are deleted from the data set: an epoch is then shorter.

With `proximity` λ the objective gains (λ/2) ‖θ − θ̂‖², which keeps a warm start near θ̂; `PBRF`
(`pbrf.py`) trains with other terms in place of wᵢ ℓᵢ.

Many models train at once where `torch.func.vmap` can run theirs: one product of matrices serves all
of them, and what a step costs besides arithmetic is paid once.
"""

import abc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from upweight._typing import Batch, Params
from upweight.errors import NotConverged, SpecError, UnsupportedModel, message
from upweight.task.data import Data
from upweight.task.lent import copied
from upweight.task.params import Layout
from upweight.task.recipe import Trained
from upweight.task.task import Task
from upweight.training.optimizers import SGD, Optimizer
from upweight.training.schedules import Constant, Schedule


class Terms(abc.ABC):
    """What each example adds to the objective, as a function of its weight."""

    @abc.abstractmethod
    def __call__(
        self, task: Task, params: Params, batch: Batch, weights: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """One value per example, whose mean is the objective without its penalties."""


@dataclass(frozen=True)
class WeightedLosses(Terms):
    """wᵢ ℓᵢ(θ)."""

    def __call__(
        self, task: Task, params: Params, batch: Batch, weights: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        return weights * task.losses(params, batch)


TOGETHER = 64
"""Models trained at once at most."""

CACHE_BYTES = 32 * 2**20
"""What their parameters, gradients and the optimizer's memory may take: with more, every step waits
for memory outside of the processor's cache."""


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
                message(
                    "Training needs at least one epoch, one example per batch and proximity ≥ 0.",
                    f"{self!r}.",
                    "0 meant as 'all', or a share of the data.",
                    "batch=len(train) is full-batch training.",
                )
            )

    def prepare(self, task: Task, train: Data) -> "TrainingTrainer":
        """The initial model, and whether many can train at once.

        Raises:
            UnsupportedModel: A layer keeps statistics of its batches while training.
            SpecError: `init` makes another model than the task's.
        """
        start = self.untrained(task)
        return trainer_for(self, start, train, task.theta(), WeightedLosses())

    def trained(self, task: Task, train: Any) -> nn.Module:
        """The task's model as this recipe trains it on all of the data: a copy, in eval mode.

        Args:
            task: Says the model, loss and penalty. Not changed.
            train: As for `as_data`.

        Raises:
            NotConverged: Its parameters became NaN or infinite.
            UpweightError: As for `prepare`.
        """
        data = task.training(train)
        found = self.prepare(task, data)(torch.ones(1, len(data)))
        if found.failures:
            raise NotConverged(
                message(
                    "Training must end in finite parameters.",
                    f"{self!r}: {found.failures[0]}.",
                    "a learning rate that is too large, or NaN in the data.",
                    "lower the learning rate.",
                ),
                found,
            )
        return task.moved_to(found.theta[0]).model.eval()

    def untrained(self, task: Task) -> Task:
        """The task with the model that training starts from.

        Raises:
            SpecError: `init` makes another model than the task's.
        """
        if self.init is None:
            return task
        with _forked():
            torch.manual_seed(self.seed)
            model = self.init()
        model = copied(model).to(task.layout.device, task.layout.dtype)
        given = dict(task.model.named_parameters())
        for name, p in model.named_parameters():
            p.requires_grad_(name not in given or given[name].requires_grad)
        made = Layout.of(model, task.params)
        if (made.names, made.shapes) != (task.layout.names, task.layout.shapes):
            raise SpecError(
                message(
                    "init must make the task's model, untrained.",
                    f"parameters {_first_difference(made, task.layout)}.",
                    "another width or depth than the trained model's.",
                    "pass the function that built it: Training(init=lambda: Net(width=128)).",
                )
            )
        with torch.no_grad():
            theirs = dict(model.named_parameters()) | dict(model.named_buffers())
            for name, value in (given | dict(task.model.named_buffers())).items():
                if name in theirs and name not in made.names:
                    theirs[name].copy_(value)
        return Task(model, task.loss, task.penalty, task.params, task.forward)


def trainer_for(
    spec: Training, start: Task, train: Data, center: Float[Tensor, " p"], terms: Terms
) -> "TrainingTrainer":
    """The trainer, and whether it can train many at once.

    Raises:
        UnsupportedModel: A layer keeps statistics of its batches while training.
    """
    _refuse_running_statistics(start.model)
    trainer = TrainingTrainer(spec, start, train, center, terms, _together(spec, start))
    if trainer.at_once > 1 and (reason := trainer.refusal()) is not None:
        return replace(trainer, at_once=1, alone_because=reason)
    return trainer


@dataclass(frozen=True, eq=False)
class TrainingTrainer:
    """w ↦ θ(w). Made by `Training.prepare`.

    Args:
        spec: The recipe.
        task: With the model as it starts.
        train: The data.
        center: θ̂, which `proximity` refers to.
        terms: What each example adds to the objective.
        at_once: How many models train together.
        alone_because: Why it is only one, if `torch.func.vmap` cannot run the model.
    """

    spec: Training
    task: Task
    train: Data
    center: Float[Tensor, " p"]
    terms: Terms
    at_once: int
    alone_because: str | None = None

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """θ(w) for each row; a row that diverged is told by name."""
        weights = weights.to(self.task.layout.device, self.task.layout.dtype)
        theta = weights.new_empty(len(weights), self.task.layout.size)
        failures: dict[int, str] = {}
        for rows in self._groups(weights):
            if self.spec.skip_absent and not bool(weights[rows[0]].any()):
                failures |= dict.fromkeys(rows.tolist(), "every example has weight 0")
                continue
            for chunk in torch.tensor_split(rows, -(-len(rows) // self.at_once)):
                theta[chunk], diverged = self._trained(weights[chunk])
                failures |= {int(chunk[k]): reason for k, reason in diverged.items()}
        return Trained(theta, theta.new_full((len(theta),), torch.nan), failures)

    def refusal(self) -> str | None:
        """Why many models cannot train at once; None if they can."""
        try:
            self._laid_out(self._stacked(2))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            # What `vmap` takes for a named tuple, such as a packed sequence, breaks in many ways.
            return str(error).splitlines()[0]
        return None

    def _groups(self, weights: Float[Tensor, "s n"]) -> Iterator[Int[Tensor, " k"]]:
        """Rows whose epochs have the same length."""
        if not self.spec.skip_absent:
            yield torch.arange(len(weights))
            return
        lengths = (weights != 0).sum(dim=1)
        for length in torch.unique(lengths).tolist():
            yield (lengths == length).nonzero()[:, 0]

    def _stacked(self, s: int) -> dict[str, Tensor]:
        start = self.task.layout.unflatten(self.task.theta())
        return {
            name: value.expand(s, *value.shape).clone().requires_grad_()
            for name, value in start.items()
        }

    def _laid_out(self, theta: Params) -> dict[str, Tensor]:
        """The same with the strides of their gradients: steps then read memory in one order."""
        s, few = len(next(iter(theta.values()))), torch.arange(min(2, len(self.train)))
        ones = self.task.theta().new_ones(s, len(few))
        if self.spec.skip_absent:  # then every model has a batch of its own
            few = few.expand(s, -1)
        with _forked():
            gradient = self._gradient(theta, few, ones, 1.0)
        return {
            name: torch.empty_like(g).copy_(p.detach()).requires_grad_()
            for (name, p), g in zip(theta.items(), gradient, strict=True)
        }

    def _trained(
        self, weights: Float[Tensor, "s n"]
    ) -> tuple[Float[Tensor, "s p"], dict[int, str]]:
        spec, s = self.spec, len(weights)
        theta = self._laid_out(self._stacked(s))
        orders = [_memory_order(p) for p in theta.values()]
        leaves = [
            p.detach().permute(order) for p, order in zip(theta.values(), orders, strict=True)
        ]
        optimizer = spec.optimizer.start(leaves)  # of the same memory
        present = weights != 0 if spec.skip_absent else torch.ones_like(weights, dtype=torch.bool)
        length = int(present[0].sum())
        share = length / len(self.train)
        steps = spec.epochs * -(-length // spec.batch)
        step, failures = 0, dict[int, str]()
        with _forked():
            torch.manual_seed(spec.seed)
            for epoch in range(spec.epochs):
                for index in torch.split(self._order(epoch, present), spec.batch, dim=-1):
                    w = weights[:, index] if index.ndim == 1 else weights.gather(1, index)
                    gradient = self._gradient(theta, index, w, share)
                    for leaf, g, order in zip(leaves, gradient, orders, strict=True):
                        leaf.grad = g.permute(order)
                    for group in optimizer.param_groups:
                        group["lr"] = spec.optimizer.lr * spec.schedule(step, steps)
                    optimizer.step()
                    step += 1
                for k in _not_finite(theta) - set(failures):
                    failures[k] = (
                        f"its parameters became NaN or infinite in epoch {epoch + 1} of "
                        f"{spec.epochs}"
                    )
        with torch.no_grad():
            return self.task.layout.flatten(theta), failures

    def _order(self, epoch: int, present: Bool[Tensor, "s n"]) -> Int[Tensor, "..."]:
        """The examples of an epoch: one order [n] for all models, or one for each [s, m].

        Those are the one order with the absent left out.
        """
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator).to(present.device)
        if bool(present.all()):
            return order
        return order.expand_as(present)[present[:, order]].reshape(len(present), -1)

    def _gradient(
        self,
        theta: Params,
        index: Int[Tensor, "..."],
        weights: Float[Tensor, "s b"],
        share: float,
    ) -> tuple[Tensor, ...]:
        """∇J_B(θ, w) of each model, by parameter, with 1/|B| times the share that is present."""
        task, layout = self.task, self.task.layout
        batch = task.to_device(self.train.take(index.flatten().cpu()))

        def objective(params: Params, batch: Batch, w: Tensor) -> Tensor:
            mean = self.terms(task, params, batch, w).mean()
            value = share * mean + task.penalty(params, layout)
            if self.spec.proximity == 0:
                return value
            away = layout.flatten(params) - self.center
            return value + 0.5 * self.spec.proximity * away.square().sum()

        if self.at_once == 1:
            one = objective({name: p[0] for name, p in theta.items()}, batch, weights[0])
            return torch.autograd.grad(one, list(theta.values()), materialize_grads=True)
        axis = None
        if index.ndim == 2:
            axis = 0
            batch = tree_map(
                lambda x: x.reshape(*index.shape, *x.shape[1:]) if isinstance(x, Tensor) else x,
                batch,
            )
        many = torch.func.vmap(objective, in_dims=(0, axis, 0), randomness="same")
        total = many(theta, batch, weights).sum()
        return torch.autograd.grad(total, list(theta.values()), materialize_grads=True)


def _memory_order(x: Tensor) -> list[int]:
    """The axes of a dense tensor as its memory runs: permuted by them, it is contiguous."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda axis: -strides[axis])


def _forked() -> AbstractContextManager[None]:
    """PyTorch's generators come back as they were: `manual_seed` seeds those of all devices."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _together(spec: Training, task: Task) -> int:
    """How many models are fastest: as many as the cache holds."""
    each = (2 + spec.optimizer.memories) * task.layout.size * task.layout.dtype.itemsize
    return max(1, min(TOGETHER, CACHE_BYTES // each))


def _not_finite(theta: Params) -> set[int]:
    found: set[int] = set()
    for p in theta.values():
        bad = ~p.detach().flatten(1).isfinite().all(dim=1)
        found |= set(bad.nonzero()[:, 0].tolist())
    return found


def _refuse_running_statistics(model: nn.Module) -> None:
    named = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module.training and getattr(module, "track_running_stats", False)
    ]
    if named:
        raise UnsupportedModel(
            message(
                "Training is a function of the data weights to θ; a layer that keeps statistics of "
                "its batches trains something besides.",
                f"{', '.join(named[:4])} in training mode.",
                "batch normalization, whose running mean and variance are no parameters.",
                "use GroupNorm or LayerNorm, freeze the statistics (init=lambda: net().eval()), or "
                "write the training loop yourself: FromFunction(train).",
            )
        )


def _first_difference(made: Layout, given: Layout) -> str:
    theirs = list(zip(made.names, made.shapes, strict=True))
    ours = list(zip(given.names, given.shapes, strict=True))
    for a, b in zip(theirs, ours, strict=False):
        if a != b:
            return f"{a[0]} {list(a[1])} where the task has {b[0]} {list(b[1])}"
    return f"{len(theirs)} in number where the task has {len(ours)}"
