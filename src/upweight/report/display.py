"""How the examples and queries of some scores are shown; nothing of it changes a score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from upweight.errors import ShapeError, SpecError
from upweight.provenance import Context
from upweight.report.shown import Render
from upweight.task.rows import Rows

ROLES = ("train", "query")

PER_SIDE = 12
"""Examples shown at each end of a query's ranking."""


@dataclass(frozen=True, eq=False)
class Display:
    """What to show of examples and queries.

    Args:
        train: The training data, as for `as_data`; by default those that the scores were made of,
            and for scores loaded from disk none: examples are then numbers. Arrays are read once
            for labels and duplicates; of a Dataset only the examples shown are read.
        queries: The queries, in the order of the rows; by default as for `train`.
        tokenizer: Of `transformers`, as the model was trained with: inputs that are token numbers
            are shown as texts, and their tokens coloured by their shares of each score. By default
            the one that the task was given.
        title: What the page is about: the data and the model.
        names: Of the classes, by index. By default as the estimator or the model's configuration
            calls them.
        features: Names of the columns, where inputs are tables `[n, f]`. By default those of the
            frame that was given, whose values are then shown in place of transformed ones.
        train_ids: What each training example is called. By default the label of its row in the
            index of the frame that was given.
        query_ids: The same for the queries.
        label: What the target of one example is called, where it is no index of a class. By default
            as the adapter of another library says.
        values: m of each query as trained. By default asked of the model, where scores carry it.
        predictions: The predicted class of each query, as index or name; by default as `values`.
        train_images: What to show in place of the training inputs, one per example: images where
            the model's inputs are flattened, rows where they are transformed.
        query_images: The same for the queries.
        train_texts: Texts to show in place of the training inputs, one per example.
        query_texts: The same for the queries.
        train_tokens: The tokens of every training example, one per position, to be coloured by
            their shares of a score.
        token_scores: (query, examples) → shares `[k, t]` and what has no position, `[k]`; they must
            add up to the scores. By default asked of the fitted method, where scores carry it, with
            their own measure; else `lambda q, some:
            fitted.attribute(uw.as_data(queries).subset([q]), measure, into=PerToken(some))`.
        render: ("train" or "query", index) → what to show of an example: a text, a mapping of names
            to values, an image array, or a list of these. Markup is shown as text: nothing that a
            renderer returns can run script.
        metadata: Columns of facts about the training examples, by name. The page sums scores over
            their values; numbers of more than 200 values are binned.
        train_labels: The label of every training example, where the data are no arrays.
        train_predictions: The predicted class of every training example, as index or name; by
            default as `train_losses`, () leaves them out.
        train_losses: ℓ of every training example. By default asked of the model, where scores
            carry it; () leaves them out.
        self_influence: S[i, i], as from `fitted.self_influence()`; by default asked of the fitted
            method, where scores carry it, at the cost written there; () leaves it out.
        k: Examples at each end of a query's ranking.
        start: The query shown first; by default the first that was retrained for, else 0.
    """

    train: Any = None
    queries: Any = None
    tokenizer: Any = None
    title: str | None = None
    names: Sequence[str] | None = None
    features: Sequence[str] | None = None
    values: Sequence[float] | None = None
    predictions: Sequence[Any] | None = None
    train_images: Any = None
    query_images: Any = None
    train_texts: Sequence[str] | None = None
    query_texts: Sequence[str] | None = None
    train_tokens: Sequence[Sequence[str]] | None = None
    token_scores: Callable[[int, list[int]], Any] | None = None
    render: Render | None = None
    train_ids: Sequence[Any] | None = None
    query_ids: Sequence[Any] | None = None
    label: Callable[[Tensor], Any] | None = None
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    train_labels: Sequence[Any] | None = None
    train_predictions: Sequence[Any] | None = None
    train_losses: Sequence[float] | None = None
    self_influence: Sequence[float] | None = None
    k: int = PER_SIDE
    start: int | None = None

    def named(self, context: Context | None) -> "Display":
        """With the names, ids and values that the data came with, where none are said."""
        if context is None:
            return self
        found: dict[str, Any] = {}
        rows = {"train": context.rows("train"), "query": context.rows("query")}
        for role in ROLES:
            held, whole = rows[role], (self.train if role == "train" else self.queries)
            if whole is not None:  # other data were named, which rows of these say nothing of
                rows[role] = None
            elif held is not None and held.ids is not None:
                found[f"{role}_ids"] = list(held.ids)
        if context.classes is not None:
            found["names"] = [str(name) for name in context.classes]
        reads = context.task.reads
        found["tokenizer"] = getattr(reads, "tokenizer", None)
        if self.names is None and reads is not None and reads.classes is not None:
            found["label"] = getattr(reads, "label", None)
        is_plain = self.tokenizer is None and found["tokenizer"] is None
        found |= self._table(rows["train"], rows["query"], is_plain)
        return replace(self, **{k: v for k, v in found.items() if getattr(self, k) is None})

    def _table(self, train: Rows | None, queries: Rows | None, is_plain: bool) -> dict[str, Any]:
        """The values as they were given, where both are tables of the same columns, or texts.

        Texts with a tokenizer, those that are not plain, are shown by their tokens.
        """
        shown = (self.render, self.train_images, self.query_images, self.train_texts,
                 self.query_texts, self.train_tokens, self.features)  # fmt: skip
        if train is None or queries is None or any(each is not None for each in shown):
            return {}
        if train.texts is not None and queries.texts is not None and is_plain:
            return {"train_texts": train.texts, "query_texts": queries.texts}
        if not train.columns or train.columns != queries.columns or train.values is None:
            return {}
        mine, theirs = train.numbers, queries.numbers
        tables = [each for each in (mine, theirs) if each is not None]
        # A missing value has no distance to others: such rows are shown by name and value.
        if len(tables) == 2 and all(np.isfinite(each).all() for each in tables):
            return {"features": train.columns, "train_images": mine, "query_images": theirs}
        if queries.values is None:
            return {}
        held = {"train": train, "query": queries}
        return {"render": lambda role, index: held[role].pairs(index)}

    def images(self, role: str) -> Any:
        """Images or rows in place of the inputs, of "train" or "query"."""
        return self.train_images if role == "train" else self.query_images

    def texts(self, role: str) -> Sequence[str] | None:
        """Texts in place of the inputs, of "train" or "query"; tokens are texts too."""
        return self.query_texts if role == "query" else self._train_texts

    @cached_property
    def _train_texts(self) -> Sequence[str] | None:
        if self.train_texts is None and self.train_tokens is not None:
            return [" ".join(words) for words in self.train_tokens]
        return self.train_texts

    def require_fit(self, q: int) -> None:
        """Refuse places that are not there.

        Raises:
            ShapeError: k is below 1, or there is no query `start`.
        """
        if self.k < 1 or (self.start is not None and not 0 <= self.start < q):
            raise ShapeError(
                f"k must be at least 1 and start one of the queries 0…{q - 1}.",
                f"k={self.k}, start={self.start}.",
                "an index into the full test set where only some queries were attributed.",
                "use a row of the scores.",
            )


def require_one_each(name: str, given: Any, n: int, of: str = "example") -> None:
    """Refuse, by a ShapeError, what does not have one entry per example or query."""
    if given is not None and len(given) != n:
        raise ShapeError(
            f"{name} must have one entry per {of}: {n}.",
            f"{len(given)} entries.",
            "those of another split, or of only some of it.",
            "pass those of what the scores are of, all of them, in their order.",
        )


def require_display(given: Any) -> Display:
    """Refuse, by a SpecError, data or names in the place of a display."""
    if isinstance(given, Display):
        return given
    raise SpecError(
        "How examples are shown is said by an upweight.report.Display.",
        f"a {type(given).__name__}.",
        "the data, or names of classes, by themselves: scores carry the data that they were made "
        "of.",
        "leave it out, or html(scores, path, Display(names=[...])).",
    )
