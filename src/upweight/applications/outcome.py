"""What every application answers with: a sentence, the numbers behind it, a figure.

    predicted     what one fitted model says, before anything is fitted again
    actual        what fitting again gave; None where nothing was

Nothing is called found, robust, fair, repaired or cleansed before a refit says so: the verdict of
an outcome that is not confirmed speaks of what is predicted.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from upweight._html import card
from upweight._typing import Axes, DataFrame
from upweight.errors import MissingPackage
from upweight.evaluation.bootstrap import Estimate
from upweight.notation import readable

NEXT = ".frame(), .plot(), .summary()"

SHOWN = 10
"""Rows of its table on a card in a notebook."""


class Outcome(abc.ABC):
    """The answer of an application. Implementations are frozen dataclasses.

    Attributes:
        predicted: What was predicted, in the unit that the class says.
        actual: The same after fitting again; None where nothing was fitted.
    """

    predicted: Any
    actual: Any

    def __init_subclass__(cls) -> None:
        # A dataclass that has none would write out its fields: tensors, models, data.
        if "__repr__" not in vars(cls):
            cls.__repr__ = Outcome.__repr__  # type: ignore[method-assign]

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What was asked, in a few words: the heading of its section in a report."""

    @property
    @abc.abstractmethod
    def verdict(self) -> str:
        """The answer in one sentence to quote, with its interval and whether refits agree."""

    @property
    def is_confirmed(self) -> bool:
        """Whether fitting again stands behind the verdict. By itself: whether it was done."""
        return self.actual is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before the numbers, a sentence without its capital and full stop each."""
        return ()

    @abc.abstractmethod
    def frame(self) -> "DataFrame":
        """The numbers as a table: one row per example, group, step or choice."""

    @abc.abstractmethod
    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The figure, on the Axes given or on new ones; nothing is shown or saved."""

    @abc.abstractmethod
    def numbers(self) -> dict[str, Any]:
        """What `summary` has beside its sentences: numbers, texts, tensors and estimates."""

    def _fields(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def summary(self) -> dict[str, Any]:
        """The answer as JSON would hold it: its sentences, whether it is confirmed, its numbers."""
        asked = {"title": self.title, "verdict": self.verdict, "confirmed": self.is_confirmed}
        return _as_json(asked | self.numbers() | {"notes": self.notes})

    def __str__(self) -> str:
        return "\n".join([self.verdict, *(f"  note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        lines = [f"{self.title}: {self.verdict}", *(f"note: {note}" for note in self.notes)]
        return "\n  ".join([*lines, f"next: {NEXT}"])

    def _repr_html_(self) -> str:
        try:
            header, rows = _head(self.frame())
        except MissingPackage:  # without pandas the sentence alone
            header, rows = [], []
        facts = {"note": "; ".join(self.notes)} if self.notes else {}
        return card(f"{self.title}: {self.verdict}", facts, header, rows, NEXT)


def as_table(
    values: Any, index: Any = None, name: str | None = None, columns: Sequence[str] | None = None
) -> "DataFrame":
    """A table of columns by name, tensors among them, or of rows, a mapping or tuple each.

    `index` is what rows are called, and `name` what the index is. `columns` names those of tuples.
    """
    from upweight.runtime.tables import pd

    if isinstance(values, Mapping):
        values = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in values.items()}
    names = None if index is None else pd.Index(index)
    return pd.DataFrame(values, names, columns).rename_axis(name)


def _as_json(value: Any) -> Any:
    """Lists in place of tuples and tensors, [value, low, high] of estimates; JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, tuple | list | Estimate):
        return [_as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_of(label: Any) -> Any:
    """A label or setting of the user's, whose infinity is a value; dates and objects as text."""
    if isinstance(label, float) and not math.isfinite(label):
        return str(label)
    if isinstance(label, str | int | float) or label is None:
        return label
    is_number = hasattr(label, "item") and not hasattr(label, "isoformat")
    return label.item() if is_number else str(label)


def _head(frame: "DataFrame") -> tuple[list[str], list[list[str]]]:
    """The first rows of a table as text, with its index in front."""
    some = frame.head(SHOWN)
    header = [str(some.index.name or ""), *map(str, some.columns)]
    rows = [
        [str(name), *(readable(v) if isinstance(v, float) else str(v) for v in row)]
        for name, row in zip(some.index.tolist(), some.to_numpy(dtype=object).tolist(), strict=True)
    ]
    return header, rows
