"""How do the examples of a batch lie in it, and how is one of them taken out?

A batch is any tree of dicts, tuples, lists and dataclasses. Most hold tensors with the examples on
their first axis, which may be cut. A list that has an entry per example (file names, bags of
different sizes) may be cut too, but not be mapped over by `torch.func`. What has its examples in
another way (the nodes of several graphs in one tensor, a packed sequence) cannot be cut: such data
are read one example at a time. `form` finds out, from a batch of three examples and each of them
alone.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from upweight.errors import ShapeError

Path: TypeAlias = tuple[Any, ...]
"""Keys and places from a batch down to a part of it."""


class Listed(list[Any]):
    """A list with an entry per example: one leaf of a batch."""


@dataclass(frozen=True)
class Form:
    """How the examples of a data set lie in its batches.

    Args:
        listed: Lists with an entry per example.
        uncut: Why examples cannot be taken out of a batch; None: they can.
    """

    listed: frozenset[Path] = frozenset()
    uncut: str | None = None

    def marked(self, batch: Any) -> Any:
        """The batch with its lists of one entry per example told from other lists."""
        if not self.listed:
            return batch
        return _rebuilt(batch, (), lambda path, x: Listed(x) if path in self.listed else None)


def mapped(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with function(leaf) in place of each leaf."""
    parts, rebuild = _opened(batch)
    if rebuild is None:
        return function(batch)
    return rebuild([mapped(function, part) for _, part in parts])


def leaves(batch: Any) -> list[Any]:
    """The leaves of a batch, in order."""
    found: list[Any] = []
    mapped(found.append, batch)
    return found


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def cut(batch: Any, index: slice, size: int) -> Any:
    """Some examples of a batch of `size`. What is the same for all of them stays as it is.

    Raises:
        ShapeError: A tensor or list of the batch does not have an entry per example.
    """

    def some(x: Any) -> Any:
        if not has_examples(x):
            return x
        if len(x) != size:
            given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{len(x)} entries"
            raise ShapeError(
                f"Every part of a batch of {size} examples must have {size} entries on its first "
                "axis.",
                f"{given}.",
                "a collate function that puts examples together in another way for some of them.",
                "put an axis for the examples first, or give each part as a list of one entry per "
                "example.",
            )
        return Listed(x[index]) if isinstance(x, Listed) else x[index]

    return mapped(some, batch)


def has_examples(leaf: Any) -> bool:
    """Whether a leaf of a batch that may be cut has an entry per example."""
    return isinstance(leaf, Listed) or (isinstance(leaf, Tensor) and leaf.ndim > 0)


def form(read: Callable[[Sequence[int]], Any], n: int) -> Form:
    """How the examples lie in the batches that `read` makes of indices.

    Cost: four batches of one to three examples.
    """
    if n == 0:
        return Form()
    chosen = [0, n // 2, n - 1]
    together = read(chosen)
    try:
        alone = [read([i]) for i in chosen]
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        # Whoever asks for this example meets the error itself.
        return Form(uncut=f"an example alone cannot be put together: {error}")
    try:
        return Form(frozenset(_listed(together, alone, ())))
    except _Uncut as found:
        return Form(uncut=str(found))


class _Uncut(Exception):
    """Examples cannot be taken out of a batch."""


def _listed(together: Any, alone: Sequence[Any], path: Path) -> list[Path]:
    """The lists of an entry per example at or below a place; an _Uncut where they lie otherwise."""
    count = len(alone)
    if any(type(one) is not type(together) for one in alone):
        raise _Uncut(f"{_named(path)} is of another type for {count} examples than for one")
    if isinstance(together, Tensor) and together.ndim > 0:
        if len(together) == count and all(one.ndim > 0 and len(one) == 1 for one in alone):
            return []
        shapes = [tuple(one.shape) for one in alone]
        raise _Uncut(
            f"{_named(path)} has shape {tuple(together.shape)} for {count} examples that have "
            f"{', '.join(map(str, shapes))} alone"
        )
    parts, rebuild = _opened(together)
    singles = [_opened(one)[0] for one in alone]
    if type(together) is list and any(len(one) != len(parts) for one in singles):
        if len(parts) == count and all(len(one) == 1 for one in singles):
            return [path]
        raise _Uncut(f"{_named(path)} has {len(parts)} entries for {count} examples")
    if rebuild is not None:
        keys = [key for key, _ in parts]
        if any([key for key, _ in one] != keys for one in singles):
            raise _Uncut(f"{_named(path)} has other parts for {count} examples than for one")
        found = []
        for k, (key, part) in enumerate(parts):
            found += _listed(part, [one[k][1] for one in singles], (*path, key))
        return found
    if not all(_same(together, one) for one in alone):
        raise _Uncut(
            f"{_named(path)}, a {type(together).__name__}, belongs to the whole batch and is not "
            "known to be the same in all of them"
        )
    return []


def _same(one: Any, other: Any) -> bool:
    """Whether two leaves are certainly equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if one is None or isinstance(one, bool | int | float | str | bytes):
        return bool(one == other)
    return False


def _opened(batch: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any] | None]:
    """The parts of a batch with their keys, and what puts others in their place.

    A leaf has no parts, and None.
    """
    if type(batch) is dict:
        return list(batch.items()), lambda parts: dict(zip(batch, parts, strict=True))
    if type(batch) in (list, tuple):
        return list(enumerate(batch)), type(batch)
    # A named tuple itself: what is derived from one (a packed sequence) may be more than its parts.
    if isinstance(batch, tuple) and type(batch).__bases__ == (tuple,) and hasattr(batch, "_fields"):
        return list(zip(batch._fields, batch, strict=True)), type(batch)._make  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Tensor):
        return _fields(batch)
    return [], None


def _fields(batch: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]]:
    names = [f.name for f in dataclasses.fields(batch) if hasattr(batch, f.name)]

    def rebuild(parts: list[Any]) -> Any:
        made = copy.copy(batch)
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(made, name, part)
        return made

    return [(name, getattr(batch, name)) for name in names], rebuild


def _rebuilt(batch: Any, path: Path, exchanged: Callable[[Path, Any], Any]) -> Any:
    """The batch with what `exchanged` returns for a place, where that is not None."""
    other = exchanged(path, batch)
    if other is not None:
        return other
    parts, rebuild = _opened(batch)
    if rebuild is None:
        return batch
    return rebuild([_rebuilt(part, (*path, key), exchanged) for key, part in parts])


def _named(path: Path) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in path)
