"""What a page shows of the data, kept beside the scores: a page can then be made without the data.

    facts, arrays = kept(scores, display)                   JSON, and arrays of numbers
    html(scores, path, reopened(facts, arrays))             the same page, from these alone

Thumbnails, texts, rows, labels, losses and self-influence; no inputs, no code, no pickle. All
queries are kept, and all training examples where that takes at most `KEPT_BYTES`; of more the
strongest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import StaleStore
from upweight.report.answers import Answers
from upweight.report.display import PER_SIDE, Display
from upweight.report.duplicates import Duplicates
from upweight.report.examples import Examples, KeptExamples, examples
from upweight.report.shown import LONGEST, clipped, length
from upweight.report.sprite import LARGEST_SIDE, PNG_ADDRESS, side_for, thumbnails
from upweight.runtime.headers import fitting
from upweight.scores import Scores

KEPT_BYTES = 64_000_000
"""What is shown of the training examples takes at most so much, beside two numbers and a label
of each."""

READ = 256
"""Examples that are read at once."""


@dataclass(frozen=True)
class _Told:
    """Examples but for their arrays."""

    labels: tuple[str, ...]
    texts: tuple[str, ...] | None
    custom: tuple[tuple[Mapping[str, Any], ...], ...] | None


@dataclass(frozen=True)
class _Options:
    """What is kept of a display as it is."""

    title: str | None = None
    names: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None
    k: int = PER_SIDE
    start: int | None = None


@dataclass(frozen=True)
class _Kept:
    """What is kept as JSON."""

    n: int
    whole: bool
    train: _Told
    queries: _Told
    labels: tuple[str, ...] | None
    twins: Duplicates | None
    predictions: tuple[Any, ...] | None
    metadata: Mapping[str, list[Any]]
    options: _Options
    left_out: tuple[str, ...]
    train_ids: tuple[str, ...] | None = None
    query_ids: tuple[str, ...] | None = None
    train_predictions: tuple[Any, ...] | None = None


def kept(
    scores: Scores, display: Display, left_out: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
    """What a page shows of the data.

    Args:
        scores: S or Δm of training examples, with their live context.
        display: How they are shown.
        left_out: What a live page has besides, and a page of what is kept goes without.

    Returns:
        What can be written as JSON, and arrays.

    Raises:
        UpweightError: As from `html`.

    Cost: that of `html`, and reading the training data once where all of it is kept.
    """
    answers = Answers(scores, display)
    display = answers.display
    data, n = answers.data["train"], answers.n
    assert data is not None
    first = dict.fromkeys([*answers.page.listed, *answers.listed])
    order = [*first, *np.argsort(-answers.totals.absolute, kind="stable").tolist()]
    columns = _columns(order, len(first), answers.hold(), n)
    low, high = answers.range or (0.0, 1.0)
    parts = [examples(data, columns[k : k + READ], "train", display)
             for k in range(0, len(columns), READ)]  # fmt: skip
    mine = _joined([_small(part, low, high, len(columns), LONGEST) for part in parts])
    theirs = _small(answers.queries, low, high, answers.q, length(answers.q))
    told = _Kept(
        n=n,
        whole=len(columns) == n,
        train=_told(mine),
        queries=_told(theirs),
        labels=None if answers.labels is None else tuple(answers.labels),
        twins=answers.page.twins,
        predictions=answers.predictions,
        metadata={str(name): list(map(_scalar, values))
                  for name, values in display.metadata.items()},
        options=_Options(display.title, _texts(display.names), _texts(display.features),
                         display.k, display.start),
        left_out=(*left_out, *(() if display.token_scores is None else ("token_scores",))),
        train_ids=_texts(display.train_ids),
        query_ids=_texts(display.query_ids),
        train_predictions=answers.train_facts.predictions,
    )  # fmt: skip
    numbers = {
        "train.images": mine.images, "train.table": mine.table,
        "query.images": theirs.images, "query.table": theirs.table,
        "train.columns": None if told.whole else np.asarray(columns, dtype=np.int64),
    }  # fmt: skip
    values = {"values": answers.values, "losses": answers.train_facts.losses,
              "self": answers.train_facts.self_influence}  # fmt: skip
    numbers |= {name: None if x is None else np.asarray(x, dtype=np.float64)
                for name, x in values.items()}  # fmt: skip
    return asdict(told), {name: x for name, x in numbers.items() if x is not None}


def reopened(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Display:
    """What `kept` gave, to be shown; a StaleStore where it is something else."""
    try:
        return _display(fitting(facts, _Kept, "shown"), arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StaleStore(
            "What a page shows is read from a run as attribute wrote it.",
            f"{type(error).__name__}: {error}.",
            "a file of another version of upweight, or edited by hand.",
            "name the project, which it is then read from and kept anew: --project project.py.",
        ) from error


def _display(told: _Kept, arrays: Mapping[str, NDArray[Any]]) -> Display:
    n, q = told.n, len(told.queries.labels)
    columns = None if told.whole else arrays["train.columns"]
    if columns is not None and (
        columns.dtype != np.int64 or not np.all(np.diff(columns, prepend=-1) > 0)
    ):
        raise ValueError("columns that are not ascending indices")
    values, losses, own = (_listed(arrays, name) for name in ("values", "losses", "self"))
    for classes in (told.predictions, told.train_predictions):
        if classes is not None and not all(type(x) in (int, str) for x in classes):
            raise ValueError("predictions are class indices or names")
    there = n if columns is None else len(columns)
    lengths = [(told.train.labels, there), (told.labels, n), (losses, n), (own, n)]
    lengths += [(told.train_predictions, n), (told.train_ids, n), (told.query_ids, q)]
    lengths += [(values, q), (told.predictions, q), *((x, n) for x in told.metadata.values())]
    for given, expected in lengths:
        if given is not None and len(given) != expected:
            raise ValueError(f"{len(given)} in place of {expected} entries")
    if told.twins is not None:
        _require_twins(told.twins, n)
    train = KeptExamples(n, _shown(told.train, arrays, "train"), columns, told.labels, told.twins)
    return Display(
        train=train,
        queries=KeptExamples(q, _shown(told.queries, arrays, "query")),
        values=values,
        predictions=told.predictions,
        train_predictions=told.train_predictions or (),
        train_losses=losses or (),
        self_influence=() if own is None else [-x for x in own],
        metadata=told.metadata,
        train_ids=told.train_ids,
        query_ids=told.query_ids,
        **{name: getattr(told.options, name) for name in _Options.__dataclass_fields__},
    )


def _columns(order: Sequence[int], first: int, listed: Examples, n: int) -> list[int]:
    """The training examples that are kept: all, or as many of the strongest as there is room for.

    What a page of the run lists comes first.
    """
    each = max(1, _bytes(listed) // max(1, len(listed.labels)))
    if listed.custom is not None:  # a function of the user's, whose cost is not known
        return sorted(dict.fromkeys(order[:first]))
    if n * each <= KEPT_BYTES:
        return list(range(n))
    return sorted(list(dict.fromkeys(order))[: max(1, KEPT_BYTES // each)])


def _bytes(shown: Examples) -> int:
    """What some examples take as they are kept, about."""
    total = sum(len(label) for label in shown.labels)
    if shown.texts is not None:
        total += sum(min(LONGEST, len(text)) for text in shown.texts)
    if shown.images is not None:
        total += thumbnails(shown.images[:1], 0.0, 1.0, LARGEST_SIDE).size * len(shown.labels)
    return total + (0 if shown.table is None else shown.table.nbytes)


def _small(shown: Examples, low: float, high: float, together: int, most: int) -> Examples:
    """Examples as they are kept: images as thumbnails of bytes, texts clipped."""
    images, texts = shown.images, shown.texts
    if images is not None and len(images):
        images = thumbnails(images, low, high, side_for(together))
    if texts is not None:
        texts = tuple(clipped(text, most) for text in texts)
    return replace(shown, images=images, texts=texts)


def _joined(parts: Sequence[Examples]) -> Examples:
    """Parts of a set as one."""

    def of(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        if any(x is None for x in found):
            return None
        arrays = isinstance(found[0], np.ndarray)
        return np.concatenate(found) if arrays else tuple(x for one in found for x in one)

    return Examples(*map(of, ("labels", "images", "table", "texts", "custom")))


def _told(shown: Examples) -> _Told:
    custom = None if shown.custom is None else tuple(map(tuple, shown.custom))
    return _Told(shown.labels, shown.texts, custom)


def _shown(told: _Told, arrays: Mapping[str, NDArray[Any]], role: str) -> Examples:
    images, table = arrays.get(f"{role}.images"), arrays.get(f"{role}.table")
    custom = None if told.custom is None else tuple([_part(x) for x in each]
                                                    for each in told.custom)  # fmt: skip
    found = Examples(told.labels, images, table, told.texts, custom)
    if any(x is not None and len(x) != len(told.labels)
           for x in (images, table, told.texts, custom)):  # fmt: skip
        raise ValueError(f"{role}: not one of each for {len(told.labels)} examples")
    is_image = images is None or (
        images.dtype == np.uint8
        and images.ndim == 4
        and images.shape[3] in (1, 3, 4)
        and min(images.shape[1:3]) > 0
    )
    if not is_image or (table is not None and (table.dtype != np.float64 or table.ndim != 2)):
        raise ValueError(f"{role}: arrays of another kind")
    return found


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a renderer gave, if it is of the three kinds that the page draws."""
    ((kind, value),) = part.items()
    if kind == "pairs":
        return {kind: [[str(name), str(what)] for name, what in value]}
    if kind == "text" or (kind == "picture" and value.startswith(PNG_ADDRESS)):
        return {kind: str(value)}
    raise ValueError(f"a part of kind {kind!r}")


def _require_twins(told: Duplicates, n: int) -> None:
    named = [i for group in (*told.same, *told.near) for i in group]
    counts = (told.sets, told.extra, told.candidates, told.among, told.read or 0)
    if min(counts) < 0 or any(not 0 <= i < n for i in named):
        raise ValueError(f"twins: not all of the {n} examples")
    if {len(pair) for pair in told.near} - {2} or len(told.near) != len(told.cosines):
        raise ValueError("twins: pairs without a cosine each")


def _listed(arrays: Mapping[str, NDArray[Any]], name: str) -> list[float] | None:
    if name not in arrays:
        return None
    found = arrays[name].astype(np.float64)
    # A page leaves out a measurement that is not finite; of examples none such are kept.
    if found.ndim != 1 or not (name == "values" or np.isfinite(found).all()):
        raise ValueError(f"{name}: no list of finite numbers")
    return list(found.tolist())


def _scalar(value: Any) -> Any:
    """A value of metadata as JSON has it; the page groups by numbers, else by what is printed."""
    value = value.item() if isinstance(value, np.generic | Tensor) else value
    return value if isinstance(value, bool | int | float | str) else str(value)


def _texts(names: Sequence[Any] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(map(str, names))
