"""Scores: the answer, with its unit, its error and where it came from.

    S[q, i] = ∂m_q/∂wᵢ  at w = 1         m_q(w) ≈ m_q(1) + Σᵢ S[q, i] (wᵢ − 1)

Upweighting example i raises m_q where S > 0. Removing it is wᵢ = 0, so Δm_q ≈ −S[q, i].
"""

import contextlib
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._html import card
from upweight._text import readable
from upweight._typing import DataFrame, Folder
from upweight.effects import FIRST_ORDER, Effects, as_groups, first_order, reweighted, without
from upweight.errors import (
    AssumptionWarning,
    NonFinite,
    ShapeError,
    SpecError,
    UpweightError,
    message,
)
from upweight.notation import count, noun_of, written
from upweight.notation import readable as readable_number
from upweight.plot import Plot
from upweight.provenance import Answered, Context, Provenance, Role
from upweight.runtime import callers, evaluations
from upweight.runtime.headers import Misfit, fitting, stale
from upweight.runtime.matrix import StoredMatrix, Tile
from upweight.runtime.selection import (
    groups_by_place,
    is_row,
    labels_by_place,
    place_of,
    places,
    row_of,
)
from upweight.runtime.store import FINISHED
from upweight.verdict import Checked, Verdict

SAVED = {"scores": "saved from memory"}
"""What scores on disk depend on that say nothing of it."""

AGAIN = (
    "the same attribute(…, into=Shards(folder)), or of a run `upweight rerun RUN --project "
    "FILE.py`, which compute only what is missing; or ask whoever gave you the run for it; or "
    "scores.save(folder)"
)
"""How scores on disk are made again."""

NEXT = (
    ".top(query=0), .table(query=0), .predict(drop=[…]); upweight.report.html(scores, 'page.html')"
)

BRIEF = 3
"""Examples at each end of the ranking on a card in a notebook."""

HEADER = ("when upweighted", "training example", "label", "score")
"""Of a ranking in a notebook."""

SIZES_UNKNOWN = "of these predicted changes read the order and not the size"
"""How the warning of a prediction begins."""

LOOKED_AT_ONCE = 4_000_000
"""Numbers looked at together for NaN and infinity."""


class Unit(enum.Enum):
    """What one entry of the scores means."""

    DERIVATIVE = "∂m/∂w: change of the measurement per unit weight of a training example"
    VALUE = "value: a share of a total, as Shapley values are; the columns of a row add up"
    RANK = "rank: only the order within a row means anything"


@dataclass(frozen=True)
class Ranking:
    """The training examples that raise and lower one measurement most when upweighted.

    Args:
        query: Which row.
        raises: Indices with the largest positive scores, largest first.
        raises_by: Their scores.
        lowers: Indices with the most negative scores, most negative first.
        lowers_by: Their scores.
        noun: What was measured, in a word.
        asked: What the query is called, with its label.
        names: What the user calls each of the examples, and its label as text.
        errors: Standard errors of the scores by index; empty where there are none.
    """

    query: int
    raises: tuple[int, ...]
    raises_by: tuple[float, ...]
    lowers: tuple[int, ...]
    lowers_by: tuple[float, ...]
    noun: str = field(default="measurement", repr=False, compare=False)
    asked: str = field(default="", repr=False, compare=False)
    names: Mapping[int, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)
    errors: Mapping[int, float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, query: int, high: Tensor, high_by: Tensor, low: Tensor, low_by: Tensor) -> Self:
        """From both ends of an order, without what has no effect or one of the other sign."""
        above, below = int((high_by > 0).sum()), int((low_by < 0).sum())
        ends = (high[:above], high_by[:above], low[:below], low_by[:below])
        raises, raises_by, lowers, lowers_by = (tuple(end.tolist()) for end in ends)
        return cls(query, raises, raises_by, lowers, lowers_by)

    def named(self, measure: str, context: Context | None) -> Self:
        """The same with what the user calls the query and the examples."""
        noun = noun_of(measure)
        if context is None:
            return replace(self, noun=noun)
        at = [*self.raises, *self.lowers]
        told = _told(context, "train", at) or [""] * len(at)
        names = {i: (context.name("train", i), text) for i, text in zip(at, told, strict=True)}
        asked = context.asked_of_all
        if context.queries is not None and not asked:
            ids = getattr(context.rows("query"), "ids", None)
            parts = [] if ids is None else [str(ids[self.query])]
            asked = ", ".join([*parts, *_told(context, "query", [self.query])])
        return replace(self, noun=noun, asked=asked, names=names)

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers as JSON would hold them."""
        ends = ("query", "raises", "raises_by", "lowers", "lowers_by")
        return {name: getattr(self, name) for name in ends}

    @property
    def _title(self) -> str:
        return f"query {self.query}" + (f": {self.asked}" if self.asked else "")

    def _lines(self) -> list[tuple[str, str, str, str]]:
        """What an example does, its name, its label and its score."""
        found = []
        for word, indices, values in (
            ("raises", self.raises, self.raises_by),
            ("lowers", self.lowers, self.lowers_by),
        ):
            for i, value in zip(indices, values, strict=True):
                name, label = self.names.get(i, (str(i), ""))
                told = _with_error(value, self.errors.get(i))
                found.append((f"{word} the {self.noun}", name, label, told))
        return found

    def __str__(self) -> str:
        lines = self._lines()
        if not lines:
            return f"{self._title}\n  no example moves the {self.noun}"
        wide = [max(len(line[k]) for line in lines) for k in (1, 2)]
        rows = (
            f"  {word}  {name:>{wide[0]}}  {label:<{wide[1]}}  {value}"
            for word, name, label, value in lines
        )
        return "\n".join([self._title, *rows])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return card(self._title, {}, HEADER, self._lines())


@dataclass(frozen=True, eq=False, repr=False)
class TopScores(Answered):
    """The extreme scores of each query, for training sets whose scores are too many to hold.

    Args:
        raises: Indices of the k largest scores of each query, largest first.
        raises_by: Those scores.
        lowers: Indices of the k smallest, most negative first.
        lowers_by: Those scores.
        unit: What a score means.
        provenance: How they were made.
        context: The live task and data.
    """

    raises: Int[Tensor, "q k"]
    raises_by: Float[Tensor, "q k"]
    lowers: Int[Tensor, "q k"]
    lowers_by: Float[Tensor, "q k"]
    unit: Unit
    provenance: Provenance
    context: Context | None = None

    def __len__(self) -> int:
        return len(self.raises)

    def _shape_and_unit(self) -> tuple[str, str]:
        kept, n = self.raises.shape[1], self.provenance.n
        shape = (
            f"{count(len(self), 'query')} × the {kept} highest and the {kept} lowest scores of "
            f"{count(n, 'training example')}"
        )
        return shape, self.unit.value.split(":")[0]

    def _about(self) -> dict[str, str]:
        return super()._about() | {"next": ".top(query=0)"}

    def top(self, k: int | None = None, query: int = 0) -> Ranking:
        """As `Scores.top`, for k up to the number that was kept, which is the default.

        Raises:
            ShapeError: There is no such query, or fewer were kept.
            SpecError: k is not a number of examples.
        """
        k = self.raises.shape[1] if k is None else k
        _require_count(k)
        if not is_row(query, len(self)) or k > self.raises.shape[1]:
            raise ShapeError(
                f"Kept are {self.raises.shape[1]} examples for each of {len(self)} queries.",
                f"k={k}, query={query}.",
                "an index into the full data set, or a larger k than was asked for.",
                f"use a query in 0…{len(self) - 1}, or attribute(..., into=Top({k})).",
            )
        query = row_of(query, len(self))
        kept = (self.raises, self.raises_by, self.lowers, self.lowers_by)
        found = Ranking.of(query, *(each[query, :k] for each in kept))
        return found.named(self.provenance.measure, self.context)


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Answered):
    """S[q, i] with its unit, standard error and provenance.

    Args:
        values: One row per query, one column per training example (or per group).
        unit: What an entry means.
        provenance: How it was made.
        error: Standard error of each entry, or None where the method is deterministic.
        columns: What the columns are when they are groups: their labels. None: training examples.
        context: The live task and data, lost on `save`.
        checks: What `upweight.check` found of them, the last at the end; of that `save` keeps the
            verdict. Pages say it first, and `predict` asks it.

    Raises:
        ShapeError: `values` is not a matrix, or `error` or `columns` do not fit it.
        NonFinite: An entry is NaN or infinite.
    """

    values: Float[Tensor, "q n"]
    unit: Unit
    provenance: Provenance
    error: Float[Tensor, "q n"] | None = None
    columns: tuple[str, ...] | None = None
    context: Context | None = None
    checks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        error_fits = self.error is None or self.error.shape == self.values.shape
        columns_fit = self.columns is None or len(self.columns) == self.values.shape[-1]
        if self.values.ndim != 2 or not error_fits or not columns_fit:
            raise ShapeError(
                "Scores are a matrix [q, n], with errors of the same shape and one label per "
                "column.",
                f"values {tuple(self.values.shape)}, "
                f"error {None if self.error is None else tuple(self.error.shape)}, "
                f"{None if self.columns is None else len(self.columns)} column labels.",
                "scores put together by hand.",
                "use the Scores that attribute(...) returns.",
            )
        if (bad := _first_not_finite(self.values)) is not None:
            row, column = bad
            raise NonFinite(
                "Scores must be finite.",
                f"{float(self.values[row, column])} for query {row}, column {column}.",
                "a gradient that overflows in this dtype.",
                "use a float64 model, or look at that query's loss.",
            )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, query: Any) -> Float[Tensor, " n"]:
        """S[q, ·] of one query, by its place or by its id in the index that it came with.

        Raises:
            ShapeError: There is no such query.
        """
        return self.values[self.place(query)]

    def __iter__(self) -> Iterator[Float[Tensor, " n"]]:
        """The rows in order."""
        return (self[query] for query in range(len(self)))

    def place(self, query: Any) -> int:
        """The row of a query, from its place or from its id; a whole number is a place.

        Raises:
            ShapeError: There is no such query.
        """
        rows = None if self.context is None else self.context.rows("query")
        if isinstance(query, str | tuple) and rows is not None and rows.ids is not None:
            return place_of(query, rows.ids, "query")
        is_other = _is_number(query) and not is_row(query, len(self))
        if is_other and rows is not None and rows.ids is not None:
            places = [place for place, own in enumerate(rows.ids) if own == query]
            if len(places) == 1:
                raise ShapeError(
                    f"A whole number is the place of a query, in 0…{len(self) - 1}.",
                    f"query={query!r}.",
                    "its id in the index of the data.",
                    f"its place, query={places[0]}.",
                )
        return row_of(query, len(self))

    def _columns_of(self, given: Any) -> Any:
        """The same with ids of training examples, or names of groups, turned into places."""
        entries = [given] if isinstance(given, str) or _is_number(given) else given
        is_named = isinstance(entries, Iterable) and not isinstance(entries, Tensor)
        if not is_named:
            return entries
        rows = None if self.context is None else self.context.rows("train")
        ids = self.columns if rows is None or self.columns is not None else rows.ids
        if ids is None:
            return list(entries)
        entries = list(entries)
        is_id = self.columns is None and any(map(_is_number, ids))
        if is_id and (numbers := [e for e in entries if _is_number(e)]):
            raise ShapeError(
                "Where ids are numbers other than 0…n − 1, examples are named by a mask, or by a "
                "tensor of places.",
                f"{', '.join(map(str, numbers[:5]))} of {len(ids)} examples whose ids begin with "
                f"{', '.join(map(str, ids[:5]))}.",
                "an index that was shuffled or cut, as by train_test_split, in which a number may "
                "be an id or a place.",
                f"of ids a mask over all rows, drop=X.index.isin({numbers[:5]}); of places, as in "
                f"scores.top(…).raises, drop=torch.tensor({numbers[:5]}).",
            )
        what, names = "training example" if self.columns is None else "group", (str, tuple)
        return [place_of(e, ids, what) if isinstance(e, names) else e for e in entries]

    def _shape_and_unit(self) -> tuple[str, str]:
        what = "training example" if self.columns is None else "group"
        shape = f"{count(len(self), 'query')} × {count(self.values.shape[1], what)}"
        return shape, self.unit.value.split(":")[0]

    def _about(self) -> dict[str, str]:
        """As of every answer, with the strongest pair and what to ask next."""
        return super()._about() | {"strongest": self._strongest(), "next": NEXT}

    def _strongest(self) -> str:
        if not self.values.numel():
            return "none"
        place = int(self.values.abs().argmax())
        q, i = divmod(place, self.values.shape[1])
        error = None if self.error is None else float(self.error[q, i])
        value = _with_error(float(self.values[q, i]), error)
        if self.columns is not None:
            return f"group {self.columns[i]} on query {q}: {value}"
        mine, asked = (self._in_words(*each) for each in (("train", i), ("query", q)))
        if self.context is not None and self.context.asked_of_all:
            return f"training example {mine} on {self.context.asked_of_all}: {value}"
        return f"training example {mine} on query {asked}: {value}"

    def _in_words(self, role: Role, index: int) -> str:
        """An example by its name, with its label."""
        context = self.context
        if context is None or context.data(role) is None:
            return str(index)
        labels = context.labels(role, [index]) or context.beginnings(role, [index])
        return context.name(role, index) + (f" ({_label(labels[0])})" if labels else "")

    def _repr_html_(self) -> str:
        title, about = self._told()
        if not self.values.numel() or self.columns is not None or isinstance(self, StoredScores):
            return card(title, about)
        query = int(self.values.abs().argmax()) // self.values.shape[1]
        found = self.top(BRIEF, query)
        return card(title, about, (found._title, *HEADER[1:]), found._lines())

    def top(self, k: int = 10, query: Any = 0) -> Ranking:
        """The k examples that raise and the k that lower measurement `query` when upweighted.

        Examples with a score of zero or of the other sign are never listed. The query is named by
        its row, or by its id in the index that it came with.

        Raises:
            ShapeError: There is no such query.
            SpecError: k is not a number of examples.
        """
        _require_count(k)
        query = self.place(query)
        row = self.values[query]
        order = row.argsort(descending=True, stable=True)
        up, down = order[:k], order.flip(0)[:k]
        found = Ranking.of(query, up, row[up], down, row[down])
        if self.error is not None:
            shown = [*found.raises, *found.lowers]
            told = self.error[query, shown].tolist()
            found = replace(found, errors=dict(zip(shown, told, strict=True)))
        if self.columns is None:
            return found.named(self.provenance.measure, self.context)
        names = {i: (self.columns[i], "") for i in (*found.raises, *found.lowers)}
        return replace(found.named(self.provenance.measure, None), names=names)

    def table(self, query: Any = 0, k: int = 10) -> "DataFrame":
        """The k examples at each end of the ranking of one query, with what the user knows of them.

        A row per example: `example`, its id in the index of the training data or else its place;
        `place`; what it does when upweighted (`effect`) and its `score`, with its standard
        `error` where it has one; its `label`; and, where the data came as a table, its values as
        they were given, before a Pipeline's transformations, in columns of that table's names.
        Scores of groups have neither.

        Raises:
            ShapeError: There is no such query.
            SpecError: k is not a number of examples.
        """
        from upweight.runtime.tables import pd

        found = self.top(k, query)
        at = [*found.raises, *found.lowers]
        columns: dict[str, Any] = {
            "place": at,
            "effect": ["raises"] * len(found.raises) + ["lowers"] * len(found.lowers),
            "score": [*found.raises_by, *found.lowers_by],
        }
        if found.errors:
            columns["error"] = [found.errors[i] for i in at]
        context, name = (None, "group") if self.columns else (self.context, "example")
        ids: list[Any] = [self.columns[i] for i in at] if self.columns else list(at)
        if context is not None:
            labels, rows = context.labels("train", at), context.rows("train")
            if labels is not None:
                columns["label"] = labels
            if rows is not None:
                taken = rows.take(at)
                ids = list(taken.ids or ())
                for column, values in taken.by_column():
                    while column in columns:
                        column += " (given)"
                    columns[column] = values
        # tupleize_cols: ids that are tuples stay one id each.
        return pd.DataFrame(columns, index=pd.Index(ids, name=name, tupleize_cols=False))

    @property
    def against_sizes(self) -> str:
        """Why to read the order of these scores and not their size; empty: sizes are supported.

        The last check decides, where there was one: it supports sizes if it said "Order and size".
        Without a check they are supported where the method is exact (a convex objective, its own
        curvature without damping, solved, at its minimum) and removing an example does what its
        score says, or where the method measured them by training again.
        """
        return self._against_sizes_of(1.0)

    def _against_sizes_of(self, columns: float) -> str:
        """The same of so many columns together."""
        if self.unit is Unit.RANK:
            return "these scores have an order within each query and no size"
        if not self.checks:
            return self.provenance.against_removal(columns * self.examples_a_column)
        found = self.checks[-1]
        if found.verdict is Verdict.SIZE:
            return ""
        return f"retraining said “{found.verdict}”: {found.reason}"

    def predict(
        self, drop: Iterable[Any] = (), weights: Iterable[float] | None = None
    ) -> Float[Tensor, " q"]:
        """Δm_q if the examples in `drop` are removed, or the data weights become `weights`.

            Δm_q ≈ Σᵢ S[q, i] (wᵢ − 1)

        First order in w: effects add up. Where nothing supports the size of the scores, or of so
        many together, an `AssumptionWarning` says why, see `against_sizes`; the numbers are the
        same. `Fitted.removal` is more than first order.
        `drop` holds places, ids (texts or tuples) of the index that the training data came with, or
        names of groups; or it is a mask that is True where an example is removed. Where the index
        holds numbers other than 0…n − 1 a list of numbers could be either: places are then given as
        a tensor, `drop=torch.tensor(scores.top().raises)`, and ids as a mask,
        `drop=X.index.isin([15])`.

        Raises:
            UpweightError: The unit is not ∂m/∂w.
            ShapeError: An index is out of range or repeated, could be a place or an id; a mask or
                `weights` is not `[n]`.
            NonFinite: A weight is NaN or infinite.
            SpecError: Both `drop` and `weights` are given.
        """
        self.require_derivatives()
        n = self.values.shape[1]
        if weights is not None and not (isinstance(drop, tuple) and not drop):
            raise SpecError(
                "A prediction takes either examples to drop or weights.",
                "both.",
                "weights for some examples and a removal of others.",
                "give weights alone, with 0 for what is dropped.",
            )
        if weights is None:
            dropped = self.values[:, places(self._columns_of(drop), n, "Columns to drop")]
            self._warn_of_sizes(dropped.shape[1])
            return without(dropped.sum(dim=1))
        w: Any = weights
        if not isinstance(w, Tensor):
            w = np.asarray(list(w) if isinstance(w, Iterator | ValuesView) else w)
        is_number = isinstance(w, Tensor) or w.dtype.kind in "biuf"
        if not is_number:
            raise ShapeError(
                f"Data weights have one entry per column: shape ({n},).",
                "weights that are no numbers.",
                "a list of names, or a table's column of texts.",
                "start from torch.ones(n) and change entries.",
            )
        w = torch.as_tensor(w)
        found = reweighted(self.values[:], w)
        self._warn_of_sizes(float((w.double() - 1.0).abs().sum()))
        return found

    @property
    def examples_a_column(self) -> float:
        """One, or of groups how many on average."""
        return 1.0 if self.columns is None else self.provenance.n / max(1, len(self.columns))

    def _warn_of_sizes(self, columns: float) -> None:
        """Warn where what is predicted of so many columns has a size that nothing supports."""
        against = self._against_sizes_of(columns)
        if against:
            next_ = "" if self.checks else ". upweight.check(scores, recipe) measures the sizes"
            callers.warn(f"{SIZES_UNKNOWN}: {against}{next_}", AssumptionWarning)

    def removal(self, groups: Iterable[Any] | None = None) -> Effects:
        """Δm of removing each group of training examples, to first order: −Σ S[q, i].

        Args:
            groups: What each column removes, as for `Fitted.removal`. None: each example by itself.

        Raises:
            UpweightError: The unit is not ∂m/∂w.
            ShapeError: The columns are not the training examples, or a group names others.
        """
        self.require_derivatives()
        self.require_examples()
        rows = None if self.context is None else self.context.rows("train")
        named = groups_by_place(groups, None if rows is None else rows.ids)
        chosen = as_groups(named, self.values.shape[1])
        values = first_order(self.values[:], chosen)
        return Effects(values, chosen, FIRST_ORDER, self.provenance, context=self.context)

    def require_derivatives(self) -> None:
        """Refuse scores that predict nothing.

        Raises:
            UpweightError: The unit is not ∂m/∂w.
        """
        if self.unit is not Unit.DERIVATIVE:
            ranks = self.unit is Unit.RANK
            raise UpweightError(
                message(
                    "A prediction needs scores in ∂m/∂w.",
                    "scores that only rank." if ranks else "values, which share out a total.",
                    "a similarity or an uncalibrated projection method."
                    if ranks
                    else "Shapley values, which are means over many data sets.",
                    "use Influence(...), or only compare the order of these scores; where their "
                    "sums should rank subsets, pass (weights - 1) @ scores.values.T as a matrix.",
                )
            )

    def require_examples(self) -> None:
        """Refuse scores whose columns are not the training examples in order.

        Raises:
            ShapeError: They are groups.
        """
        if self.columns is not None:
            raise ShapeError(
                "This needs one column per training example, in order.",
                f"columns {list(self.columns[:5])}.",
                "scores of groups.",
                "use attribute(...) as it comes, over all training examples.",
            )

    def group(self, labels: Iterable[Any]) -> "Scores":
        """Scores of groups: the sum over the examples that share a label.

        Exact for ∂m/∂w and for values.

        Raises:
            ShapeError: There is not one label per column.
            DataError: Labels that differ have one text, such as 1 and "1".
        """
        names, at = labels_by_place(labels, self.values.shape[1], "column")
        values = self.values[:]
        where = torch.tensor(at, device=values.device)
        total = values.new_zeros(len(self), len(names)).index_add(1, where, values)
        error = None
        if self.error is not None:
            squares = total.new_zeros(total.shape).index_add(1, where, self.error**2)
            error = squares.sqrt()
        return replace(self, values=total, error=error, columns=names)

    def attach(self, context: Context) -> "Scores":
        """The same scores with a live task and data: `upweight.provenance.Context(…)`.

        Args:
            context: The task, training data and queries in any form that the task reads, and the
                measure. That they are those of the scores is not checked.
        """
        return replace(self, context=context.read())

    @property
    def plot(self) -> Plot:
        """Figures by Matplotlib: `histogram`, `agreement`, `value`, `classes`, `spectrum`."""
        return Plot(self)

    def to_pandas(self) -> "DataFrame":
        """A table with a row per query and a column per training example or group.

        Examples and queries that came in a frame have the labels of its index.

        Names of groups are those that were given. A spreadsheet that opens a CSV file of them takes
        a name that starts with =, +, - or @ for a formula, which may be somebody else's text:

            frame.columns = ["'" + name if name[:1] in "=+-@" else name for name in frame.columns]
        """
        from upweight.runtime.tables import pd

        ids = None if self.columns else self._ids("train")
        columns: Any = range(self.values.shape[1]) if ids is None else ids
        columns = [*map(readable, self.columns)] if self.columns else columns
        frame = pd.DataFrame(self.values[:].cpu().numpy(), self._ids("query"), columns)
        frame.index.name, frame.columns.name = "query", "example" if not self.columns else "group"
        return frame

    def _ids(self, role: Role) -> Any:
        """The labels of an index; None where there is none."""
        from upweight.runtime.tables import pd

        ids = None if self.context is None else getattr(self.context.rows(role), "ids", None)
        return None if ids is None else pd.Index(ids, tupleize_cols=False)

    def save(self, directory: Folder) -> Path:
        """Write the scores into a directory, in place of scores saved there before; no pickle.

        An interrupted save leaves either the old scores or none that load.

        Raises:
            NotWritten: The disk is full or not writable.
            StaleStore: The directory holds something else, as what `Shards(folder)` wrote.
        """
        with contextlib.suppress(FileNotFoundError):
            found = StoredMatrix.load(directory, AGAIN)
            found.require(SAVED, found.shape)
        q, n = self.values.shape
        tensors = {"values": self.values[:]} | ({} if self.error is None else {"error": self.error})
        last = [Checked(c.verdict, c.reason, c.models, tuple(c.notes)) for c in self.checks[-1:]]
        told = ToldOfScores(self.unit, self.provenance, self.columns, tuple(last))
        names = [asdict(each) | {"verdict": each.verdict.name} for each in last]
        StoredMatrix.replace(
            directory,
            SAVED,
            {Tile(0, q, 0, n).name: tensors},
            asdict(told) | {"unit": self.unit.name, "checks": names},
            shape=(q, n),
            way_out="free space or save elsewhere; the scores are still in memory, and what was "
            "saved before is as it was.",
        )
        return Path(directory)

    @classmethod
    def load(cls, directory: Folder) -> "Scores":
        """Read what `save` or `Shards(folder)` wrote. The live context is not part of it.

        What `upweight evaluate RUN` found is the last of `checks` of the scores in RUN/scores.

        Raises:
            FileNotFoundError: There are no scores in the directory.
            SpecError: They do not fit into memory; see `open`.
            ShapeError: Some are missing.
            StaleStore: They are damaged, or of another version; or what was found is, or is of
                other scores.
        """
        found, told = stored_in(directory)
        has_error = "error" in found.read(found.names()[0])
        error = found.part("error", range(len(found))) if has_error else None
        of = (told.unit, told.provenance, error, told.columns)
        return cls(found.values(), *of, checks=_checks_of(found, told))

    @classmethod
    def open(cls, directory: Folder) -> "Scores":
        """The same without reading them, for scores that do not fit into memory.

        Its `values[query]`, `values[first:last]` and `values[:, columns]` are read from the disk
        when they are asked for; `values[:]` is all of them.

        Raises:
            FileNotFoundError, ShapeError, StaleStore: As for `load`.

        Cost: one reading of all files, to see that they are what was written.
        """
        found, told = stored_in(directory)
        found.verify()
        of = (told.unit, told.provenance)
        return StoredScores(found, *of, columns=told.columns, checks=_checks_of(found, told))


@dataclass(frozen=True, eq=False, repr=False)
class StoredScores(Scores):
    """Scores of which only what is asked for is read."""

    values: Any

    def __post_init__(self) -> None:
        """They are finite: they were when they were written, and have not changed."""

    def _strongest(self) -> str:
        return "not read; .top(query=0) reads one row"


@dataclass(frozen=True)
class ToldOfScores:
    """What finished.json says of scores."""

    unit: Unit
    provenance: Provenance
    columns: tuple[str, ...] | None = None
    checks: tuple[Checked, ...] = ()


def stored_in(directory: Folder) -> tuple[StoredMatrix, ToldOfScores]:
    """The scores of a directory, and what is said of them; they are not read.

    Raises:
        FileNotFoundError, ShapeError, StaleStore: As for `Scores.load`.
    """
    found = StoredMatrix.load(directory, AGAIN)
    facts = found.require_finished()
    try:
        told: ToldOfScores = fitting(facts, ToldOfScores, "facts")
    except Misfit as misfit:
        way_out = f"delete the file and ask again: {AGAIN}; nothing is computed again."
        raise stale(found.directory / FINISHED, misfit, way_out) from misfit
    return found, told


def _checks_of(found: StoredMatrix, told: ToldOfScores) -> list[Any]:
    """The verdict that was saved with scores, and that which `upweight evaluate` kept of a run."""
    kept = evaluations.read(evaluations.beside(found.directory), found.digest)
    halves = kept.get(evaluations.HALVES)
    if halves is None:
        return [*told.checks]
    verdict, models, notes = Verdict(halves["verdict"]), halves["models"], tuple(halves["notes"])
    return [*told.checks, Checked(verdict, halves["reason"], models, notes)]


def _told(context: Context, role: Role, indices: Sequence[int]) -> list[str]:
    """The label of each example and how its text begins, as far as there are such; else empty."""
    labels, texts = context.labels(role, indices), context.beginnings(role, indices)
    if labels is None or texts is None:
        return [*map(_label, labels or texts or [])]
    return [f"{_label(label)}  {text}" for label, text in zip(labels, texts, strict=True)]


def _label(label: Any) -> str:
    """A label as text; numbers with four digits."""
    return written(label) if isinstance(label, float) else str(label)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _with_error(value: float, error: float | None) -> str:
    """A score, ± its standard error where there is one."""
    told = readable_number(value, signed=True)
    return told if error is None else f"{told} ± {readable_number(error, 2)}"


def _require_count(k: Any) -> None:
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 0:
        raise SpecError(
            "A ranking lists a number of examples, 0 or more.",
            f"k={k!r}.",
            "a negative count meant as the other end of the ranking, or a share of the data.",
            "pass k=10 for ten at each end: .raises and .lowers are the two ends.",
        )


def _first_not_finite(values: Float[Tensor, "q n"]) -> tuple[int, int] | None:
    """Where the first NaN or infinity is. Some rows at a time: asking takes as much again."""
    size = max(1, LOOKED_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), size):
        bad = ~values[start : start + size].isfinite()
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            return start + row, column
    return None
