"""What a person is shown of an example: its image, text or table row, and its label."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import DataError
from upweight.notation import short, written
from upweight.report.display import Display, require_one_each
from upweight.report.duplicates import Duplicates
from upweight.report.shown import clipped, content, length
from upweight.report.sprite import as_images
from upweight.report.tokenizer import ids_in, words_in
from upweight.scores import Scores
from upweight.task.batches import has_examples, leaves
from upweight.task.data import ArrayData, Data, as_data

ROW_SHOWN = 40
"""Columns of a row: the first ones."""

TEXTS_READ = 100_000
"""Texts of a data set that are compared with each other, at most: more lie on disk."""

NOT_KEPT = "Not kept in the run, which holds what it shows of the strongest examples alone."

_TARGETS = ("labels", "label", "targets", "target", "y")
"""Names under which dict batches carry the target."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples at some indices of a data set, as far as they can be shown.

    Args:
        labels: One text per example; empty where there is no target.
        images: [k, h, w, c], or None.
        table: [k, f], or None. At most one of images, table and texts.
        texts: One per example, or None.
        custom: What the user's renderer gave, or None.
        known: Whether each is there to be shown; None: all are.
    """

    labels: tuple[str, ...]
    images: NDArray[np.generic] | None = None
    table: NDArray[np.float64] | None = None
    texts: tuple[str, ...] | None = None
    custom: tuple[list[dict[str, Any]], ...] | None = None
    known: tuple[bool, ...] | None = None

    @property
    def noun(self) -> str:
        """What one of them is called on the page."""
        if self.custom is not None:
            return "example"
        if self.images is not None:
            return "image"
        if self.texts is not None:
            return "text"
        return "example" if self.table is None else "row"

    @property
    def contents(self) -> list[dict[str, Any]]:
        """Of each what is not a tile: its text, its row, or what a renderer gave."""
        told: list[dict[str, Any]] = [{} for _ in self.labels]
        if self.custom is not None:
            told = [{"custom": parts} for parts in self.custom]
        elif self.texts is not None:
            most = length(len(self.texts))
            told = [{"text": clipped(text, most)} for text in self.texts]
        elif self.table is not None:
            told = [{"row": [short(v) for v in row[:ROW_SHOWN]]} for row in self.table]
        if self.known is None:
            return told
        pairs = zip(told, self.known, strict=True)
        return [one if known else {"text": NOT_KEPT, "bare": True} for one, known in pairs]


def data_of(scores: Scores, display: Display, role: str) -> Data | None:
    """The data that a display names, else those that scores carry, as the task reads them."""
    given = display.train if role == "train" else display.queries
    context = scores.context
    if role == "query" and context is not None and context.asked_of_all:
        return None  # the one row is of all queries, and has no label or values
    if given is None:
        return None if context is None else context.train if role == "train" else context.queries
    if context is None or isinstance(given, KeptExamples):
        return as_data(given)
    return context.task.training(given) if role == "train" else context.task.queries(given)


@dataclass(frozen=True, eq=False)
class KeptExamples(Data):
    """What a page shows of some of n examples, ascending columns or all, without the data.

    No model can read it. Labels are of all n, where they are known.
    """

    n: int
    shown: Examples
    columns: NDArray[np.int64] | None = None
    all_labels: tuple[str, ...] | None = None
    twins: Duplicates | None = None

    def __len__(self) -> int:
        return self.n

    def take(self, indices: Any) -> Any:
        raise DataError(
            "A model needs the data themselves.",
            "what a run keeps to show of them.",
            "a page made of the run alone.",
            "name the project: --project project.py.",
        )

    def at(self, indices: Sequence[int]) -> Examples:
        """The examples at some indices; of those that were not kept only labels."""
        wanted = np.asarray(list(indices), dtype=np.int64)
        known = np.ones(len(wanted), dtype=bool)
        place = wanted
        if self.columns is not None:
            place = np.searchsorted(self.columns, wanted).clip(max=max(0, len(self.columns) - 1))
            known = self.columns[place] == wanted if len(self.columns) else ~known
            place = np.where(known, place, 0)
        of, labels = self.shown, self.all_labels
        if not len(of.labels):
            return Examples(("",) * len(wanted), known=(False,) * len(wanted))
        if of.known is not None:
            known &= np.asarray(of.known)[place]
        chosen = place.tolist()
        images = None if of.images is None else of.images[place]
        table = None if of.table is None else of.table[place]
        for values in (images, table):
            if values is not None:
                values[~known] = 0  # another example's would be wrong
        return Examples(
            tuple(of.labels[j] for j in chosen)
            if labels is None
            else tuple(labels[i] for i in wanted.tolist()),
            images,
            table,
            None if of.texts is None else tuple(of.texts[j] for j in chosen),
            None if of.custom is None else tuple(of.custom[j] for j in chosen),
            None if known.all() else tuple(known.tolist()),
        )


def examples(data: Data, indices: Sequence[int], role: str, display: Display) -> Examples:
    """The examples of "train" or "query" at `indices`, which are all that is read of the data.

    Raises:
        ShapeError: Images or texts do not have one entry per example of the data.
    """
    if isinstance(data, KeptExamples):
        return data.at(indices)
    instead, texts, render = display.images(role), display.texts(role), display.render
    require_one_each(f"{role}_images", instead, len(data))
    require_one_each(f"{role}_texts", texts, len(data))
    batch = data.take(indices)
    source: Any
    # Of examples that cannot be told apart in a batch there is nothing to show by itself.
    source, target = _parts(batch) if data.form.uncut is None else (None, None)
    labels = tuple(_labels(target, len(indices), display))
    if render is not None:
        return Examples(labels, custom=tuple(content(render(role, int(i))) for i in indices))
    if texts is not None or _is_texts(source):
        mine = source if texts is None else [texts[int(i)] for i in indices]
        return Examples(labels, texts=tuple(str(text) for text in mine))
    if instead is None and display.tokenizer is not None and data.form.uncut is None:
        words = words_in(batch, display.tokenizer)
        if words is not None:
            ids = ids_in(batch)
            if target is not None and ids is not None and target.shape == ids.shape:
                labels = ("",) * len(indices)  # the tokens themselves
            return Examples(labels, texts=tuple(each.text for each in words))
    shown = source if instead is None else instead[list(indices)]
    if shown is None:
        return Examples(labels)
    values = _array(shown)
    images = as_images(values)
    if images is not None:
        return Examples(labels, images=images)
    if values.ndim in (1, 2) and values.dtype.kind in "buif" and values.shape[-1]:
        return Examples(labels, table=values.reshape(len(values), -1).astype(np.float64))
    return Examples(labels)


def class_name(value: Any, names: Sequence[str] | None) -> str:
    """A target or prediction in words: its class name where it has one, else the number."""
    number = float(value)
    if names is not None and number == int(number) and 0 <= int(number) < len(names):
        return str(names[int(number)])
    return written(number)


def _parts(batch: Any) -> tuple[Any, Any]:
    """The first input and the first target of a batch."""
    if isinstance(batch, tuple):
        first = batch[0] if _is_texts(batch[0]) else _rows(leaves(batch[0])[0])
        return first, _rows(leaves(batch[-1])[0]) if len(batch) > 1 else None
    if dataclasses.is_dataclass(batch):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if not isinstance(batch, dict):
        return None, None
    target = next((batch[key] for key in _TARGETS if key in batch), None)
    inputs = [leaf for key, leaf in batch.items() if key not in _TARGETS]
    return (inputs[0] if inputs else None), target


def _rows(leaf: Any) -> Any:
    """What has an entry per example."""
    return leaf if has_examples(leaf) else None


def _is_texts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )


def all_labels(data: Data | None, display: Display) -> list[str] | None:
    """The label of every example, where they were given or are held in arrays; else None."""
    given, names = display.train_labels, display.names
    if given is not None:
        if data is not None:
            require_one_each("train_labels", given, len(data))
        return [v if isinstance(v, str) else class_name(v, names) for v in given]
    if isinstance(data, KeptExamples):
        return None if data.all_labels is None else list(data.all_labels)
    if not isinstance(data, ArrayData):
        return None
    _, target = _parts(data.arrays)
    if target is None or _array(target[:1]).size != 1:
        return None
    values, codes = np.unique(_array(target).reshape(-1), return_inverse=True)
    known = display.label
    shape = target.shape[1:]
    words = [
        class_name(v, names) if known is None else str(known(target.new_tensor(v).reshape(shape)))
        for v in values.tolist()
    ]
    return [words[code] for code in codes]


def inputs_of(data: Data | None, display: Display) -> Tensor | Sequence[str] | Duplicates | None:
    """What is compared for duplicates: texts, or arrays with a row for each example.

    Of what was kept without its data: what was found among the inputs.
    """
    texts = display.texts("train")
    if data is not None and texts is not None:
        require_one_each("train_texts", texts, len(data))
        return texts
    if isinstance(data, KeptExamples):
        return data.twins
    rows = getattr(data, "given", None)
    if rows is not None and rows.texts is not None and len(rows.texts) <= TEXTS_READ:
        return [str(text) for text in rows.texts]
    if not isinstance(data, ArrayData):
        return None
    inputs, _ = _parts(data.arrays)
    return inputs if isinstance(inputs, Tensor) and inputs.ndim > 1 else None


def spread_of(
    train: Examples, queries: Examples
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Per column the mean and the standard deviation over what is shown, to compare columns by."""
    if train.table is None or queries.table is None:
        return None
    there = train.table if train.known is None else train.table[list(train.known)]
    if there.shape[1:] != queries.table.shape[1:]:  # padded to other lengths: no columns
        return None
    both = np.concatenate([there, queries.table])
    spread = both.std(axis=0)
    return both.mean(axis=0), np.where(spread > 0, spread, 1.0)


def _array(value: Any) -> NDArray[np.generic]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value if value.dtype.is_floating_point is False else value.double()
        return np.asarray(value.numpy())
    return np.asarray(value)


def _labels(target: Any, k: int, display: Display) -> list[str]:
    names = display.names
    if target is None:
        return [""] * k
    known = [] if display.label is None else [display.label(each) for each in target]
    if known and all(each is not None for each in known):
        return list(map(str, known))
    values = _array(target).reshape(k, -1)
    if values.shape[1] == 1:
        return [class_name(row[0], names) for row in values]
    shown = [", ".join(f"{float(v):.3g}" for v in row[:3]) for row in values]
    return [f"({text}{', …' if values.shape[1] > 3 else ''})" for text in shown]
