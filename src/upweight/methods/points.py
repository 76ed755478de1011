"""S[q, i] = −(1/n) Σ_k a_k ⟨P_k ∇m_q(θ_k), gᵢ(θ_k)⟩: points, a preconditioner, gradients.

PointMethod      a method of this formula says its points and its preconditioner
Identity         P = I, of gradients as they are or normalized
Inverse          P = (H + λI)⁻¹, by layer or by a solver on all of θ
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.curvature import Curvature
from upweight.curvature.layerwise import LayerwiseCurvature
from upweight.linalg.damping import Absolute, Damping, Evidence, FromTraining
from upweight.linalg.solve import Auto
from upweight.linalg.solver import Solver
from upweight.methods import dense, layered
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, Job, Scorer, TokenScores
from upweight.notation import alike
from upweight.scoring.stream import normalized, unchanged
from upweight.task.point import Point
from upweight.training.history import resolved_damping


class Preconditioner(abc.ABC):
    """P: what a query's gradient is multiplied with before it meets the training gradients."""

    goes_by_layer: bool = False
    """Whether it needs θ a layer at a time only."""

    @abc.abstractmethod
    def prepare(self, fitting: Fitting, point: Point) -> Scorer:
        """P at a point, ready for queries.

        Raises:
            UpweightError: It cannot be had for this model or these data.
        """


@dataclass(frozen=True)
class Identity(Preconditioner):
    """P = I.

    Args:
        normalize: Whether each gradient, of queries and training examples, is divided by its norm.
    """

    normalize: bool = False

    goes_by_layer = True

    def prepare(self, fitting: Fitting, point: Point) -> Scorer:
        return layered.identity(fitting, point, normalized if self.normalize else unchanged)


@dataclass(frozen=True)
class Inverse(Preconditioner):
    """P = (H + λI)⁻¹.

    A curvature by layer with `Auto()` is inverted in its own eigenbases, a layer at a time; any
    other by the solver, on all of θ as one block.

    Args:
        curvature, solver, damping, tolerance: As for `Influence`.
    """

    curvature: Curvature
    solver: Solver[Any]
    damping: Damping | float
    tolerance: float

    @property
    def goes_by_layer(self) -> bool:  # type: ignore[override]
        of_theta = isinstance(self.damping, FromTraining | Evidence)
        by_layer = isinstance(self.curvature, LayerwiseCurvature) and isinstance(self.solver, Auto)
        return by_layer and not of_theta

    def prepare(self, fitting: Fitting, point: Point) -> Scorer:
        damping = self.damping
        if isinstance(damping, FromTraining):
            damping = Absolute(resolved_damping(fitting.history, fitting.task, fitting.data))
        if isinstance(self.curvature, LayerwiseCurvature) and isinstance(self.solver, Auto):
            return layered.inverse(self.curvature, damping, self.tolerance, fitting, point)
        return dense.inverse(self.curvature, self.solver, damping, fitting, point)


class PointMethod(Method):
    """A method of the formula: where gradients are taken, and what P is there."""

    @property
    @abc.abstractmethod
    def preconditioner(self) -> Preconditioner:
        """P."""

    @property
    def goes_by_layer(self) -> bool:  # type: ignore[override]
        return type(self).points is PointMethod.points and self.preconditioner.goes_by_layer

    def points(self, fitting: Fitting) -> Sequence[Point]:
        """θ_k and a_k; θ̂ alone unless the method says otherwise."""
        return [Point(fitting.theta)]

    def prepare(self, fitting: Fitting) -> Scorer:
        scorers = tuple(self.preconditioner.prepare(fitting, p) for p in self.points(fitting))
        return scorers[0] if len(scorers) == 1 else SumOfScorers(scorers)


@dataclass(eq=False)
class SumOfJobs(Job):
    """The same queries at several points."""

    jobs: tuple[Job, ...]

    @property
    def first(self) -> int:  # type: ignore[override]
        return self.jobs[0].first

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return min(job.at_once for job in self.jobs)

    def __len__(self) -> int:
        return len(self.jobs[0])

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        parts = []
        for job in self.jobs:  # one at a time: each watches the layers of the one model
            with job:
                parts.append(job.block(start, stop))
        return torch.stack(parts).sum(dim=0)

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        parts = []
        for job in self.jobs:
            with job:
                parts.append(job.by_layer(start, stop))
        return {name: torch.stack([p[name] for p in parts]).sum(dim=0) for name in parts[0]}

    def tokens(self, examples: Sequence[int]) -> TokenScores:
        parts = [job.tokens(examples) for job in self.jobs]
        return TokenScores(*(torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)))

    @property
    def record(self) -> tuple[tuple[Any], ...]:
        return tuple((job.record,) for job in self.jobs)


@dataclass(frozen=True, eq=False)
class SeveralScorers(Scorer):
    """Scorers that answer the same question, whose answers become one.

    Args:
        scorers: One per point or model.
    """

    scorers: tuple[Scorer, ...]
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        every = [note for scorer in self.scorers for note in scorer.notes]
        object.__setattr__(self, "notes", alike(every))

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Of records that hold those of each scorer's jobs; the numbers are of the last one."""
        told: dict[str, Any] = {}
        notes: list[str] = []
        for k, scorer in enumerate(self.scorers):
            told, some = scorer.summary([each for record in records for each in record[k]])
            notes += some
        return told, alike(notes)


class AddedScorers(SeveralScorers):
    """Those whose scores are added, and so are shares of layers and self-influence."""

    @property
    def layers(self) -> tuple[str, ...]:
        return self.scorers[0].layers

    @property
    def couples_layers(self) -> bool:
        return any(scorer.couples_layers for scorer in self.scorers)

    def settings(self, asked: Asked) -> dict[str, int]:
        found = [scorer.settings(asked) for scorer in self.scorers]
        # Queries are held with every scorer at once.
        together = min(s["queries_together"] for s in found) // len(self.scorers)
        return {**found[0], "queries_together": max(1, together)}

    @property
    def has_self_influence(self) -> bool:
        return all(scorer.has_self_influence for scorer in self.scorers)

    @property
    def is_quick_of_itself(self) -> bool:
        return all(scorer.is_quick_of_itself for scorer in self.scorers)


@dataclass(frozen=True, eq=False)
class SumOfScorers(AddedScorers):
    """Σ_k of scorers that each hold their own point and weight."""

    def jobs(self, asked: Asked) -> Iterator[SumOfJobs]:
        if asked.together is None and asked.functional is None:
            # Solved queries of all points are held at once.
            asked = replace(asked, together=self.settings(asked)["queries_together"])
        for jobs in zip(*(scorer.jobs(asked) for scorer in self.scorers), strict=True):
            yield SumOfJobs(jobs)

    def health(self) -> dict[str, Any]:
        return {"points": len(self.scorers)}

    def self_influence(self) -> Float[Tensor, " n"]:
        return torch.stack([scorer.self_influence() for scorer in self.scorers]).sum(dim=0)
