"""How the arrays, tables and lists that users hold become tensors, and which of them cannot.

Numbers are kept as they are, but for unsigned ones of 16 bits and more, which PyTorch cannot index
and which become int64; a table becomes one array of its columns' common dtype. What is no
number is named by its column and row. Rows of tables are paired by their position, so tables whose
rows are labelled otherwise are refused.
"""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight.errors import DataError, ShapeError, message

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Where a dict of arrays or a dict batch holds its targets."""

NUMBERS = "biufc"
"""Kinds of NumPy's dtypes that are numbers."""

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""What PyTorch can hold but not take rows of."""

ONE = "(X[3:4], y[3:4]); of a data set a list, [dataset[3]]."
"""How one example is given as data."""


def is_array(value: Any) -> bool:
    """Whether this is a tensor, an array or a table."""
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def arrays_of(data: Any) -> tuple[Any, tuple[str, ...]]:
    """A tuple or dict of arrays as one of tensors, and notes on what was left out.

    Entries of a dict that are None stay None; those that are text are left out and noted.

    Raises:
        DataError: A part is no array of numbers, or tables disagree about their rows.
        ShapeError: The parts disagree about the number of examples.
    """
    _require_same_rows(data)
    notes: list[str] = []
    tensors = _tree(data, "", notes)
    leaves = [leaf for leaf in tree_leaves(tensors) if leaf is not None]
    sizes = [tuple(leaf.shape) for leaf in leaves]
    if len(leaves) > 1 and any(leaf.ndim == 0 for leaf in leaves):
        raise ShapeError(
            "All arrays of the data must have the examples on their first axis.",
            f"shapes {sizes}.",
            "one example, without an axis for examples.",
            ONE,
        )
    if not leaves or any(leaf.ndim == 0 for leaf in leaves) or len({s[0] for s in sizes}) != 1:
        raise ShapeError(
            "All arrays of the data must have the same number of examples on their first axis.",
            f"shapes {sizes}.",
            "inputs and targets of different splits, a transposed array, or one array per "
            "example in place of one for all.",
            "pass (X, y) with X [n, ...] and y [n, ...].",
        )
    return tensors, tuple(notes)


def require_columns(parts: Sequence[Any], count: int | None = None) -> None:
    """Refuse a list of arrays that may as well hold one example each as one column each.

    Args:
        parts: The list.
        count: How many examples the columns would hold, where the list must have as many entries to
            hold examples itself. None: any number.

    Raises:
        DataError: All have the same shape and dtype.
    """
    kinds = {(tuple(np.shape(part)), str(getattr(part, "dtype", ""))) for part in parts}
    if len(kinds) > 1 or not all(map(is_array, parts)) or count not in (None, len(parts)):
        return
    shape, dtype = kinds.pop()
    raise DataError(
        "A list of arrays is read as [X, ..., y], with n examples on each first axis.",
        f"{len(parts)} arrays, all of shape {shape} and {dtype}.",
        "a list of inputs, one array per example, which cannot be distinguished from columns.",
        "pass a tuple, (X, y), where these are inputs and targets; of inputs one by one, "
        "(torch.stack(inputs), targets).",
    )


def _tree(value: Any, path: str, notes: list[str]) -> Any:
    """The same containers with tensors in place of arrays."""
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, part in value.items():
            here = f"{path}[{key!r}]"
            if part is None:
                found[key] = None
            elif _is_text(part) and key in TARGET_KEYS:
                raise DataError(_no_numbers(np.asarray(part, dtype=object), here))
            elif _is_text(part):
                notes.append(f"{key!r} was left out of the data: it is text, not numbers")
            else:
                found[key] = _tree(_of_list(part, here), here, notes)
        return found
    if isinstance(value, tuple | list):
        if isinstance(value, list) and value and np.ndim(value[0]):
            require_columns(value, len(value[0]))
        return tuple(_tree(part, f"{path}[{k}]", notes) for k, part in enumerate(value))
    if not is_array(value):
        raise DataError(_not_an_array(value, path))
    return as_tensor(value, path)


def _not_an_array(value: Any, path: str) -> str:
    if hasattr(value, "toarray"):
        return _sparse(type(value).__name__, path, "X.toarray()")
    if isinstance(value, Number) and path.count("[") == 1:
        return message(
            "Data given as (X, y) must be arrays or tensors, all of them.",
            f"{_named(path)} of type {type(value).__name__}.",
            "one example, in place of a list of examples.",
            ONE,
        )
    return message(
        "Data given as (X, y) must be arrays or tensors, all of them.",
        f"{_named(path)} of type {type(value).__name__}.",
        "inputs or targets that are not there."
        if value is None
        else "a number of a Python list, in place of an array of them."
        if isinstance(value, Number)
        else "data sets of several splits, or another container than a tuple or dict of arrays.",
        "convert each part: np.asarray(y) or torch.tensor(y); pass a data set by itself.",
    )


def _of_list(part: Any, path: str) -> Any:
    """An array of a list of numbers, or of lists of numbers of one length; others as they are."""
    if not isinstance(part, list) or not part or not all(map(is_listed_numbers, part)):
        return part
    lengths = {np.shape(row) if not _is_ragged(row) else None for row in part}
    if len(lengths) > 1 or None in lengths:
        raise DataError(ragged(_named(path), part, range(len(part))))
    return np.asarray(part)


def is_listed_numbers(value: Any) -> bool:
    """Whether this is a number of Python's, or lists of them to any depth."""
    if isinstance(value, list):
        return all(map(is_listed_numbers, value))
    return isinstance(value, bool | int | float)


def _is_ragged(value: Any) -> bool:
    try:
        np.asarray(value)
    except ValueError:
        return True
    return False


def ragged(name: str, values: Sequence[Any], indices: Sequence[int]) -> str:
    """The message for examples of different shapes."""
    shapes = [None if _is_ragged(value) else tuple(np.shape(value)) for value in values]
    other = next((k for k, shape in enumerate(shapes) if shape != shapes[0]), 0)
    named = [
        f"example {indices[k]} {'has rows of several lengths' if shapes[k] is None else shapes[k]}"
        for k in sorted({0, other})
    ]
    return message(
        "Examples that go together must have one shape.",
        f"{name}: {', '.join(named)}.",
        "sequences of different lengths, or images of different sizes.",
        "pass DataLoader(dataset, collate_fn=pad), where pad(examples) fills up the shorter ones "
        "(torch.nn.utils.rnn.pad_sequence, or the tokenizer's own) and gives a label of -100 to "
        "every position that it filled.",
    )


def as_tensor(value: Any, path: str = "") -> Tensor:
    """A tensor of the numbers of an array or table.

    Raises:
        DataError: It does not hold numbers only, or one that no int64 holds.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise DataError(_sparse(str(value.layout), path, "X.to_dense()"))
        return signed(value.detach(), path)
    array = _table(value, path) if hasattr(value, "iloc") else _array(value, path)
    if array.dtype == object:
        array = _of_objects(array, path)
    if array.dtype.kind not in NUMBERS:
        raise DataError(_no_numbers(array, path))
    # Tensors cannot view negative strides or read-only memory without a warning.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return signed(torch.as_tensor(array), path)


def signed(value: Any, path: str = "") -> Any:
    """int64 of a tensor of unsigned numbers that PyTorch holds and cannot index or compute with.

    Raises:
        DataError: A number is above 2⁶³ − 1.
    """
    if not isinstance(value, Tensor) or value.dtype not in UNSIGNED:
        return value
    result = value.to(torch.int64)
    if value.dtype == torch.uint64 and bool((result < 0).any()):  # 2⁶³ and more wrap around
        at = (result < 0).nonzero()[0].tolist()
        raise DataError(
            "Examples of whole numbers must fit int64: at most 2⁶³ − 1.",
            f"{int(result[tuple(at)]) + 2**64} in {_named(path)} at [{', '.join(map(str, at))}].",
            "identifiers or hashes in place of class numbers, or a −1 that was made unsigned.",
            "y.astype(np.int64) gives −1 back; of others, number the values as the model was "
            "trained with: np.unique(y, return_inverse=True)[1] numbers them from 0.",
        )
    return result


def _array(value: Any, path: str) -> Any:
    """An array of what is none yet; entries that are masked or missing do not become numbers."""
    masked = np.ma.getmaskarray(value) if isinstance(value, np.ma.MaskedArray) else None
    if masked is None and not isinstance(value, np.ndarray) and hasattr(value, "isna"):
        masked = np.asarray(value.isna()) if getattr(value.dtype, "kind", "f") in "biu" else None
    if masked is not None and masked.any():
        at = ", ".join(map(str, np.argwhere(masked)[0]))
        raise DataError(_missing(f"{_named(path)}, the first at [{at}]", int(masked.sum())))
    return np.asarray(value)


def _missing(where: str, count: int) -> str:
    return message(
        "Examples must be numbers.",
        f"{count} missing values in {where}.",
        "missing values that were not imputed.",
        "impute them as in training, or leave these rows out.",
    )


def _sparse(kind: str, path: str, way_out: str) -> str:
    return message(
        "Data must be dense arrays, of which any example can be taken.",
        f"{_named(path)} that is sparse ({kind}).",
        "one-hot columns or counts, kept without their zeros.",
        f"write the zeros out, {way_out}; or a Dataset that does so an example at a time.",
    )


def _no_numbers(array: Any, path: str) -> str:
    what, cause, way = (
        f"{_named(path)} of dtype {array.dtype}.",
        "dates or other values that are no numbers.",
        "encode them as the model was trained with, then pass the encoded arrays.",
    )
    if array.dtype.names:
        cause = "a structured array, which holds several columns."
        way = "pass each column by its name: {name: a[name] for name in a.dtype.names}."
    elif array.dtype.kind in "US" or array.dtype == object:
        text = next((x for x in array.flat if isinstance(x, str | bytes)), None)
        if text is not None:
            what = f"{_named(path)} of dtype {array.dtype} that holds text such as {text!r}."
            cause = "names of classes or of categories."
            way = (
                "number them as the model was trained with: of class names, "
                "np.array([classes.index(name) for name in y]), with classes in the order of the "
                "model's outputs."
            )
    return message("Examples must be numbers.", what, cause, way)


def _of_objects(array: Any, path: str) -> Any:
    """An array of numbers from one of Python objects."""
    entries = list(array.flat)
    wrong = next((k for k, x in enumerate(entries) if not isinstance(x, Number | np.bool_)), None)
    if wrong is None:
        return np.array(entries).reshape(array.shape)
    entry = entries[wrong]
    if isinstance(entry, str | bytes):
        return array
    if isinstance(entry, list | tuple | np.ndarray) and array.ndim == 1:
        if len({np.shape(x) for x in entries if not _is_ragged(x)}) != 1:
            raise DataError(ragged(_named(path), entries, range(len(entries))))
        return np.stack([np.asarray(x) for x in entries])
    at = ", ".join(map(str, np.unravel_index(wrong, array.shape)))
    missing = entry is None or type(entry).__name__ in ("NAType", "NaTType")
    raise DataError(
        "Examples must be numbers.",
        f"{entry!r} in {_named(path)} at [{at}].",
        "a missing value." if missing else f"an object of type {type(entry).__name__}.",
        "impute it as in training, or leave that example out."
        if missing
        else "encode it as the model was trained with.",
    )


def _table(table: Any, path: str) -> Any:
    """The numbers of a pandas Series [n] or DataFrame [n, columns]."""
    if table.ndim == 1:
        return _column(table, f"{_named(path)} ({table.name!r})" if table.name else _named(path))
    columns = [table.iloc[:, k] for k in range(table.shape[1])]
    words = [c for c in columns if c.dtype.kind not in NUMBERS + "O" or _is_words(c)]
    if words:
        listed = ", ".join(f"{c.name!r} ({c.dtype})" for c in words[:5])
        raise DataError(
            "Examples must be numbers.",
            f"{len(words)} of {len(columns)} columns of {_named(path)} that hold none: {listed}.",
            "categories, text or dates that a step before the model turns into numbers.",
            "pass what the model itself takes: X after that step (an encoder, "
            "pandas.get_dummies with the columns of training), or X.drop(columns=[...]) where "
            "the model does not use them.",
        )
    if not columns:
        return np.empty(table.shape)
    return np.stack([_column(c, f"column {c.name!r}") for c in columns], axis=1)


def _is_words(column: Any) -> bool:
    """Whether a column holds text or categories; what is missing in it is no text."""
    if column.dtype.kind != "O":
        return False
    # An extension type of this kind holds text, categories or objects, whatever is in it now.
    return not isinstance(column.dtype, np.dtype) or any(
        not isinstance(x, Number | np.bool_) for x in column.dropna()
    )


def _column(column: Any, name: str) -> Any:
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind != "O":
        return column.to_numpy()
    missing = column.isna().to_numpy()
    if missing.any():
        row = column.index.tolist()[int(missing.argmax())]
        raise DataError(_missing(f"{name}, the first in row {row!r}", int(missing.sum())))
    if dtype.kind in NUMBERS:
        return column.to_numpy(dtype=getattr(dtype, "numpy_dtype", None) or f"{dtype.kind}8")
    if type(dtype).__name__ == "CategoricalDtype":
        raise DataError(
            "Examples must be numbers.",
            f"{name} of dtype category: {', '.join(map(repr, dtype.categories[:5]))}.",
            "names of classes or of categories.",
            "number them as the model was trained with: y.cat.codes.to_numpy() numbers the "
            "categories in their order, which must be that of the model's outputs.",
        )
    array = column.to_numpy(dtype=object)
    return _of_objects(array, f" {name}")


def _is_text(part: Any) -> bool:
    """Whether a part of the data is one text per example."""
    if isinstance(part, list | tuple):
        return bool(part) and all(isinstance(x, str) for x in part)
    if isinstance(part, Tensor) or not hasattr(part, "dtype"):
        return False
    kind = getattr(part.dtype, "kind", "")
    if kind in "US":
        return True
    return kind == "O" and all(isinstance(x, str) for x in np.asarray(part, dtype=object).flat)


def _require_same_rows(data: Any) -> None:
    """Refuse tables whose rows have other labels, which pairing by position would ignore."""
    tables = [(path, part) for path, part in _parts(data, "") if hasattr(part, "iloc")]
    for path, table in tables[1:]:
        first_path, first = tables[0]
        if len(table) != len(first) or table.index.equals(first.index):
            continue
        here, there = table.index.tolist(), first.index.tolist()
        same = sorted(map(repr, here)) == sorted(map(repr, there))
        k = next((k for k in range(len(here)) if here[k] != there[k]), 0)
        raise DataError(
            "Tables of one data set must have their rows in the same order, under the same index.",
            f"row {k} is {there[k]!r} in {_named(first_path)} and {here[k]!r} in {_named(path)}.",
            "the same rows in another order, or an index that was reset in one of the two."
            if same
            else "an index that was reset in one of the two, or rows of another split.",
            "y.loc[X.index] puts the rows of y in the order of X; y.to_numpy() pairs them by "
            "position as they stand.",
        )


def _parts(value: Any, path: str) -> list[tuple[str, Any]]:
    """Every part of nested containers, with where it is."""
    if isinstance(value, Mapping):
        return [p for key, part in value.items() for p in _parts(part, f"{path}[{key!r}]")]
    if isinstance(value, tuple | list):
        return [p for k, part in enumerate(value) for p in _parts(part, f"{path}[{k}]")]
    return [(path, value)]


def _named(path: str) -> str:
    return path[1:] if path.startswith(" ") else f"data{path}" if path else "an array"
