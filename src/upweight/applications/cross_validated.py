"""What cross-validation answers: the loss on examples that were left out, and how far to trust it.

    CV = (1/n) Σᵢ ℓ(f₋ᵢ(xᵢ), yᵢ)          one standard error: the spread of the n losses over √n

The n losses are not independent, since any two fits share most of their data; that standard error
is the usual one, and on the small side (Bengio & Grandvalet 2004 show that none is unbiased). Where
examples leave by cluster, the sums of the clusters are what varies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.errors import ShapeError
from upweight.evaluation.bootstrap import around, standard_error, student
from upweight.notation import count
from upweight.plot import axes

SHOWN = 3


@dataclass(frozen=True, eq=False)
class CrossValidated(Outcome):
    """The held-out loss of every example. Made by `loo`, `kfold` and `grouped`.

    `predicted` and `actual` are the mean losses of the groups that were refitted, `[r]`: from one
    fit, and from fits without them. Units are those of the loss.

    Args:
        kind: "leave-one-out", "10-fold", or what else, in words.
        approximate: ℓ(f₋ᵢ(xᵢ), yᵢ) of each example from one fit, `[n]`.
        exact: The same by a refit, where there is one; else approximate.
        train_losses: ℓ(f(xᵢ), yᵢ) of the fit on all data.
        outputs: f₋ᵢ(xᵢ), `[n, c]`.
        leverage: hᵢ; None where examples leave in groups.
        groups: Which examples leave together.
        unsafe: Places of the groups that a step from one fit says too little of.
        refitted: Places of the groups that were fitted again, in order.
        sampled: Groups that were drawn at random to check the others, as often as drawn; all of
            them where all were asked for.
        chances: Of each group, to be the one in a draw.
        failures: Why there is no refit of a group, by its place.
        is_clustered: Whether the standard error is over groups.
        loss: What ℓ is called.
        said: Notes.
        seconds: Time spent, refits included.
    """

    kind: str
    approximate: Float[Tensor, " n"]
    exact: Float[Tensor, " n"]
    train_losses: Float[Tensor, " n"]
    outputs: Float[Tensor, "n *c"]
    leverage: Float[Tensor, " n"] | None
    groups: tuple[tuple[int, ...], ...] = field(repr=False)
    unsafe: tuple[int, ...] = ()
    refitted: tuple[int, ...] = ()
    sampled: tuple[int, ...] = ()
    chances: Float[Tensor, " g"] | None = field(default=None, repr=False)
    failures: Mapping[int, str] = field(default_factory=dict)
    is_clustered: bool = False
    loss: str = "of the objective"
    said: tuple[str, ...] = ()
    seconds: float = 0.0

    # -- the numbers ------------------------------------------------------------------------------

    @cached_property
    def per_example(self) -> Float[Tensor, " n"]:
        """The held-out loss of each: from one fit, and by refits where that is unsafe.

        Random refits check the others and do not enter, unless all were refitted: the errors that
        they would take out are not those that are left.
        """
        found = self.approximate.clone()
        rows = [
            i for k in self.refitted if self.refits_all or k in self.unsafe for i in self.groups[k]
        ]
        found[rows] = self.exact[rows]
        return found

    @cached_property
    def mean(self) -> float:
        """CV, the mean held-out loss."""
        return float(self.per_example.mean())

    @cached_property
    def standard_error(self) -> float:
        """Of the mean. NaN for one example or group."""
        return standard_error(self.per_example, self.groups if self.is_clustered else None)

    @property
    def interval(self) -> tuple[float, float]:
        """The mean ± 1.96 standard errors."""
        _, low, high = around(self.mean, self.standard_error)
        return low, high

    @cached_property
    def predicted(self) -> Float[Tensor, " r"]:  # type: ignore[override]
        """Mean loss of each refitted group, from one fit."""
        return self._of_groups(self.approximate, self.refitted)

    @cached_property
    def actual(self) -> Float[Tensor, " r"] | None:  # type: ignore[override]
        """The same from fits without the group; None where nothing was refitted."""
        return self._of_groups(self.exact, self.refitted) if self.refitted else None

    @cached_property
    def missed(self) -> float | None:
        """What refits of all groups would change of the mean, from those drawn; None without any.

            (1/d) Σ_draws z        z = (1/n) Σ_{i∈g} (ℓᵢ refitted − ℓᵢ) / π_g

        Unbiased (Hansen & Hurwitz 1943). π_g is larger where one fit is expected to miss more; a
        group that is unsafe is refitted anyway, and misses nothing. Exact where all are refitted.
        """
        found = self._misses
        return None if found is None else float(found.mean())

    @cached_property
    def missed_standard_error(self) -> float | None:
        """Of `missed`: √(Σ z² / (d (d − 1))). NaN for one draw, or where no refit differs.

        About 0 and not about their mean: draws that agree have missed the few large ones. It is at
        least the usual standard error, and that where z has both signs. 0 where all were refitted.
        """
        found = self._misses
        if found is None:
            return None
        if self._is_census:
            return 0.0
        d, squares = len(found), float(found.square().sum())
        return math.sqrt(squares / (d * (d - 1))) if d > 1 and squares > 0 else math.nan

    @property
    def missed_interval(self) -> tuple[float, float] | None:
        """`missed` ± its standard errors at 95 % of Student's t for d − 1 degrees of freedom."""
        found, error = self._misses, self.missed_standard_error
        if found is None or error is None:
            return None
        half = 0.0 if self._is_census else student(len(found) - 1) * error
        middle = float(found.mean())
        return middle - half, middle + half

    @property
    def refits_all(self) -> bool:
        """Whether every group was fitted again: nothing is left that one fit misses."""
        return len(self.refitted) == len(self.groups)

    @property
    def _is_census(self) -> bool:
        """Whether no group was left to chance."""
        return len({*self.sampled, *self.unsafe, *self.failures}) == len(self.groups)

    @cached_property
    def _misses(self) -> Float[Tensor, " d"] | None:
        if not self.sampled or self.chances is None:
            return None
        moved, unsafe = self.exact - self.approximate, set(self.unsafe)
        if self._is_census:
            at = [i for k, group in enumerate(self.groups) if k not in unsafe for i in group]
            return (moved[at].sum() / len(moved)).reshape(1)
        drawn = [k for k in self.sampled if k not in unsafe]
        total = torch.stack([moved[list(self.groups[k])].sum() for k in drawn])
        return total / self.chances[drawn] / len(moved)

    @property
    def is_confirmed(self) -> bool:
        """Whether all of `missed_interval` is within a standard error of the mean.

        Not where that interval is not known; and not where a refit failed: what is kept there may
        have no limit.
        """
        if self.failures:
            return False
        return self.refits_all or _is_within(self.missed_interval, self.standard_error)

    def worst(self, k: int = 10) -> list[int]:
        """The k examples with the largest held-out losses, the largest first."""
        return self.per_example.topk(min(k, len(self.per_example))).indices.tolist()

    @property
    def _is_refitted(self) -> Tensor:
        found = torch.zeros(len(self.approximate), dtype=torch.bool)
        found[[i for k in self.refitted for i in self.groups[k]]] = True
        return found

    def _of_groups(self, values: Tensor, places: Sequence[int]) -> Float[Tensor, " r"]:
        parts = [values[list(self.groups[k])].mean() for k in places]
        return torch.stack(parts) if parts else values.new_zeros(0)

    # -- the outcome ------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return f"Cross-validation, {self.kind}"

    @property
    def verdict(self) -> str:
        n, low_high = len(self.per_example), _interval(self.interval)
        said = (
            f"The {self.kind} loss ({self.loss}) of {n} examples is {self.mean:.4g} (95 % interval "
            f"{low_high}; "
            f"training loss {float(self.train_losses.mean()):.4g})"
        )
        if self.refits_all:
            return f"{said}, by fits without each."
        unsafe = [k for k in self.unsafe if k in self.refitted]
        again = f" and {count(len(unsafe), 'refit')} where it is unsafe" if unsafe else ""
        said += f", from one fit{again}"
        failed = ""
        if self.failures:
            names = ", ".join(self._named(k) for k in list(self.failures)[:SHOWN])
            more = ", …" if len(self.failures) > SHOWN else ""
            failed = f"; without {names}{more} no refit succeeds: the mean is not confirmed"
        if self.missed is None:
            return f"{said}; no random refit checks it{failed}."
        drawn = len(set(self.sampled))
        low, high = self.missed_interval or (math.nan, math.nan)
        within = f"95 % interval {low:+.2g} to {high:+.2g}"
        if not low <= high:
            within = "one has no interval" if len(self.sampled) == 1 else "none differs"
        off = f"{self.missed:+.2g} ({within})"
        checked = f"by {drawn} random {'refit' if drawn == 1 else 'refits'} it is off by {off}"
        doubt = ""
        if not self.is_confirmed:
            if abs(self.missed) > self.standard_error:
                doubt = ", more than a standard error"
            elif low <= high:
                doubt = ", an interval that reaches beyond a standard error"
            doubt += ": it is not confirmed"
        return f"{said}; {checked}{failed or doubt}."

    @property
    def notes(self) -> tuple[str, ...]:
        found = list(self.said)
        left = [k for k in self.unsafe if k not in self.refitted]
        if left:
            named = ", ".join(self._named(k) for k in left[:SHOWN])
            found.append(
                f"one fit says too little of {len(left)} of {len(self.groups)}, which were not "
                f"refitted: {named}{', …' if len(left) > SHOWN else ''}"
            )
        if self.failures:
            k, reason = next(iter(self.failures.items()))
            found.append(
                f"{count(len(self.failures), 'refit')} failed and keep the approximation; the "
                f"first, without {self._named(k)}: {reason.rstrip('.')}"
            )
        return tuple(found)

    def _named(self, place: int) -> str:
        group = self.groups[place]
        return "+".join(map(str, group[:2])) + ("+…" if len(group) > 2 else "")

    def frame(self) -> "DataFrame":
        """One row per example."""
        place = {i: k for k, group in enumerate(self.groups) for i in group}
        order = [place[i] for i in range(len(self.per_example))]
        columns = {
            "loss": self.per_example,
            "approximate": self.approximate,
            "exact": self.exact.where(self._is_refitted, torch.nan),
            "train_loss": self.train_losses,
            "group": order,
        }
        if self.leverage is not None:
            columns["leverage"] = self.leverage
        return as_table(columns, name="example")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Held-out against training loss of each example; what was refitted is marked."""
        ax = axes(ax)
        rows, before = self._is_refitted.numpy(), self.train_losses.numpy()
        ax.scatter(before, self.per_example.numpy(), s=8, label="example")
        if rows.any():
            ax.scatter(
                before[rows], self.exact[rows], s=24, facecolors="none",
                edgecolors="C3", label="refitted",
            )  # fmt: skip
            ax.legend()
        ax.axline((0.0, 0.0), slope=1.0, color="0.6", linewidth=0.8)
        ax.set(xlabel="training loss", ylabel="held-out loss", title=self.title)
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            **self._fields("kind", "loss"),
            "n": len(self.per_example),
            **self._fields("mean", "standard_error", "interval"),
            "train_loss": float(self.train_losses.mean()),
            **self._fields("unsafe", "refitted", "predicted", "actual"),
            **self._fields("missed", "missed_standard_error", "missed_interval", "is_confirmed"),
            "largest_leverage": None if self.leverage is None else float(self.leverage.max()),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, eq=False)
class Difference(Outcome):
    """How much lower or higher the held-out loss of one model is than that of another, paired.

    `predicted` and `actual` are the mean difference over the groups that both refitted.

    Args:
        first, second: On the same examples, in the same order.
        names: What the two are called.
    """

    first: CrossValidated
    second: CrossValidated
    names: tuple[str, str] = ("the first model", "the second")

    @cached_property
    def per_example(self) -> Float[Tensor, " n"]:
        """ℓ of the first minus ℓ of the second."""
        return self.first.per_example - self.second.per_example

    @property
    def mean(self) -> float:
        """Of the differences."""
        return float(self.per_example.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, by example; by cluster where either was."""
        by = next((x.groups for x in (self.first, self.second) if x.is_clustered), None)
        return standard_error(self.per_example, by)

    @property
    def interval(self) -> tuple[float, float]:
        """The mean ± 1.96 standard errors."""
        _, low, high = around(self.mean, self.standard_error)
        return low, high

    @property
    def _both(self) -> list[int]:
        """Examples that both refitted."""
        rows = [
            {i for k in model.refitted for i in model.groups[k]}
            for model in (self.first, self.second)
        ]
        return sorted(rows[0] & rows[1])

    @property
    def predicted(self) -> float | None:  # type: ignore[override]
        """Mean difference over what both refitted, each from one fit."""
        rows, (a, b) = self._both, (self.first, self.second)
        return float((a.approximate - b.approximate)[rows].mean()) if rows else None

    @property
    def actual(self) -> float | None:  # type: ignore[override]
        """The same by refits."""
        rows = self._both
        return float((self.first.exact - self.second.exact)[rows].mean()) if rows else None

    @property
    def missed_interval(self) -> tuple[float, float] | None:
        """What refits of all groups would change of the mean; None without refits of both.

            from low_a − high_b to high_a − low_b,  of the intervals of what is missed of each

        Where each of the two holds in 95 of 100 draws, this does in 90 or more (Bonferroni).
        """
        parts = [
            (0.0, 0.0) if model.refits_all else model.missed_interval
            for model in (self.first, self.second)
        ]
        a, b = parts
        return None if a is None or b is None else (a[0] - b[1], a[1] - b[0])

    @property
    def is_confirmed(self) -> bool:
        """Whether all of `missed_interval` is within a standard error of the mean difference.

        A difference in pairs is known better than either loss, so that each being confirmed is not
        enough. Not where a refit of either failed.
        """
        if self.first.failures or self.second.failures or self.actual is None:
            return False
        whole = self.first.refits_all and self.second.refits_all
        return whole or _is_within(self.missed_interval, self.standard_error)

    @property
    def title(self) -> str:
        return f"Difference in cross-validated loss, {self.first.kind}"

    @property
    def verdict(self) -> str:
        lower = self.mean < 0
        low, high = self.interval
        losses = tuple(dict.fromkeys((self.first.loss, self.second.loss)))
        said = (
            f"The {self.first.kind} loss ({' against '.join(losses)}) of {self.names[0]} is "
            f"{abs(self.mean):.3g} "
            f"{'lower' if lower else 'higher'} than that of {self.names[1]} (95 % interval of the "
            f"difference {_interval(self.interval)})"
        )
        tells = ", which does not tell them apart" if low <= 0 <= high else ""
        return f"{said}{tells}{'' if self.is_confirmed else '; not confirmed by refits of both'}."

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.notes, *self.second.notes)))

    def frame(self) -> "DataFrame":
        """One row per example."""
        columns = {
            "first": self.first.per_example,
            "second": self.second.per_example,
            "difference": self.per_example,
        }
        return as_table(columns, name="example")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The differences from the smallest to the largest."""
        ax = axes(ax)
        ax.plot(self.per_example.sort().values.numpy())
        ax.axhline(self.mean, color="C3", label="mean")
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        ax.legend()
        ax.set(xlabel="examples, sorted", ylabel="difference in loss", title=self.title)
        return ax

    def numbers(self) -> dict[str, Any]:
        made = self._fields("mean", "standard_error", "interval")
        return made | self._fields("predicted", "actual", "missed_interval", "is_confirmed")


def difference(
    first: CrossValidated,
    second: CrossValidated,
    names: tuple[str, str] = ("the first model", "the second"),
) -> Difference:
    """The paired difference between two models, with its standard error.

        d̄ = (1/n) Σᵢ (ℓᵢᵃ − ℓᵢᵇ)        standard error: the spread of the n differences over √n

    Losses of the same example go together, so the difference is told far better than either loss.

    Args:
        first: Of `loo`, `kfold` or `grouped`.
        second: Of the same examples in the same order, left out in the same way.
        names: What the models are called in the verdict.

    Raises:
        ShapeError: They are not of the same examples, or left out differently.
    """
    if len(first.per_example) != len(second.per_example) or first.groups != second.groups:
        raise ShapeError(
            "A paired difference is between losses of the same examples, left out alike.",
            f"{len(first.per_example)} examples in {len(first.groups)} groups, and "
            f"{len(second.per_example)} in {len(second.groups)}.",
            "models of other rows, or folds from another seed.",
            "cross-validate both on the same rows, with the same folds=, such as an array of one "
            "label per example.",
        )
    return Difference(first, second, names)


def _is_within(interval: tuple[float, float] | None, limit: float) -> bool:
    """Whether it is known, and between −limit and limit."""
    return interval is not None and -limit <= interval[0] <= interval[1] <= limit


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{low:.4g} to {high:.4g}" if low == low else "unknown"
