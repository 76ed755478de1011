"""What every application answers with: a sentence, the numbers behind it, a figure.

    predicted     what one fitted model says, before anything is fitted again
    actual        what fitting again gave; None where nothing was

Nothing is called found, robust, fair, repaired or cleansed before a refit says so: the verdict of
an outcome that is not confirmed speaks of what is predicted.
"""

import abc
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Outcome(abc.ABC):
    """The answer of an application. Implementations are frozen dataclasses.

    Attributes:
        predicted: What was predicted, in the unit that the class says.
        actual: The same after fitting again; None where nothing was fitted.
    """

    predicted: Any
    actual: Any

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What was asked, in a few words: the heading of its section in a report."""

    @property
    @abc.abstractmethod
    def verdict(self) -> str:
        """The answer in one sentence to quote, with its interval and whether refits agree."""

    @property
    @abc.abstractmethod
    def is_confirmed(self) -> bool:
        """Whether fitting again stands behind the verdict."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before the numbers, a sentence without its capital and full stop each."""
        return ()

    @abc.abstractmethod
    def frame(self) -> "pd.DataFrame":
        """The numbers as a table: one row per example, group, step or choice."""

    @abc.abstractmethod
    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The figure, on the Axes given or on new ones; nothing is shown or saved."""

    @abc.abstractmethod
    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them."""

    def __str__(self) -> str:
        return "\n".join([self.verdict, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """The sentence, the notes and the table, for notebooks."""
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        listed = f"<ul>{notes}</ul>" if notes else ""
        table = self.frame().to_html(max_rows=20, index=False)
        return f"<p><b>{escape(self.verdict)}</b></p>{listed}{table}"
