"""What every adapter answers with: yes or no with the reason, and data that carry notes."""

from dataclasses import dataclass, field

from upweight.task.data import ArrayData


@dataclass(frozen=True)
class Support:
    """Whether an estimator has a translation, and why not or with what reservation.

    Args:
        ok: Whether it has. A `Support` is true where `ok` is.
        reason: The reason for a no with its way out; for a yes, what is minimized.
    """

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, eq=False)
class TranslatedData(ArrayData):
    """Arrays as a translated model's task takes them, with what to know about them."""

    notes: tuple[str, ...] = field(default=())
