"""What the page asks and what it is told: plain JSON, of whatever is looked at and no more."""

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import SpecError, message
from upweight.report.content import (
    contents,
    differences,
    histogram_of,
    query_words,
    short,
    spread_of,
)
from upweight.report.examples import (
    Examples,
    KeptExamples,
    all_labels,
    examples,
    inputs_of,
    read_queries,
    read_training,
)
from upweight.report.facts import noun_of, query_facts, train_facts
from upweight.report.shown import Render
from upweight.report.sprite import GUTTER, LARGEST_SIDE, display_range, sprite
from upweight.report.strongest import effects, ranked
from upweight.report.training import training_set
from upweight.scores import Scores, Unit
from upweight.task.data import Data
from upweight.view.kept import kept_totals

PER_PAGE = 12
"""Examples of one page of a ranking."""

MOST_DROPPED = 1000
"""Examples that may be dropped together: each is read from as many places as there are queries."""

LONGEST_INDEX = 18
"""Digits of an index."""

SAMPLED = 256
"""Training examples that say what is drawn black and white, and how far columns spread."""


class Answers:
    """Scores, and what their columns and rows are, ready to be asked.

    Args:
        scores: S or Δm, in memory or memory-mapped. With a context, what the model says of the
            queries is asked of it.
        train: The training data; without them examples are numbers.
        queries: The queries.
        names, features, values, predictions, train_images, query_images, train_texts, query_texts,
            render, metadata, train_labels, train_losses, self_influence: As for
            `upweight.report.html`.
        keep: A folder of these scores alone, where the totals of the training page are kept.

    Raises:
        ShapeError: Parts disagree about the number of queries or examples.

    Cost: one pass over the scores for the totals of the training page.
    """

    def __init__(
        self,
        scores: Scores,
        train: Any = None,
        queries: Any = None,
        *,
        names: Sequence[str] | None = None,
        features: Sequence[str] | None = None,
        values: Sequence[float] | None = None,
        predictions: Sequence[Any] | None = None,
        train_images: Any = None,
        query_images: Any = None,
        train_texts: Sequence[str] | None = None,
        query_texts: Sequence[str] | None = None,
        render: Render | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
        train_labels: Sequence[Any] | None = None,
        train_losses: Sequence[float] | None = None,
        self_influence: Sequence[float] | None = None,
        keep: Path | None = None,
    ) -> None:
        self.scores = scores
        self.q, self.n = scores.values.shape
        self._train = None if train is None else read_training(scores, train)
        self._queries = None if queries is None else read_queries(scores, queries)
        self._names, self._render = names, render
        self._instead = {
            "train": (train_images, train_texts),
            "query": (query_images, query_texts),
        }
        # Datasets of the user's need not bear two readers at once.
        self._reading = threading.Lock()
        self._keep = keep
        self._effects = lru_cache(maxsize=8)(lambda query: effects(scores, query))
        asked = self._every_query = self._shown("query", range(self.q))
        facts = query_facts(scores, values, predictions)
        self._asked = query_words(asked, facts, names)
        there = range(self.n)
        if isinstance(self._train, KeptExamples) and self._train.columns is not None:
            there = self._train.columns.tolist()
        some = self._shown("train", there[:: max(1, len(there) // SAMPLED)][:SAMPLED])
        self._spread = spread_of(some, asked)
        self._range = _display_range(some, asked)
        self.training = self._training_page(
            asked.labels, metadata or {}, train_labels, train_losses, self_influence
        )
        self.meta: dict[str, Any] = {
            "queries": self._asked,
            "checks": [],
            "features": list(features or _numbered(some, asked)),
            "newton": False,
            "predicts": scores.unit is not Unit.RANK,
            "n": self.n,
            "groups": scores.columns is not None,
            "noun": noun_of(scores),
            "kind": asked.noun,
            "start": 0,
            "sprites": self._geometry(some, asked),
            "comparison": None,
            "orders": sorted(self._orders),
        }

    # -- what the page asks -----------------------------------------------------------------------

    def query(self, query: int) -> dict[str, Any]:
        """The ends of one row, and its histogram."""
        sides = {side: self.ranking(query, side, 0) for side in ("raised", "lowered")}
        return {**sides, "histogram": self._histogram(query)}

    def ranking(self, query: int, side: str, start: int) -> dict[str, Any]:
        """A page of the examples that raised or lowered one measurement, strongest first."""
        effect = self._effects(query)
        signed = effect if side == "raised" else -effect
        chosen = ranked(signed, start + PER_PAGE + 1)[start:]
        page, more = list(chosen[:PER_PAGE]), len(chosen) > PER_PAGE
        predicts = self.scores.unit is not Unit.RANK
        shown = self._shown("train", page)
        entries = []
        for place, (i, example) in enumerate(zip(page, self._told(page, shown), strict=True)):
            entry: dict[str, Any] = {"example": example, "score": short(effect[i])}
            if predicts:
                entry["change"] = short(-effect[i])
            if self._spread is not None:
                entry["differs"] = differences(shown, self._every_query, place, query, self._spread)
            entries.append(entry)
        return {"entries": entries, "more": more}

    def examples(self, columns: Sequence[int]) -> list[dict[str, Any]]:
        """What some columns are."""
        return self._told(columns, self._shown("train", columns))

    def _told(self, columns: Sequence[int], shown: Examples) -> list[dict[str, Any]]:
        pictured = shown.images is not None
        found = []
        known = shown.known or (True,) * len(shown.labels)
        told = zip(columns, shown.labels, contents(shown), known, strict=True)
        for i, label, content, is_known in told:
            name = self.scores.columns[i] if self.scores.columns is not None else f"#{i}"
            label = label or self._label(i)
            words = f"{'group' if self.scores.columns else 'training example'} {name}"
            found.append(
                {
                    "id": i,
                    "name": name,
                    "label": label,
                    "words": words + (f", label {label}" if label else ""),
                    "contents": content,
                    **({"tile": i} if pictured and is_known else {}),
                }
            )
        return found

    def drop(self, columns: Sequence[int]) -> list[float]:
        """The predicted change of every query without some examples, as `scores.predict` says.

        Raises:
            UpweightError: The scores only rank.
        """
        if self.scores.unit is Unit.RANK:
            self.scores.predict()  # raises, with the reason
        # predict multiplies whole rows; of a memory-mapped matrix only these columns are read.
        sums = self.scores.values[:, list(columns)].double().sum(dim=1)
        sign = 1.0 if self.scores.unit is Unit.DIFFERENCE else -1.0
        return [short(v, 9) for v in (sign * sums).tolist()]

    def page(self, order: str, start: int) -> dict[str, Any]:
        """A page of all training examples, in the order of one number, largest first."""
        chosen = self._orders[order][start : start + 2 * PER_PAGE].tolist()
        rows = [
            {"id": i, **{key: short(values[i], 5) for key, values in self._numbers.items()}}
            for i in chosen
        ]
        return {"rows": rows, "start": start, "of": self.n}

    def picture(self, role: str, place: int) -> bytes:
        """A thumbnail, as PNG."""
        shown = self._shown(role, [place])
        if shown.images is None or self._range is None:
            raise KeyError(place)
        return sprite(shown.images, *self._range).png

    # -- how it is known --------------------------------------------------------------------------

    def _shown(self, role: str, indices: Sequence[int]) -> Examples:
        data = self._train if role == "train" else self._queries
        if data is None or (role == "train" and self.scores.columns is not None):
            return Examples(("",) * len(indices))
        images, texts = self._instead[role]
        with self._reading:
            return examples(data, indices, self._names, images, role, texts, self._render)

    def _histogram(self, query: int) -> dict[str, Any]:
        return histogram_of(self._effects(query))

    def _label(self, column: int) -> str:
        return "" if self._labels is None else self._labels[column]

    def _geometry(self, some: Examples, asked: Examples) -> dict[str, Any]:
        found = {}
        for role, shown in (("train", some), ("query", asked)):
            if shown.images is None or self._range is None:
                continue
            tile = sprite(shown.images[:1], *self._range, side=LARGEST_SIDE)
            size = {"width": tile.width, "height": tile.height}
            found[role] = {**size, "gutter": GUTTER, "tiles": 1, "sheets": None}
        return found

    def _training_page(
        self,
        asked: Sequence[str],
        metadata: Mapping[str, Sequence[Any]],
        labels: Sequence[Any] | None,
        losses: Sequence[float] | None,
        self_influence: Sequence[float] | None,
    ) -> dict[str, Any]:
        data: Data | None = self._train if self.scores.columns is None else None
        inputs: Any = None
        if data is not None:
            self._labels = all_labels(data, self._names, labels)
            texts = self._instead["train"][1]
            inputs = texts if texts is not None else inputs_of(data)
        else:
            self._labels = None if labels is None else [str(label) for label in labels]
        # Not asked of a live model: of a million examples that would take its time.
        facts = train_facts(
            self.scores,
            () if losses is None else losses,
            () if self_influence is None else self_influence,
        )
        kept = partial(kept_totals, folder=self._keep)
        found, page = training_set(self.scores, self._labels, inputs, metadata, facts, asked, kept)
        self._numbers: dict[str, NDArray[np.float64]] = {
            "absolute": found.absolute,
            "signed": found.signed,
        }
        if facts.losses is not None:
            self._numbers["loss"] = facts.losses
        if facts.self_influence is not None:
            self._numbers["self"] = facts.self_influence
        self._orders = {
            name: np.argsort(-values, kind="stable") for name, values in self._numbers.items()
        }
        return page.data


def _display_range(some: Examples, asked: Examples) -> tuple[float, float] | None:
    found = [shown.images for shown in (some, asked) if shown.images is not None]
    return display_range(*found) if found else None


def wanted(text: str | None, most: int, below: int) -> list[int]:
    """Distinct indices 0 … below − 1 of an address, as "3,17".

    Raises:
        SpecError: It names others, or too many.
    """
    parts = [part for part in (text or "").split(",") if part]
    # Of so few digits as any index has: Python refuses to read thousands of them.
    found = [int(part) for part in parts if part.isdecimal() and len(part) <= LONGEST_INDEX]
    if len(found) != len(parts) or len(set(found)) != len(found) or len(found) > most:
        raise SpecError(_not_indices(text, most, below))
    if any(i >= below for i in found):
        raise SpecError(_not_indices(text, most, below))
    return found


def _not_indices(text: str | None, most: int, below: int) -> str:
    return message(
        f"At most {most} distinct indices below {below}.",
        f"{(text or '')[:60]!r}.",
        "an address written by hand.",
        "go by the page.",
    )


def _numbered(some: Examples, asked: Examples) -> list[str]:
    table = some.table if some.table is not None else asked.table
    return [] if table is None else [f"x{c}" for c in range(table.shape[1])]
