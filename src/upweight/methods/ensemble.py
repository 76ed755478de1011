"""S[q, i] = (1/K) Σ_k S_k[q, i]: a method's scores, averaged over models.

A network is one draw of its training, and its scores have the noise of that draw. The mean over
models of other seeds or of random subsets ranks retrained models far better (Park et al. 2023,
"TRAK", §3.2; Bae et al. 2024, §5); their spread says how sure the mean is.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError
from upweight.methods.fitting import Fitting
from upweight.methods.members import members_given
from upweight.methods.method import Method
from upweight.methods.points import AddedScorers
from upweight.methods.scorer import Asked, Job, TokenScores, not_offered
from upweight.scores import Unit
from upweight.task.check import require_answerable
from upweight.task.measures import Functional
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.history import History
from upweight.training.subset_models import SubsetModels, subset_models


@dataclass(frozen=True)
class Ensemble(Method):
    """The mean of a method's scores over models, each with its own θ_k and m at its own θ_k.

        S[q, i] = (1/K) Σ_k S_k[q, i]       error[q, i] = sd_k(S_k[q, i]) / √K

    Which models, `fit(..., history=...)` says: a recipe, from which `members` models are trained
    with other seeds; the `SubsetModels` of `upweight.training.subset_models`; a list of models,
    state dicts or vectors θ [p] in `task.layout`; or a `Trajectory`, whose kept states after the
    first are the members. Of a method that looks at training itself (`TracIn`, `SOURCE`, `MAGIC`)
    each member has its own run: of a recipe, or a list of runs; for `MAGIC`, whose scores are
    derivatives at w = 1, of all of the data. The scores have their standard error, `scores.error`:
    of the mean over members, taken as drawn at random.

    Args:
        method: What is averaged.
        members: K, where a recipe trains them.
        fraction: Of the data, what each of these is trained on: 1 for models that differ by their
            seed, 0.5 for models of random halves, which cost half as much.
        at: The share of their training at which the members are taken; 1 is its end.

    Raises:
        SpecError: The method needs a history of its own, or a number that cannot be meant.

    Exact when: the method is, for every member: then the mean is the derivative of the mean of m
    over members.
    Cost: `members` trainings of a recipe, and fit and scores of the method once per member.
    Memory: K copies of the parameters and of what the method learns.
    """

    method: Method
    members: int = 10
    fraction: float = 1.0
    at: float = 1.0

    takes_history = True

    def __post_init__(self) -> None:
        if not (isinstance(self.method, Method) and self.method.is_of_one_model):
            raise SpecError(
                "Ensemble averages a method that looks at one model, or at the training of one.",
                f"method={self.method!r}.",
                "a class that was not called, or a method that looks at several models itself.",
                "Ensemble(Influence(EKFAC(), damping=Relative(0.1))), for instance.",
            )
        if not (self.members >= 1 and 0 < self.fraction <= 1 and 0 < self.at <= 1):
            raise SpecError(
                "An ensemble has one member or more, of a share of the data and of the training "
                "above 0 and at most 1.",
                f"members={self.members!r}, fraction={self.fraction!r}, at={self.at!r}.",
                "a share in percent.",
                "Ensemble(method, members=10, fraction=0.5).",
            )
        if self.method.of_all_data and self.fraction != 1:
            raise SpecError(
                f"{type(self.method).__name__} differentiates training on all of the data.",
                f"fraction={self.fraction!r}, models of subsets.",
                "members that are cheaper to train, or are those of a stack.",
                f"Ensemble({self.method!r}, members={self.members}), whose members differ by seed.",
            )
        if self.method.takes_run and self.at != 1:
            raise SpecError(
                "A method that looks at training is fitted where training ends.",
                f"at={self.at!r} for {self.method!r}.",
                "a time of training at which another method was better.",
                "leave at out; SOURCE(segment=0) has the early part of training.",
            )

    @property
    def unit(self) -> Unit:
        return self.method.unit

    def prepare(self, fitting: Fitting) -> "MeanScorer":
        task, history = fitting.task, fitting.history
        if isinstance(history, Recipe):
            trained = subset_models(
                history, task, fitting.data, self.members, self.fraction, self.members,
                at=(self.at,), runs=self.method.takes_run,
                resources=fitting.resources.within("subset-models"),
            )  # fmt: skip
            fittings = [self.fitting_of(fitting, trained, k) for k in range(len(trained))]
            return self.at_members(fittings, trained.trainings)
        if isinstance(history, SubsetModels):
            if self.at not in history.theta:
                raise SpecError(
                    "Members are taken at a share of training at which their states were kept.",
                    f"at={self.at:g}, and models with states at {sorted(history.theta)}.",
                    "models that were trained for another method.",
                    f"subset_models(recipe, task, train, …, at=[{self.at:g}, 1.0]).",
                )
            count = min(self.members, len(history))
            fittings = [self.fitting_of(fitting, history, k) for k in range(count)]
            return self.at_members(fittings, count * history.fraction)
        if self.method.takes_run:
            ends = [(task.moved_to(run.state(len(run)).theta), run) for run in _runs(history)]
            return self.at_members([moved(fitting, end, run) for end, run in ends])
        members = members_given(task, history)
        return self.at_members([moved(fitting, task.moved_to(*member)) for member in members])

    def fitting_of(
        self, fitting: Fitting, models: SubsetModels, k: int, *, shares: bool = False
    ) -> Fitting:
        """A fit at one of the models, with its run where the method looks at it."""
        at = models.task_of(fitting.task, k)
        if not self.method.takes_run:
            return moved(fitting, at.moved_to(models.theta[self.at][k]), shares=shares)
        if not models.runs:
            raise SpecError(
                f"{self.method!r} looks at the run of each member.",
                "models without their runs.",
                "subset_models(...), which keeps ends of training unless told otherwise.",
                "subset_models(..., runs=True), or pass history=recipe.",
            )
        run = models.runs[k]
        return moved(fitting, at.moved_to(models.theta[1.0][k]), run, shares=shares)

    def at_members(self, fittings: Sequence[Fitting], trainings: float = 0.0) -> "MeanScorer":
        """The method, prepared at each of some models, and averaged."""
        return MeanScorer(tuple(self.method.prepare(f) for f in fittings), trainings)


def moved(fitting: Fitting, task: Task, run: Any = None, *, shares: bool = False) -> Fitting:
    """A fit of the same data with another model.

    Args:
        fitting: At the model that is asked about.
        task: The same task at the other one.
        run: Its training, for a method that looks at it.
        shares: Whether several methods are about to be fitted there, which then learn a curvature
            once.
    """
    probe = require_answerable(task, fitting.data, "training data")
    learned: list[Any] | None = [] if shares else None
    # What is kept on disk is of one θ.
    resources = replace(fitting.resources, folder=None)
    return Fitting(task, fitting.data, task.theta(), probe, resources, run, learned=learned)


@dataclass(eq=False)
class _Mean(Job):
    """The same queries with every member."""

    members: tuple[tuple[Job, ...], ...]
    first: int
    size: int

    def __enter__(self) -> "_Mean":
        self._open = contextlib.ExitStack()
        for jobs in self.members:
            for job in jobs:
                self._open.enter_context(job)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def __len__(self) -> int:
        return self.size

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return min(job.at_once for jobs in self.members for job in jobs)

    def each(self, start: int, stop: int) -> Float[Tensor, "k q b"]:
        """S_k of every member."""
        return torch.stack(
            [torch.cat([job.block(start, stop) for job in jobs]) for jobs in self.members]
        )

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        return self.each(start, stop).mean(dim=0)

    def block_with_error(
        self, start: int, stop: int
    ) -> tuple[Float[Tensor, "q b"], Float[Tensor, "q b"] | None]:
        found = self.each(start, stop)
        if len(found) == 1:
            return found[0], None
        return found.mean(dim=0), found.std(dim=0) / math.sqrt(len(found))

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        total: dict[str, Tensor] = {}
        for jobs in self.members:
            parts = [job.by_layer(start, stop) for job in jobs]
            for name in parts[0]:
                share = torch.cat([part[name] for part in parts]) / len(self.members)
                total[name] = total[name] + share if name in total else share
        return total

    def tokens(self, examples: Sequence[int]) -> TokenScores:
        found = [[job.tokens(examples) for job in jobs] for jobs in self.members]
        shares, rest = (
            torch.stack([torch.cat([part[k] for part in parts]) for parts in found]).mean(dim=0)
            for k in (0, 1)
        )
        return TokenScores(shares, rest)

    @property
    def record(self) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(job.record for job in jobs) for jobs in self.members)


@dataclass(frozen=True, eq=False)
class MeanScorer(AddedScorers):
    """(1/K) Σ_k of scorers that each hold a model of their own.

    Args:
        trainings: What the models cost, in trainings on all of the data.
    """

    trainings: float = 0.0

    @property
    def dtype(self) -> torch.dtype | None:
        return self.scorers[0].dtype

    def jobs(self, asked: Asked) -> Iterator[_Mean]:
        if asked.functional is not None or isinstance(asked.measure, Functional):
            raise not_offered("A Functional", "one θ̂, of which it is a function")
        together = asked.together or self.settings(asked)["queries_together"]
        for first, queries in asked.groups(together):
            some = replace(asked, queries=queries, together=len(queries))
            yield _Mean(tuple(tuple(m.jobs(some)) for m in self.scorers), first, len(queries))

    def health(self) -> dict[str, Any]:
        return {"members": len(self.scorers), "trainings": self.trainings}

    def self_influence(self) -> Float[Tensor, " n"]:
        return torch.stack([scorer.self_influence() for scorer in self.scorers]).mean(dim=0)


def _runs(history: Any) -> list[History]:
    """The runs of members that were handed over."""
    if isinstance(history, Sequence) and history and all(isinstance(h, History) for h in history):
        return list(history)
    raise SpecError(
        "An ensemble of a method that looks at training needs the run of each member.",
        f"history={'None' if history is None else type(history).__name__}.",
        "ends of training, or one run.",
        "pass history=recipe to train them, or a list of trajectories or recorded runs.",
    )
