"""What was meant by an argument that a function does not take?

Python's own TypeError says that it is unexpected. Here the error says which one is meant.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from upweight.errors import SpecError, nearest

_F = TypeVar("_F", bound=Callable[..., Any])


def explained(known: Mapping[str, str]) -> Callable[[_F], _F]:
    """A function that refuses arguments that it does not take with a way out.

    Args:
        known: By other names that people have for an argument, what it is called here.

    Raises:
        SpecError: When it is called with an argument that it does not take, or without one that it
            needs.
    """

    def decorated(function: _F) -> _F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise SpecError(*_parts(function.__name__, signature, args, kwargs, known, error)) \
                    from None  # fmt: skip
            return function(*args, **kwargs)

        return called  # type: ignore[return-value]

    return decorated


def _parts(
    name: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    known: Mapping[str, str],
    error: TypeError,
) -> tuple[str, str, str, str]:
    parameters = signature.parameters.values()
    placed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    required = f"{name} takes {', '.join(placed)}, and by name {', '.join(named)}."
    other = next((key for key in kwargs if key not in signature.parameters), None)
    if other is not None:
        meant = known.get(other) or f"{nearest(other, [*named, *placed])}=…"
        cause = "another name for an argument, or an argument of another function."
        return required, f"{other}=.", cause, f"{meant} in place of {other}=."
    if len(args) > len(placed):
        more = ", ".join(f"{key}={value!r:.40}" for key, value in
                         zip(named, args[len(placed):], strict=False))  # fmt: skip
        return (
            required,
            f"{len(args)} arguments without a name.",
            "an argument that is given by its name only.",
            f"name what comes after {placed[-1]}, such as {more}.",
        )
    needed = ", ".join(p.name for p in parameters if p.default is p.empty)
    of_model = ", or None for queries where the measure is of the model alone, as a Coefficient"
    return (
        required,
        f"{error}.",
        "an argument that was left out, or given twice.",
        f"{name}({needed}){of_model if 'queries' in signature.parameters else ''}.",
    )
