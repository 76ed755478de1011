"""w ↦ θ(w) by steps, each a function of the state before it (`steps.py`) and of nothing else.

    state t + 1 = advance(step t, state t)

Many models train at once where `torch.func.vmap` can run theirs: one product of matrices serves all
of them, and what a step costs besides arithmetic is paid once.
"""

import abc
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from upweight._typing import Batch, Params
from upweight.errors import UnsupportedModel
from upweight.task.data import Data
from upweight.task.gradients import require_recording
from upweight.task.recipe import Trained
from upweight.task.task import Task
from upweight.training.optimizers import OptimizerState
from upweight.training.steps import Step, TrainingState, step_seed

TOGETHER = 64
"""Models trained at once at most."""


CACHE_BYTES = 32 * 2**20
"""What their parameters, gradients and the optimizer's memory may take: with more, every step waits
for memory outside of the processor's cache."""


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


def trainer_for(
    spec: Any, start: Task, train: Data, center: Float[Tensor, " p"], terms: Terms
) -> "TrainingTrainer":
    """The trainer, and whether it can train many at once.

    Raises:
        UnsupportedModel: A layer keeps statistics of its batches while training.
    """
    _refuse_running_statistics(start.model)
    # As many models as the cache holds are the fastest.
    numbers = (2 + len(spec.optimizer.memories)) * start.layout.size
    together = CACHE_BYTES // (numbers * start.layout.dtype.itemsize)
    at_once = max(1, min(TOGETHER, together))
    trainer = TrainingTrainer(spec, start, train, center, terms, at_once)
    if trainer.at_once > 1 and (reason := trainer.refusal()) is not None:
        return replace(trainer, at_once=1, alone_because=reason)
    return trainer


@dataclass(frozen=True, eq=False)
class TrainingTrainer:
    """w ↦ θ(w). Made by `Training.prepare`."""

    spec: Any
    task: Task
    train: Data
    center: Float[Tensor, " p"]
    terms: Terms
    at_once: int
    alone_because: str | None = None

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """θ(w) for each row; a row that diverged is named."""
        weights = self.placed(weights)
        theta = weights.new_empty(len(weights), self.task.layout.size)
        failures: dict[int, str] = {}
        for rows in self._groups(weights):
            if self.spec.skip_absent and not bool(weights[rows[0]].any()):
                failures |= dict.fromkeys(rows.tolist(), "every example has weight 0")
                continue
            for chunk in torch.tensor_split(rows, -(-len(rows) // self.at_once)):
                # One model trains by itself: so it does where a trajectory is recorded.
                some = weights[chunk[0]] if len(chunk) == 1 else weights[chunk]
                theta[chunk], diverged = self._trained(some)
                failures |= {int(chunk[k]): reason for k, reason in diverged.items()}
        return Trained(theta, theta.new_full((len(theta),), torch.nan), failures)

    def placed(self, weights: Float[Tensor, "*s n"]) -> Float[Tensor, "*s n"]:
        """Data weights as the parameters are: device and dtype."""
        return weights.to(self.task.layout.device, self.task.layout.dtype)

    def start(self, *models: int) -> TrainingState:
        """The state before the first step, of one model or of as many as said."""
        theta = self.task.theta().expand(*models, -1).clone()
        return TrainingState(theta, self.spec.optimizer.init(theta))

    def length(self, weights: Float[Tensor, "*s n"]) -> int:
        """T, the number of steps."""
        return self.spec.epochs * -(-self._present(weights)[1] // self.spec.batch)

    def steps(
        self, weights: Float[Tensor, "*s n"], begin: int = 0, end: int | None = None
    ) -> Iterator[Step]:
        """Steps begin … end − 1 of the run with these weights; None: to its end."""
        spec, total = self.spec, self.length(weights)
        present, count = self._present(weights)
        for t in range(begin, total if end is None else end):
            epoch, k = divmod(t, total // spec.epochs)
            if k == 0 or t == begin:
                order = self._order(epoch, present)
            indices = order[..., k * spec.batch : (k + 1) * spec.batch]
            w = weights[..., indices] if indices.ndim == 1 else weights.gather(1, indices)
            lr = spec.optimizer.lr * spec.schedule(t, total)
            yield Step(t, lr, indices, w, count / len(self.train), step_seed(spec.seed, t))

    def states(
        self,
        weights: Float[Tensor, "*s n"],
        wanted: Collection[int],
        begin: TrainingState | None = None,
    ) -> Iterator[TrainingState]:
        """The wanted ones of the states of the run with these weights, in order."""
        with _forked():
            run = _Run(self, begin or self.start(*weights.shape[:-1]))
        if run.steps in wanted:
            yield run.state()
        for step in self.steps(weights, run.steps, max(wanted)):
            with _forked():
                run.advance(step)
            if run.steps in wanted:
                yield run.state()

    def advance(self, step: Step, state: TrainingState) -> TrainingState:
        """The state after a step.

        Differentiable in θ_t, the optimizer's memories and the data weights of the step, where one
        of them requires a gradient: then in all of them. To the same bits as training otherwise.
        """
        with _forked():
            if torch.is_grad_enabled() and any(
                x.requires_grad for x in (*state.tensors, step.weights)
            ):
                params = self.task.layout.unflatten(state.theta)
                parts = self.gradient(step, params, create_graph=True)
                gradient = self.task.layout.flatten(dict(zip(params, parts, strict=True)))
                rule = self.spec.optimizer.step
                return TrainingState(*rule(state.theta, gradient, state.optimizer, step.lr))
            run = _Run(self, state)
            run.advance(step)
            return run.state()

    def refusal(self) -> str | None:
        """Why many models cannot train at once; None if they can."""
        try:
            with _forked():
                _Run(self, self.start(2))
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

    def _trained(
        self, weights: Float[Tensor, "*s n"]
    ) -> tuple[Float[Tensor, "*s p"], dict[int, str]]:
        epochs, failures = self.spec.epochs, dict[int, str]()
        each = self.length(weights) // epochs
        with _forked():
            run = _Run(self, self.start(*weights.shape[:-1]))
            for step in self.steps(weights):
                run.advance(step)
                epoch, k = divmod(step.number + 1, each)
                if k == 0:
                    for row in run.not_finite() - set(failures):
                        failures[row] = (
                            f"its parameters became NaN or infinite in epoch {epoch} of {epochs}"
                        )
            return run.theta(), failures

    def _present(self, weights: Float[Tensor, "*s n"]) -> tuple[Bool[Tensor, "*s n"], int]:
        """Which examples an epoch visits, and how many: as many for each model."""
        if not self.spec.skip_absent:
            return torch.ones_like(weights, dtype=torch.bool), weights.shape[-1]
        present = weights != 0
        return present, int(present.reshape(-1, weights.shape[-1])[0].sum())

    def _order(self, epoch: int, present: Bool[Tensor, "*s n"]) -> Int[Tensor, "..."]:
        """The examples of an epoch: one order [n] for all models, or one for each [s, m].

        Those are the one order with the absent left out.
        """
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator).to(present.device)
        if bool(present.all()):
            return order
        chosen = order.expand_as(present)[present[..., order]]
        return chosen.reshape(*present.shape[:-1], -1)

    def _first(self, s: int) -> Step:
        """A step of s models on few examples."""
        few = torch.arange(min(2, len(self.train)))
        ones = self.placed(torch.ones(s, len(few)))
        if self.spec.skip_absent:  # then every model has a batch of its own
            few = few.expand(s, -1)
        return Step(0, 1.0, few, ones, 1.0, 0)

    def batch(self, step: Step) -> Batch:
        """What a step reads, on the device of the parameters."""
        return self.task.to_device(self.train.take(step.indices.flatten().cpu()))

    @contextmanager
    def drawing(self, step: Step) -> Iterator[None]:
        """Draws inside are those of the step; PyTorch's generators come back as they were."""
        with _forked():
            _seed_all(step.seed, self.task.layout.device)
            yield

    def beside(self, params: Params) -> Float[Tensor, ""]:
        """What the objective has beside the examples: R(θ) and the proximity."""
        penalty = self.task.penalty(params, self.task.layout)
        if self.spec.proximity == 0:
            return penalty
        away = self.task.layout.flatten(params) - self.center
        return penalty + 0.5 * self.spec.proximity * away.square().sum()

    def gradient(
        self, step: Step, params: Params, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """∇J_B(θ, w) of each model, by parameter, with 1/|B| times the share that is present.

        Draws from PyTorch's generators, which it seeds.
        """
        require_recording()
        task, batch = self.task, self.batch(step)

        def objective(params: Params, batch: Batch, w: Tensor) -> Tensor:
            mean = self.terms(task, params, batch, w).mean()
            return step.share * mean + self.beside(params)

        _seed_all(step.seed, task.layout.device)
        with torch.enable_grad():
            if step.weights.ndim == 1:
                value = objective(params, batch, step.weights)
            else:
                axis = None
                if step.indices.ndim == 2:
                    axis, shape = 0, step.indices.shape
                    batch = tree_map(
                        lambda x: x.reshape(*shape, *x.shape[1:]) if isinstance(x, Tensor) else x,
                        batch,
                    )
                many = torch.func.vmap(objective, in_dims=(0, axis, 0), randomness="same")
                value = many(params, batch, step.weights).sum()
            return torch.autograd.grad(
                value, list(params.values()), create_graph=create_graph, materialize_grads=True
            )


class _Run:
    """Training on its way: θ by parameter and what is remembered, changed in place by a step."""

    def __init__(self, trainer: TrainingTrainer, state: TrainingState) -> None:
        layout = trainer.task.layout
        self.trainer, self.steps = trainer, state.step
        theta = layout.unflatten(state.theta.detach())
        self.models, like = 1, tuple(theta.values())
        if state.theta.ndim == 2:
            # With the strides of their gradients: steps then read memory in one order.
            self.models = len(state.theta)
            leaves = {name: x.clone().requires_grad_() for name, x in theta.items()}
            like = trainer.gradient(trainer._first(self.models), leaves)
        self.orders = [_memory_order(x) for x in like]
        self.parts = self._placed(theta)
        self.memories = {
            name: self._placed(layout.unflatten(memory.detach()))
            for name, memory in state.optimizer.memories.items()
        }
        self.params = {  # of the same memory
            name: x.detach().requires_grad_()
            for name, x in zip(theta, self._shaped(self.parts), strict=True)
        }

    def advance(self, step: Step) -> None:
        """Take a step."""
        gradient = self.trainer.gradient(step, self.params)
        grads = [g.permute(o).contiguous() for g, o in zip(gradient, self.orders, strict=True)]
        rule = self.trainer.spec.optimizer.update_
        with torch.no_grad():
            rule(self.parts, grads, self.memories, self.steps, step.lr, self.models)
        self.steps += 1

    def state(self) -> TrainingState:
        """As it now is, in memory of its own."""
        memories = {name: self._flat(parts) for name, parts in self.memories.items()}
        return TrainingState(self.theta(), OptimizerState(self.steps, memories))

    def theta(self) -> Float[Tensor, "*s p"]:
        """θ as it now is, flat."""
        return self._flat(self.parts)

    def not_finite(self) -> set[int]:
        """Models with NaN or infinite parameters."""
        rows = [x.reshape(self.models, -1) for x in self._shaped(self.parts)]
        bad = torch.stack([~x.isfinite().all(dim=1) for x in rows]).any(dim=0)
        return set(bad.nonzero()[:, 0].tolist())

    def _placed(self, params: Params) -> list[Tensor]:
        """Copies of the parameters, each contiguous with its axes in the gradient's order."""
        pairs = zip(params.values(), self.orders, strict=True)
        return [x.permute(o).clone(memory_format=torch.contiguous_format) for x, o in pairs]

    def _shaped(self, parts: list[Tensor]) -> list[Tensor]:
        """Views with the axes as the model has them."""
        pairs = zip(parts, self.orders, strict=True)
        return [x.permute([o.index(k) for k in range(len(o))]) for x, o in pairs]

    def _flat(self, parts: list[Tensor]) -> Float[Tensor, "*s p"]:
        layout = self.trainer.task.layout
        return layout.flatten(dict(zip(layout.names, self._shaped(parts), strict=True)))


def _memory_order(x: Tensor) -> list[int]:
    """The axes of a dense tensor as its memory runs: permuted by them, it is contiguous."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda axis: -strides[axis])


def _seed_all(seed: int, device: torch.device) -> None:
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _forked() -> AbstractContextManager[None]:
    """PyTorch's generators come back as they were: `manual_seed` seeds those of all devices."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _refuse_running_statistics(model: nn.Module) -> None:
    named = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module.training and getattr(module, "track_running_stats", False)
    ]
    if named:
        raise UnsupportedModel(
            "Training is a function of the data weights to θ; a layer that keeps statistics of "
            "its batches trains something besides.",
            f"{', '.join(named[:4])} in training mode.",
            "batch normalization, whose running mean and variance are no parameters.",
            "use GroupNorm or LayerNorm, freeze the statistics (init=lambda: net().eval()), or "
            "write the training loop yourself: FromFunction(train).",
        )
