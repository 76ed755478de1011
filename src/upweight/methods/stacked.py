"""S[q, i] = Σ_k c_k S_k[q, i], with c fitted to retrained models of random subsets.

Stacking (Wolpert 1992; Breiman 1996) of attribution scores. `combination.py` has the regression.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, SpecError
from upweight.methods.combination import LEVEL, Combination, combine
from upweight.methods.ensemble import Ensemble
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, Job, Scorer, not_offered
from upweight.notation import alike, count, percent
from upweight.runtime.memory import require_bytes
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Functional, measured
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.history import History, as_history
from upweight.training.subset_models import SubsetModels, subset_models
from upweight.training.training import Training

FEWEST = 8
"""Subsets to fit to."""

UNLIKE = 3.0
"""Standard deviations of the subset models' measurements from their mean to that of the model,
beyond which it was trained otherwise: half of the data less, or another seed, is one or two."""

CALIBRATED = (0.5, 2.0)
"""Of the fitted factor of the sizes, between which its interval lies where sizes are supported."""

WHOLE = "all"
"""What a prediction of all layers together is called."""


@dataclass(frozen=True)
class Stacked(Method):
    """Scores of several methods, combined as retraining on random subsets says.

        S[q, i] = Σ_k c_k S_k[q, i]        c = argmin over c ≥ 0 of Σ_{s,q} (Δm − Σ_k c_k Δm_k)²

    Δm[s, q] is what retraining on subset s did to measurement q, and Δm_k = Σᵢ S_k[q, i] (w_sᵢ − 1)
    what predictor k said. The coefficients are shared by all queries of a question, so subsets ×
    queries are the evidence; they are fitted anew for every measure and the queries asked. The unit
    is ∂m/∂w whatever that of the methods; `Stacked((method,), by_layer=False)` is the calibration
    of a method, one factor with an interval.

    `fit(..., history=...)` takes a recipe, by which the subset models are trained, or the
    `SubsetModels` of `upweight.training.subset_models`, trained once for several methods. An
    `Ensemble` among the methods averages over these very models if its `fraction` is theirs; a
    model's own scores are left out where its own subset is predicted. A method that looks at
    training (`SOURCE`, `TracIn`) gets the run by which a `Training` recipe makes θ̂ again.

    Members j of an ensemble that are sure of a query have small scores for it, and a plain mean is
    of the few that are not. Here its scores are the mean of rows of one length:

        S_k[q, i] = (1/K) Σ_j (f̄_q / f_jq) S_kj[q, i]       f_jq = ‖S_kj[q, :]‖, f̄ their mean

    Args:
        methods: What is combined.
        subsets: Models of random subsets that the coefficients are fitted to.
        fraction: Of the data, what each keeps.
        seeds: Of the recipe, from which the subset models are trained: two subsets or more of each,
            about whose mean the regression is, or as many as subsets, when it is about that of all.
        by_layer: Whether each layer's share of a method's scores is a predictor of its own. Where a
            system of all layers is solved (the GGN by CG) shares of layers are none: they have one
            coefficient.

    Raises:
        SpecError: There is no method, one looks at several models itself, or there are too few
            subsets; or one looks at training, and the recipe is no `Training` that ends at θ̂.

    Exact when: the change of m is linear in w and one of the methods' scores is it, up to a factor.
    Cost: `subsets` trainings on `fraction` of the data, one on all of them where a method looks at
    training, fit and scores of every method once per member, and a forward pass of the queries per
    subset model.
    Memory: a q × n matrix per predictor and for each layer of a member, and what the fit of each
    member holds.
    """

    methods: tuple[Method, ...]
    subsets: int = 40
    fraction: float = 0.5
    seeds: int = 10
    by_layer: bool = True

    takes_history = True
    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        for method in self.methods:
            if not isinstance(method, Method) or not (
                isinstance(method, Ensemble) or method.is_of_one_model
            ):
                raise SpecError(
                    "Stacked combines methods that look at one model, and ensembles of them.",
                    f"{method!r}.",
                    "a class that was not called, or a method that looks at several models itself.",
                    "Stacked((Influence(EKFAC(), damping=Relative(0.1)), GradientDot())), for "
                    "instance.",
                )
        spread = self.subsets >= 2 * self.seeds >= 2 or self.subsets == self.seeds
        enough = spread and self.subsets >= FEWEST
        if not (self.methods and enough and 0 < self.fraction < 1):
            raise SpecError(
                f"Stacked needs a method, and {FEWEST} subsets or more of part of the data, two of "
                "each seed or each of its own.",
                f"{self!r}.",
                "an empty tuple, a fraction of 1, or some seeds with one subset alone.",
                "Stacked((method,), subsets=40, fraction=0.5, seeds=10).",
            )

    def prepare(self, fitting: Fitting) -> "StackedScorer":
        # Refused, if at all, before the subset models are trained.
        run = _run_of(fitting) if any(method.takes_run for method in self.methods) else None
        means = [m for m in self.methods if isinstance(m, Ensemble)]
        models = models_of(self, fitting, [m for m in means if m.fraction == self.fraction])
        if fitting.learned is None:
            fitting.learned = []
        places: dict[tuple[float, bool, int], Fitting] = {}
        sources, trainings = [], models.trainings
        if run is not None:
            trainings += 1.0
        for method in self.methods:
            if not isinstance(method, Ensemble):
                here = replace(fitting, history=run if method.takes_run else None)
                sources.append(Source(repr(method), (method.prepare(here),), (None,)))
            elif method.fraction == self.fraction:  # the models of the subsets are the members
                own = tuple(range(min(method.members, len(models))))
                keys = [(method.at, method.method.takes_run, k) for k in own]
                for key in keys:
                    if key not in places:
                        places[key] = method.fitting_of(fitting, models, key[-1], shares=True)
                mean = method.at_members([places[key] for key in keys])
                sources.append(Source(repr(method), mean.scorers, own))
            else:
                recipe = fitting.history
                if not isinstance(recipe, Recipe):
                    raise SpecError(
                        "Members that are not models of the subsets are trained by a recipe.",
                        f"{method!r}, and models in place of a recipe.",
                        "an Ensemble of another fraction than that of the subsets.",
                        "give the ensemble the fraction of the subsets, or pass history=recipe.",
                    )
                found = method.prepare(replace(fitting, history=recipe))
                trainings += found.trainings
                sources.append(Source(repr(method), found.scorers, (None,) * len(found.scorers)))
        return StackedScorer(
            fitting.task, fitting.data, models, tuple(sources), self.by_layer, trainings
        )


def _run_of(fitting: Fitting) -> History:
    """The run by which the recipe makes the model that is asked about.

    Raises:
        SpecError: There is no recipe that records its run, or it makes another model.
    """
    if not isinstance(fitting.history, Training):
        raise SpecError(
            "A method that looks at training gets the run of the model from a Training recipe.",
            f"history={type(fitting.history).__name__}.",
            "models that were trained before, or a function that trains.",
            "pass history=Training(…); or look at the runs of the subset models in place of the "
            "model's: Ensemble(SOURCE(3), members=10, fraction=0.5).",
        )
    return as_history(fitting.history, fitting.task, fitting.data, fitting.theta)


def models_of(spec: Any, fitting: Fitting, ensembles: Sequence[Ensemble]) -> SubsetModels:
    """The subset models of a method's history: given, or trained by a recipe.

    Args:
        spec: What says how many there are.
        fitting: With the history.
        ensembles: Whose members they are.

    Raises:
        SpecError: There is neither, or the models are not those of the spec.
    """
    history, at = fitting.history, {1.0} | {m.at for m in ensembles}
    runs = any(m.method.takes_run for m in ensembles)
    if isinstance(history, Recipe):
        return subset_models(
            history, fitting.task, fitting.data, spec.subsets, spec.fraction, spec.seeds,
            at=sorted(at), runs=runs, resources=fitting.resources.within("subset-models"),
        )  # fmt: skip
    if not isinstance(history, SubsetModels):
        raise SpecError(
            f"{type(spec).__name__} is fitted to models of random subsets.",
            f"history={'None' if history is None else type(history).__name__}.",
            "history left out, or models without the subsets they were trained on.",
            "pass history=recipe to train them, or what subset_models(recipe, …) returned.",
        )
    missing = sorted(at - set(history.theta))
    other = len(history) != spec.subsets or history.fraction != spec.fraction
    if missing or other or history.weights.shape[1] != len(fitting.data):
        raise SpecError(
            "Subset models that are given are those that the method says.",
            f"{len(history)} of {history.fraction:g} of {history.weights.shape[1]} examples, with "
            f"states at {sorted(history.theta)}, for {spec!r} on {len(fitting.data)}.",
            "models that were trained for another method.",
            f"subset_models(recipe, task, train, {spec.subsets}, {spec.fraction}, {spec.seeds}, "
            f"at={sorted(at)}).",
        )
    return history


def outcomes(models: SubsetModels, task: Task, queries: Data, measure: Any) -> Float[Tensor, "s q"]:
    """m of every query under every subset model, on the CPU in float64.

    Raises:
        NonFinite: One is NaN or infinite.
    """
    rows = [
        measured(models.task_of(task, k), theta, queries, measure)
        for k, theta in enumerate(models.theta[1.0])
    ]
    found = torch.stack(rows).cpu()
    if not bool(found.isfinite().all()):
        model, query = (~found.isfinite()).nonzero()[0].tolist()
        raise NonFinite(
            "Measurements of the subset models must be finite.",
            f"{float(found[model, query])} for query {query} with model {model}.",
            "a measure that overflows with a model of less data.",
            "leave that query out, or ask another measure.",
        )
    return found


@dataclass(frozen=True, eq=False)
class Source:
    """A method, prepared.

    Args:
        name: What it is called.
        members: The scorers whose mean its scores are.
        own: Of each, the subset that its model was trained on; None: none of them.
    """

    name: str
    members: tuple[Scorer, ...]
    own: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class StackedScorer(Scorer):
    """Predictors, and the models that say how they combine."""

    task: Task
    train: Data
    models: SubsetModels
    sources: tuple[Source, ...]
    splits: bool
    trainings: float
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        every = [note for s in self.sources for m in s.members for note in m.notes]
        object.__setattr__(self, "notes", alike(every))

    @property
    def layers(self) -> tuple[str, ...]:
        found = [source.members[0].layers for source in self.sources]
        return found[0] if self.splits and all(each == found[0] for each in found) else ()

    @property
    def dtype(self) -> torch.dtype:
        each = [m.dtype or self.task.layout.dtype for s in self.sources for m in s.members[:1]]
        found = each[0]
        for other in each[1:]:
            found = torch.promote_types(found, other)
        return found

    def health(self) -> dict[str, Any]:
        return {
            "subsets": len(self.models),
            "fraction": self.models.fraction,
            "share_dropped": 1 - self.models.fraction,
            "seeds": self.models.seeds,
            "trainings": self.trainings,
        }

    def jobs(self, asked: Asked) -> Iterator["StackedJob"]:
        if asked.queries is None or isinstance(asked.measure, Functional):
            raise not_offered("A Functional", "a measurement of each query")
        of_subsets = outcomes(self.models, self.task, asked.queries, asked.measure)
        names, places, values, predicted = self._predictors(asked)
        found = combine(predicted, of_subsets, self.models.compared)
        total: dict[str, Tensor] = {}
        for (layer, place), part in zip(places, values, strict=True):
            c = float(found.coefficients[place])
            total[layer] = total[layer].add_(part, alpha=c) if layer in total else part.mul_(c)
        apart = self._apart(asked, of_subsets)
        yield StackedJob(total, names, found, apart)

    def _apart(self, asked: Asked, of_subsets: Float[Tensor, "s q"]) -> float:
        """Median over queries of |m − mean of the subset models'| in their standard deviations."""
        assert asked.queries is not None
        own = measured(self.task, self.task.theta(), asked.queries, asked.measure).cpu()
        spread = of_subsets.std(dim=0)
        away = (own - of_subsets.mean(dim=0)).abs()[spread > 0] / spread[spread > 0]
        return float(away.median()) if len(away) else 0.0

    def _predictors(
        self, asked: Asked
    ) -> tuple[
        tuple[str, ...],
        list[tuple[str, int]],
        list[Float[Tensor, "q n"]],
        Float[Tensor, "k s q"],
    ]:
        """Of every predictor its name; by layer, whose predictor it is and its scores; and Δm_k."""
        n, q = len(self.train), len(asked)
        layers = [s.members[0].layers if self.splits else () for s in self.sources]
        names, places = list[str](), list[tuple[str, int]]()
        for source, some in zip(self.sources, layers, strict=True):
            told = (WHOLE,) if source.members[0].couples_layers or not some else some
            for k, layer in enumerate(some or (WHOLE,)):
                places.append((layer, len(names) + min(k, len(told) - 1)))
            names += [f"{source.name} {each}" for each in told]
        dtype, device = self.dtype, self.task.layout.device
        most = max(max(1, len(some)) for some in layers)
        require_bytes(
            (len(places) + most) * q * n * dtype.itemsize,
            f"{len(names)} predictors of {q} × {n} scores",
            device,
            "ask some queries at a time, or combine fewer predictors: by_layer=False.",
        )
        change = self.models.weights.to(device) - 1.0
        values = [torch.zeros(q, n, dtype=dtype, device=device) for _ in places]
        predicted = torch.zeros(len(places), len(change), q, dtype=torch.float64, device=device)
        at = 0
        for source, some in zip(self.sources, layers, strict=True):
            width = max(1, len(some))
            times = torch.full((len(change), 1), float(len(source.members)), device=device)
            lengths = torch.zeros(q, dtype=torch.float64, device=device)
            for member, own in zip(source.members, source.own, strict=True):
                heard = torch.ones(len(change), 1, dtype=torch.float64, device=device)
                if own is not None:
                    heard[own], times[own] = 0.0, times[own] - 1.0
                found = torch.zeros(width, q, n, dtype=dtype, device=device)
                said = torch.zeros(width, len(change), q, dtype=torch.float64, device=device)
                for first, start, parts in blocks(member, asked, n, bool(some)):
                    for k, part in enumerate(parts):
                        rows, columns = (
                            slice(x, x + size)
                            for x, size in zip((first, start), part.shape, strict=True)
                        )
                        found[k, rows, columns] = part
                        said[k, :, rows] = said[k, :, rows] + change[:, columns] @ part.mT.double()
                length = torch.linalg.vector_norm(found, dim=(0, 2), dtype=torch.float64)
                lengths += length / len(source.members)
                # A row of zeros stays one.
                scale = 1 / torch.where(length > 0, length, torch.inf)
                for k in range(width):
                    values[at + k] += found[k] * scale[:, None]
                predicted[at : at + width] += heard * said * scale
            for value in values[at : at + width]:
                value *= lengths[:, None] / len(source.members)
            # Where the only member is a subset's own there is nothing to predict it with.
            predicted[at : at + width] *= lengths / times.clamp_min(1.0)
            at += width
        index = torch.tensor([place for _, place in places], device=device)
        of_each = predicted.new_zeros(len(names), *predicted.shape[1:])
        return tuple(names), places, values, of_each.index_add_(0, index, predicted).cpu()

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        if not records:
            return {}, ()
        ((names, found, apart),) = records
        bounds = found.intervals.T.tolist()
        told = {
            "coefficients": {
                name: [c, *ends]
                for name, c, ends in zip(names, found.coefficients.tolist(), bounds, strict=True)
            },
            "coefficient_level": LEVEL,
            "ridge": found.strength,
            "explained": found.explained,
            "size": [found.size, *found.size_interval],
            "apart": apart,
            "against_sizes": _against_sizes(found, apart),
        }
        seeds = self.models.seeds
        note = (
            f"{count(len(names), 'predictor')} combined as {len(self.models)} models of "
            f"{percent(self.models.fraction)} of the data from {count(seeds, 'seed')} say "
            f"({self.trainings:g} trainings): they explain {percent(max(0.0, found.explained))} of "
            "how left-out models differ; sizes were fitted to random drops of "
            f"{percent(1 - self.models.fraction)}, trained on the rest alone, and for rows that "
            "are fewer or chosen they are an extrapolation"
        )
        unlike = (
            f"the model's measurements are {apart:.0f} standard deviations of the subset models' "
            "from their mean (median over queries): the recipe has other settings than the model "
            "was trained with, and the scores are of its training",
        )
        return told, (note, *(unlike if apart > UNLIKE else ()))


def _against_sizes(found: Combination, apart: float) -> str:
    """Why the sizes are not supported by the subset models that they were fitted to."""
    if apart > UNLIKE:
        return "the subset models were trained otherwise than the model"
    low, high = (end / found.size for end in found.size_interval)
    if not (low >= CALIBRATED[0] and high <= CALIBRATED[1]):
        return (
            f"from {found.size_interval[0]:.2g} to {found.size_interval[1]:.2g} is the factor that "
            f"was fitted as {found.size:.2g}"
        )
    return ""


def blocks(
    scorer: Scorer, asked: Asked, n: int, splits: bool = False, records: list[Any] | None = None
) -> Iterator[tuple[int, int, list[Float[Tensor, "q b"]]]]:
    """(first query, first example, scores) of every block, whole or by layer.

    `records` gets those of the jobs.
    """
    for job in scorer.jobs(asked):
        with job:
            for start in range(0, n, max(1, job.at_once)):
                stop = min(n, start + max(1, job.at_once))
                if splits:
                    yield job.first, start, list(job.by_layer(start, stop).values())
                else:
                    yield job.first, start, [job.block(start, stop)]
        if records is not None:
            records.append(job.record)


@dataclass(eq=False)
class StackedJob(Job):
    """All queries, with the combined scores of each layer."""

    parts: Mapping[str, Float[Tensor, "q n"]]
    names: tuple[str, ...]
    combination: Combination
    apart: float
    first: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        return torch.stack([part[:, start:stop] for part in self.parts.values()]).sum(dim=0)

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        if WHOLE in self.parts:
            return super().by_layer(start, stop)
        return {name: part[:, start:stop] for name, part in self.parts.items()}

    @property
    def record(self) -> tuple[tuple[str, ...], Combination, float]:
        return self.names, self.combination, self.apart
