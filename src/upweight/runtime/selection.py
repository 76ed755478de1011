"""Which of n things does the user mean, and which of them share a label?"""

import difflib
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from upweight.errors import DataError, ShapeError


def places(given: Any, n: int, what: str, *, least: int = 0, repeats: bool = False) -> list[int]:
    """Places in 0…n − 1, from whole numbers or from a mask of n yes-or-no answers.

    Args:
        given: One index, several, or a mask; lists, arrays and tensors alike.
        n: How many there are to choose from.
        what: What they are, for the message: "Training examples".
        least: How many must be named.
        repeats: Whether one may be named twice.

    Raises:
        ShapeError: Fewer than `least` are named; an entry is no whole number or not in 0…n − 1; one
            is named twice; or a mask has another length than n.
    """
    entries = [_plain(entry) for entry in _entries(given)]
    if entries and all(isinstance(entry, bool) for entry in entries):
        if len(entries) != n:
            raise ShapeError(
                f"A mask of {what.lower()} has one True or False for each: {n}.",
                f"{len(entries)} of them.",
                "a mask of another data set, or of a part of this one.",
                f"make the mask over all {n}, or pass indices in 0…{n - 1}.",
            )
        entries = [k for k, chosen in enumerate(entries) if chosen]
    if len(entries) < least:
        raise ShapeError(
            f"{what} are named by indices in 0…{n - 1}, at least {least} of them.",
            f"{len(entries)} of them.",
            "an empty list, a filter that matched nothing, or a mask without a True.",
            "pass the index of one, or leave this question out.",
        )
    wrong = [e for e in entries if not _is_whole(e) or not 0 <= e < n]
    repeated = [] if wrong or repeats else _repeated(entries)
    if wrong or repeated:
        cause = (
            "the same one listed twice."
            if repeated
            else "places counted from the end, or indices of another data set."
            if all(map(_is_whole, wrong))
            else "a computation that gave fractions, names in place of places, or True and False "
            "among numbers."
        )
        raise ShapeError(
            f"{what} are named by {'' if repeats else 'distinct '}indices in 0…{n - 1}.",
            f"{len(entries)} of them, {'twice' if repeated else 'among them'} "
            f"{', '.join(map(repr, (repeated or wrong)[:5]))}.",
            cause,
            f"pass each index once, as whole numbers in 0…{n - 1}, or a mask of {n} booleans.",
        )
    return [int(entry) for entry in entries]


def spaced(n: int, most: int) -> list[int]:
    """`most` places among n, evenly spaced; or all."""
    count = min(n, most)
    return [k * n // count for k in range(count)]


def is_row(query: Any, q: int) -> bool:
    """Whether this is a whole number of any kind in 0…q − 1."""
    row = _plain(query)
    return _is_whole(row) and 0 <= row < q


def row_of(query: Any, q: int) -> int:
    """The row of one of q queries that were scored, from a whole number of any kind.

    Raises:
        ShapeError: It is no whole number, or not in 0…q − 1.
    """
    if is_row(query, q):
        return int(query)
    raise ShapeError(
        f"The query must be one of the {q} scored.",
        f"query={query!r}.",
        "an index into the full data set where only some queries were scored, or a place "
        "counted from the end.",
        f"use an index in 0…{q - 1}.",
    )


def place_of(name: Any, ids: Sequence[Any], what: str) -> int:
    """Which of the things with these ids is called `name`.

    Raises:
        ShapeError: None, or more than one.
    """
    found = [i for i, own in enumerate(ids) if own == name]
    if len(found) == 1:
        return found[0]
    n, texts = len(ids), {str(own): own for own in ids if isinstance(own, str | tuple)}
    near = [] if found else difflib.get_close_matches(str(name), texts, n=1) or [*texts][:1]
    raise ShapeError(
        f"A {what} is named by its id in the index of the data, which no other has, or by its "
        "place.",
        f"{name!r}, the id of {len(found)} of {n}.",
        "an index with repeated ids." if found else "a misspelling, or an id of other data.",
        f"use a place in 0…{n - 1}"
        + "".join(f"; the nearest id is {texts[each]!r}" for each in near)
        + ".",
    )


def groups_by_place(groups: Iterable[Any] | None, ids: Sequence[Any] | None) -> Any:
    """Groups of training examples, with their ids that are texts turned into places.

    Raises:
        ShapeError: No example has an id, or more than one.
    """
    if groups is None or ids is None:
        return groups

    def placed(entry: Any) -> Any:
        return place_of(entry, ids, "training example") if isinstance(entry, str) else entry

    return [[*map(placed, g)] if isinstance(g, tuple | list) else placed(g) for g in groups]


def require_labels(labels: Iterable[Any], what: str) -> None:
    """Refuse labels that are missing where a group called nan or None would mean something.

    Raises:
        DataError: One is None or NaN.
    """
    given = [_plain(label) for label in _entries(labels)]
    lacking = [
        place
        for place, label in enumerate(given)
        if label is None or (not isinstance(label, str) and str(label) in ("nan", "<NA>", "NaT"))
    ]
    if lacking:
        raise DataError(
            f"Every {what} belongs to a group.",
            f"no label at places {lacking[:5]}{' and more' if lacking[5:] else ''}.",
            "missing values in the column.",
            "leave them out, or make them a group: labels.fillna('unknown').",
        )


def labels_by_place(labels: Iterable[Any], n: int, what: str) -> tuple[tuple[str, ...], list[int]]:
    """The distinct labels as text, sorted, and for each of n things the place of its label.

    Raises:
        ShapeError: There is not one label for each.
        DataError: Two labels that differ have one text, such as 1 and "1".
    """
    given = [_plain(label) for label in _entries(labels)]
    keys = [str(label) for label in given]
    nested = getattr(labels, "ndim", 1) != 1
    if nested or len(keys) != n:
        raise ShapeError(
            f"Grouping needs one label per {what}: {n}.",
            f"labels of shape {tuple(labels.shape)}."  # type: ignore[attr-defined]
            if nested
            else f"{len(keys)} labels.",
            "one-hot labels, or a column that was not squeezed."
            if nested
            else "labels of another split.",
            "pass labels in the order of the training data, one for each.",
        )
    first: dict[str, Any] = {}
    for key, label in zip(keys, given, strict=True):
        other = first.setdefault(key, label)
        if type(other) is not type(label) and other != label:
            raise DataError(
                "Labels of different groups must read differently.",
                f"{other!r} of type {type(other).__name__} and {label!r} of type "
                f"{type(label).__name__}.",
                "numbers and texts among the labels of one column, as of two files.",
                "[str(label) for label in labels] makes one group of the two; otherwise give "
                "one of them another name.",
            )
    names = tuple(sorted(first))
    place = {name: k for k, name in enumerate(names)}
    return names, [place[key] for key in keys]


def _entries(given: Any) -> list[Any]:
    if isinstance(given, Tensor) or hasattr(given, "__array__"):
        # One step: an array gives its entries one at a time as arrays of their own, slowly.
        values = given.tolist()
        return values if isinstance(values, list) else [values]
    return list(given) if isinstance(given, Iterable) else [given]


def _plain(entry: Any) -> Any:
    """A number of Python's from one of NumPy's or a tensor with one entry."""
    return entry.item() if getattr(entry, "ndim", None) == 0 else entry


def _is_whole(entry: Any) -> bool:
    return isinstance(entry, Integral) and not isinstance(entry, bool)


def _repeated(entries: list[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [e for e in entries if e in seen or seen.add(e)]  # type: ignore[func-returns-value]
