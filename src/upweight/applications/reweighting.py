"""Weights of the training rows that lower the loss on a small clean validation set.

    min over w ≥ 0, Σ w = n of L(w) = (1/q) Σ ℓ(θ(w); z_q),    θ(w) = argmin (1/n) Σ wᵢ ℓᵢ + R

With p = w/n, each step moves p as far as a Kullback-Leibler ball allows, and the model is fitted
again:

    exact        min ⟨∂L/∂w, w'⟩ s.t. KL(p' ‖ p) ≤ radius    ⟹    p'ᵢ ∝ pᵢ exp(−β ∂L/∂wᵢ)
    lookahead    p' = (1 − a) p + a e,   e ∝ max(0, ⟨∇L, gᵢ⟩),   a < 1 the largest in the ball

∂L/∂wᵢ = S[val, i] is taken at the current w, by the method fitted to θ(w) with w in the objective:
the implicit gradient of the two-level problem. The look-ahead direction is Ren et al. (2018, Eqs.
7–9): one step of gradient descent in place of training, H⁻¹ replaced by η. The first is mirror
descent with the entropy (Beck & Teboulle 2003), whose weights stay above 0.

A few clean images are soon fitted by heart. The path therefore starts at the better of two weights
that do not look at the validation set one by one, all equal or n/(K n_c) in a class of n_c, and the
number of steps is chosen by cross-fitting: paths made on one half of the validation set, judged on
the other. Where the change against the start has an interval with 0 in it, the start is returned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.held_out import (
    Held,
    Refits,
    classes_of,
    columns,
    mean_loss_scores,
    splits,
    weighing_one,
)
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import subject_of
from upweight.errors import NotConverged, NotOffered, SpecError
from upweight.evaluation import bootstrap as intervals
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.methods.similarity import GradientDot
from upweight.notation import loss_in_words
from upweight.plot import axes
from upweight.runtime.resources import Resources
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Loss
from upweight.task.recipe import Recipe, Trained

Rule: TypeAlias = Literal["exact", "lookahead"]
"""The direction of a step."""

MOST = 1 - 1e-6
"""Largest a: at 1 rows without a negative slope would weigh 0, and never come back."""

EQUAL, CLASSES = "equal weights", "class weights"
"""Where a path may start."""


@dataclass(frozen=True)
class Point:
    """A point of the path.

    Args:
        validation_loss: Mean over the validation set that the path was made on.
        cross_fitted: Mean over each half, of the paths made on the other.
        effective_n: (Σw)²/Σw².
        divergence: KL(w/n ‖ start/n).
    """

    validation_loss: float
    cross_fitted: float
    effective_n: float
    divergence: float


@dataclass(frozen=True, eq=False)
class Weights(Outcome):
    """Weights of the training rows, what they are predicted to do, and what they did.

    Args:
        w: [n], ≥ 0, with Σ w = n.
        start: "equal weights" or "class weights": the better on the validation set.
        steps: How many steps were taken from there; 0: none promised a gain.
        rule: Of the steps.
        radius: KL(w'/n ‖ w/n) of each.
        path: The whole path on the validation set, the start first.
        predicted: Change of the mean validation loss against equal weights, cross-fitted.
        beyond: The same of the best number of steps against the start: what decided.
        actual: Change of the mean test loss against equal weights; None where there is no test.
        actual_beyond: The same against the start.
        models: Test loss and accuracy by weights: "equal weights", "class weights", "these".
        level: Of the intervals.
        notes: What went otherwise than asked.
        loss: What the loss is called.
    """

    w: Float[Tensor, " n"]
    start: str
    steps: int
    rule: Rule
    radius: float
    path: tuple[Point, ...]
    predicted: Estimate
    beyond: Estimate
    actual: Estimate | None
    actual_beyond: Estimate | None
    models: Mapping[str, Held]
    level: float
    notes: tuple[str, ...] = ()  # type: ignore[assignment]
    loss: str = "of the objective"

    @property
    def effective_n(self) -> float:
        """(Σw)²/Σw²: as many equally weighted rows would have the same variance (Kish 1965)."""
        return effective_n(self.w)

    @property
    def expects_gain(self) -> bool:
        """Whether steps from the start are predicted to lower the loss: stated before the test."""
        return self.steps > 0

    @property
    def title(self) -> str:
        return f"Reweight {len(self.w)} rows"

    @property
    def is_confirmed(self) -> bool:
        """Whether the refit gains on the test data against the start, where that was predicted."""
        if self.actual is None or self.actual_beyond is None:
            return False
        return self.actual_beyond.high < 0 or not self.expects_gain

    @property
    def verdict(self) -> str:
        if self.expects_gain:
            said = (
                f"Reweighting from {self.start} (steps: {self.steps}) is predicted to change the "
                f"loss ({self.loss}) by {self.beyond:+.3f}"
            )
        else:
            tried = f"{self.beyond:+.3f} predicted"
            if self.beyond.value == 0:  # the start itself was the best point of the path
                tried = "no step lowers the cross-fitted loss"
            said = (
                f"No gain expected from reweighting beyond {self.start} ({tried}): {self.start} "
                "are returned"
            )
        said += f"; {self.effective_n:.0f} effective rows of {len(self.w)}"
        if self.actual is None:
            return said + "; not tried on test data."
        agrees = "" if self.is_confirmed else "the refit does not agree: "
        named = "loss" if self.expects_gain else f"loss ({self.loss})"
        text = [f"{agrees}on test data the {named} changes by {self.actual:+.3f} against {EQUAL}"]
        if self.expects_gain and self.start == CLASSES and self.actual_beyond is not None:
            text.append(f"by {self.actual_beyond:+.3f} against {CLASSES}")
        mine, equal = self.models.get("these"), self.models.get(EQUAL)
        if mine and equal and mine.accuracy and equal.accuracy:
            text.append(f"error {1 - mine.accuracy.value:.3f} from {1 - equal.accuracy.value:.3f}")
        return said + "; " + ", ".join(text) + "."

    def frame(self) -> "DataFrame":
        """One row per point of the path, the start first; `chosen` marks the one returned."""
        rows = [vars(at) | {"chosen": k == self.steps} for k, at in enumerate(self.path)]
        return as_table(rows, name="step")

    def comparison(self) -> "DataFrame":
        """Test loss and accuracy with equal weights, class weights and these."""
        return as_table([columns(model) for model in self.models.values()], self.models, "weights")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Validation loss along the path: on the set that makes it, and cross-fitted."""
        ax = axes(ax)
        ax.plot([p.validation_loss for p in self.path], "o-", color="0.6", label="on its own set")
        ax.plot([p.cross_fitted for p in self.path], "o-", color="#0072b2", label="cross-fitted")
        ax.axvline(self.steps, color="0.7", linewidth=1, label="chosen")
        ax.set_xlabel(f"steps from {self.start}")
        ax.set_ylabel("mean validation loss")
        ax.set_title(self.title)
        ax.legend(frameon=False)
        return ax

    def numbers(self) -> dict[str, Any]:
        found = {
            **self._fields("predicted", "beyond", "actual", "actual_beyond"),
        }
        for name, model in self.models.items():
            found |= {f"{name}: loss": model.loss, f"{name}: accuracy": model.accuracy}
        return {
            **self._fields("start", "steps", "rule", "radius", "effective_n", "expects_gain", "w"),
            "path": [vars(point) for point in self.path],
            **intervals.summarized(found, self.level),
        }


def reweight(
    asked: Any,
    recipe: Recipe | None = None,
    validation: Any = None,
    *,
    train: Any = None,
    test: Any = None,
    steps: int = 10,
    radius: float = 0.02,
    rule: Rule = "exact",
    seed: int = 0,
    bootstrap: Bootstrap = Bootstrap(),
    resources: Resources | None = None,
) -> Weights:
    """Weights of the training rows for a validation set, with the number of steps cross-fitted.

    Each model is measured, and the method fitted to it, with running statistics of its own where
    the recipe is a function that trains them; ∂L/∂w takes them for constants.

    Args:
        asked: What `Method.fit` gave; or a fitted scikit-learn estimator or statsmodels results.
        recipe: How the model is fitted again; an estimator's own where None.
        validation: Held-out examples that choose, of the distribution that counts.
        train: The training data of an estimator, as given to its `fit`.
        test: Held-out examples that report, which nothing has seen. None: nothing is confirmed.
        steps: At most how many.
        radius: KL(w'/n ‖ w/n) of a step, in nats.
        rule: The direction: "exact" or "lookahead".
        seed: Of the halves of the validation set.
        bootstrap: How intervals are made.
        resources: With a `folder`, which keeps the refits: an interrupted call resumes. None:
            those of the fitted method.

    Raises:
        SpecError: No recipe, or a number or rule that cannot be meant.
        DataError: Two of the three splits hold the same examples, or there is no validation set.
        NotOffered: The method's scores are no derivatives, which "exact" follows.
        NotConverged: The recipe does not train with equal weights.
        StaleStore: The folder keeps the refits of something else.
        UpweightError: From the adapter, the method or the recipe.

    Cost: 3 · (steps + 1) trainings, and as many fits of the method with one solve each.

    Ren et al. (2018), Learning to reweight examples for robust deep learning.
    """
    subject = subject_of(asked, train, recipe)
    fitted = subject.fitted
    using = (fitted.resources if resources is None else resources).within("reweight")
    refits = Refits(subject, "Reweighting", using)
    _require_meant(steps, radius, rule)
    if rule == "exact" and fitted.spec.unit is not Unit.DERIVATIVE:
        raise NotOffered(
            "An exact step follows ∂L/∂w.",
            f"{fitted.spec!r}, whose scores are no derivatives.",
            "a method that ranks.",
            "fit Influence(...), or take rule='lookahead', which needs gradients alone.",
        )
    refits.subject.require_recipe(refits.what)
    split = splits(fitted, validation, test, seed)
    n = len(fitted.train)
    starts = _starts(refits)
    begun = _trained(refits, starts)
    task = fitted.task

    before = {k: at.measured(task, split.validation, Loss())[0] for k, at in begun.items()}
    start = min(before, key=lambda name: float(before[name].mean()))
    notes = [f"{k} do not train" for k in starts if k not in begun]
    walk = Walk(refits, rule, radius, steps)
    first = (starts[start], begun[start])
    a, b = split.halves
    crossed = [walk.losses(walk.points(a, *first), b), walk.losses(walk.points(b, *first), a)]
    length = min(len(part) for part in crossed)
    tried = torch.cat([part[:length] for part in crossed], dim=1)
    best = int(tried.mean(dim=1).argmin())
    beyond = intervals.mean(tried[best] - tried[0], bootstrap)
    taken = best if beyond.high < 0 else 0

    whole = walk.points(split.validation, *first)[:length]
    taken = min(taken, len(whole) - 1)
    own = walk.losses(whole, split.validation).mean(dim=1)
    path = tuple(
        Point(
            float(own[k]),
            float(tried[k].mean()),
            effective_n(w),
            divergence(w / n, starts[start] / n),
        )
        for k, (w, _) in enumerate(whole)
    )
    w, model = whole[taken]
    # The halves hold the validation examples in another order: pair by example.
    equal = torch.cat([begun[EQUAL].measured(task, half, Loss())[0] for half in (b, a)])
    models: dict[str, Held] = {}
    if split.test is not None:
        models = {k: refits.held(at, split.test, bootstrap) for k, at in begun.items()}
        models["these"] = refits.held(model, split.test, bootstrap)
    judged = bool(models)
    return Weights(
        w=w,
        start=start,
        steps=taken,
        rule=rule,
        radius=radius,
        path=path,
        predicted=intervals.mean(tried[taken] - equal, bootstrap),
        beyond=beyond,
        actual=models["these"].change_of_loss(models[EQUAL], bootstrap) if judged else None,
        actual_beyond=models["these"].change_of_loss(models[start], bootstrap) if judged else None,
        models=models,
        level=bootstrap.level,
        notes=(*notes, *dict.fromkeys(walk.notes)),
        loss=loss_in_words(task.loss),
    )


# -- the path -------------------------------------------------------------------------------------


class Walk:
    """Paths of weights, by the validation set that makes them."""

    def __init__(self, refits: Refits, rule: Rule, radius: float, steps: int) -> None:
        self.refits, self.rule, self.radius, self.steps = refits, rule, radius, steps
        self.notes: list[str] = []

    def points(
        self, guide: Data, w: Float[Tensor, " n"], model: Trained
    ) -> list[tuple[Float[Tensor, " n"], Trained]]:
        """(w, 𝒜(w)) at the start and after each step; shorter where the path ends sooner."""
        found = [(w, model)]
        step = entropic_step if self.rule == "exact" else lookahead_step
        for k in range(1, self.steps + 1):
            # None where no direction leads down.
            following = step(w, self.slope(guide, w, model), self.radius)
            if following is None:
                self.notes.append(f"a path ended after {k - 1} steps: no row lowers the loss")
                break
            trained = self.refits.attempted(following)
            if isinstance(trained, str):
                self.notes.append(f"a path ended after {k - 1} steps: {trained}")
                break
            w, model = following, trained
            found.append((w, model))
        return found

    def losses(
        self, points: list[tuple[Float[Tensor, " n"], Trained]], data: Data
    ) -> Float[Tensor, "t q"]:
        """ℓ of every example at every point."""
        task = self.refits.fitted.task
        return torch.cat([model.measured(task, data, Loss()) for _, model in points])

    def slope(self, guide: Data, w: Float[Tensor, " n"], model: Trained) -> Float[Tensor, " n"]:
        """∂L/∂wᵢ at w, or with η in place of H⁻¹."""
        method = None if self.rule == "exact" else GradientDot()
        here = self.refits.at_weights(model, w, method)
        by_log = mean_loss_scores(here, weighing_one(here, guide))
        # Scores of wᵢ ℓᵢ in a factor are wᵢ ∂L/∂wᵢ. A row of weight 0 never comes back.
        return torch.where(w > 0, by_log / w, 0.0)


def entropic_step(
    w: Float[Tensor, " n"], slope: Float[Tensor, " n"], radius: float
) -> Float[Tensor, " n"] | None:
    """w' ∝ w exp(−β slope) with KL(w'/n ‖ w/n) = radius: the lowest ⟨slope, w'⟩ in that ball.

    None where the slope is the same for every row. β is found by bisection.
    """
    total, size = float(w.sum()), float(slope.abs().max())
    log_p = (w / total).log()
    if size == 0 or float(slope.max() - slope.min()) <= 1e-12 * size:
        return None

    def tilted(beta: float) -> Float[Tensor, " n"]:
        return (log_p - beta * slope / size).log_softmax(dim=0)

    def reached(beta: float) -> float:
        log_q = tilted(beta)
        return float((log_q.exp() * (log_q - log_p)).sum())

    low, high = 0.0, 1.0
    # All weight on the lowest row is as far as it goes: its own −log p, which may be in the ball.
    while reached(high) < radius and high < 1e12:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < radius else (low, middle)
    return tilted(low).exp() * total


def lookahead_step(
    w: Float[Tensor, " n"], slope: Float[Tensor, " n"], radius: float
) -> Float[Tensor, " n"] | None:
    """(1 − a) w + a n e with e ∝ max(0, −slope), and the largest a ≤ MOST with KL ≤ radius.

    None where no row has a negative slope. a is found by bisection.
    """
    total = float(w.sum())
    target = (-slope).clamp(min=0)
    if float(target.sum()) == 0:
        return None
    p, e = w / total, target / target.sum()
    low, high = 0.0, 1.0
    if divergence(e, p) > radius:
        for _ in range(100):
            middle = (low + high) / 2
            inside = divergence((1 - middle) * p + middle * e, p) < radius
            low, high = (middle, high) if inside else (low, middle)
        a = low
    else:
        a = MOST
    return ((1 - a) * p + a * e) * total


def divergence(q: Float[Tensor, " n"], p: Float[Tensor, " n"]) -> float:
    """KL(q ‖ p) = Σ q log(q/p) in nats."""
    return float(torch.special.xlogy(q, q / p).sum())


def effective_n(w: Float[Tensor, " n"]) -> float:
    """(Σw)²/Σw²."""
    return float(w.sum() ** 2 / w.square().sum())


def _starts(refits: Refits) -> dict[str, Float[Tensor, " n"]]:
    """Weights that do not look at the validation set."""
    train = refits.fitted.train
    n = len(train)
    starts = {EQUAL: torch.ones(n, dtype=torch.float64)}
    classes = classes_of(refits.fitted.task, train)
    if classes is not None:
        counts = classes.bincount()
        if len(counts) > 1 and int(counts.min()) < int(counts.max()):
            starts[CLASSES] = n / (len(counts) * counts[classes].double())
    return starts


def _trained(refits: Refits, starts: Mapping[str, Float[Tensor, " n"]]) -> dict[str, Trained]:
    """Models by start; those that do not train are left out.

    Raises:
        NotConverged: The model does not train with equal weights.
    """
    found = {name: refits.attempted(w) for name, w in starts.items()}
    if isinstance(found[EQUAL], str):
        raise NotConverged(
            "Reweighting starts from the model as it was trained.",
            f"with equal weights: {found[EQUAL]}.",
            "a recipe of another model, or one with too few steps.",
            "check the recipe alone: recipe.prepare(task, train)(torch.ones(1, n)).failures.",
        )
    return {name: model for name, model in found.items() if not isinstance(model, str)}


def _require_meant(steps: Any, radius: Any, rule: Any) -> None:
    if rule not in get_args(Rule):
        raise SpecError(
            f"A rule is one of {', '.join(map(repr, get_args(Rule)))}.",
            f"rule={rule!r}.",
            "a rule of `subset`.",
            "rule='exact', or rule='lookahead' for Ren et al. (2018).",
        )
    numbers = isinstance(steps, Integral) and isinstance(radius, Real)
    if not (numbers and steps >= 1 and 0 < radius < float("inf")):
        raise SpecError(
            "A path has at least one step, and each step a radius above 0.",
            f"steps={steps!r}, radius={radius!r}.",
            "0 meant as no limit.",
            "steps=10, radius=0.02; the number of steps is chosen by cross-fitting.",
        )
