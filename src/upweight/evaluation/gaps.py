"""Why do scores differ from retraining? The difference in five parts.

    cold start      train again from the initialization              what removal means
      − warm start      train on from θ̂                              gap 1: warm start
      − proximal        with (λ/2) ‖θ − θ̂‖²                          gap 2: proximity
      − PBRF            with divergences from θ̂'s outputs            gap 3: non-convergence
      − linearized      its first-order response, solved exactly     gap 4: linearization
      − scores          as a method computed them                    gap 5: solver

Bae, Ng, Lo, Ghassemi & Grosse (2022), "If influence functions are the answer, then what is the
question?", §4. Every line is a matrix Δm [removals, queries]; gap k is the difference of two
neighbours, and the five add up to cold start − scores.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes
from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import Bootstrap, Estimate, estimate, mean
from upweight.evaluation.loo import leave_one_out
from upweight.evaluation.prediction import predicted_removals, removals
from upweight.plot import NEUTRAL, axes
from upweight.runtime.resources import Resources
from upweight.scores import Scores
from upweight.training.pbrf import PBRF
from upweight.training.schedules import Cosine
from upweight.training.training import Training
from upweight.training.weights import Removal

STAGES = ("cold start", "warm start", "proximal", "PBRF", "linearized", "scores")
GAPS = ("warm start", "proximity", "non-convergence", "linearization", "solver")


@dataclass(frozen=True)
class Gap:
    """One of the five.

    Args:
        name: Which.
        size: √(mean of its squares), in units of the measure.
        share: ⟨gap, total⟩ / ⟨total, total⟩ with total = cold start − scores; five shares add up to
            1. A negative share makes up for others.
        pearson: Correlation of the effects before and after.
    """

    name: str
    size: Estimate
    share: Estimate
    pearson: Estimate


@dataclass(frozen=True, eq=False)
class Gaps:
    """Effects of removals, by six ways from retraining to scores.

    Args:
        examples: What each removal takes out.
        effects: Δm by stage, in the order of `STAGES`, each [removals, queries].
        bootstrap: How the intervals are made, over removals.
    """

    examples: tuple[tuple[int, ...], ...]
    effects: Mapping[str, Float[Tensor, "e q"]]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        shapes = {name: tuple(self.effects[name].shape) for name in STAGES if name in self.effects}
        if len(shapes) != len(STAGES) or len(set(shapes.values())) != 1:
            raise ShapeError(
                f"The five gaps lie between six matrices of one shape: {', '.join(STAGES)}.",
                ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none.",
                "one stage measured on other removals or queries.",
                "give all stages the same examples and queries.",
            )
        bad = [name for name in STAGES if not bool(self.effects[name].isfinite().all())]
        if bad:
            raise NonFinite(
                "Effects of removals must be finite.",
                f"NaN or infinity in {', '.join(bad)}.",
                "a model that diverged.",
                "lower the learning rate of that stage.",
            )

    @cached_property
    def each(self) -> tuple[Gap, ...]:
        """The five, in order."""
        return tuple(
            self._gap(name, before, after)
            for name, before, after in zip(GAPS, STAGES[:-1], STAGES[1:], strict=True)
        )

    @property
    def largest(self) -> Gap:
        """The one with the largest size."""
        return max(self.each, key=lambda gap: gap.size.value)

    def correlation(self, a: str, b: str) -> Estimate:
        """Pearson correlation of the effects of two stages, over all removals and queries."""
        return metrics.pearson(self.effects[a], self.effects[b], self.bootstrap)

    def _gap(self, name: str, before: str, after: str) -> Gap:
        difference = (self.effects[before] - self.effects[after]).double()
        total = (self.effects[STAGES[0]] - self.effects[STAGES[-1]]).double()
        squares = difference.square().mean(dim=1)
        size = Estimate(*(bound**0.5 for bound in astuple(mean(squares, self.bootstrap))))
        along, whole = (difference * total).sum(dim=1), total.square().sum(dim=1)

        def shares(counts: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
            below = counts @ whole
            return counts @ along / torch.where(below == 0, torch.nan, below)

        share = estimate(shares, [len(along)], self.bootstrap)
        return Gap(name, size, share, self.correlation(before, after))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """A bar per gap, its RMS size with its interval, and its share of the whole in words.

        Needs the extra `plot`.
        """
        ax = axes(ax)
        places, sizes = range(len(GAPS)), [gap.size for gap in self.each]
        ax.barh(places, [s.value for s in sizes], color=NEUTRAL, alpha=0.5)
        ax.hlines(places, [s.low for s in sizes], [s.high for s in sizes], color="0.2")
        ax.set_yticks(places, GAPS)
        ax.invert_yaxis()
        for place, gap in zip(places, self.each, strict=True):
            text = f"  {round(100 * gap.share.value)} % of the whole"
            ax.text(max(0.0, gap.size.high), place, text, va="center")
        ax.margins(x=0.35)
        ax.set_xlim(left=0.0)
        ax.set(
            xlabel="RMS size of the gap, in units of the measure",
            title="Cold-start retraining minus scores, in five gaps",
        )
        return ax

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them."""
        cold, pbrf = (self.correlation("scores", s) for s in ("cold start", "PBRF"))
        return {
            "removals": len(self.examples),
            "queries": next(iter(self.effects.values())).shape[1],
            "level": self.bootstrap.level,
            "gaps": {
                gap.name: {k: list(astuple(getattr(gap, k))) for k in ("size", "share", "pearson")}
                for gap in self.each
            },
            "largest": self.largest.name,
            "pearson_with_cold_start": list(astuple(cold)),
            "pearson_with_pbrf": list(astuple(pbrf)),
        }

    def __str__(self) -> str:
        e, q = next(iter(self.effects.values())).shape
        lines = [
            f"cold-start retraining minus scores in five gaps, {e} removals × {q} "
            f"{'query' if q == 1 else 'queries'} ({self.bootstrap.level:.0%} intervals)",
            f"  {'gap':16}{'RMS size':>34}{'share of the whole':>26}{'Pearson across':>26}",
        ]
        for gap in self.each:
            size, share, r = f"{gap.size:.2e}", f"{gap.share:.2f}", f"{gap.pearson:.2f}"
            lines.append(f"  {gap.name:16}{size:>34}{share:>26}{r:>26}")
        cold, pbrf = (self.correlation("scores", s) for s in ("cold start", "PBRF"))
        lines += [
            f"  the largest is {self.largest.name}",
            f"  Pearson of the scores with cold start {cold:.2f}, with PBRF {pbrf:.2f}",
        ]
        return "\n".join(lines)


def gaps(
    scores: Scores,
    linearized: Scores,
    recipe: Training,
    examples: Iterable[Removal],
    *,
    damping: float,
    warm: Training | None = None,
    resources: Resources | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> Gaps:
    """Train four times over, and hold each against the next.

    Args:
        scores: What is judged; says the task, data, queries and measure.
        linearized: The same without approximations of the curvature or the solver:
            `Influence(curvature=GGN(), damping=Absolute(damping), solver=CG(rtol=1e-8))`.
        recipe: How the model was trained, from its initialization.
        examples: What to remove: indices, or lists of indices that go together.
        damping: λ of the proximity and of both scores.
        warm: How to train on from θ̂, without an `init`; None: as `recipe`, with its learning rate
            falling to 0. Gaps 1 to 3 are between stages that share it; absent examples keep their
            places there.
        resources: As for `retrain`; each of the four stages has a folder in the folder.
        bootstrap: Over removals.

    Raises:
        MissingContext: The scores were loaded from disk, without their task and data.
        SpecError: `warm` starts from an initialization, or there are fewer than three removals.
        UpweightError: See `leave_one_out`.

    Cost: 4 (e + 1) trainings for e removals.
    """
    context = scores.require_context()
    groups = removals(examples, len(context.train))
    if warm is None:
        warm = replace(recipe, init=None, schedule=Cosine())
    if warm.init is not None or len(groups) < 3:
        raise SpecError(
            "The five gaps need a warm start without an init, and at least three removals.",
            f"warm={warm!r}, {len(groups)} removals.",
            "the recipe of the cold start given twice, or one example to look into.",
            "leave warm out, or give Training(init=None, ...); name more examples.",
        )
    warm = replace(warm, skip_absent=False, proximity=0.0)
    response = PBRF(damping, warm.optimizer, warm.epochs, warm.batch, warm.schedule, warm.seed)
    stages: Sequence[Training | PBRF] = (
        recipe, warm, replace(warm, proximity=damping), response,
    )  # fmt: skip
    using = Resources() if resources is None else resources
    effects: dict[str, Tensor] = {}
    for name, stage in zip(STAGES, stages, strict=False):
        retrained = leave_one_out(
            stage,
            context.task,
            context.train,
            groups,
            context.queries,
            context.measure,
            resources=using.within(name.replace(" ", "-")),
        )
        effects[name] = retrained.change
    effects["linearized"] = predicted_removals(linearized, groups)
    effects["scores"] = predicted_removals(scores, groups)
    return Gaps(groups, effects, bootstrap)
