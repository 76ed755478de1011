"""Is the model still what the method was fitted to? All of it that θ does not hold, part by part.

Buffers, frozen parameters, attributes, training flags, hooks, and the loss, penalty and forward of
the task: what runs on disk hash is here compared by name.
"""

import enum
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight.errors import ModelChanged, SpecError, message
from upweight.runtime.fingerprint import checksum
from upweight.task.identity import described
from upweight.task.task import Task

ENTRIES = 1000
"""Entries of a list or dict that are compared one by one; a longer one counts as one object."""

SHOWN = 4
"""Changes that a message names."""

_INHERITED = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a task was at one time, by the name of the part.

    Args:
        parts: A text for what can be read; another object stands for itself.
        moving: Parts that the model's own forward writes, which say nothing.
    """

    parts: Mapping[str, Any]
    moving: frozenset[str] = frozenset()

    @classmethod
    def of(cls, task: Task) -> "Snapshot":
        """The task now. Cost: one reading of buffers and frozen parameters."""
        parts = dict(_of_module(task.model, frozenset(task.layout.names)))
        for name in ("loss", "penalty", "forward"):
            value = getattr(task, name)
            held = getattr(value, "function", value)  # a function or module of the user's
            if isinstance(held, nn.Module):
                parts |= {f"{name}: {k}": v for k, v in _of_module(held, frozenset())}
            else:
                parts[name] = _spec(value)
        return cls(parts)

    def settled(self, before: "Snapshot") -> "Snapshot":
        """This one, without the parts that differ from an earlier one: passes alone wrote them."""
        moving = {k for k in {*self.parts, *before.parts} if not self._same(before, k)}
        return Snapshot(self.parts, frozenset(moving))

    def require_same(self, now: "Snapshot") -> None:
        """Refuse a task that has changed.

        Raises:
            ModelChanged: With the names of what changed.
        """
        names = [*self.parts, *(k for k in now.parts if k not in self.parts)]
        changed = [
            name
            for name in names
            if name not in self.moving
            and not self._same(now, name)
            # A new attribute is something noted down beside the model.
            and not (name not in self.parts and name.startswith("attribute "))
        ]
        if changed:
            words = [self._words(now, name) for name in changed]
            flags = [name for name in changed if name.startswith("training of ")]
            if len(flags) > 1:  # one call sets them all
                kept = [w for w, name in zip(words, changed, strict=True) if name not in flags]
                mode = "train" if now.parts[flags[0]] == "True" else "eval"
                words = [f"model.{mode}() was called ({len(flags)} modules)", *kept]
            more = f", and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
            raise ModelChanged(
                message(
                    "The model and its objective must still be what the method was fitted to.",
                    f"{'; '.join(words[:SHOWN])}{more}.",
                    "training or calls of the model in training mode went on, weights were "
                    "loaded, or an attribute was set after fit.",
                    "put it back as it was, fit again, or fit to a copy: copy.deepcopy(model).",
                )
            )

    def _same(self, other: "Snapshot", name: str) -> bool:
        a, b = (s.parts.get(name, _Absent) for s in (self, other))
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
        return a is b or (isinstance(a, str) and isinstance(b, str) and a == b)

    def _words(self, now: "Snapshot", name: str) -> str:
        then, new = self.parts.get(name), now.parts.get(name)
        if name not in now.parts:
            return f"{name} is gone"
        if name not in self.parts:
            return f"{name} is new"
        if _is_short(then) and _is_short(new):
            return f"{name} {then} → {new}"
        return f"{name} changed"


class _Absent:
    """No such part."""


def _is_short(part: Any) -> bool:
    return isinstance(part, str) and len(part) <= 40 and not part.startswith("tensor ")


def _of_module(model: nn.Module, free: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Everything about a module but the parameters named in `free`."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        yield f"module {name or 'model'}", type(module).__qualname__
        # Not a method of the instance: reading that makes a new object.
        yield f"forward of {type(module).__qualname__}", type(module).forward
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        yield f"hooks of {name or 'model'}", hooks
        for key, value in vars(module).items():
            if key == "training":
                yield f"training of {name or 'model'}", repr(value)
            elif key not in _INHERITED:
                yield f"attribute {prefix}{key}", _told(value)
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", _tensor(buffer)
    for name, parameter in model.named_parameters():
        if name not in free:
            yield f"frozen parameter {name}", _tensor(parameter)


def _spec(value: Any) -> Any:
    """A loss, penalty or function by what it says of itself; else the object."""
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    try:
        return described(value)
    except SpecError:
        return value


def _told(value: Any) -> Any:
    """An attribute's value as a text where that says all of it; else the object."""
    if value is None or isinstance(value, bool | int | float | complex | str | enum.Enum):
        return repr(value)
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return repr(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _tensor(torch.as_tensor(np.ascontiguousarray(value)))
    if isinstance(value, list | tuple | dict) and len(value) <= ENTRIES:
        inner = value.items() if isinstance(value, dict) else value
        parts = [_told(part) for part in inner]
        if all(isinstance(part, str) for part in parts):
            return f"{type(value).__name__}({', '.join(parts)})"
    return value


def _tensor(tensor: Tensor) -> Any:
    """Its bytes; the object itself where they cannot be read."""
    if tensor.layout is not torch.strided:
        return tensor
    try:
        return f"tensor {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}"
    except RuntimeError:  # one that a transform of torch.func left behind
        return tensor
