"""What a computation says of itself: facts in words, and the limits they are held against.

A method states facts in `Provenance.facts`; the report and the terminal only print them, so what a
new method has to say is shown without editing either.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from upweight.notation import readable

FIRST_ORDER = "Removal against first order (leverage)"
"""The name of a fact that is about removals by the sum of scores, not about the scores."""

REMOVAL_LIMIT = 0.2
"""How far a removal may be from that sum, relative to it: beyond, its size misleads."""

WITHIN = "its own checks are within their limits"
"""Of a computation."""

UNKNOWN = "the method checks nothing of itself"
"""Of one that states no facts."""


@dataclass(frozen=True)
class Fact:
    """One thing to judge scores by. All of it is JSON.

    Args:
        name: What it is about: "Solver".
        value: What was found, in words or as a number: "CG(), 12 steps".
        limit: Past it the fact is a concern; None: nothing is held against anything.
        meaning: Why it matters, a clause without capital and full stop.
        number: What is held against the limit. None: not known, as where it came out as NaN; that
            is past every limit.
        past: What it is where past its limit, in plain words and with the field's term; empty: its
            name.
    """

    name: str
    value: str
    limit: float | None = None
    meaning: str = ""
    number: float | None = None
    past: str = ""

    def __post_init__(self) -> None:
        if self.number is not None and not math.isfinite(self.number):
            object.__setattr__(self, "number", None)

    @property
    def concern(self) -> bool:
        """Whether the number is past its limit, or not known where there is one."""
        return self.limit is not None and not (
            self.number is not None and self.number <= self.limit
        )

    @property
    def warning(self) -> str:
        """That it is past its limit, in a clause."""
        return self.past or f"past its limit: {self.name.lower()}"

    @property
    def told(self) -> str:
        """Its meaning, and its limit where there is one."""
        limit = "" if self.limit is None else f"marked past {readable(self.limit, 1)}"
        return "; ".join(filter(None, (self.meaning, limit)))

    def __str__(self) -> str:
        return f"{self.name.lower()}: {self.value}" + (f" ({self.told})" if self.told else "")


def in_a_line(facts: Sequence[Fact]) -> str:
    """What a computation says of itself, in a line."""
    warned = [fact.warning for fact in facts if fact.concern]
    return "; ".join(warned) or (WITHIN if facts else UNKNOWN)
