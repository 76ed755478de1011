"""Predicted against actual: what removing examples really did to one query, after retraining.

    predicted[e]  the change Δm that the scores say        actual[e]  m retrained − m as trained

Of removing one example at a time, or several together. It takes plain numbers, so whoever retrained
may fill it in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upweight.errors import DataError, NonFinite, ShapeError, SpecError, message
from upweight.verdict import FEWEST, Judgement, Verdict, judged

Removal = int | Sequence[int]
"""One training example, or several that were removed together."""

Estimate = tuple[float, float, float]
"""A value and the ends of its 95 % confidence interval: (value, low, high). NaN: not known."""


class Comparison(Protocol):
    """Scores held against retraining as a whole, as `fitted.check` does."""

    @property
    def verdict(self) -> Verdict:
        """One of three."""
        ...

    @property
    def reason(self) -> str:
        """Why, in a sentence without its capital and full stop."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What to know before the numbers."""
        ...

    @property
    def models(self) -> int:
        """How many models were trained for it."""
        ...


@dataclass(frozen=True, eq=False)
class Check:
    """One kind of prediction for one query, beside the truth.

    Args:
        label: What predicted: "first order", "leverage-corrected", ….
        examples: What was removed, one removal at a time: a training example, or a list of those
            that went together.
        predicted: Predicted Δm of each removal.
        actual: Δm of each removal, by retraining without it; a mean where it was done repeatedly.
        pearson: Linear correlation, (value, low, high).
        spearman: Rank correlation, (value, low, high).
        slope: Of actual over predicted: 1 is calibrated, above 1 the effects are underpredicted.
        query: Which row of the scores.
        errors: Standard error of each actual change over the repeated retrainings.
        names: What each removal is, in words.
        repeats: How often each removal was retrained.

    Raises:
        ShapeError: The sequences differ in length, or an estimate is not a triple.
        DataError: No example was removed.
        NonFinite: A change is NaN or infinite.
    """

    label: str
    examples: Sequence[Removal]
    predicted: Sequence[float]
    actual: Sequence[float]
    pearson: Estimate
    spearman: Estimate
    slope: Estimate
    query: int = 0
    errors: Sequence[float] | None = None
    names: Sequence[str] | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        sizes = [len(self.examples), len(self.predicted), len(self.actual)]
        estimates = [len(e) for e in (self.pearson, self.spearman, self.slope)]
        if len(set(sizes)) != 1 or set(estimates) != {3}:
            raise ShapeError(
                message(
                    "A check has one predicted and one actual change per removed example, and "
                    "estimates (value, low, high).",
                    f"{sizes[0]} examples, {sizes[1]} predicted, {sizes[2]} actual; estimates of "
                    f"lengths {estimates}.",
                    "changes [e, q] of several queries in one check.",
                    "make one Check per query, with predicted[:, query] and actual[:, query].",
                )
            )
        if not sizes[0]:
            raise DataError(
                message(
                    "A check compares at least one removal.",
                    f"no examples for {self.label!r}.",
                    "a selection of examples that came out empty.",
                    "leave the check out, or remove at least one example.",
                )
            )
        for name in ("errors", "names"):
            given = getattr(self, name)
            if given is not None and len(given) != sizes[0]:
                raise ShapeError(
                    message(
                        f"A check has one of its {name} per removal.",
                        f"{sizes[0]} removals, {len(given)} {name}.",
                        f"{name} of other removals.",
                        "give one for each, in the order of the removals, or None.",
                    )
                )
        for name in ("predicted", "actual", *(() if self.errors is None else ("errors",))):
            values = self.array(name)
            if not np.isfinite(values).all():
                bad = int(np.flatnonzero(~np.isfinite(values))[0])
                raise NonFinite(
                    message(
                        f"Every {name} change must be finite.",
                        f"{values[bad]} for example {self.examples[bad]} in {self.label!r}.",
                        "a retraining that diverged.",
                        "leave that example out, or retrain it to convergence.",
                    )
                )

    @property
    def told(self) -> Judgement | None:
        """The verdict on these removals; None where they are too few for intervals."""
        known = all(math.isfinite(v) for v in (*self.spearman, *self.slope))
        if not known or len(self.examples) < FEWEST:
            return None
        return judged(self.spearman, self.slope, len(self.examples))

    @property
    def removed(self) -> tuple[tuple[int, ...], ...]:
        """The examples of each removal."""
        return tuple(
            tuple(int(i) for i in e) if isinstance(e, Sequence) else (int(e),)
            for e in self.examples
        )

    def array(self, name: str) -> NDArray[np.float64]:
        """`predicted`, `actual` or `errors` as an array."""
        return np.asarray([float(v) for v in getattr(self, name)], dtype=np.float64)


def require_checks(checks: Any, comparison: Any = None) -> None:
    """Refuse a comparison of all scores given as checks of removals, and the other way round.

    Raises:
        SpecError: `checks` is no sequence of `Check`, or `comparison` is one.
    """
    if isinstance(comparison, Check):
        raise SpecError(
            message(
                "comparison= takes what fitted.check(...) found of all scores.",
                f"a check of single removals, {comparison.label!r}.",
                "the two mixed up.",
                "pass it as checks=[check].",
            )
        )
    given = checks if isinstance(checks, Sequence) else [checks]
    wrong = [check for check in given if not isinstance(check, Check)]
    if not wrong and given is checks:
        return
    other = wrong[0] if wrong else checks
    kind = f"{type(other).__module__}.{type(other).__qualname__}"
    cause, way = "an object of another kind.", "make a uw.report.Check of each kind of prediction."
    if not wrong:
        cause, way = "one check without its list.", "pass checks=[check]."
    elif hasattr(other, "verdict") and hasattr(other, "reason"):
        cause = "what check(...) found, which is about all scores and not about single removals."
        way = "pass what check found as comparison=, to uw.report.html(…, comparison=found)."
    raise SpecError(
        message("checks= takes a sequence of uw.report.Check.", f"a {kind}.", cause, way)
    )
