"""The cross-validated loss along a parameter, and which value to choose."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.cross_validated import CrossValidated
from upweight.applications.outcome import Outcome, as_table, json_of
from upweight.evaluation.bootstrap import NORMAL
from upweight.plot import axes


@dataclass(frozen=True, eq=False)
class Path(Outcome):
    """Cross-validation at each value of a parameter. Made by `cross_validation.path`.

    `predicted` and `actual` are, for each value, the mean loss over what was refitted there: from
    one fit and by refits; NaN where nothing was.

    Args:
        parameter: Its name.
        values: In the order given.
        along: At each value; None where it could not be cross-validated.
        reasons: Why not, by the place of the value.
    """

    parameter: str
    values: tuple[Any, ...]
    along: tuple[CrossValidated | None, ...]
    reasons: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def mean(self) -> Float[Tensor, " v"]:
        """The curve; NaN where there is none."""
        return self._each(lambda at: at.mean)

    @cached_property
    def standard_error(self) -> Float[Tensor, " v"]:
        """Of each mean."""
        return self._each(lambda at: at.standard_error)

    @cached_property
    def unsafe(self) -> tuple[int, ...]:
        """How many examples or folds are unsafe at each value."""
        return tuple(0 if at is None else len(at.unsafe) for at in self.along)

    @property
    def best(self) -> int:
        """The place of the smallest mean."""
        return int(self.mean.nan_to_num(nan=float("inf")).argmin())

    @property
    def chosen(self) -> Any:
        """The value of the smallest mean."""
        return self.values[self.best]

    @cached_property
    def simplest(self) -> int:
        """The place of the one-standard-error choice.

        Among the values whose mean is within one standard error of the smallest, the one that fits
        the training data least: the largest penalty (Breiman et al. 1984, §3.4.3).
        """
        limit = float(self.mean[self.best] + self.standard_error[self.best])
        fit = self._each(lambda at: float(at.train_losses.mean()))
        near = [k for k in range(len(self.values)) if float(self.mean[k]) <= limit]
        return max(near, key=lambda k: float(fit[k]), default=self.best)

    @property
    def chosen_within_one_standard_error(self) -> Any:
        """The value of the one-standard-error choice."""
        return self.values[self.simplest]

    @cached_property
    def predicted(self) -> Float[Tensor, " v"]:  # type: ignore[override]
        """Mean loss of what was refitted at each value, from one fit."""
        return self._each(lambda at: float(at.predicted.mean()))

    @cached_property
    def actual(self) -> Float[Tensor, " v"] | None:  # type: ignore[override]
        """The same by refits; None where nothing was refitted at any value."""
        if not any(at is not None and at.refitted for at in self.along):
            return None
        return self._each(lambda at: float("nan") if at.actual is None else float(at.actual.mean()))

    @property
    def is_confirmed(self) -> bool:
        """Whether random refits agree at every value that was cross-validated."""
        return all(at.is_confirmed for at in self.along if at is not None)

    @property
    def title(self) -> str:
        return f"Cross-validation along {self.parameter}"

    @property
    def verdict(self) -> str:
        at = self.along[self.best]
        assert at is not None
        edge = self.best in (0, len(self.values) - 1) and len(self.values) > 1
        return (
            f"The {at.kind} loss ({at.loss}) is smallest at {self.parameter} = {self.chosen:.4g} "
            f"({at.mean:.4g} ± {at.standard_error:.2g}"
            f"{', at the end of the grid' if edge else ''}); within one standard error the "
            f"simplest is {self.parameter} = {self.chosen_within_one_standard_error:.4g}; "
            f"{'random refits agree' if self.is_confirmed else 'not confirmed by random refits'}."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        found = [
            f"{self.parameter} = {self.values[k]}: not cross-validated: {reason.rstrip('.')}"
            for k, reason in self.reasons.items()
        ]
        found += [
            f"{self.parameter} = {value}: {len(at.unsafe)} of {len(at.groups)} are unsafe, "
            f"{len(set(at.unsafe) & set(at.refitted))} of them refitted"
            for value, at in zip(self.values, self.along, strict=True)
            if at is not None and at.unsafe
        ]
        # What holds at every value is said once.
        said = [set(at.said) for at in self.along if at is not None]
        common = set.intersection(*said)
        best = self.along[self.best]
        assert best is not None
        return (*found, *(note for note in best.said if note in common))

    def frame(self) -> "DataFrame":
        """One row per value."""
        columns = {
            self.parameter: list(self.values),
            "loss": self.mean,
            "standard_error": self.standard_error,
            "train_loss": self._each(lambda at: float(at.train_losses.mean())),
            "unsafe": list(self.unsafe),
            "refitted": [0 if at is None else len(at.refitted) for at in self.along],
        }
        return as_table(columns)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The curve with 95 % intervals, the training loss, and both choices."""
        ax = axes(ax)
        numbers = all(isinstance(v, int | float) for v in self.values)
        x = list(self.values) if numbers else list(range(len(self.values)))
        mean, spread = self.mean.numpy(), NORMAL * self.standard_error.numpy()
        ax.errorbar(x, mean, yerr=spread, label="held out", capsize=2)
        train = self._each(lambda at: float(at.train_losses.mean())).numpy()
        ax.plot(x, train, color="0.6", label="training")
        unsafe = [k for k, count in enumerate(self.unsafe) if count]
        if unsafe:
            ax.scatter(
                [x[k] for k in unsafe], mean[unsafe], marker="x", color="C3", zorder=3,
                label="unsafe for some",
            )  # fmt: skip
        ax.axvline(x[self.best], color="C0", linewidth=0.8)
        ax.axvline(x[self.simplest], color="C0", linewidth=0.8, linestyle=":")
        if numbers and min(x) > 0:
            ax.set_xscale("log")
        ax.legend()
        ax.set(xlabel=self.parameter, ylabel="loss", title=self.title)
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "parameter": self.parameter,
            "values": [json_of(value) for value in self.values],
            "loss": self.mean,
            "standard_error": self.standard_error,
            "chosen": json_of(self.chosen),
            "chosen_within_one_standard_error": json_of(self.chosen_within_one_standard_error),
            **self._fields("unsafe", "predicted", "actual", "is_confirmed"),
        }

    def _each(self, of: Any) -> Float[Tensor, " v"]:
        return torch.tensor(
            [float("nan") if at is None else of(at) for at in self.along], dtype=torch.float64
        )
