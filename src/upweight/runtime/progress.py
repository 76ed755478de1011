"""What is it doing, how far is it, how long will it take?

A bar on a terminal and in a notebook; where nobody sees one, in a log file or a pipe, a line on
standard error after ten seconds and every half minute from then on. Short work says nothing.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

FIRST, EVERY = 10.0, 30.0
"""Seconds to the first line, and from one to the next."""


def progress(
    steps: Iterable[tuple[int, int, T]], total: int, what: str, done: int = 0
) -> Iterator[tuple[int, int, T]]:
    """The steps `(start, stop, …)`, with a bar that counts the examples they cover, or lines."""
    if not _has_bars():
        lines = Lines(what, "examples", done)
        for start, stop, step in steps:
            yield start, stop, step
            done += stop - start
            lines.tell(done, total)
        return
    # unit_scale writes 60.0k for 60 000.
    bar = tqdm(
        total=total, desc=what, unit=" examples", unit_scale=True, initial=done, leave=False,
    )  # fmt: skip
    with bar:
        for start, stop, step in steps:
            yield start, stop, step
            bar.update(stop - start)


@dataclass
class Lines:
    """Says now and then how far something is; `before` is how many were done before it began."""

    what: str
    unit: str
    before: int = 0
    began: float = field(default_factory=lambda: time.monotonic())
    said: float = 0.0

    def tell(self, done: int, total: int, more: str = "") -> None:
        """A line, if it is time for one, with `more` to say, such as how near a solver is.

        `total` is about how many there will be, where that is not known.
        """
        took = time.monotonic() - self.began
        if took < (self.said + EVERY if self.said else FIRST) or done >= total:
            return
        self.said = took
        left = took / max(done - self.before, 1) * (total - done)
        also = f"; {more}" if more else ""
        print(
            f"upweight: {self.what}: {done:,} of {total:,} {self.unit} after {duration(took)}, "
            f"about {duration(left)} to go{also}",
            file=sys.stderr,
            flush=True,
        )


def _has_bars() -> bool:
    """Whether somebody watches: a terminal, or a notebook, which says that it is none."""
    is_terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
    return is_terminal or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
