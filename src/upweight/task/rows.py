"""What does the user call the examples, and what were their values before any transformation?

Taken from what the data came in: the index and the columns of a frame. A Pipeline's scaler, a
formula's encoding and the conversion to tensors lose both; tables and pages of scores show them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight.task.arrays import TARGET_KEYS

UNNAMED = "LABEL_"
"""How configurations of `transformers` begin the names of classes that nobody named."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Names of the examples and of their columns, and the values as they were given.

    Args:
        ids: The label of each row in its index; None where they are 0…n − 1.
        columns: Names of the columns of `values`.
        values: `[n, f]`, a frame or an array, in the units of the user; None: no table was given.
        texts: What each example says, where examples are texts.
    """

    ids: tuple[Any, ...] | None = None
    columns: tuple[str, ...] | None = None
    values: Any = field(default=None, repr=False)
    texts: Sequence[str] | None = field(default=None, repr=False)

    @staticmethod
    def of(X: Any, y: Any = None, columns: Sequence[Any] | None = None) -> "Rows | None":
        """From the inputs and targets as they were given; None where they name nothing.

        Args:
            X: Inputs; a frame has an index, columns and values.
            y: Targets; a series has an index.
            columns: Names of the columns of an array.
        """
        index = next((part.index for part in (X, y) if _is_table(part)), None)
        ids = None if index is None else tuple(index.tolist())
        if ids == tuple(range(len(ids or ()))):
            ids = None
        if _is_table(X) and X.ndim == 2:
            # Not the frame itself: sorting it in place would give each row the name of another.
            return Rows(ids, tuple(map(str, X.columns)), X.copy(deep=False))
        if columns is not None and getattr(X, "ndim", 0) == 2 and X.shape[1] == len(columns):
            return Rows(ids, tuple(map(str, columns)), X)
        return None if ids is None else Rows(ids)

    def take(self, indices: Sequence[int]) -> "Rows":
        """Those at `indices`."""
        at = [int(i) for i in indices]
        ids = tuple(at if self.ids is None else (self.ids[i] for i in at))
        values = self.values
        if values is not None:
            values = values.iloc[at] if hasattr(values, "iloc") else values[at]
        texts = None if self.texts is None else [self.texts[i] for i in at]
        return replace(self, ids=ids, values=values, texts=texts)

    @property
    def numbers(self) -> Any:
        """The values as an array `[n, f]`; None where there are none, or some are no numbers."""
        if self.values is None:
            return None
        held = self.values.detach().cpu() if isinstance(self.values, Tensor) else self.values
        array = np.asarray(held)
        if array.dtype.kind == "O":
            try:
                array = array.astype(np.float64)
            except (TypeError, ValueError):
                return None
        return array if array.dtype.kind in "biuf" else None

    def by_column(self) -> list[tuple[str, list[Any]]]:
        """The values of each column, with its name; columns may share one. Texts are a column."""
        if self.texts is not None:
            return [("text", list(self.texts))]
        if self.values is None or self.columns is None:
            return []
        by_place = self.values.iloc if hasattr(self.values, "iloc") else self.values
        return [(name, by_place[:, j].tolist()) for j, name in enumerate(self.columns)]

    def pairs(self, index: int) -> dict[str, Any]:
        """A row as values by column."""
        if self.values is None or self.columns is None:
            return {}
        row = self.values.iloc[index] if hasattr(self.values, "iloc") else self.values[index]
        return dict(zip(self.columns, row.tolist(), strict=True))


def row_name(rows: Rows | None, i: int, what: str = "example") -> str:
    """What an example is called in a message: by its id, where it has one."""
    ids = None if rows is None else rows.ids
    return f"{what} {i}" if ids is None else f"{what} {ids[i]!r} (place {i})"


def _is_table(value: Any) -> bool:
    """Whether it is a frame or a series of pandas."""
    return hasattr(value, "iloc") and hasattr(value, "index")


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names that a model of `transformers` has for its classes; None where nobody named them.

    They are by output; those of other models, and of estimators, are said by `Task.reads`.
    """
    named = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(named, dict) or sorted(named) != list(range(len(named))):
        return None
    names = tuple(str(named[k]) for k in range(len(named)))
    return None if not names or all(name.startswith(UNNAMED) for name in names) else names


def labels_in(
    batch: Any, names: Sequence[Any] | None = None, known: Callable[[Tensor], Any] | None = None
) -> list[Any] | None:
    """The label of each example of a batch as the user knows it; None where it has no single one.

    Args:
        batch: As `Data.take` gives it.
        names: Of the classes, by number.
        known: What a target of one example is called, where an adapter knows; None: it does not.
    """
    target = None
    if isinstance(batch, dict):
        target = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, tuple) and len(batch) > 1:
        target = batch[-1]
    y = target[0] if isinstance(target, tuple | list) and len(target) == 2 else target
    if not isinstance(y, Tensor) or y.ndim == 0:
        return None
    told = [None if known is None else known(row) for row in y]
    if all(each is not None for each in told):
        return told
    if y.numel() != len(y):
        return None
    values: list[Any] = y.reshape(-1).tolist()
    if y.dtype == torch.bool or not y.is_floating_point():
        count = 0 if names is None else len(names)
        return [names[int(v)] if names and 0 <= v < count else int(v) for v in values]
    return values
