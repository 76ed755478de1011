"""Which models train together: those of one seed, or one or more of each of several seeds.

    θ_s = 𝒜_{k(s)}(w_s)        𝒜_k: the recipe from seed k

Seeds differ in where training starts, in the order of the examples and in what a step draws. A step
of models of several seeds is one of `torch.func.vmap` with a batch for each model, where no step
draws anything: what is drawn would be the same for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight.task.data import Data
from upweight.task.recipe import Recipe, Trainer
from upweight.task.task import Task
from upweight.training.steps import Step, TrainingState
from upweight.training.trainer import CACHE_BYTES, TrainingTrainer

ROUNDING = 64
"""How many ε of its largest entry two gradients may be apart that are the same computation."""


@dataclass(frozen=True, eq=False)
class SeveralSeeds(TrainingTrainer):
    """w ↦ θ(w), each row by a trainer of its own; all rows have equally many examples."""

    each: tuple[TrainingTrainer, ...] = ()

    @classmethod
    def of(cls, each: Sequence[TrainingTrainer]) -> "SeveralSeeds":
        """Made by `rows_together`, which knows that they can train at once."""
        own = {f.name: getattr(each[0], f.name) for f in fields(TrainingTrainer)}
        return cls(**own, each=tuple(each))

    def start(self, *models: int) -> TrainingState:
        assert models == (len(self.each),)
        theta = torch.stack([trainer.task.theta() for trainer in self.each])
        return TrainingState(theta, self.spec.optimizer.init(theta))

    def _order(self, epoch: int, present: Bool[Tensor, "s n"]) -> Int[Tensor, "s m"]:
        rows = zip(self.each, present, strict=True)
        return torch.stack([trainer._order(epoch, some) for trainer, some in rows])

    def _first(self, s: int) -> Step:
        step = super()._first(s)
        return replace(step, indices=step.indices.expand(s, -1))


def rows_together(
    recipes: Sequence[Recipe],
    task: Task,
    train: Data,
    group: Int[Tensor, " s"],
    *,
    replayed: bool = False,
) -> Iterator[tuple[Trainer, Int[Tensor, " k"]]]:
    """Trainers, and the rows that each is to train in one call.

    Args:
        recipes: One per seed.
        task: What is trained.
        train: On what.
        group: Of which seed each row is. Where there are several, rows have equally many examples.
        replayed: Whether steps are to be taken again, one model at a time: models that draw then
            train alone, since on a GPU `vmap` draws others.
    """
    first = recipes[0].prepare(task, train)
    prepared: list[Trainer] = [first]
    size = max(1, first.at_once)
    if isinstance(first, TrainingTrainer) and size > 1:
        # Models of one seed have the same batches, unless absent examples are left out: shared
        # batches are quicker than models of other seeds beside them.
        apart = first.spec.skip_absent or (1 < len(recipes) == len(group))
        draws = _draws(first)
        if draws and replayed:
            size = 1
        elif apart:
            size = min(size, _batches_in_cache(first))
        if len(recipes) > 1 and size > 1 and apart and not draws and _is_small(first):
            trainers = [first, *(_prepared(recipe, task, train) for recipe in recipes[1:])]
            prepared = [*trainers]
            if _are_alike(trainers):
                rows = torch.arange(len(group))
                for chunk in torch.tensor_split(rows, -(-len(rows) // size)):
                    own = [trainers[k] for k in group[chunk].tolist()]
                    yield (SeveralSeeds.of(own) if len(own) > 1 else own[0]), chunk
                return
    for k, recipe in enumerate(recipes):
        trainer = prepared[k] if k < len(prepared) else recipe.prepare(task, train)
        rows = (group == k).nonzero()[:, 0]
        for chunk in torch.tensor_split(rows, -(-len(rows) // size)):
            yield trainer, chunk


def _prepared(recipe: Recipe, task: Task, train: Data) -> TrainingTrainer:
    trainer = recipe.prepare(task, train)
    assert isinstance(trainer, TrainingTrainer)
    return trainer


def _batches_in_cache(trainer: TrainingTrainer) -> int:
    """How many models may have a batch each: as many as the processor's cache holds."""
    few = torch.arange(min(trainer.spec.batch, len(trainer.train)))
    leaves = tree_leaves(trainer.train.take(few))
    held = sum(x.nbytes for x in leaves if isinstance(x, Tensor))
    return max(1, CACHE_BYTES // max(1, held))


def _is_small(trainer: TrainingTrainer) -> bool:
    """Whether a copy of the model for each seed is nothing: its frozen weights are copied too."""
    model = trainer.task.model
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return held <= CACHE_BYTES


def _one(trainer: TrainingTrainer) -> Step:
    """A step of one model on few examples."""
    step = trainer._first(1)
    return replace(step, indices=step.indices.reshape(-1), weights=step.weights[0])


def _draws(trainer: TrainingTrainer) -> bool:
    """Whether a step draws anything, as dropout does."""
    device, step = trainer.task.layout.device, _one(trainer)

    def generators() -> list[Tensor]:
        own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *own]

    with trainer.drawing(step):
        before = generators()
        trainer.gradient(step, _leaves(trainer))  # from the same seed again
        return not all(map(torch.equal, generators(), before))


def _are_alike(trainers: Sequence[TrainingTrainer]) -> bool:
    """Whether models of the seeds differ in θ alone, and train at once."""
    first = trainers[0]
    for trainer in trainers[1:]:
        params, step = _leaves(trainer), _one(trainer)
        with trainer.drawing(step):
            own, same = (each.gradient(step, params) for each in (trainer, first))
        for a, b in zip(own, same, strict=True):
            most = ROUNDING * torch.finfo(a.dtype).eps * a.abs().max()
            if not bool(((a - b).abs() <= most).all()):
                return False
    return SeveralSeeds.of(trainers[:2]).refusal() is None


def _leaves(trainer: TrainingTrainer) -> dict[str, Tensor]:
    """Where its training starts."""
    parts = trainer.task.layout.unflatten(trainer.task.theta())
    return {name: x.detach().clone().requires_grad_() for name, x in parts.items()}
