"""What the page asks and what it is told: plain JSON, of whatever is looked at and no more.

A view asks while it is looked at; a file holds what was asked in advance.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.effects import Effects, as_groups, without
from upweight.errors import ShapeError
from upweight.notation import short
from upweight.report.display import Display, require_display, require_one_each
from upweight.report.evidence import evidence_of
from upweight.report.examples import (
    Examples,
    KeptExamples,
    all_labels,
    class_name,
    data_of,
    examples,
    inputs_of,
    spread_of,
)
from upweight.report.live import noun_of, query_facts, train_facts
from upweight.report.sprite import display_range, sprite
from upweight.report.strongest import histogram, numbers, ranked, require_scores
from upweight.report.tokenizer import require_tokenizer
from upweight.report.tokens import tokens_of
from upweight.report.totals import Grouping, Totals, totals
from upweight.report.training import numbers_of, training_set
from upweight.report.whatif import together
from upweight.scores import Scores, Unit

SIDES = ("raised", "lowered")

COLUMNS_SHOWN = 3
"""Columns of a table row on a card: those in which the example and the query differ most, and as
many in which they are most alike."""

COLOURED = 64
"""Queries of a file whose tokens are coloured where nobody asked for it: each takes two solves."""

SAMPLED = 256
"""Training examples that say what is drawn black and white, and how far columns spread."""

Summed = Callable[[Scores, Mapping[str, Grouping]], Totals]


class Answers:
    """Scores, and what their columns and rows are, ready to be asked.

    Args:
        scores: In memory or memory-mapped. With a context, what the model says of
            the queries is asked of it.
        display: How examples and queries are shown.
        evidence: What retraining said: results of evaluation, at most one of `fitted.check`.
        removal: Better predictions of Δm for the same columns, as from `fitted.removal(queries)`;
            by default removal is predicted to first order.
        ask: Whether a live model and method are asked for losses and self-influence of all training
            examples: of a million that would take its time.
        summed: Takes the sums over all scores, or has kept them.

    Raises:
        DataError: There is nothing to show, or a renderer returned what cannot be shown.
        SpecError: `evidence` holds something else.
        NonFinite: A measured change is NaN or infinite.
        ShapeError: Parts disagree about the number of queries, examples or columns.

    Cost: one pass over the scores for the totals of the training page.
    """

    def __init__(
        self,
        scores: Scores,
        display: Display = Display(),  # noqa: B008  frozen
        evidence: Any = (),
        removal: Effects | None = None,
        *,
        ask: bool = True,
        summed: Summed = totals,
    ) -> None:
        require_scores(scores)
        display = require_display(display).named(scores.context)
        require_tokenizer(display.tokenizer)
        self.scores, self.display, self.removal = scores, display, removal
        self.q, self.n = scores.values.shape
        self.evidence = evidence_of(evidence, self.q, self.n, scores.checks)
        self.data = {role: data_of(scores, display, role) for role in ("train", "query")}
        self._require_fit()
        self._tokens = tokens_of(scores, self.data, display, COLOURED if ask else None)
        # Datasets of the user's need not bear two readers at once.
        self._reading = threading.Lock()
        self._effects = lru_cache(maxsize=8)(lambda query: numbers(scores, query))
        self._ends = lru_cache(maxsize=4096)(self._ranked)
        self._order = lru_cache(maxsize=None)(
            lambda name: np.argsort(-self._numbers[name], kind="stable")
        )
        self.queries = self._shown("query", range(self.q))
        self.values, self.predictions = query_facts(scores, display)
        self.train_facts = train_facts(scores, display, ask)
        data = None if scores.columns is not None else self.data["train"]
        self.labels = all_labels(data, display) if scores.columns is None else None
        self.totals, self.page = training_set(
            scores, self.labels, inputs_of(data, display), display.metadata, self.train_facts,
            self.queries.labels, summed,
        )  # fmt: skip
        self.training = self.page.data
        self._numbers = numbers_of(self.totals, self.train_facts)

    # -- what the page asks -----------------------------------------------------------------------

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What it must know before it asks."""
        series = self.evidence.series
        start = self.display.start
        if start is None:
            start = series[0].query if series else 0
        return {
            "queries": [
                {"label": label, **self._known(q, label), **content}
                for q, (label, content) in enumerate(
                    zip(self.queries.labels, self.queries.contents, strict=True)
                )
            ],
            "checks": [each.data for each in series],
            "comparison": self.evidence.subsets,
            "features": self._features(),
            "newton": self.removal is not None,
            "together": None if self.evidence.comparison else together(self.scores),
            "predicts": self.scores.unit is Unit.DERIVATIVE,
            "errs": self.scores.error is not None,
            "n": self.n,
            "groups": self.scores.columns is not None,
            "noun": noun_of(self.scores),
            "kind": self.queries.noun,
            "start": start,
        }

    def query(self, query: int) -> dict[str, Any]:
        """The ends of one row, and its histogram."""
        effect = self._effects(query)
        start, width, counts = histogram(effect)
        ends = {"low": short(float(effect.min())), "high": short(float(effect.max()))}
        bars = {"start": short(start), "width": short(width), "counts": counts, **ends}
        bars["positive"] = int((effect > 0).sum())
        told = {side: self.ranking(query, side) for side in SIDES}
        spoken = {} if self._tokens is None else self._tokens.told_query(query)
        return {**told, "histogram": bars, **({"query": spoken} if spoken else {})}

    def ranking(self, query: int, side: str, start: int = 0) -> dict[str, Any]:
        """A page of the examples that raised or lowered one measurement, strongest first."""
        stop = start + self.display.k
        chosen = self._ends(query, side, stop + 1)
        ids = list(chosen[start:stop])
        effect = self._effects(query)
        told = {"ids": ids, "scores": [short(effect[i]) for i in ids], "more": len(chosen) > stop}
        if self.scores.error is not None:
            told["errors"] = [short(v) for v in self.scores.error[query, ids].tolist()]
        if self.removal is not None:
            told["changes"] = [short(v) for v in numbers(self.removal, (query, ids))]
        if self._spread is not None and ids:
            told["differs"], told["alike"] = self._compared(query, ids, *self._spread)
        if self._tokens is not None:
            told |= self._tokens.shares(query, ids)
        return told

    def examples(self, columns: Sequence[int]) -> list[dict[str, Any]]:
        """What some columns are."""
        shown = self._shown("train", columns)
        found = []
        tokens = [{}] * len(columns) if self._tokens is None else self._tokens.told(columns)
        for i, label, content, spoken in zip(
            columns, shown.labels, shown.contents, tokens, strict=True
        ):
            one = {"id": i, "label": label or ("" if self.labels is None else self.labels[i])}
            if self.scores.columns is not None:
                one["name"] = self.scores.columns[i]
            elif self.display.train_ids is not None:
                one["name"] = str(self.display.train_ids[i])
            if self.train_facts.predictions is not None:
                one["predicted"] = self._class(self.train_facts.predictions[i])
            found.append(one | content | spoken)
        return found

    def drop(self, columns: Sequence[int]) -> list[float]:
        """The predicted change of every query without some examples, as `scores.predict` says.

        Raises:
            UpweightError: The scores are not ∂m/∂w.
        """
        self.scores.require_derivatives()
        # predict multiplies whole rows; of a memory-mapped matrix only these columns are read.
        sums = without(numbers(self.scores, (slice(None), list(columns))).sum(axis=1))
        return [short(v, 9) for v in sums.tolist()]

    @property
    def orders(self) -> list[str]:
        """The numbers that all training examples can be ordered by."""
        return sorted(self._numbers)

    def browse(self, order: str, start: int, count: int) -> dict[str, Any]:
        """A page of all training examples, in the order of one number, largest first."""
        chosen = self._order(order)[start : start + count].tolist()
        rows = [
            {"id": i, **{key: short(values[i], 5) for key, values in self._numbers.items()}}
            for i in chosen
        ]
        return {"rows": rows, "start": start, "of": self.n}

    def picture(self, role: str, place: int) -> bytes:
        """A thumbnail, as PNG."""
        shown = self._shown(role, [place])
        if shown.images is None or self.range is None:
            raise KeyError(place)
        return sprite(shown.images, *self.range).png

    # -- in advance -------------------------------------------------------------------------------

    @cached_property
    def listed(self) -> list[int]:
        """Every column that the page shows before anything but itself is asked."""
        return sorted({*self.shown_by_queries(), *self.evidence.removed, *self.page.listed})

    def shown_by_queries(self) -> list[int]:
        """Every column that some query lists, as often as it does."""
        k = self.display.k
        return [i for q in range(self.q) for side in SIDES for i in self._ends(q, side, k + 1)[:k]]

    def hold(self) -> Examples:
        """Read all that is listed, at once; no more is read of the training data after it."""
        held = self._shown("train", self.listed)
        columns = np.asarray(self.listed, dtype=np.int64)
        self.data["train"] = KeptExamples(self.n, held, columns)
        self.some = held
        return held

    # -- how it is known --------------------------------------------------------------------------

    @cached_property
    def some(self) -> Examples:
        """Some training examples: what is drawn black and white, how far columns spread."""
        data, there = self.data["train"], range(self.n)
        if isinstance(data, KeptExamples) and data.columns is not None:
            there = data.columns.tolist()
        return self._shown("train", there[:: max(1, len(there) // SAMPLED)][:SAMPLED])

    @cached_property
    def range(self) -> tuple[float, float] | None:
        """What is drawn black and what white; None: there are no images."""
        found = [one.images for one in (self.some, self.queries) if one.images is not None]
        found = [images for images in found if len(images)]
        return display_range(*found) if found else None

    @cached_property
    def _spread(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        return spread_of(self.some, self.queries)

    def _shown(self, role: str, indices: Sequence[int]) -> Examples:
        data = self.data[role]
        is_group = role == "train" and self.scores.columns is not None
        if data is None or is_group or not len(indices):
            return Examples(("",) * len(indices))
        with self._reading:
            return examples(data, indices, role, self.display)

    def _ranked(self, query: int, side: str, most: int) -> tuple[int, ...]:
        effect = self._effects(query)
        return ranked(effect if side == "raised" else -effect, most)

    def _compared(
        self,
        query: int,
        ids: Sequence[int],
        mean: NDArray[np.float64],
        spread: NDArray[np.float64],
    ) -> tuple[list[list[list[float]]], list[list[list[float]]]]:
        """[column, value of the query, of the example] where they differ most, and are most alike.

        With z = (value − mean) / standard deviation they differ by |z_q − z_i|. Where that is at
        most 1 they are alike, and most where z_q z_i is large: far from the mean on the same side.
        A column is in one of the two.
        """
        shown, theirs = self._shown("train", ids), self.queries.table
        assert shown.table is not None
        assert theirs is not None
        other = theirs[query]
        differs: list[list[list[float]]] = []
        alike: list[list[list[float]]] = []
        for place, mine in enumerate(shown.table):
            known = shown.known is None or shown.known[place]
            apart = np.abs(mine - other) / spread
            together = np.where(apart <= 1, (mine - mean) * (other - mean) / spread**2, 0)
            for found, measure in ((alike, together), (differs, apart)):
                most = np.argsort(-measure, kind="stable")[: COLUMNS_SHOWN if known else 0]
                most = most[measure[most] > 0]
                found.append([[int(c), short(other[c]), short(mine[c])] for c in most.tolist()])
                apart[most] = 0  # what is said to be alike does not differ
        return differs, alike

    def _known(self, q: int, label: str) -> dict[str, Any]:
        """What the model says of a query."""
        known: dict[str, Any] = {}
        if self.display.query_ids is not None:
            known["name"] = str(self.display.query_ids[q])
        if self.values is not None and np.isfinite(self.values[q]):
            known["value"] = short(self.values[q])
        if self.predictions is not None:
            told = self._class(self.predictions[q])
            known |= {"prediction": told, "wrong": told != label}
        return known

    def _class(self, value: int | str) -> str:
        return value if isinstance(value, str) else class_name(value, self.display.names)

    def _features(self) -> list[str]:
        table = self.some.table if self.some.table is not None else self.queries.table
        if table is None:
            return []
        width, features = table.shape[1], self.display.features
        if features is None:
            return [f"x{c}" for c in range(width)]
        if len(features) != width:
            raise ShapeError(
                f"features must name each of the {width} columns of the table.",
                f"{len(features)} names.",
                "the target's column among the names.",
                "pass one name per input column, in order.",
            )
        return [str(name) for name in features]

    def _require_fit(self) -> None:
        """Refuse parts that are not about the same queries and training examples."""
        self.display.require_fit(self.q)
        sizes = {role: None if data is None else len(data) for role, data in self.data.items()}
        n = None if self.scores.columns is not None else sizes["train"]
        if self.scores.columns is None:
            require_one_each("train_ids", self.display.train_ids, self.n)
        require_one_each("query_ids", self.display.query_ids, self.q, "query")
        if n not in (None, self.n) or sizes["query"] not in (None, self.q):
            raise ShapeError(
                "Scores have one row per query and one column per training example.",
                f"scores of shape ({self.q}, {self.n}) with {sizes['train']} training examples "
                f"and {sizes['query']} queries.",
                "train and queries swapped, or data of another split.",
                "pass the data that fit(...) and attribute(...) were given.",
            )
        better = self.removal
        if better is not None and (
            better.values.shape != self.scores.values.shape
            or (self.scores.columns is None and better.groups != as_groups(None, self.n))
        ):
            raise ShapeError(
                f"removal must hold Δm of shape ({self.q}, {self.n}), column by column as the "
                "scores.",
                f"shape {tuple(better.values.shape)}, groups {list(better.groups[:5])} first.",
                "removals of some examples or groups only.",
                "pass fitted.removal(queries) for all training examples, or leave it out.",
            )
