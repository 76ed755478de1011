"""Should scores be believed? Three answers, from what retraining found, by one rule.

    first that holds                                                    verdict
    the recipe makes another model, further off than its seeds are      Do not believe these
    fewer than 8 retrained models                                       Do not believe these
    the interval of the rank correlation reaches 0 or below             Do not believe these
    the interval of the ceiling does: retraining repeats nothing        Do not believe these
    measured changes go against the predicted ones (slope below 0)      Do not believe these
    the interval of the slope lies within [0.5, 2]                      Order and size
    else                                                                Order only

The slope is that of measured on predicted changes: 1 where sizes are right. An interval that is not
known counts as one that reaches 0: what is inconclusive is not believed.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

Interval = tuple[float, float, float]
"""A value and the ends of its confidence interval: (value, low, high). NaN: not known."""

FEWEST = 8
"""Retrained models: with fewer, nothing can be said."""

CALIBRATED = (0.5, 2.0)
"""Slopes between which a predicted size is worth printing."""

CLOSE = 0.1
"""Sizes that are off by less are called right."""

SAME_MODEL = 0.1
"""How far the recipe's model may be from the scored one, over what half of the data does."""

SEEDS = 2.0
"""How far it may be, over what another seed of the recipe does: beyond it is another recipe."""


class Verdict(enum.StrEnum):
    """Whether to believe scores."""

    DOUBT = "Do not believe these"
    ORDER = "Order only"
    SIZE = "Order and size"


@dataclass(frozen=True)
class Judgement:
    """A verdict and why.

    Args:
        verdict: One of three.
        reason: In a sentence without its capital and full stop.
    """

    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Checked(Judgement):
    """What is kept of a check on disk, beside its scores.

    Args:
        models: How many were trained for it.
        notes: What to know before its numbers.
    """

    models: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """How near the recipe, on all of the data, comes to the model that was scored.

    Args:
        apart: Median over queries of |m of the recipe's model − m of the scored model|.
        moves: Median of what a subset of the data moves the measurements by.
        noise: Median difference of two seeds on the same subset; None: one seed.
    """

    apart: float
    moves: float
    noise: float | None = None

    @property
    def is_same(self) -> bool:
        """Whether the two models are the same, beside what removals do."""
        return self.apart <= SAME_MODEL * self.moves

    @property
    def is_another_seed(self) -> bool:
        """Whether they are not the same, but no further apart than seeds of the recipe are.

        Other settings can hide there: where seeds are as far apart as recipes, nothing tells one
        from the other.
        """
        return not self.is_same and self.noise is not None and self.apart <= SEEDS * self.noise

    @property
    def holds(self) -> bool:
        """Whether the recipe can be the one that the model was trained by."""
        return self.is_same or self.is_another_seed

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of it; nothing where the models are the same."""
        if self.is_same:
            return ()
        if self.is_another_seed:
            return (
                "the model is as another seed of the recipe: on all of the data measurements of "
                f"the two are {self.apart:.1e} apart, those of two seeds {self.noise:.1e} "
                "(medians); rankings are judged for the recipe's models, and settings that differ "
                "by no more than seeds do are not told apart",
            )
        seeds = "" if self.noise is None else f" and another seed by {self.noise:.1e}"
        return (
            "on all of the data the recipe makes another model: its measurements are off by "
            f"{self.apart:.1e}, where a subset of the data moves them by {self.moves:.1e}{seeds} "
            "(medians); give the recipe the settings that the model was trained with, and its "
            "seed where it is known",
        )


def judged(
    correlation: Interval,
    slope: Interval,
    models: int,
    ceiling: Interval | None = None,
    reproduction: Reproduction | None = None,
) -> Judgement:
    """The verdict on predicted against measured changes.

    Args:
        correlation: Rank correlation of predicted and measured changes.
        slope: Of measured on predicted changes.
        models: How many retrained models were compared.
        ceiling: What retraining again gets in place of a prediction; None: not known.
        reproduction: Whether the recipe makes the model that was scored; None: not known.
    """
    numbers = f"{_numbers(correlation, ceiling)}; {sizes(slope)}"
    if reproduction is not None and not reproduction.holds:
        (note,) = reproduction.notes
        return Judgement(Verdict.DOUBT, f"{note}. Of that other model: {numbers}")
    if models < FEWEST:
        few = f"{models} retrained {'model is' if models == 1 else 'models are'} too few to tell"
        return Judgement(Verdict.DOUBT, f"{few}, {FEWEST} or more may: {numbers}")
    if not correlation[1] > 0:
        low = "the order is reversed" if correlation[2] < 0 else "the order may be chance"
        return Judgement(Verdict.DOUBT, f"{low}: {numbers}")
    if ceiling is not None and not ceiling[1] > 0:
        hidden = "retraining from another seed does not repeat itself; there is nothing to compare"
        return Judgement(Verdict.DOUBT, f"{hidden}: {numbers}")
    if slope[2] < 0:
        return Judgement(Verdict.DOUBT, numbers)
    calibrated = CALIBRATED[0] <= slope[1] and slope[2] <= CALIBRATED[1]
    return Judgement(Verdict.SIZE if calibrated else Verdict.ORDER, numbers)


def sizes(slope: Interval) -> str:
    """The slope in words."""
    value, low, high = slope
    if high < 0:
        return "the sign is wrong: measured changes go against the predicted ones"
    if not low > 0:
        return "sizes are inconclusive: the interval of the slope includes 0"
    if abs(value - 1) < CLOSE and CALIBRATED[0] <= low and high <= CALIBRATED[1]:
        return f"sizes are right (measured {value:.2f} × predicted)"
    if low <= 1 <= high:
        return f"sizes may be right (measured {low:.1f} to {high:.1f} × predicted)"
    if value > 1:
        return f"predicted sizes are too small by {value:.1f} ×"
    return f"predicted sizes are too large by {1 / value:.1f} ×"


def worst(judgements: Sequence[Judgement]) -> Judgement:
    """The first of those that say least for the scores."""
    order = list(Verdict)
    return min(judgements, key=lambda each: order.index(each.verdict))


def _numbers(correlation: Interval, ceiling: Interval | None) -> str:
    value, low, high = correlation
    top = "" if ceiling is None else f" (retraining again gets {ceiling[0]:.2f})"
    return f"rank correlation with retraining {value:.2f} ± {(high - low) / 2:.2f}{top}"
