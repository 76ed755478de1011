"""What retraining said of the scores: results of `upweight.evaluation`, as they are.

removals      predicted Δm beside that of models retrained without some examples, as `loo` finds
comparison    one verdict on all scores, as `fitted.check(recipe, budget)` finds
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.errors import NonFinite, ShapeError, SpecError, message
from upweight.notation import count, interval, short
from upweight.verdict import FEWEST, Judgement, Verdict, judged, worst

MOST_DOTS = 2000
"""Dots of the figure of a comparison on subsets."""

FEWEST_ESTIMATED = 3
"""Removals of which there is a correlation."""

Interval = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Series:
    """Predicted against actual changes of one query: one column of an `evaluation.LOO`, `of`.

    Estimates are (value, low, high), NaN where they are not known.
    """

    of: Any
    query: int
    pearson: Interval
    spearman: Interval
    slope: Interval

    @property
    def removed(self) -> tuple[tuple[int, ...], ...]:
        """The examples of each removal."""
        return tuple(self.of.examples)

    @property
    def judgement(self) -> Judgement | None:
        """The verdict on these removals; None where they are too few for intervals."""
        known = all(math.isfinite(v) for v in (*self.spearman, *self.slope))
        if not known or len(self.removed) < FEWEST:
            return None
        return judged(self.spearman, self.slope, len(self.removed))

    @property
    def data(self) -> dict[str, Any]:
        """JSON for the figure."""
        columns = {name: getattr(self.of, name) for name in ("predicted", "actual", "errors")}
        return {
            "label": self.of.label,
            "query": self.query,
            "removed": [list(removal) for removal in self.removed],
            "names": None if self.of.names is None else [str(name) for name in self.of.names],
            "repeats": self.of.repeats,
            "slope": short(self.slope[0]) if math.isfinite(self.slope[0]) else None,
        } | {name: None if x is None else _listed(x) for name, x in columns.items()}

    @property
    def row(self) -> dict[str, Any]:
        """What the table of estimates says."""
        estimates = (self.pearson, self.slope, self.spearman)
        return {
            "label": self.of.label,
            "query": self.query,
            "n": len(self.removed),
            "estimates": [interval(estimate).partition(" ")[::2] for estimate in estimates],
        }


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that retraining said: removals, a query at a time; and a comparison, None without one."""

    series: tuple[Series, ...] = ()
    comparison: Any = None

    @property
    def removed(self) -> tuple[int, ...]:
        """Every example that some removal took out."""
        found = (i for each in self.series for removal in each.removed for i in removal)
        return tuple(dict.fromkeys(found))

    @property
    def judgement(self) -> Judgement | None:
        """The worst verdict on the removals of a query; None where all are too few for one."""
        told = [found for each in self.series if (found := each.judgement) is not None]
        if not told:
            return None
        found = worst(told)
        return Judgement(found.verdict, f"{found.reason}, on the removals that were retrained")

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before the numbers of the removals."""
        return tuple(dict.fromkeys(note for each in self.series for note in each.of.notes))

    @property
    def subsets(self) -> dict[str, Any] | None:
        """Predicted and measured changes on subsets, each query about its own mean; JSON."""
        lds = getattr(self.comparison, "lds", None)
        if lds is None:
            return None
        rows, columns = lds.predicted.shape
        step = max(1, rows * columns // MOST_DOTS)
        found = {
            name: _listed(values - values.mean(dim=0), step, 4)
            for name, values in (("predicted", lds.predicted), ("measured", lds.measured))
        }
        of = torch.tensor(getattr(self.comparison, "queries", range(columns)))
        query = of.repeat(rows)[::step].tolist()
        return {**found, "query": query, "subsets": rows, "all": rows * columns}

    @property
    def words(self) -> dict[str, Any]:
        """How many models were retrained, and for what: a line of the health panel."""
        found, meaning, concern = "not compared", "nothing here shows that removal does this", True
        if self.series:
            removals = len({removal for each in self.series for removal in each.removed})
            queries = len({each.query for each in self.series})
            found, concern = f"{count(removals, 'removal')}, {count(queries, 'query')}", False
            meaning = "the comparison holds for these; for others it is evidence, not proof"
            if (repeats := max(each.of.repeats for each in self.series)) > 1:
                meaning = f"each the mean of {repeats} retrainings from their own seeds; {meaning}"
        elif self.comparison is not None:
            found = f"{count(self.comparison.models, 'model')}: {self.comparison.verdict}"
            meaning = "on random subsets of the data, for all queries at once"
            concern = self.comparison.verdict is not Verdict.SIZE
        return {"name": "Retraining", "value": found, "told": meaning, "concern": concern}


def evidence_of(given: Any, rows: int, columns: int, known: Sequence[Any] = ()) -> Evidence:
    """Results of evaluation of scores `[rows, columns]`, told apart.

    Args:
        given: What the caller says.
        rows: Of the scores.
        columns: Of the scores.
        known: `scores.checks`, whose last stands where the caller gives no comparison.

    Raises:
        SpecError: There is something else among them, or a second comparison.
        ShapeError: A removal is of a query or example that is not there.
        NonFinite: A change is NaN or infinite.
    """
    series: list[Series] = []
    comparisons = []
    for each in given if isinstance(given, Iterable) else [given]:
        if hasattr(each, "verdict") and hasattr(each, "reason"):
            comparisons.append(each)
        elif all(hasattr(each, name) for name in ("examples", "predicted", "actual")):
            series += [_series(each.query(j), rows, columns) for j in range(each.actual.shape[1])]
        else:
            raise SpecError(_refused(f"a {type(each).__module__}.{type(each).__qualname__}"))
    if len(comparisons) > 1:
        raise SpecError(_refused(f"{len(comparisons)} verdicts on all scores"))
    comparisons = comparisons or [*known[-1:]]
    return Evidence(tuple(series), comparisons[0] if comparisons else None)


def _series(one: Any, rows: int, columns: int) -> Series:
    (query,) = one.queries
    outside = [i for removal in one.examples for i in removal if not 0 <= i < columns]
    if outside or not 0 <= query < rows:
        raise ShapeError(
            f"Removals are of queries 0…{rows - 1} and examples 0…{columns - 1}.",
            f"query {query}, examples {outside[:5]} in {one.label!r}.",
            "indices into another data set.",
            "use row and column indices of the scores.",
        )
    for name in ("predicted", "actual"):
        values = getattr(one, name)[:, 0]
        if not bool(values.isfinite().all()):
            place = int((~values.isfinite()).nonzero()[0])
            raise NonFinite(
                f"Every {name} change must be finite.",
                f"{float(values[place])} for {one.examples[place]} in {one.label!r}.",
                "a retraining that diverged.",
                "leave that removal out, or retrain it to convergence.",
            )
    if len(one.examples) < FEWEST_ESTIMATED:
        return Series(one, query, *[(math.nan, math.nan, math.nan)] * 3)
    return Series(one, query, astuple(one.pearson), astuple(one.spearman), astuple(one.slope))


def _refused(given: str) -> str:
    return message(
        "evidence= takes results of retraining: what loo(…) and compare(…) gave, and one of "
        "fitted.check(…).",
        f"{given}.",
        "another object, or a second check of the same scores.",
        "pass the results themselves: evidence=[loo, fitted.check(recipe, budget)].",
    )


def _listed(values: Tensor, step: int = 1, digits: int = 6) -> list[float]:
    return [short(v, digits) for v in values.detach().double().cpu().ravel()[::step].tolist()]
