"""What does training again without an example do? Scores of models that were really trained.

LeaveOneOut             S[q, i] = m_q(all) − m_q(without i)
SubsampledInfluence     S[q, i] = E[m_q | i in the subset] − E[m_q | i not in it]

Both need a recipe and nothing of the model: neither gradients nor parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NotConverged, NotOffered, SpecError
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, Job, Known, Scorer, not_offered
from upweight.notation import percent
from upweight.runtime.memory import solved_bytes
from upweight.runtime.progress import progress
from upweight.scores import Unit
from upweight.task.measures import Functional, as_measure
from upweight.task.recipe import Recipe, Trained
from upweight.task.task import Task
from upweight.training.kept import Kept, training_identity
from upweight.training.seeds import rows_together
from upweight.training.subset_models import fitting_weights, has_seed, reseeded_from

FEWER = "fewer queries at a time, or SubsampledInfluence(subsets=100)."

FEWEST = 8
"""Subsets, of which about half hold an example: a variance over fewer than 4 says nothing."""


@dataclass(frozen=True)
class LeaveOneOut(Method):
    """One training without each example.

        S[q, i] = (1/K) Σ_k m_q(θ_k) − m_q(θ_k without i)         k: seeds of the recipe

    A difference quotient over a weight that goes from 1 to 0, where the derivative is of a small
    change of it: `scores.removal()` gives back what the trainings measured. With several seeds each
    score has the standard error of the mean of K differences, sd_k/√K; model and removal are
    trained from the same seed.

    Args:
        seeds: Of the recipe, from which each model is trained, beginning with its own. A recipe
            without a field `seed` has one.

    Needs: `history=recipe`.

    Raises:
        SpecError: There is no recipe, or more models than memory holds.
        NotConverged: The recipe did not train without some example.

    Exact: always, for the recipe, where training repeats itself. Known failure: noise of training
    that is larger than what one example does; then the errors say so.
    Cost: (n + 1) K trainings; all θ are held. With `Resources(folder=…)` they are kept on disk, and
    what was interrupted goes on.
    """

    seeds: int = 1

    takes_history = True
    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise SpecError(
                "Each example is left out from one seed or more.",
                f"seeds={self.seeds!r}.",
                "a budget that was rounded down to nothing.",
                "LeaveOneOut(seeds=1).",
            )

    def prepare(self, fitting: Fitting) -> Scorer:
        recipe, n = recipe_of(self, fitting), len(fitting.data)
        seeds = self.seeds if has_seed(recipe) else 1
        weights = torch.ones(n + 1, n, dtype=torch.float64)
        weights[1:].fill_diagonal_(0.0)
        require_room(self, fitting, (n + 1) * seeds, FEWER)
        kept = _kept(recipe, fitting)
        runs = []
        for k in range(seeds):
            own = [reseeded_from(recipe, k)]
            runs.append(_trained(own, fitting, weights, f"refits, seed {k}", kept, first=k))
        return _RefitScorer(self, fitting.task, runs, weights[1:], n * seeds, has_seed(recipe))


@dataclass(frozen=True)
class SubsampledInfluence(Method):
    """Trainings on random subsets: what having an example changes, beside others that come and go.

        S[q, i] = mean of m_q over subsets with i − mean over those without i

    The influence estimate of Feldman & Zhang (2020, Eq. 3), for any measure. Its expectation is the
    mean effect of adding i to a random subset of about `fraction` of the others, with fraction =
    1/2 nearly the Banzhaf value (Wang & Jia 2023): smaller data sets than the whole, in which an
    example counts for more. The standard error is that of two means, √(v_in/s_in + v_out/s_out);
    with s subsets and n examples of about equal effect it is √(n/s) times a typical score.

    Args:
        subsets: Models, s, each from a seed of its own where the recipe has a field `seed`.
        fraction: Of the data, what each keeps.

    Needs: `history=recipe`.

    Raises:
        SpecError: There is no recipe, there are fewer than 8 subsets, an example is in fewer than 2
            of them or missing from fewer than 2, or memory does not hold the models.
        NotConverged: The recipe did not train on some subset.

    Exact: in expectation. Known failure: fewer subsets than examples rank little but the strongest.
    Cost: s trainings on `fraction` of the data; all θ are held, with `Resources(folder=…)` on disk.
    """

    subsets: int = 100
    fraction: float = 0.5

    takes_history = True
    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        if self.subsets < FEWEST or not 0 < self.fraction < 1:
            raise SpecError(
                f"Influence is subsampled over {FEWEST} subsets or more, of part of the data.",
                f"subsets={self.subsets!r}, fraction={self.fraction!r}.",
                "a fraction in percent, or a budget of a few trainings.",
                "SubsampledInfluence(subsets=100, fraction=0.5).",
            )

    def prepare(self, fitting: Fitting) -> Scorer:
        recipe, n = recipe_of(self, fitting), len(fitting.data)
        require_room(self, fitting, self.subsets, FEWER)
        weights = fitting_weights(n, self.subsets, self.fraction)
        held = (weights > 0).sum(dim=0)
        few = ((held < 2) | (self.subsets - held < 2)).nonzero()[:, 0].tolist()
        if few:
            raise SpecError(
                "Each example must be in 2 subsets and missing from 2, for a standard error.",
                f"{self!r}, where {len(few)} of {n} examples are not (first {few[:5]}).",
                "few subsets, or a fraction near 0 or 1.",
                "more subsets, with fraction=0.5.",
            )
        kept = _kept(recipe, fitting)
        is_seeded = has_seed(recipe)
        recipes = [reseeded_from(recipe, k) for k in range(self.subsets if is_seeded else 1)]
        models = _trained(recipes, fitting, weights, "refits", kept)
        return _RefitScorer(self, fitting.task, [models], weights, self.subsets, is_seeded)


@dataclass(frozen=True, eq=False)
class _RefitScorer(Scorer):
    """Models of each seed: for leave-one-out that of all of the data first."""

    spec: LeaveOneOut | SubsampledInfluence
    task: Task
    runs: Sequence[Trained]
    weights: Float[Tensor, "s n"]
    trainings: int
    is_seeded: bool

    by_refits = True

    def health(self) -> dict[str, Any]:
        return {"trainings": self.trainings}

    has_self_influence = False

    def self_influence(self) -> Float[Tensor, " n"]:
        raise NotOffered(
            "self_influence() needs scores that are sums over parameters.",
            f"{type(self.spec).__name__}, whose scores are differences between trained models.",
            "a question of influence functions, asked of another kind of method.",
            "ask with the training rows as queries: the diagonal of attribute(model, train, "
            "train).values is S[i, i].",
        )

    def jobs(self, asked: Asked) -> Iterator[Job]:
        queries, measure = asked.queries, asked.measure
        if isinstance(measure, Functional) or queries is None:
            raise not_offered("A Functional", "a measurement of each query")
        of = as_measure(measure)
        values = torch.stack([run.measured(self.task, queries, of) for run in self.runs])  # [k r q]
        dtype = self.runs[0].theta.dtype
        is_alone = isinstance(self.spec, LeaveOneOut)
        found, error = left_out(values) if is_alone else subsampled(values[0], self.weights > 0)
        yield _RefitJob(found.to(dtype), errors=None if error is None else error.to(dtype))

    def summary(self, records: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
        pairs = [record for record in records if record is not None]
        spec, found = self.spec, self.trainings
        if isinstance(spec, LeaveOneOut):
            said = f"each score is the effect of one removal, measured over {found} trainings"
            alone = "they are of one seed, and how much of them is training noise is not known"
            told = {"against_sizes": alone if self.is_seeded and len(self.runs) == 1 else ""}
        else:
            share = percent(spec.fraction)
            told = {"against_sizes": f"they are of removals from {share} of the data"}
            said = (
                f"each score is a mean over {found} trainings on random "
                f"{percent(spec.fraction)} of the data"
            )
        if not pairs:
            return told, (f"{said}; of one seed, without standard errors",)
        clear, of = (sum(each) for each in zip(*pairs, strict=True))
        said += f"; {clear:,} of {of:,} exceed two standard errors, where 5 % would by chance"
        return {**told, "share_beyond_two_errors": clear / of}, (said,)


@dataclass(frozen=True, eq=False)
class _RefitJob(Known):
    errors: Float[Tensor, "q n"] | None = None

    def block_with_error(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        error = None if self.errors is None else self.errors[:, start:stop]
        return self.values[:, start:stop], error

    @property
    def record(self) -> tuple[int, int] | None:
        """Scores beyond two standard errors, of how many."""
        if self.errors is None:
            return None
        return int((self.values.abs() > 2 * self.errors).sum()), self.values.numel()


def left_out(
    values: Float[Tensor, "k n_1 q"],
) -> tuple[Float[Tensor, "q n"], Float[Tensor, "q n"] | None]:
    """S and its standard error from measurements of the whole, then without each example."""
    differences = (values[:, :1] - values[:, 1:]).transpose(1, 2)
    seeds = len(values)
    error = None if seeds == 1 else differences.std(dim=0) / seeds**0.5
    return differences.mean(dim=0), error


def subsampled(
    values: Float[Tensor, "s q"], inside: Int[Tensor, "s n"]
) -> tuple[Float[Tensor, "q n"], Float[Tensor, "q n"]]:
    """Mean with i − mean without i, and the standard error of two means of unequal variance."""
    centred = values - values.mean(dim=0)  # so that squares do not cancel
    means, variances = [], []
    for member in (inside, ~inside):
        w = member.to(values)
        count = w.sum(dim=0)
        mean = centred.T @ w / count
        squares = centred.square().T @ w / count
        means.append(mean)
        # Of values that are all alike the difference is rounding, on either side of 0.
        variances.append((squares - mean.square()).clamp_min(0.0) / (count - 1))
    return means[0] - means[1], (variances[0] + variances[1]).sqrt()


def recipe_of(spec: Method, fitting: Fitting) -> Recipe:
    """The recipe by which a method trains again; a SpecError where there is none."""
    if isinstance(fitting.history, Recipe):
        return fitting.history
    name = type(spec).__name__
    raise SpecError(
        f"{name} trains again, by a recipe.",
        f"history={type(fitting.history).__name__}.",
        "a fit without history=, or one with a trajectory or models.",
        f"uw.attribute(…, method=uw.{name}(), recipe=recipe), as uw.training.Newton() or "
        "uw.Training(...); an estimator of scikit-learn has its own.",
    )


def require_room(spec: Method, fitting: Fitting, models: int, way_out: str) -> None:
    """Refuse, by a SpecError, more models than memory holds."""
    needed = models * len(fitting.theta) * fitting.theta.element_size()
    room = solved_bytes(torch.device("cpu"), fitting.resources.memory_bytes)
    if needed > room:
        raise SpecError(
            f"{type(spec).__name__} holds every model that it trains.",
            f"{models} models of {len(fitting.theta)} numbers, {needed:,} bytes, where "
            f"{room:,} are free for them.",
            "many examples, each of which takes a model; or many queries of an estimator.",
            way_out,
        )


def _kept(recipe: Recipe, fitting: Fitting) -> Kept:
    """The models that were trained before, in a folder of the resources."""
    task, data = fitting.task, fitting.data
    resources = fitting.resources.within("refits")
    return Kept.of(resources, lambda: training_identity(recipe, task, data))


def _trained(
    recipes: Sequence[Recipe], fitting: Fitting, weights: Float[Tensor, "r n"], what: str,
    kept: Kept, *, first: int = 0,
) -> Trained:  # fmt: skip
    """The model of each row of weights: of its own recipe, or all of one, whose seed is `first`."""
    group = torch.arange(len(weights)) if len(recipes) > 1 else torch.zeros(len(weights)).long()
    chunks = (
        (int(rows[0]), int(rows[-1]) + 1, trainer)
        for trainer, rows in rows_together(recipes, fitting.task, fitting.data, group)
    )
    parts: list[Trained] = []
    for start, stop, trainer in progress(chunks, len(weights), what):
        key = f"seeds {sorted({first + k for k in group[start:stop].tolist()})}"
        found = kept.trainer(trainer, fitting.task, key)(weights[start:stop])
        if found.failures:
            row, reason = next(iter(found.failures.items()))
            gone = (weights[start + row] == 0).nonzero()[:, 0].tolist()
            raise NotConverged(
                "Every model must train without the examples that are left out.",
                f"without {gone[:5]}{'…' if len(gone) > 5 else ''} it did not: {reason}.",
                "a class with few examples, or a subset on which the objective has no minimum.",
                "leave that class out of the data; or a larger fraction of them, "
                "SubsampledInfluence(subsets=100, fraction=0.8).",
                solution=Trained.joined(parts) if parts else None,
            )
        parts.append(found)
    return Trained.joined(parts)
