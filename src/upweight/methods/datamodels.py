"""S[q, i] = β_qi of m_q(θ(w)) ≈ a_q + Σᵢ β_qi wᵢ, fitted to models of random subsets.

Ilyas et al. (2022, "Datamodels", Eq. 3), who fit β by the lasso to up to a million models. Ridge
regression has a closed form in the subsets alone, and a prior: with scores S₀ the regression is on
what S₀ leaves unexplained, so that β = S₀ where the retrained models do not say otherwise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DataError, SpecError
from upweight.methods.combination import within
from upweight.methods.ensemble import Ensemble
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, BlockScorer, JobOf, Scorer, not_offered
from upweight.methods.stacked import Stacked, blocks, models_of, outcomes
from upweight.notation import percent
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Functional
from upweight.task.task import Task
from upweight.training.subset_models import SubsetModels

STRENGTHS = tuple(10.0**k for k in range(-10, 7))
"""Ridge penalties that are tried, in units of the mean of the diagonal of W Wᵀ."""

EXACT = 1e-20
"""Of the outcomes' square: a rest below it is rounding."""


@dataclass(frozen=True)
class Datamodels(Method):
    """Ridge regression of retrained measurements on which examples they were trained with.

        β_q = S₀_q + Wᵀ (W Wᵀ + ρI)⁻¹ r_q,      r_q = Δm_q − W S₀_q

    W [s, n] are the weights of the subsets about their mean, Δm the measurements of their models
    about theirs (both over subsets of one seed). ρ is one number for all queries of a question: the
    one with the smallest leave-one-out error of r, where every query counts by its own variance.

    Args:
        subsets: Models of random subsets, s.
        fraction: Of the data, what each keeps.
        seeds: Of the recipe, from which they are trained.
        prior: A method whose scores are S₀; it needs unit ∂m/∂w. `Stacked(...)` with the same
            subsets shares their models. None: S₀ = 0.

    Raises:
        SpecError: There are fewer than three subsets per seed, or the prior's scores are no
            derivatives.

    Exact when: m is linear in w and there are as many subsets as examples, or the prior is exact.
    Without a prior and with s < n it knows at most s directions of w: on 5 000 examples, a hundred
    subsets say next to nothing.
    Cost: `subsets` trainings on `fraction` of the data; two passes of the prior; s³ + s² q.
    """

    subsets: int = 100
    fraction: float = 0.5
    seeds: int = 1
    prior: Method | None = None

    takes_history = True
    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        if not (1 <= self.seeds and 3 * self.seeds <= self.subsets and 0 < self.fraction < 1):
            raise SpecError(
                "Datamodels are fitted to three subsets or more per seed, of part of the data.",
                f"subsets={self.subsets!r}, seeds={self.seeds!r}, fraction={self.fraction!r}.",
                "a fraction in percent, or a seed for every subset.",
                "Datamodels(subsets=100, fraction=0.5, seeds=4).",
            )
        if self.prior is not None and (
            not isinstance(self.prior, Method) or self.prior.unit is not Unit.DERIVATIVE
        ):
            raise SpecError(
                "The prior of a regression on Δm is a method whose scores are ∂m/∂w.",
                f"prior={self.prior!r}.",
                "a similarity, whose scores only rank, or a class that was not called.",
                "calibrate it first: prior=Stacked((GradientDot(),), subsets=…).",
            )

    def prepare(self, fitting: Fitting) -> "DatamodelScorer":
        prior = self.prior
        combined = prior.methods if isinstance(prior, Stacked) else ()
        models = models_of(self, fitting, [m for m in combined if isinstance(m, Ensemble)])
        scorer: Scorer = NOTHING
        if prior is not None:
            shared = isinstance(prior, Stacked) and (
                (prior.subsets, prior.fraction, prior.seeds)
                == (self.subsets, self.fraction, self.seeds)
            )
            known = models if shared else fitting.history
            scorer = prior.prepare(replace(fitting, history=known if prior.takes_history else None))
        return DatamodelScorer(fitting.task, fitting.data, models, scorer)


def _zeros(queries: Data, measure: Any, start: int, stop: int) -> Tensor:
    return torch.zeros(len(queries), stop - start, dtype=torch.float64)


NOTHING = BlockScorer(_zeros)
"""The prior where there is none."""


@dataclass(frozen=True, eq=False)
class DatamodelScorer(Scorer):
    """W, the subset models, and the prior."""

    task: Task
    train: Data
    models: SubsetModels
    prior: Scorer
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", self.prior.notes)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.prior.dtype

    def settings(self, asked: Asked) -> dict[str, int]:
        return self.prior.settings(asked)

    def health(self) -> dict[str, Any]:
        told = self.prior.health()
        return {
            **told,
            "subsets": len(self.models),
            "fraction": self.models.fraction,
            "seeds": self.models.seeds,
            "trainings": max(told.get("trainings", 0.0), self.models.trainings),
        }

    def jobs(self, asked: Asked) -> Iterator["DatamodelJob"]:
        queries = asked.queries
        if queries is None or isinstance(asked.measure, Functional):
            raise not_offered("A Functional", "a measurement of each query")
        models, n = self.models, len(self.train)
        change = within(models.weights, models.group)
        measured = outcomes(models, self.task, queries, asked.measure)
        rest = within(measured, models.group)
        size = rest.square().mean(dim=0)
        if not bool((size > 0).any()):
            raise DataError(
                "Datamodels are fitted to how models of random subsets differ.",
                "measurements that are the same for every subset.",
                "a measure of something that training does not touch.",
                "ask another measure.",
            )
        for first, start, (part,) in blocks(self.prior, asked, n):
            rows, columns = slice(first, first + len(part)), slice(start, start + part.shape[1])
            rest[:, rows] -= change[:, columns] @ part.cpu().double().mT
        dual, told = _ridge(change @ change.mT, rest, size, models.group)
        for job in self.prior.jobs(asked):
            yield DatamodelJob(job, dual[:, job.first : job.first + len(job)], change, told)

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        if not records:
            return {}, ()
        inner = [record for record, _ in records]
        told, notes = self.prior.summary(inner)
        found = records[0][1]
        note = (
            f"regressed on {len(self.models)} models of {percent(self.models.fraction)} of the "
            f"data: explains {percent(max(0.0, found['regression_explained']))} of how left-out "
            "models differ" + ("" if self.prior is NOTHING else " beyond the prior")
        )
        return {**told, **found}, (*notes, note)


@dataclass(frozen=True, eq=False)
class DatamodelJob(JobOf):
    """β of some queries: the prior's scores, and Wᵀ α."""

    dual: Float[Tensor, "s q"]
    change: Float[Tensor, "s n"]
    told: dict[str, float]

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        part = self.job.block(start, stop)
        return part + (self.dual.mT @ self.change[:, start:stop]).to(part)

    @property
    def record(self) -> tuple[Any, dict[str, float]]:
        return self.job.record, self.told


def _ridge(
    kernel: Float[Tensor, "s s"],
    rest: Float[Tensor, "s q"],
    size: Float[Tensor, " q"],
    group: Tensor,
) -> tuple[Float[Tensor, "s q"], dict[str, float]]:
    """α = (K + ρI)⁻¹ r, with ρ of the smallest leave-one-out error.

    Kernel and rest are about their means over groups, whose fit is part of what is left out:
    r − r̂ = (r − Hr) / (1 − h) with H = K (K + ρI)⁻¹ + 1/s_g within group g.
    """
    heard = size > 0
    scaled = rest[:, heard] / size[heard].sqrt()
    given = float(scaled.square().mean())
    if given <= EXACT:
        return torch.zeros_like(rest), {"regression_strength": 0.0, "regression_explained": 0.0}
    values, vectors = torch.linalg.eigh(kernel)
    values = values.clamp_min(0.0)  # of a Gram matrix: below zero is rounding
    unit = float(kernel.diagonal().mean())
    means = (group[:, None] == group).double()
    means = (means / means.sum(dim=1)).diagonal()
    inside = vectors.mT @ scaled
    found: list[tuple[float, float]] = []
    for strength in STRENGTHS:
        kept = values / (values + strength * unit)
        left = scaled - vectors @ (kept[:, None] * inside)
        share = 1.0 - means - vectors.square() @ kept
        error = left / share[:, None].clamp_min(torch.finfo(rest.dtype).eps)
        found.append((float(error.square().mean()), strength))
    # What a constant of each group leaves of the rest, each model left out of its mean.
    alone = float((scaled / (1.0 - means)[:, None]).square().mean())
    error, strength = min(found)
    dual = vectors @ ((vectors.mT @ rest) / (values + strength * unit)[:, None])
    told = {"regression_strength": strength, "regression_explained": 1.0 - error / alone}
    return dual, told
