"""What is it doing, how far is it, how long will it take? tqdm, on a terminal or in a notebook.

Nothing is drawn into a pipe or a log file.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def progress(
    steps: Iterable[tuple[int, int, T]], total: int, what: str, done: int = 0
) -> Iterator[tuple[int, int, T]]:
    """The steps `(start, stop, …)`, with a bar that counts the examples they cover."""
    # disable=None: only where somebody is watching. unit_scale writes 60.0k for 60 000.
    bar = tqdm(
        total=total, desc=what, unit=" examples", unit_scale=True, initial=done, disable=None,
        leave=False,
    )  # fmt: skip
    with bar:
        for start, stop, step in steps:
            yield start, stop, step
            bar.update(stop - start)
