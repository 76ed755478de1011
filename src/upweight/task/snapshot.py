"""Is the model still what the method was fitted to? All of it that θ does not hold, part by part.

Buffers, frozen parameters, attributes, training flags, hooks, and the loss, penalty and forward of
the task: what runs on disk hash is here compared by name.
"""

import argparse
import dataclasses
import enum
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Batch
from upweight.errors import ModelChanged, SpecError
from upweight.runtime.fingerprint import checksum
from upweight.task.data import Data
from upweight.task.identity import described
from upweight.task.reads import reads
from upweight.task.sharded import SPLIT_STATE, own_part
from upweight.task.task import Task

ENTRIES = 1000
"""Entries of a list or dict that are compared one by one; a longer one counts as one object."""

DEPTH = 4
"""Objects and containers inside of each other that are read; what is deeper is compared as one."""

CHECKED_AT_ONCE = 256
"""Examples per forward pass where losses are compared."""

SHOWN = 4
"""Changes that a message names."""

_INHERITED = frozenset(vars(nn.Module())) - {"training"}

_STATEFUL = sys.stdlib_module_names | {"lightning", "pytorch_lightning"}
"""Packages whose objects (loggers, trainers) write their own records: no settings of a model."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a task was at one time, by the name of the part.

    Args:
        parts: A text for what can be read; another object stands for itself.
        moving: Parts that the model's own forward writes, which say nothing.
        losses: Of the training examples, NaN where they are not known; None: none is.
        notes: On what has changed since, and was seen to be harmless.
    """

    parts: dict[str, Any]
    moving: frozenset[str] = frozenset()
    losses: Float[Tensor, " n"] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, task: Task) -> "Snapshot":
        """The task now. Cost: one reading of buffers and frozen parameters."""
        split = {} if task.sharded is None else dict(task.sharded.split)
        parts = dict(_of_module(task.model, frozenset({*task.layout.names, *split})))
        # These are not in θ.
        parts |= {f"parameter {name}": _tensor(own_part(p)) for name, p in split.items()}
        for name in ("loss", "penalty", "forward"):
            value = getattr(task, name)
            held = getattr(value, "function", value)  # a function or module of the user's
            if isinstance(held, nn.Module):
                parts |= {f"{name}: {k}": v for k, v in _of_module(held, frozenset())}
            else:
                parts[name] = _spec(value)
                function = held if isinstance(held, types.FunctionType) else type(held).__call__
                parts |= _read(function, type(held))
        return cls(parts)

    def settled(
        self, before: "Snapshot", written: frozenset[str], losses: Float[Tensor, " n"] | None
    ) -> "Snapshot":
        """This one, without what passes alone changed since an earlier one, and what they write."""
        return Snapshot(self.parts, written | frozenset(self._differing(before)), losses)

    def _differing(self, other: "Snapshot") -> set[str]:
        return {k for k in {*self.parts, *other.parts} if not self._same(other, k)}

    def _is_moving(self, name: str) -> bool:
        """Also of what is inside of a part that forward writes: an object that it replaces."""
        ends = [k for k, c in enumerate(name) if c in ".["]
        return name in self.moving or any(name[:k] in self.moving for k in ends)

    def require_same(self, task: Task, train: Data) -> None:
        """Refuse a task that has changed.

        A cache may have grown, as by an input that is longer than any before, where the training
        losses did not move. It is noted.

        Raises:
            ModelChanged: With the names of what changed.

        Cost: of a cache that has grown, one forward pass over the training data.
        """
        now = Snapshot.of(task)
        names = [*self.parts, *(k for k in now.parts if k not in self.parts)]
        changed = [
            name
            for name in names
            if not self._is_moving(name)
            and not self._same(now, name)
            # A new attribute is something noted down beside the model.
            and not (name not in self.parts and name.startswith("attribute "))
        ]
        if changed and self._only_grew(task, train, now, changed):
            self.parts.update({name: now.parts[name] for name in changed})
            self.notes.append(
                f"{', '.join(changed)} grew after fit; the losses of all training examples are as "
                "they were"
            )
        elif changed:
            words = [self._words(now, name) for name in changed]
            flags = [name for name in changed if name.startswith("training of ")]
            if len(flags) > 1:  # one call sets them all
                kept = [w for w, name in zip(words, changed, strict=True) if name not in flags]
                mode = "train" if now.parts[flags[0]] == "True" else "eval"
                words = [f"model.{mode}() was called ({len(flags)} modules)", *kept]
            hooked = [name for name in changed if ": hooks of " in f": {name}"]
            causes = ["a hook was registered or removed after fit"] if hooked else []
            if len(hooked) < len(changed):
                causes.append(
                    "training or calls of the model in training mode went on, weights were "
                    "loaded, or an attribute or a global was set after fit"
                )
            undo = " (a hook: handle.remove())" if hooked else ""
            more = f", and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
            raise ModelChanged(
                "The model and its objective must still be what the method was fitted to.",
                f"{'; '.join(words[:SHOWN])}{more}.",
                f"{'; '.join(causes)}.",
                f"put it back as it was{undo}, fit again, or fit to a copy: copy.deepcopy(model).",
            )

    def _only_grew(self, task: Task, train: Data, now: "Snapshot", names: Sequence[str]) -> bool:
        """Whether they hold what they held and more, and the training losses have not moved."""
        held = _held(task.model)
        if self.losses is None or not all(
            name in held and _is_longer(self.parts.get(name), held[name], now.parts.get(name))
            for name in names
        ):
            return False
        with torch.no_grad():
            losses = [
                task.losses_of(*task.call(task.held_theta(), task.to_device(batch)))
                for _, _, batch in train.batches(CHECKED_AT_ONCE)
            ]
        known = ~self.losses.isnan()
        gap = (torch.cat(losses) - self.losses)[known].abs().max()
        return bool(gap <= torch.finfo(gap.dtype).eps ** 0.5 * self.losses[known].abs().max())

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


def written(task: Task, data: Data) -> frozenset[str]:
    """The names of what the model's own forward writes: counters, caches, the last output.

    Seen inside of calls, before `lent` puts things back. Of two sizes: what is kept of a batch may
    be the same as of the last one. A value that is written again as it was is told by its object.

    Cost: two calls of the model, of two examples and of one.
    """
    found: set[str] = set()

    def watched(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
        before, held = Snapshot.of(task), _held(model)
        result = task.forward(model, batch)
        now = _held(model)
        found.update(name for name in held.keys() & now.keys() if held[name] is not now[name])
        found.update(Snapshot.of(task)._differing(before))
        return result

    watching = task.called(watched)
    with torch.no_grad():
        for size in (min(2, len(data)), 1):
            watching.call(task.held_theta(), task.to_device(data.batch(0, size)))
    return frozenset(found)


def _held(model: nn.Module) -> dict[str, Any]:
    """Attributes and buffers as objects, by the name of the part."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key in vars(module).keys() - _INHERITED - {"training"}:
            found[f"attribute {prefix}{key}"] = vars(module)[key]
        for key, buffer in module._buffers.items():
            found[f"buffer {prefix}{key}"] = buffer
    return found


def _is_longer(then: Any, held: Any, now: Any) -> bool:
    """Whether what is held begins with what was there then, as it was told; none is the least."""
    if then == "None":
        return isinstance(held, Tensor | list | dict)
    if not isinstance(then, str) or not isinstance(now, str):
        return False
    if isinstance(held, Tensor):
        shape = re.match(r"tensor \S+ \(([\d, ]*)\)", then)
        sizes = [int(size) for size in shape[1].split(",") if size.strip()] if shape else []
        if shape is None or len(sizes) != held.ndim:
            return False
        return bool(_tensor(held[tuple(map(slice, sizes))]) == then)
    if isinstance(held, list | dict):
        kind = type(held).__qualname__
        if then.startswith(f"{kind} of "):  # entries are parts of their own
            return now.startswith(f"{kind} of ")
        return now.startswith(f"{kind}(" if then == f"{kind}()" else f"{then[:-1]}, ")
    return isinstance(held, int) and then.isdigit() and held > int(then)


def _is_short(part: Any) -> bool:
    return isinstance(part, str) and len(part) <= 40 and not part.startswith("tensor ")


def _of_module(model: nn.Module, free: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Everything about a module but the parameters named in `free`."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        yield f"module {name or 'model'}", type(module).__qualname__
        # Not a method of the instance: reading that makes a new object.
        yield f"forward of {type(module).__qualname__}", type(module).forward
        yield from _read(type(module).forward, type(module)).items()
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        yield f"hooks of {name or 'model'}", hooks
        for key, value in vars(module).items():
            if key == "training":
                yield f"training of {name or 'model'}", repr(value)
            elif key not in _INHERITED and not key.startswith(SPLIT_STATE):
                yield from _parts(f"attribute {prefix}{key}", value)
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", _tensor(buffer)
    for name, parameter in model.named_parameters():
        if name not in free:
            yield f"frozen parameter {name}", _tensor(parameter)


def _read(function: Any, owner: type) -> dict[str, Any]:
    """What a function reads besides its arguments."""
    found = reads(function, owner).items()
    return {
        f"global {name}": (_spec if isinstance(value, types.CodeType) else _told)(value)
        for name, value in found
    }


def _spec(value: Any) -> Any:
    """A loss, penalty or function by what it says of itself; else the object."""
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    try:
        return described(value)
    except SpecError:
        return value


def _parts(name: str, value: Any, inside: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """An attribute, and what is inside of it where it is an object or a container of objects."""
    told = _told(value)
    fields = None if isinstance(told, str) else _fields(value)
    if fields is None or len(inside) >= DEPTH or any(value is outer for outer in inside):
        yield name, told
        return
    yield name, f"{type(value).__qualname__} of {len(value)}" if _is_container(value) else told
    for key, field in fields.items():
        yield from _parts(f"{name}{key}", field, (*inside, value))


def _fields(value: Any) -> dict[str, Any] | None:
    """The settings in an object, and the entries of a container; None of all else."""
    if _is_container(value):
        if len(value) > ENTRIES:
            return None
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {f"[{key!r}]": field for key, field in pairs}
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
        return {f".{k}": getattr(value, k) for k in names if hasattr(value, k)}
    is_namespace = isinstance(value, argparse.Namespace | types.SimpleNamespace)
    if isinstance(value, Tensor | nn.Module | types.FunctionType | types.MethodType) or (
        type(value).__module__.partition(".")[0] in _STATEFUL and not is_namespace
    ):
        return None
    held = getattr(value, "__dict__", None)
    return {f".{k}": v for k, v in held.items()} if isinstance(held, dict) else None


def _is_container(value: Any) -> bool:
    return isinstance(value, list | tuple | dict)


def _told(value: Any) -> Any:
    """An attribute's value as a text where that says all of it; else the object."""
    if value is None or isinstance(
        value, bool | int | float | complex | str | bytes | enum.Enum | np.generic
    ):
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
