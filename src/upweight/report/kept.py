"""What a page shows of the data, kept beside the scores: a page can then be made without the data.

    facts, arrays = kept(scores, train, queries, names=…)      JSON, and arrays of numbers
    html(scores, path=…, **reopened(facts, arrays))            the same page, from these alone

Thumbnails, texts, rows, labels, losses and self-influence; no inputs, no code, no pickle. All
queries are kept, and all training examples where that takes at most `KEPT_BYTES`; of more the
strongest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import StaleStore, message
from upweight.report.content import selection
from upweight.report.duplicates import Duplicates
from upweight.report.examples import (
    Examples,
    KeptExamples,
    all_labels,
    examples,
    inputs_of,
    read_queries,
    read_training,
    require_one_each,
)
from upweight.report.facts import query_facts, train_facts
from upweight.report.page import PER_SIDE
from upweight.report.shown import LONGEST, clipped, length
from upweight.report.sprite import display_range, thumbnails
from upweight.report.strongest import require_scores
from upweight.report.training import training_set
from upweight.scores import Scores

KEPT_BYTES = 64_000_000
"""What is shown of the training examples takes at most so much, beside two numbers and a label
of each."""

READ = 256
"""Examples that are read at once."""

PLAIN = ("title", "names", "features", "k", "start")
"""Arguments of `html` that are kept as they are."""

LIVE = ("checks", "comparison", "removal", "token_scores")
"""Arguments of `html` that a page of what was kept goes without."""


def kept(
    scores: Scores, train: Any, queries: Any, **shown: Any
) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
    """What a page shows of the data.

    Args:
        scores: S or Δm, with their live context.
        train: As for `html`.
        queries: As for `html`.
        shown: Other arguments of `html`.

    Returns:
        What can be written as JSON, and arrays.

    Raises:
        UpweightError: As from `html`.

    Cost: that of `html`, and reading the training data once where all of it is kept.
    """
    require_scores(scores)
    train_data, query_data = read_training(scores, train), read_queries(scores, queries)
    names, render = shown.get("names"), shown.get("render")
    texts = shown.get("train_texts")
    if texts is None and shown.get("train_tokens") is not None:
        texts = [" ".join(words) for words in shown["train_tokens"]]
    require_one_each("train_texts", texts, len(train_data))
    asked = examples(
        query_data, range(len(query_data)), names, shown.get("query_images"), "query",
        shown.get("query_texts"), render,
    )  # fmt: skip
    facts = query_facts(scores, shown.get("values"), shown.get("predictions"))
    about = train_facts(scores, shown.get("train_losses"), shown.get("self_influence"))
    labels = all_labels(train_data, names, shown.get("train_labels"))
    inputs = texts if texts is not None else inputs_of(train_data)
    chosen = selection(scores, (), shown.get("k", PER_SIDE))
    found, page = training_set(scores, labels, inputs, {}, about, asked.labels)
    first = dict.fromkeys([*page.listed, *chosen.columns])
    order = [*first, *np.argsort(-found.absolute, kind="stable").tolist()]

    def read(columns: Sequence[int]) -> Examples:
        instead = shown.get("train_images")
        return examples(train_data, columns, names, instead, "train", texts, render)

    listed = read(sorted(first))
    columns = _columns(order, len(first), listed, len(train_data))
    pictured = [one.images for one in (listed, asked) if one.images is not None]
    low, high = display_range(*pictured) if pictured else (0.0, 1.0)
    parts = [columns[k : k + READ] for k in range(0, len(columns), READ)]
    mine = _joined([_small(read(part), low, high, len(columns), LONGEST) for part in parts])
    theirs = _small(asked, low, high, len(asked.labels), length(len(asked.labels)))
    json_facts: dict[str, Any] = {
        "n": len(train_data),
        "whole": len(columns) == len(train_data),
        "train": _told(mine),
        "queries": _told(theirs),
        "labels": labels,
        "twins": None if page.twins is None else asdict(page.twins),
        "predictions": facts.predictions,
        "metadata": {
            str(name): list(map(_scalar, column))
            for name, column in (shown.get("metadata") or {}).items()
        },
        "options": {name: _plain(shown[name]) for name in PLAIN if shown.get(name) is not None},
        "left_out": [name for name in LIVE if shown.get(name) not in (None, ())],
    }
    arrays: dict[str, NDArray[np.generic]] = {}
    for role, one in (("train", mine), ("query", theirs)):
        arrays |= {f"{role}.{what}": x for what in ("images", "table")
                   if (x := getattr(one, what)) is not None}  # fmt: skip
    if not json_facts["whole"]:
        arrays["train.columns"] = np.asarray(columns, dtype=np.int64)
    numbers = {"values": facts.values, "losses": about.losses, "self": about.self_influence}
    arrays |= {name: np.asarray(x, dtype=np.float64) for name, x in numbers.items()
               if x is not None}  # fmt: skip
    return json_facts, arrays


def reopened(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What `kept` gave, as arguments of `html` and of `Answers`.

    Raises:
        StaleStore: It is not what `kept` gives.
    """
    try:
        twins = facts["twins"]
        labels = facts["labels"]
        train = KeptExamples(
            _count(facts["n"]),
            _shown(facts["train"], arrays, "train"),
            None if facts["whole"] else arrays["train.columns"],
            None if labels is None else tuple(map(str, labels)),
            None if twins is None else _twins(twins, _count(facts["n"])),
        )
        queries = _shown(facts["queries"], arrays, "query")
        options = {name: _option(name, facts["options"][name])
                   for name in PLAIN if name in facts["options"]}  # fmt: skip
        own = _listed(arrays, "self")
        if not all(isinstance(each, str) for each in facts["left_out"]):
            raise ValueError("left_out: not all are names")
        found = {
            "train": train,
            "queries": KeptExamples(len(queries.labels), queries),
            "values": _listed(arrays, "values"),
            "predictions": _predictions(facts["predictions"]),
            "train_losses": _listed(arrays, "losses") or (),
            "self_influence": () if own is None else [-x for x in own],
            "metadata": {str(k): list(v) for k, v in facts["metadata"].items()},
            **options,
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _not_kept(f"{type(error).__name__}: {error}") from error
    n, q, there = train.n, len(queries.labels), len(train.shown.labels)
    columns = train.columns
    if columns is not None and (
        columns.dtype != np.int64 or not np.all(np.diff(columns, prepend=-1) > 0)
    ):
        raise _not_kept("columns that are not ascending indices")
    sizes = [(there, n if columns is None else len(columns))]
    sizes += [(len(x), n) for x in found["metadata"].values()]
    sizes += [(len(x), n) for x in (found["train_losses"], found["self_influence"]) if x]
    sizes += [(len(x), q) for x in (found["values"], found["predictions"]) if x is not None]
    sizes += [] if labels is None else [(len(labels), n)]
    for given, expected in sizes:
        if given != expected:
            raise _not_kept(f"{given} in place of {expected} entries")
    return found


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
        total += thumbnails(shown.images[:1], 0.0, 1.0, 1).size * len(shown.labels)
    return total + (0 if shown.table is None else shown.table.nbytes)


def _small(shown: Examples, low: float, high: float, together: int, most: int) -> Examples:
    """Examples as they are kept: images as thumbnails of bytes, texts clipped."""
    images, texts = shown.images, shown.texts
    if images is not None and len(images):
        images = thumbnails(images, low, high, together)
    if texts is not None:
        texts = tuple(clipped(text, most) for text in texts)
    return replace(shown, images=images, texts=texts)


def _joined(parts: Sequence[Examples]) -> Examples:
    """Parts of a set as one."""

    def arrays(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        return None if any(x is None for x in found) else np.concatenate(found)

    def sequences(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        return None if any(x is None for x in found) else tuple(x for one in found for x in one)

    return Examples(
        sequences("labels"), arrays("images"), arrays("table"), sequences("texts"),
        sequences("custom"),
    )  # fmt: skip


def _told(shown: Examples) -> dict[str, Any]:
    return {"labels": shown.labels, "texts": shown.texts, "custom": shown.custom}


def _shown(told: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], role: str) -> Examples:
    labels, texts, custom = told["labels"], told["texts"], told["custom"]
    found = Examples(
        tuple(map(str, labels)),
        arrays.get(f"{role}.images"),
        arrays.get(f"{role}.table"),
        None if texts is None else tuple(map(str, texts)),
        None if custom is None else tuple(map(_parts, custom)),
    )
    each = [found.images, found.table, found.texts, found.custom]
    if any(x is not None and len(x) != len(labels) for x in each):
        raise ValueError(f"{role}: not one of each for {len(labels)} examples")
    is_image = found.images is None or (
        found.images.dtype == np.uint8
        and found.images.ndim == 4
        and found.images.shape[3] in (1, 3, 4)
        and min(found.images.shape[1:3]) > 0
    )
    is_table = found.table is None or (found.table.dtype == np.float64 and found.table.ndim == 2)
    if not is_image or not is_table:
        raise ValueError(f"{role}: arrays of another kind")
    return found


def _parts(custom: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a renderer gave, if it is of the three kinds that the page draws."""
    found: list[dict[str, Any]] = []
    for part in custom:
        ((kind, value),) = part.items()
        if kind == "pairs":
            found.append({kind: [[str(name), str(what)] for name, what in value]})
        elif kind == "text" or (kind == "picture" and value.startswith("data:image/png;base64,")):
            found.append({kind: str(value)})
        else:
            raise ValueError(f"a part of kind {kind!r}")
    return found


def _option(name: str, value: Any) -> Any:
    """One of `PLAIN`, if it is of its kind."""
    if name in ("names", "features"):
        is_fit = isinstance(value, list) and all(isinstance(one, str) for one in value)
    else:
        is_fit = type(value) is (str if name == "title" else int)
    if not is_fit:
        raise ValueError(f"{name}: {value!r:.60}")
    return value


def _predictions(told: Any) -> list[int | str] | None:
    if told is None or all(type(one) in (int, str) for one in told):
        return told
    raise ValueError("predictions are class indices or names")


def _twins(told: Mapping[str, Any], n: int) -> Duplicates:
    named = [i for group in told["same"] for i in group] + [i for p in told["near"] for i in p[:2]]
    if not all(type(i) is int and 0 <= i < n for i in named):
        raise ValueError(f"twins: not all of the {n} examples")
    return Duplicates(
        tuple(tuple(map(int, group)) for group in told["same"]),
        _count(told["sets"]),
        _count(told["extra"]),
        tuple((int(i), int(j), _finite(cosine)) for i, j, cosine in told["near"]),
        _count(told["candidates"]),
        _count(told["among"]),
        None if told["read"] is None else _count(told["read"]),
    )


def _listed(arrays: Mapping[str, NDArray[Any]], name: str) -> list[float] | None:
    if name not in arrays:
        return None
    found = arrays[name].astype(np.float64)
    # A page leaves out a measurement that is not finite; of examples none such are kept.
    if found.ndim != 1 or not (name == "values" or np.isfinite(found).all()):
        raise ValueError(f"{name}: no list of finite numbers")
    return list(found.tolist())


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"no count: {value!r:.60}")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"no finite number: {value!r:.60}")
    return float(value)


def _scalar(value: Any) -> Any:
    """A value of metadata as JSON has it; the page groups by numbers, else by what is printed."""
    value = value.item() if isinstance(value, np.generic | Tensor) else value
    return value if isinstance(value, bool | int | float | str) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, str | int):
        return value
    return [str(one) for one in value]


def _not_kept(given: str) -> StaleStore:
    return StaleStore(
        message(
            "What a page shows is read from a run as attribute wrote it.",
            f"{given}.",
            "a file of another version of upweight, or edited by hand.",
            "name the project, which it is then read from and kept anew: --project project.py.",
        )
    )
