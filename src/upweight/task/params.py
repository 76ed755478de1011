"""θ as one flat vector: which parameters, in which order.

A vector is one flat tensor over its last axis and a `Layout` names its slices. Parameters are
chosen by glob; those with `requires_grad=False` were not trained and are never part of θ.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from upweight.errors import DtypeError, ShapeError, UnsupportedModel, listed, message


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any glob of `patterns` matches the parameter's name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the chosen parameters, in the order of the flat vector.

    Args:
        names: Parameter names as in `model.named_parameters()`; a tied parameter appears once.
        shapes: The shape of each.
        dtype: Their common dtype.
        device: Their common device.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, patterns: Sequence[str]) -> "Layout":
        """The trainable parameters of `model` whose name, or an alias of it, matches a glob.

        Raises:
            UnsupportedModel: No parameter is chosen, or one of them shares memory with another.
            DtypeError: The chosen parameters differ in dtype, or are not floating point.
            ShapeError: The chosen parameters are on several devices.
        """
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        chosen = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and any(matches(a, patterns) for a in aliases[id(parameter)])
        }
        if not chosen:
            names = [
                f"{name}{'' if p.requires_grad else ' (requires_grad=False)'}"
                for name, p in model.named_parameters()
            ]
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise UnsupportedModel(
                f"Task(params={list(patterns)!r}) must choose at least one trainable parameter.",
                f"a model with these parameters: {shown or 'none'}.",
                "a glob that matches no name, or layers frozen with requires_grad_(False).",
                "name the parameters as model.named_parameters() does, or call "
                "requires_grad_(True) on the ones that were trained.",
            )
        dtypes = {p.dtype for p in chosen.values()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            raise DtypeError(
                "The chosen parameters must share one floating-point dtype.",
                ", ".join(f"{name}: {p.dtype}" for name, p in chosen.items()),
                "a model loaded in mixed precision or partly quantized.",
                "convert the model (model.float() or model.double()), or choose fewer "
                'parameters with Task(params="pattern").',
            )
        lazy = [name for name, p in chosen.items() if is_lazy(p)]
        if lazy:
            raise UnsupportedModel(
                "Parameters must have their shapes.",
                f"{listed(lazy)}, which the first call of the model gives one.",
                "lazy layers of a model that was not called yet.",
                "call the model once on a batch, model(x), before making the Task.",
            )
        devices = {p.device for p in chosen.values()}
        if len(devices) > 1:
            raise ShapeError(
                "The chosen parameters must be on one device.",
                ", ".join(sorted(map(str, devices))),
                "a model split over several devices.",
                'choose the parameters of one device with Task(params="pattern").',
            )
        _require_own_memory(model, set(chosen))
        shapes = tuple(tuple(p.shape) for p in chosen.values())
        return cls(tuple(chosen), shapes, dtypes.pop(), devices.pop())

    @property
    def size(self) -> int:
        """p, the length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in the flat vector."""
        where, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            where[name] = slice(start, start + math.prod(shape))
            start = where[name].stop
        return where

    def flatten(self, params: Mapping[str, Tensor]) -> Float[Tensor, "*k p"]:
        """One flat vector from parameters by name; leading axes they share are kept."""
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            value = params[name]
            lead = value.shape[: value.ndim - len(shape)]
            pieces.append(value.reshape((*lead, math.prod(shape))))
        return torch.cat(pieces, dim=-1)

    def unflatten(self, vector: Float[Tensor, "*k p"]) -> dict[str, Tensor]:
        """Views of a flat vector as parameters by name, each `[*k, *shape]`.

        Raises:
            ShapeError: The last axis is not p long.
        """
        if vector.shape[-1] != self.size:
            raise ShapeError(
                f"A vector over the chosen parameters has {self.size} entries.",
                f"a tensor of shape {tuple(vector.shape)}.",
                "a vector made for another model or another choice of parameters.",
                "build it with layout.flatten(...).",
            )
        lead = vector.shape[:-1]
        return {
            name: vector[..., where].reshape((*lead, *shape))
            for (name, where), shape in zip(self.slices.items(), self.shapes, strict=True)
        }

    def mask(self, patterns: Sequence[str]) -> Bool[Tensor, " p"]:
        """True at the entries of parameters whose name matches a glob."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        for name, where in self.slices.items():
            mask[where] = matches(name, patterns)
        return mask


def _require_own_memory(model: nn.Module, chosen: set[str]) -> None:
    """One number of memory is one entry of θ: training moves it everywhere, a derivative once."""
    kinds = (Tensor, nn.Parameter)  # others, as of FSDP, say nothing of their memory
    every = {n: x for n, x in (*model.named_parameters(), *model.named_buffers())}
    held = [(n, x) for n, x in every.items() if type(x) in kinds and _has_memory(x)]
    spans = sorted((*_span(x), name) for name, x in held)
    for k, (storage, first, stop, name) in enumerate(spans):
        x = every[name].detach()
        is_dense = stop - first == x.numel() * x.itemsize and 0 not in x.stride()
        if name in chosen and not is_dense and len(set(_cells(x).tolist())) < x.numel():
            raise UnsupportedModel(_shared(f"{name}, {x.numel()} entries in less memory"))
        j = k + 1
        while j < len(spans) and spans[j][:2] < (storage, stop):
            other = spans[j][3]
            y, j = every[other].detach(), j + 1
            if chosen.isdisjoint((name, other)):
                continue
            if x.dtype != y.dtype or bool(torch.isin(_cells(x), _cells(y)).any()):
                raise UnsupportedModel(_shared(f"{name} and {other}"))


def _has_memory(x: Tensor) -> bool:
    return x.layout == torch.strided and x.device.type != "meta" and x.numel() > 0


def _span(x: Tensor) -> tuple[tuple[str, int], int, int]:
    """The storage of a tensor, and its first and last byte in it."""
    axes = zip(x.shape, x.stride(), strict=True)
    last = sum((size - 1) * int(stride) for size, stride in axes)
    first = int(x.storage_offset()) * x.itemsize
    stop = first + (last + 1) * x.itemsize
    return (str(x.device), x.untyped_storage().data_ptr()), first, stop


def _cells(x: Tensor) -> Int[Tensor, " k"]:
    """Which numbers of its storage a tensor consists of."""
    cells = torch.tensor(x.storage_offset())
    for size, stride in zip(x.shape, x.stride(), strict=True):
        cells = cells[..., None] + stride * torch.arange(size)
    return cells.flatten()


def _shared(what: str) -> str:
    return message(
        "Each chosen parameter must have memory of its own, or be one parameter.",
        f"shared memory: {what}.",
        "b.weight.data = a.weight.data, a parameter made of a view or of an expanded tensor, or a "
        "buffer of a parameter's values.",
        "share the parameter itself, b.weight = a.weight, which counts once; keep a tensor that "
        "is used in parts as one parameter and take the parts in forward; or separate what is not "
        "meant to be shared, p.data = p.data.clone().",
    )
