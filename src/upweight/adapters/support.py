"""Can this be translated? Yes or no, with the reason."""

from dataclasses import dataclass


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
