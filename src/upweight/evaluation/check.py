"""Should a score be believed? A stated budget of retraining answers in words and numbers.

    LDS      mean over queries of the rank correlation, over random halves of the data, of predicted
             and measured change; beside what retraining again would get
    slope    of measured against predicted change, within each query: 1 where sizes are right
    drift    m of the recipe's model on all of the data − m of the model that was scored

`upweight.verdict` makes one of three verdicts of these.

Random halves are where a retraining tells most: each answers for every query at once, and moves the
measurements by far more than training noise does. Every half is trained from two seeds, which say
how much noise there is.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from textwrap import shorten
from typing import Any, overload

from jaxtyping import Float
from torch import Tensor

from upweight._html import card
from upweight.effects import Effects
from upweight.errors import SpecError, message
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.evaluation.lds import LDS, lds
from upweight.evaluation.prediction import predicted_changes
from upweight.evaluation.tail_patch import TailPatch, tail_patch
from upweight.runtime.progress import duration
from upweight.runtime.resources import Resources
from upweight.scores import Scores
from upweight.task.recipe import Recipe
from upweight.training.function import as_recipe
from upweight.training.optimizers import Optimizer
from upweight.training.retrain import Retrained, joined, retrain
from upweight.training.subset_models import has_seed, reseeded_from
from upweight.training.weights import subset_weights
from upweight.verdict import FEWEST, Judgement, Reproduction, Verdict, judged

UNITS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
MOST = 256
"""Halves: with more, the intervals are narrow enough."""

LEAST = 3
"""Halves that a rank correlation can be taken of; with fewer than `FEWEST` none is believed."""

TRIED = 10
"""Examples of each query that a tail-patch steps on."""

HOPELESS = 4.0
"""How much less than the first model, which pays for preparations, others may take."""

SPENDS = 0.9
"""Share of the budget after which no further models are begun."""


@dataclass(frozen=True, eq=False)
class Check:
    """Scores against retraining on random halves of the data.

    Args:
        lds: The comparison.
        fraction: Of the data, what each model was trained on.
        models: How many were trained for it, from the cache or now.
        seconds: What it took.
        budget: Seconds that were allowed; infinite where the number of subsets was given instead.
        drift: Of each query, m of the recipe's model on all of the data − m of the model that was
            scored; None: not recorded.
        each: Seconds that a further subset would take; NaN: not known.
        left_out: Queries that were not compared, since their measure, or what is predicted of it,
            is the same for all subsets: as the loss on a query that every model is sure of.
    """

    lds: LDS
    fraction: float
    models: int
    seconds: float
    budget: float
    drift: Float[Tensor, " q"] | None = None
    each: float = math.nan
    left_out: tuple[int, ...] = ()

    @property
    def queries(self) -> list[int]:
        """Which queries the columns of `lds` are of."""
        without, total = set(self.left_out), self.lds.predicted.shape[1] + len(self.left_out)
        return [q for q in range(total) if q not in without]

    @cached_property
    def slope(self) -> Estimate:
        """Of measured against predicted change, each query about its own mean over the subsets."""
        return metrics.slope_within(self.lds.predicted, self.lds.measured, self.lds.bootstrap)

    @property
    def reproduction(self) -> Reproduction | None:
        """Whether the recipe makes the model that was scored; None where it was not recorded."""
        if self.drift is None:
            return None
        values, measured = self.lds.values, self.lds.measured
        moves = float((measured - measured.mean(dim=0)).abs().median())
        noise = float((values[0] - values[1]).abs().median()) if len(values) > 1 else None
        return Reproduction(float(self.drift.abs().median()), moves, noise)

    @cached_property
    def judgement(self) -> Judgement:
        """The verdict with its reason."""
        ceiling = self.lds.ceiling
        return judged(
            astuple(self.lds.spearman),
            astuple(self.slope),
            len(self.lds.predicted),
            None if ceiling is None else astuple(ceiling),
            self.reproduction,
        )

    @property
    def verdict(self) -> Verdict:
        """One of three: "Do not believe these", "Order only", "Order and size"."""
        return self.judgement.verdict

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        return self.judgement.reason

    @property
    def more(self) -> str:
        """How much longer would make it say more; empty where it says enough, or no time is known.

        Intervals become narrower with the square root of the number of subsets.
        """
        halves = len(self.lds.predicted)
        if not math.isfinite(self.each) or self.verdict is Verdict.SIZE or halves >= MOST:
            return ""
        if halves < FEWEST:
            return f"{_time(self.each * (FEWEST - halves))} more would make it {FEWEST} subsets, " \
                "the fewest that say whether to believe scores"  # fmt: skip
        return f"{_time(self.each * 3 * halves)} more would make its intervals half as wide"

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before the numbers."""
        found = self.reproduction
        without = () if not self.left_out else (_left_out(self.left_out, len(self.queries)),)
        if found is None:
            return ("whether the recipe makes the model that was scored was not recorded", *without)
        return (*found.notes, *without)

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them."""
        slope = self.slope
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "notes": list(self.notes),
            **self.lds.summary(),
            "left_out": list(self.left_out),
            "more": self.more,
            "slope": [slope.value, slope.low, slope.high],
            "fraction": self.fraction,
            "models": self.models,
            "seconds": self.seconds,
            "budget": self.budget if math.isfinite(self.budget) else None,
        }

    def _repr_html_(self) -> str:
        first, *lines = str(self).splitlines()
        return card(first, {}, note="; ".join(line.strip() for line in lines))

    def __str__(self) -> str:
        halves, seeds = len(self.lds.predicted), len(self.lds.values)
        notes = "".join(f"  note: {note}\n" for note in self.notes if note not in self.reason)
        allowed = f" of {self.budget:.0f} s" if math.isfinite(self.budget) else ""
        return (
            f"{self.verdict}: {self.reason}.\n"
            f"{notes}"
            f"  {halves} random subsets of {self.fraction:.0%} of the data, "
            f"{seeds} {'seed' if seeds == 1 else 'seeds'} each: {self.models} models in "
            f"{self.seconds:.0f} s{allowed}\n"
            f"  slope {self.slope:.2f} of measured against predicted change"
            + (f"\n  {self.more}" if self.more else "")
        )

    __repr__ = __str__


@overload
def check(
    scores: Scores | Effects,
    recipe: Recipe | Callable[..., Any],
    budget: str | float | None = None,
    *,
    subsets: int | None = None,
    fraction: float = 0.5,
    resources: Resources | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> Check: ...


@overload
def check(
    scores: Scores,
    recipe: Optimizer,
    *,
    resources: Resources | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> TailPatch: ...


def check(
    scores: Scores | Effects,
    recipe: Recipe | Callable[..., Any] | Optimizer,
    budget: str | float | None = None,
    *,
    subsets: int | None = None,
    fraction: float = 0.5,
    resources: Resources | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> Check | TailPatch:
    """Retrain on random subsets for as long as the budget lasts, and compare.

    Where nobody can retrain, an optimizer in place of the recipe asks for the cheap check: one more
    step on each of the ten examples that each query's ranking puts first; see `tail_patch`.

    Args:
        scores: What is judged; says the task, data, queries and measure.
        recipe: How the model was trained; also a function from data weights to the trained model.
            With a field `seed` each subset is trained from two
            seeds; without one the recipe has no noise, and the comparison no ceiling. An optimizer,
            such as `SGD(1e-3)`: a tail-patch by its step.
        budget: "90 s", "2 min", "1 h", or seconds. What has begun is finished. None: "2 min".
        subsets: How many, in place of a time; they are the first ones of any check.
        fraction: Of the data, what each model keeps. The mean is taken over what is kept.
        resources: As for `retrain`; a later check with a larger budget resumes from its folder.
        bootstrap: How the intervals are made.

    Returns:
        A `Check`, which is also the last of `scores.checks`; with an optimizer a `TailPatch`.

    Raises:
        SpecError: The budget is no time, or too short for eight subsets; or there are both a
            budget and a number of subsets; or either of them beside an optimizer.
        MissingContext: The scores were loaded from disk, without their task and data.
        UpweightError: See `retrain` and `lds`.

    Cost: the budget; or subsets + 1 trainings per seed.
    """
    if isinstance(recipe, Optimizer):
        if budget is not None or subsets is not None or isinstance(scores, Effects):
            raise SpecError(_steps_only(recipe, budget, subsets))
        asked, k = scores.require_context(), min(TRIED, scores.values.shape[1])
        return tail_patch(
            asked.task, asked.train, asked.queries, scores, recipe, k, asked.measure,
            control=k, bootstrap=bootstrap,
        )  # fmt: skip
    recipe = as_recipe(recipe)
    if not isinstance(recipe, Recipe):
        raise SpecError(
            "A recipe says how the model is trained.",
            f"a {type(recipe).__name__}: {shorten(repr(recipe), 60)}.",
            "a trained model, or an argument in the place of another.",
            'check(scores, recipe, budget="2 min"), with an upweight.Training(...), or with a '
            "function from data weights to a trained model.",
        )
    if budget is not None and subsets is not None:
        raise SpecError(_both(budget, subsets))
    seconds = seconds_of("2 min" if budget is None else budget) if subsets is None else math.inf
    started = time.perf_counter()
    context = scores.require_context()
    n = len(context.train)
    most = min(MOST, math.comb(n, max(1, round(fraction * n)))) if subsets is None else subsets
    weights = subset_weights(n, most, fraction, renormalize=True)
    predicted = predicted_changes(scores, weights)
    if not bool((compared := metrics.differing(predicted.cpu())).any()):
        metrics.varying(predicted, predicted)  # refuses, before any time is spent
    seeds = [recipe, reseeded_from(recipe, 1)] if has_seed(recipe) else [recipe]
    rounds: list[list[Retrained]] = []
    using = Resources() if resources is None else resources
    done, step, each = 0, 1 if subsets is None else subsets, 0.0
    while step >= 1 and done < most:
        begun, stop = time.perf_counter(), min(most, done + step)
        rounds.append(_retrained(seeds, scores, weights[done:stop], using))
        models = sum(part.models for part in rounds[-1])
        now = time.perf_counter()
        each = (now - begun) * len(seeds) / models if models else each
        done, left = stop, SPENDS * seconds - (now - started)
        # The first models alone say little of what many together take each.
        most_left = left if done > 1 else HOPELESS * left
        if each * (LEAST - done) > most_left:
            raise SpecError(_too_short(budget, *(now - started + each * (k - done)
                                                 for k in (LEAST, FEWEST))))  # fmt: skip
        affordable = int(min(left / each, most)) if each else done
        # Half of it, then half of the rest: the machine may become slower meanwhile.
        some = (affordable + 1) // 2
        is_open = done < FEWEST and each <= most_left
        step = min(max(1, some) if is_open else some, done)
    truth = [joined(parts) for parts in zip(*rounds, strict=True)]
    for one in truth:
        compared = compared & metrics.differing(one.values.cpu())
    if not bool(compared.any()):
        compared[:] = True  # `lds` says what is wrong with them
    of = compared.nonzero()[:, 0]
    found = lds(
        predicted[:done, of], weights[:done], [one.of(of) for one in truth], bootstrap=bootstrap
    )
    models = len(seeds) * (done + 1)
    took = time.perf_counter() - started
    left_out = tuple((~compared).nonzero()[:, 0].tolist())
    drift = truth[0].drift[of]
    checked = Check(found, fraction, models, took, seconds, drift, each or math.nan, left_out)
    if isinstance(scores, Scores):
        scores.checks.append(checked)
    return checked


def _retrained(
    seeds: Sequence[Recipe],
    scores: Scores | Effects,
    weights: Float[Tensor, "s n"],
    using: Resources,
) -> list[Retrained]:
    """The same subsets by the recipe under each of its seeds."""
    context = scores.require_context()
    return [
        retrain(
            seed, context.task, context.train, weights, context.queries, context.measure,
            resources=using.within(f"check-{k}"),
        )
        for k, seed in enumerate(seeds)
    ]  # fmt: skip


def seconds_of(budget: str | float) -> float:
    """A time, "90 s", "2 min", "1 h" or a number, in seconds.

    Raises:
        SpecError: It is no time.
    """
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", budget.lower())
        unit = UNITS.get(match[2], UNITS.get(match[2].removesuffix("s"), 0.0)) if match else 0.0
        value = float(match[1]) * unit if match else 0.0
    else:
        value = float(budget)
    if not 0 < value < float("inf"):
        raise SpecError(
            "A budget is a time.",
            f"budget={budget!r}.",
            "a number without its unit in a text, or 0.",
            'say "90 s", "2 min", "1 h", or give seconds as a number.',
        )
    return value


def _left_out(queries: Sequence[int], compared: int) -> str:
    some = ", ".join(str(q) for q in queries[:3]) + (", …" if len(queries) > 3 else "")
    return (
        f"{len(queries)} of {len(queries) + compared} queries left out ({some}): their measure, or "
        "what is predicted of it, is the same for all subsets"
    )


def _time(seconds: float) -> str:
    return f"about {duration(max(seconds, 1))}"


def _both(budget: str | float, subsets: int) -> str:
    return message(
        "A check is limited by a time or by a number of subsets.",
        f"budget={budget!r} and subsets={subsets!r}.",
        "both, where one limits the other.",
        f"check(scores, recipe, {budget!r}), or check(scores, recipe, subsets={subsets!r}).",
    )


def _steps_only(optimizer: Optimizer, budget: str | float | None, subsets: int | None) -> str:
    return message(
        "An optimizer asks for one step on each example that scores rank first: there is nothing "
        "to retrain, and effects of removals do not rank examples.",
        f"recipe={optimizer!r}, budget={budget!r}, subsets={subsets!r}.",
        "the optimizer in place of the recipe that it is part of.",
        "check(scores, optimizer); or a recipe such as Training(init, optimizer, epochs, batch) "
        "with a budget.",
    )


def _too_short(budget: str | float | None, least: float, needed: float) -> str:
    return message(
        f"A check needs at least {LEAST} subsets, and {FEWEST} to say whether to believe scores.",
        f"budget={budget or '2 min'!r}, where {LEAST} subsets would take about {least:.0f} s and "
        f"{FEWEST} subsets would take about {needed:.0f} s.",
        "a model that takes long to train.",
        f"allow {needed:.0f} s or more; or say how many, subsets={FEWEST} or --lds {FEWEST}; or, "
        "without training again, check(scores, upweight.SGD(1e-3)), which takes one more step on "
        "what scores rank first. What was trained is kept in Resources(folder=...), and in a run, "
        "so that a later check resumes from there.",
    )
