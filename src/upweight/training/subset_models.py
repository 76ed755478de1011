"""Models of random subsets, or of all of the data, for methods that are fitted to them.

    θ_s = 𝒜(w_s)        w_s: a random subset of the training data; 𝒜: the recipe, of several seeds

`evaluation.check` and `subset_weights` with its default seed draw the subsets that judge. Those of
here are other ones, drawn from another seed and trained from other seeds of the recipe: what is
fitted to them may be judged by `check`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NotConverged, SpecError
from upweight.runtime.resources import Resources
from upweight.task.data import Data
from upweight.task.recipe import Recipe, Trainer
from upweight.task.task import Task
from upweight.training.function import FromFunction
from upweight.training.kept import Kept, packed_others, training_identity, unpacked_others
from upweight.training.seeds import SeveralSeeds, rows_together
from upweight.training.trainer import TrainingTrainer
from upweight.training.training import Training
from upweight.training.trajectory import Trajectory, packed, recorded_together, unpacked
from upweight.training.weights import subset_weights

JUDGES = 256
"""Subsets of the default seed that no fit uses: as many as `check` draws at most."""

SHORT = 32
"""Steps of a run up to which each state is kept: of fewer than √T, a third might have none."""

APART = 1_000
"""Seeds of the recipe from its own seed to the first one used here."""


@dataclass(frozen=True, eq=False)
class SubsetModels:
    """Trained models.

    Args:
        weights: w_s, the subsets, of mean 1.
        theta: Parameters, by the share of the training at which they were taken.
        group: Which seed of the recipe each was trained from, as 0, 1, …
        fraction: Of the data, what each was trained on.
        runs: The training of each, where it was kept; replayed to rounding.
        others: What of each is no part of θ and another than the task's, as in `Trained`. Empty
            where no model has any.
    """

    weights: Float[Tensor, "s n"]
    theta: dict[float, Float[Tensor, "s p"]]
    group: Int[Tensor, " s"]
    fraction: float
    runs: tuple[Trajectory, ...] = ()
    others: tuple[Mapping[str, Tensor], ...] = ()

    def __len__(self) -> int:
        return len(self.weights)

    def task_of(self, task: Task, k: int) -> Task:
        """The task with what of a model is no part of θ; itself where that is none."""
        return task.with_others(self.others[k]) if self.others else task

    @property
    def seeds(self) -> int:
        """From how many seeds of the recipe they were trained."""
        return int(self.group.max()) + 1

    @property
    def compared(self) -> Int[Tensor, " s"]:
        """Which are compared with each other: those of one seed; all, if each has its own."""
        return torch.zeros_like(self.group) if self.seeds == len(self) else self.group

    @property
    def trainings(self) -> float:
        """What they cost, in trainings on all of the data."""
        return len(self) * self.fraction


def subset_models(
    recipe: Recipe,
    task: Task,
    train: Data,
    subsets: int,
    fraction: float = 0.5,
    seeds: int = 1,
    *,
    at: Sequence[float] = (1.0,),
    seed: int = 1,
    runs: bool = False,
    resources: Resources | None = None,
) -> SubsetModels:
    """Train a model on each of some random subsets.

    Args:
        recipe: The learning algorithm.
        task: What is trained.
        train: On what.
        subsets: How many models.
        fraction: Of the data, what each keeps; 1 is all of it, and then seeds alone differ.
        seeds: From how many seeds of the recipe, each with as many of the subsets. A recipe
            without a field `seed` has one.
        at: Shares of the training at which parameters are taken; 1 is the end.
        seed: Of the draw of the subsets.
        runs: Whether to keep the runs, √T states of each or all of 32, for methods that look at
            training.
        resources: With a folder the models are kept in it, or the states of their runs, and a call
            that was interrupted goes on.

    Raises:
        SpecError: There are not so many subsets that judge nothing; the recipe has no seed to make
            models of all of the data differ, or does not hand out states of its training.
        StaleStore: The folder holds models of another recipe, task or training set.
        NotConverged: A model has parameters that are NaN or infinite.
        UpweightError: From the recipe.

    Cost: `subsets` trainings on `fraction` of the data each. Models that fit into the processor's
    cache train beside each other, those of several seeds too where no step draws (dropout does).
    """
    seeds = min(seeds, subsets) if has_seed(recipe) else 1
    if fraction == 1.0:
        if not has_seed(recipe):
            raise SpecError(
                "Models of all of the data differ by the seed that they are trained from.",
                f"{recipe!r}, which has none.",
                "a recipe that minimizes, or a function of its own.",
                "pass fraction=0.5 for models of random halves, or a list of models as history.",
            )
        weights, seeds = torch.ones(subsets, len(train), dtype=torch.float64), subsets
    else:
        weights = fitting_weights(len(train), subsets, fraction, seed)
    group = torch.arange(subsets) % seeds
    if runs and not isinstance(recipe, Training):
        raise SpecError(
            "A run is of a recipe that says its steps.",
            f"runs=True with {recipe!r}.",
            "a recipe that says what it ends in and nothing else.",
            "use Training(...) as the recipe, or a method that looks at one θ.",
        )
    theta = {share: task.theta().new_empty(subsets, task.layout.size) for share in at}
    kept: dict[int, Trajectory] = {}
    others: list[Mapping[str, Tensor]] = [{} for _ in range(subsets)]
    using = Resources() if resources is None else resources
    models = Kept.of(using, lambda: training_identity(recipe, task, train))
    for trainer, chunk in rows_together(
        [reseeded(recipe, k) for k in range(seeds)], task, train, group, replayed=runs
    ):
        drawn, key = weights[chunk], f"seeds {[APART + k for k in group[chunk].tolist()]}"
        if runs:
            assert isinstance(trainer, TrainingTrainer)
            for row, run in zip(chunk.tolist(), _runs(trainer, drawn, models, key), strict=True):
                kept[row] = run
                for share in at:
                    found = run.state(max(1, round(share * len(run)))).theta
                    theta[share][row] = found.to(theta[share])
            continue
        make = partial(_trained, trainer, recipe, drawn, at)
        made = models.once(f"{key} at {list(at)}", drawn, make)
        for share in at:
            theta[share][chunk] = made[str(share)].to(theta[share])
        for row, some in zip(chunk.tolist(), unpacked_others(made, len(chunk)), strict=False):
            others[row] = some
    bad = (~torch.stack([x.isfinite().all(dim=1) for x in theta.values()]).all(dim=0)).nonzero()
    if len(bad):
        raise NotConverged(
            "Every model of a subset must train to finite parameters.",
            f"{len(bad)} of {subsets} models with NaN or infinite parameters, by {recipe!r}.",
            "a learning rate at which training diverges without some of the data.",
            "lower the learning rate, or keep a larger fraction of the data.",
            solution=SubsetModels(weights, theta, group, fraction),
        )
    ran = tuple(kept[k] for k in sorted(kept))
    own_others = tuple(others) if any(others) else ()
    return SubsetModels(weights, theta, group, fraction, ran, own_others)


def _runs(
    trainer: TrainingTrainer, weights: Float[Tensor, "s n"], models: Kept, key: str
) -> list[Trajectory]:
    """The run of each row, from the states that were kept of them or by training."""
    placed = trainer.placed(weights)
    every = 1 if trainer.length(placed) <= SHORT else None

    def make() -> dict[str, Tensor]:
        found = enumerate(recorded_together(trainer, placed, every))
        return {f"{row}.{name}": x for row, states in found for name, x in packed(states).items()}

    made = models.once(f"runs of {key}", weights, make)
    each = trainer.each if isinstance(trainer, SeveralSeeds) else (trainer,) * len(weights)
    states: list[dict[str, Tensor]] = [{} for _ in each]
    for name, x in made.items():
        row, _, rest = name.partition(".")
        states[int(row)][rest] = x
    return [
        Trajectory(own, w.clone(), unpacked(own, some))
        for own, w, some in zip(each, placed, states, strict=True)
    ]


def fitting_weights(n: int, subsets: int, fraction: float, seed: int = 1) -> Float[Tensor, "s n"]:
    """Random subsets as of `subset_weights(…, renormalize=True)`, of which none judges.

    The first 256 subsets of seed 0, which `check` is made with, are left out.

    Raises:
        SpecError: There are not so many others.
    """
    kept = round(fraction * n) if 0 < fraction < 1 else 0
    possible = math.comb(n, kept) if 0 < kept < n else 0
    judging = min(JUDGES, possible)
    if possible - judging < subsets:
        raise SpecError(
            "Subsets to fit to keep some rows, not all, and are other ones than those that judge.",
            f"{subsets} subsets of {kept} of {n} rows (fraction={fraction}), of which there are "
            f"{possible} and the first {judging} are for `check`.",
            "a fraction in percent, or a data set too small for random subsets.",
            "use a fraction near 0.5; a data set of fewer than 12 examples has too few halves.",
        )
    draw = partial(subset_weights, n, fraction=fraction, renormalize=True)
    judges = {tuple(row) for row in _members(draw(judging))}
    drawn = draw(min(subsets + judging, possible), seed=seed)
    fresh = [k for k, row in enumerate(_members(drawn)) if tuple(row) not in judges]
    return drawn[fresh[:subsets]]


def _members(weights: Float[Tensor, "s n"]) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in weights]


def _trained(
    trainer: Trainer, recipe: Recipe, weights: Float[Tensor, "s n"], at: Sequence[float]
) -> dict[str, Tensor]:
    """Parameters of some models at each share of their training, and their others."""
    if list(at) == [1.0]:
        found = trainer(weights)
        if found.failures:
            row, reason = next(iter(found.failures.items()))
            raise NotConverged(
                "Every model of a subset must train.",
                f"{len(found.failures)} that did not, model {row} because {reason}.",
                "a subset on which the objective has no minimum, or a step size that diverges.",
                "loosen the recipe, or keep a larger fraction of the data.",
                solution=found,
            )
        return {str(at[0]): found.theta.cpu(), **packed_others(found.others)}
    if not isinstance(trainer, TrainingTrainer):
        raise SpecError(
            "Models on their way are handed out by a `Training`.",
            f"at={[x for x in at if x != 1.0]} with {recipe!r}.",
            "a recipe that says what it ends in and nothing else.",
            "use Training(...) as the recipe, or at=1.",
        )
    placed = trainer.placed(weights)
    placed = placed[0] if len(placed) == 1 else placed
    total = trainer.length(placed)
    steps = {share: max(1, round(share * total)) for share in at}
    states = {s.step: s.theta for s in trainer.states(placed, set(steps.values()))}
    return {str(share): states[step].reshape(len(weights), -1).cpu()
            for share, step in steps.items()}  # fmt: skip


def has_seed(recipe: Recipe) -> bool:
    """Whether it can be trained from other seeds: by a field `seed`."""
    return is_dataclass(recipe) and isinstance(getattr(recipe, "seed", None), int)


def reseeded(recipe: Recipe, k: int) -> Recipe:
    """The recipe from its k-th seed for fitting; itself where it has none."""
    return reseeded_from(recipe, APART + k)


def reseeded_from(recipe: Recipe, k: int) -> Recipe:
    """The recipe from k seeds after its own; itself where it has none."""
    if not has_seed(recipe):
        return recipe
    made: Callable[..., Recipe] = replace  # type: ignore[assignment]
    # A function is held to determinism once: from its own seed, or the first one for fitting.
    once = {"twice": False} if isinstance(recipe, FromFunction) and k not in (0, APART) else {}
    return made(recipe, seed=recipe.seed + k, **once)  # type: ignore[attr-defined]
