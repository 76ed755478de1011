"""Predicted against actual: what removing examples really did to one query, after retraining.

    predicted[e]  the change Δm that the scores say        actual[e]  m retrained − m as trained

Both of removing one example at a time. It takes plain numbers, so whoever retrained may fill it in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upweight.errors import DataError, NonFinite, ShapeError, message

Estimate = tuple[float, float, float]
"""A value and the ends of its 95 % confidence interval: (value, low, high). NaN: not known."""


@dataclass(frozen=True, eq=False)
class Check:
    """One kind of prediction for one query, beside the truth.

    Args:
        label: What predicted: "first order", "leverage-corrected", ….
        examples: Which training examples were removed, one at a time.
        predicted: Predicted Δm of each removal.
        actual: Δm of each removal, by retraining without the example.
        pearson: Linear correlation, (value, low, high).
        spearman: Rank correlation, (value, low, high).
        slope: Of actual over predicted: 1 is calibrated, above 1 the effects are underpredicted.
        query: Which row of the scores.

    Raises:
        ShapeError: The three sequences differ in length, or an estimate is not a triple.
        DataError: No example was removed.
        NonFinite: A change is NaN or infinite.
    """

    label: str
    examples: Sequence[int]
    predicted: Sequence[float]
    actual: Sequence[float]
    pearson: Estimate
    spearman: Estimate
    slope: Estimate
    query: int = 0

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
        for name in ("predicted", "actual"):
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

    def array(self, name: str) -> NDArray[np.float64]:
        """`examples`, `predicted` or `actual` as an array."""
        return np.asarray([float(v) for v in getattr(self, name)], dtype=np.float64)
