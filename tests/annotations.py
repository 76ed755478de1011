"""Beartype for jaxtyping's import hook: each annotated signature is compiled once.

The hook decorates a function where it is defined, so one inside another is decorated at every call
of the outer, for a millisecond each. What it hands to Beartype has no body: it is a function of its
annotations alone, and the one that was compiled for the same annotations checks the same.
"""

from collections.abc import Callable
from typing import Any

import beartype

compiled: dict[tuple[str, str, str], Callable[..., Any]] = {}


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked at every call."""
    key = (function.__module__, function.__qualname__, str(function.__annotations__))
    if key not in compiled:
        compiled[key] = beartype.beartype(function)
    return compiled[key]
