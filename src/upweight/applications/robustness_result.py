"""What the search for a small set answers: the set, the refit without it, and the way there."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table, json_of
from upweight.errors import SpecError
from upweight.notation import bracketed, count, percent, readable
from upweight.plot import LOWERED, NEUTRAL, RAISED, axes

HAPPENS = {
    "sign": "its sign changes",
    "lose significance": "it is no longer significant at the {level} level",
    "gain significance": "it becomes significant at the {level} level",
    "both": "it is significant at the {level} level with the opposite sign",
    "value": "it passes {value}",
    "sign of the difference": "it passes {value}",
    "lose significance of the difference": "it no longer differs significantly from {value} at the "
    "{level} level",
    "gain significance of the difference": "it comes to differ significantly from {value} at the "
    "{level} level",
    "both of the difference": "it differs significantly from {value} at the {level} level, on the "
    "other side",
}
"""What the removal of a set does, by question; of another value than 0, by its difference."""

ASKED = {
    "sign": "changes its sign",
    "lose significance": "takes away its significance at the {level} level",
    "gain significance": "makes it significant at the {level} level",
    "both": "makes it significant at the {level} level with the opposite sign",
    "value": "takes it past {value}",
    "sign of the difference": "takes it past {value}",
    "lose significance of the difference": "makes it no longer differ significantly from {value} "
    "at the {level} level",
    "gain significance of the difference": "makes it differ significantly from {value} at the "
    "{level} level",
    "both of the difference": "makes it differ significantly from {value} at the {level} level, on "
    "the other side",
}
"""What was looked for, by question."""


NAMED = 3
"""Rows or groups that a verdict names; of more it gives the number."""


READABLE = 80
"""Characters of names that a verdict holds."""


@dataclass(frozen=True)
class Finding:
    """A number and the ends of its interval; NaN where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return bracketed(self.value, self.low, self.high)

    def summary(self) -> list[float] | float:
        """As JSON."""
        return self.value if math.isnan(self.low) else [self.value, self.low, self.high]


@dataclass(frozen=True)
class OneShot:
    """The set of one linearization (Broderick, Giordano & Meager 2020).

    Args:
        k: Units that must leave by first order; None if no number of them does.
        holds: Whether a refit without them agrees; None where none was made.
        fewest: The fewest along the same order that a refit confirms; None if none did.
    """

    k: int | None
    holds: bool | None
    fewest: int | None


@dataclass(frozen=True, eq=False)
class Path:
    """The number as units leave one by one, in the order of the set.

    Args:
        left: How many have left.
        labels: The unit that leaves then; None at the start, and where several left since.
        predicted: By the linearization at the start: value and ends of the interval, `[steps, 3]`.
        refitted: The same, fitted again; NaN where it was not.
    """

    left: tuple[int, ...]
    labels: tuple[Hashable | None, ...]
    predicted: Float[np.ndarray, "s 3"]
    refitted: Float[np.ndarray, "s 3"]


@dataclass(frozen=True, eq=False)
class Robustness(Outcome):
    """How few rows carry a finding.

    A set that is given was left out and the model fitted again: it is a bound from above on how few
    rows suffice. That none is given does not show that there is none.

    Args:
        about: What was asked about, such as "coefficient of white".
        asked: "sign", "lose significance", "gain significance", "both" or "value".
        value: What is passed.
        level: Of the interval.
        n, units: Rows, and what could leave: rows, or groups.
        unit: "row" or "group".
        start: With all rows, as reported.
        one_shot: What one linearization says.
        k: The units that leave; None where no set is confirmed.
        rows: Labels of all rows that leave.
        left_out: Labels of the units that leave, in order.
        end: Fitted again without them; of a one-shot set that fails, the refit that says so.
        before: Fitted again with the last of them back in: nothing happens yet. None at k = 1.
        tried: The largest set that was looked at.
        path: The way from `start` to `end`.
        by: Who fitted again.
        said: Notes.
        certificate: A proof that no smaller set exists: none is offered.
    """

    about: str
    asked: str
    value: float
    level: float
    n: int
    units: int
    unit: str
    start: Finding
    one_shot: OneShot
    k: int | None
    rows: tuple[Hashable, ...]
    left_out: tuple[Hashable, ...]
    end: Finding | None
    before: Finding | None
    tried: int
    path: Path
    by: str
    said: tuple[str, ...] = ()
    certificate: None = None

    @property
    def predicted(self) -> int | None:
        """How many units must leave, by one linearization."""
        return self.one_shot.k

    @property
    def actual(self) -> int | None:
        """How many left in the refit that confirms it."""
        return self.k

    @property
    def share(self) -> float | None:
        """The share of rows that leave."""
        return None if self.k is None else len(self.rows) / self.n

    @property
    def title(self) -> str:
        return f"Which few {self.unit}s carry the {self.about}: {self.asked}"

    @property
    def verdict(self) -> str:
        if self.k is not None and self.end is not None:
            return (
                f"Without {self._counted(self.k)} the {self.about} goes from {self.start} to "
                f"{self.end}: {self._words(HAPPENS)}, confirmed by a refit of {self.by}."
            )
        if self.end is not None and self.one_shot.k is not None:
            return (
                f"One linearization predicts that leaving out {self._counted(self.one_shot.k)} "
                f"{self._words(ASKED)}, but a refit of {self.by} does not confirm it: the "
                f"{self.about} goes from {self.start} to {self.end}."
            )
        return (
            f"No set of at most {self.tried:,} of {count(self.units, self.unit)} was found whose "
            f"removal {self._words(ASKED)} (the {self.about}, {self.start}); this does not show "
            "that none exists."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        k, holds, fewest = self.one_shot.k, self.one_shot.holds, self.one_shot.fewest
        said = list(self.said)
        if k is None:
            said.insert(0, "one linearization predicts that no number of them suffices")
        elif holds is False:
            said.insert(
                0,
                f"one linearization predicts {k:,}, whose removal does not do it when refitted"
                + (f"; along its order {fewest:,} do" if fewest is not None else ""),
            )
        return tuple(said)

    def frame(self) -> "DataFrame":
        """The path: a line for each number of units left out, predicted and refitted.

        Columns `left_out`, `label` (the unit that leaves last), and `predicted` and `refitted` with
        the ends `_low` and `_high` of their intervals, where there are intervals.
        """
        from upweight.runtime.tables import pd

        labels = pd.Series(self.path.labels, dtype=object)
        columns: dict[str, Any] = {"left_out": self.path.left, "label": labels}
        ends = ("", "_low", "_high") if self.has_interval else ("",)
        for name, values in (("predicted", self.path.predicted), ("refitted", self.path.refitted)):
            for k, end in enumerate(ends):
                columns[f"{name}{end}"] = values[:, k]
        return as_table(columns)

    @property
    def has_interval(self) -> bool:
        """Whether what was asked about has one."""
        return not math.isnan(self.start.low)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The number and its interval as units leave, predicted and refitted."""
        ax = axes(ax)
        left = np.array(self.path.left)
        for name, values, color, line in (
            ("predicted", self.path.predicted, RAISED, "--"),
            ("refitted", self.path.refitted, NEUTRAL, "-"),
        ):
            there = np.isfinite(values[:, 0])
            mark = "o" if there.sum() < 25 else ""
            ax.plot(left[there], values[there, 0], line, color=color, label=name, marker=mark, ms=3)
            if self.has_interval and name == "refitted":
                low, high = values[there, 1], values[there, 2]
                ax.fill_between(left[there], low, high, color=LOWERED, alpha=0.15, linewidth=0)
            elif self.has_interval:
                for end in (1, 2):
                    ax.plot(left[there], values[there, end], ":", color=color, linewidth=1)
        ax.axhline(self.value, color="0.4", linewidth=1)
        ax.set(xlabel=f"{self.unit}s left out", ylabel=self.about)
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "start": self.start.summary(),
            "end": None if self.end is None else self.end.summary(),
            "k": self.k,
            "share": self.share,
            "predicted": self.one_shot.k,
            "one_shot_holds": self.one_shot.holds,
            "one_shot_fewest": self.one_shot.fewest,
            "tried": self.tried,
            "left_out": [json_of(label) for label in self.left_out],
            "rows": [json_of(label) for label in self.rows],
        }

    @property
    def change(self) -> str:
        """What the removal does, such as "its sign changes"."""
        return self._words(HAPPENS)

    @property
    def sought(self) -> str:
        """The same of a set, such as "changes its sign"."""
        return self._words(ASKED)

    @property
    def names(self) -> str:
        """Who leaves, where it is few: "District of Columbia"; else empty."""
        few = 0 < len(self.left_out) <= NAMED
        text = ", ".join(map(str, self.left_out)) if few else ""
        return text if len(text) <= READABLE else ""

    def _counted(self, k: int) -> str:
        who = f"; {self.names}" if self.names and self.left_out and len(self.left_out) == k else ""
        if who and all(isinstance(label, int | float) for label in self.left_out):
            # A number beside a percentage does not say that it is a name.
            who = f"; {self.unit}{'s' * (k != 1)} {self.names}"
        if self.unit == "row":
            return f"{k:,} of {count(self.n, 'row')} ({percent(k / self.n)}{who})"
        rows = f"; {len(self.rows):,} of {self.n:,} rows" if self.k == k else ""
        return f"{k:,} of {count(self.units, self.unit)} ({percent(k / self.units)}{rows}{who})"

    def _words(self, of: Mapping[str, str]) -> str:
        level = f"{100 * (1 - self.level):g} %"
        about_zero = self.value == 0 or self.asked == "value"
        asked = self.asked if about_zero else f"{self.asked} of the difference"
        return of[asked].format(level=level, value=readable(self.value))


class _Several(Outcome):
    """Answers to several questions: confirmed where a refit stands behind at least one of them."""

    findings: Any

    @property
    def predicted(self) -> tuple[int | None, ...]:
        """How many must leave by one linearization, question by question."""
        return tuple(found.predicted for found in self.findings)

    @property
    def actual(self) -> tuple[int | None, ...] | None:
        """How many left in the refits that confirm it; None where there is none."""
        found = tuple(found.actual for found in self.findings)
        return found if any(k is not None for k in found) else None


@dataclass(frozen=True, eq=False)
class RobustnessTable(_Several):
    """One `Robustness` per coefficient and question: a line each.

    `predicted` and `actual` are how many must leave, and how many left, line by line.

    Args:
        lines: What was found, by (model, coefficient); models are "" where there is one.
    """

    lines: tuple[tuple[str, str, Robustness], ...]

    def __post_init__(self) -> None:
        if not self.lines:
            raise SpecError(
                "A table has at least one coefficient and one question.",
                "none.",
                "an empty list.",
                "name coefficients, or leave the argument out for all of them.",
            )

    @property
    def findings(self) -> tuple[Robustness, ...]:
        """What was found, line by line."""
        return tuple(found for _, _, found in self.lines)

    title = "How few rows carry each coefficient"

    @property
    def verdict(self) -> str:
        held = [line for line in self.lines if line[2].k is not None]
        asked = f"{count(len(self.lines), 'question')}"
        if not held:
            return (
                f"For none of {asked} was a set of rows found that changes the answer; this does "
                "not show that none exists."
            )
        few = sum((found.share or 1.0) <= 0.01 for _, _, found in held)
        model, name, least = min(held, key=lambda line: line[2].share or 1.0)
        place = f"{name} of {model}" if model else name
        return (
            f"For {len(held)} of {asked} a set of rows was found that changes the answer, each "
            f"confirmed by a refit, and {few} of them are at most 1 % of the rows; the smallest "
            f"is {count(least.k or 0, least.unit)} ({place}, {least.asked})."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        every = [note for found in self.findings for note in found.said]
        return tuple(dict.fromkeys(every))

    def frame(self) -> "DataFrame":
        """A line per coefficient and question.

        Columns `model` (where several were given), `coefficient`, `estimate`, `low`, `high`,
        `asked`, `one_shot` and `one_shot_holds`, `k`, `share`, `tried`, and after the refit
        `estimate_without`, `low_without`, `high_without`.
        """
        lines = []
        for model, name, found in self.lines:
            end = found.end if found.k is not None and found.end is not None else Finding(math.nan)
            line: dict[str, Any] = {} if not model else {"model": model}
            lines.append(
                line
                | {
                    "coefficient": name,
                    "estimate": found.start.value,
                    "low": found.start.low,
                    "high": found.start.high,
                    "asked": found.asked,
                    "one_shot": found.one_shot.k,
                    "one_shot_holds": found.one_shot.holds,
                    "k": found.k,
                    "share": found.share,
                    "tried": found.tried,
                    "estimate_without": end.value,
                    "low_without": end.low,
                    "high_without": end.high,
                }
            )
        return as_table(lines).astype({"one_shot": "Int64", "k": "Int64"})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The share of rows that leaves, a bar per line; hollow where no set was found."""
        ax = axes(ax)
        names = [
            f"{f'{model}: ' if model else ''}{name}, {f.asked}" for model, name, f in self.lines
        ]
        places = np.arange(len(names))
        shares = [100 * (found.share or found.tried / found.units) for _, _, found in self.lines]
        for place, share, (_, _, found) in zip(places, shares, self.lines, strict=True):
            ax.barh(
                place, share, color=NEUTRAL if found.k is not None else "none", edgecolor=NEUTRAL
            )
        ax.set(xlabel="rows left out, % (hollow: none found up to here)")
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "lines": [
                {"model": model, "coefficient": name} | found.summary()
                for model, name, found in self.lines
            ],
        }


@dataclass(frozen=True, eq=False)
class Fragility(_Several):
    """How few rows carry one coefficient: its sign, its significance, both together.

    `predicted` and `actual` are how many must leave, and how many left, question by question.

    Args:
        findings: One `Robustness` for each question, of the same coefficient.
    """

    findings: tuple[Robustness, ...]

    @property
    def title(self) -> str:
        return f"How few rows carry the {self.findings[0].about}"

    @property
    def verdict(self) -> str:
        first = self.findings[0]
        held: dict[tuple[Hashable, ...], list[Robustness]] = {}
        for found in self.findings:
            if found.k is not None:
                held.setdefault(found.left_out, []).append(found)
        if not held:
            return (
                f"No set of at most {max(f.tried for f in self.findings):,} of "
                f"{count(first.units, first.unit)} was found whose removal changes the sign or the "
                f"significance of the {first.about}, {first.start}; this does not show that none "
                "exists."
            )
        parts = []
        for same in sorted(held.values(), key=lambda found: found[0].k or 0):
            one = same[0]
            who = f" ({one.names})" if one.names else ""
            end = "" if one.end is None else f" goes to {one.end} and"
            parts.append(
                f"without {one.k:,} of {count(one.units, one.unit)}{who} it{end} "
                + ", and ".join(
                    found.change.removeprefix("it ").replace("its sign changes", "changes its sign")
                    for found in same
                )
            )
        said = f"The {first.about} is {first.start}: " + "; ".join(parts)
        return f"{said} (refitted by {first.by})."

    @property
    def notes(self) -> tuple[str, ...]:
        missing = [
            f"no set of at most {found.tried:,} was found that {found.sought}; this does not show "
            "that none exists"
            for found in self.findings
            if found.k is None
        ]
        every = [note for found in self.findings for note in found.said]
        return tuple(dict.fromkeys([*missing, *every]))

    def frame(self) -> "DataFrame":
        """A line per question, as of `RobustnessTable`, and `rows`: the labels of all that leave.

        The first line is the coefficient with all rows.
        """
        first = self.findings[0]
        lines: list[dict[str, Any]] = [
            {"change": "none", "k": 0, "share": 0.0, "estimate": first.start.value}
            | {"low": first.start.low, "high": first.start.high, "rows": ()}
        ]
        for found in self.findings:
            held = found.k is not None and found.end is not None
            end = found.end if held and found.end is not None else Finding(math.nan)
            lines.append(
                {"change": found.asked, "k": found.k, "share": found.share, "estimate": end.value}
                | {"low": end.low, "high": end.high, "rows": found.rows if held else ()}
            )
        return as_table(lines).astype({"k": "Int64"})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The coefficient and its interval with all rows, and refitted without each set."""
        ax = axes(ax)
        first = self.findings[0]
        lines = [(f"all {count(first.n, 'row')}", first.start)]
        for found in self.findings:
            if found.k is not None and found.end is not None:
                who = found.names or count(found.k, found.unit)
                lines.append((f"without {who}\n({found.asked})", found.end))
        for at, (_, end) in enumerate(lines):
            color = NEUTRAL if at == 0 else RAISED
            ax.plot([end.low, end.high], [at, at], color=color, linewidth=2)
            ax.plot([end.value], [at], "o", color=color)
        ax.axvline(first.value, color="0.4", linewidth=1)
        ax.set_yticks(range(len(lines)), [name for name, _ in lines])
        ax.invert_yaxis()
        ax.margins(y=0.25)
        ax.set(xlabel=f"{first.about}, {100 * first.level:g} % interval")
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "findings": [found.summary() for found in self.findings],
        }
