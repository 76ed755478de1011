"""What a task and its data are, in words that hash: what is kept on disk belongs to them.

Specs are described by their fields, tensors by their bytes, functions by their byte code, defaults
and closure. What says nothing but its address in memory is refused: two runs could not tell whether
it is the same. A function's description follows what it reads; see `upweight.task.reads`.
"""

import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from upweight.errors import SpecError
from upweight.runtime.fingerprint import digest
from upweight.runtime.progress import progress
from upweight.task.data import Data
from upweight.task.reads import reads
from upweight.task.sharded import kind_of
from upweight.task.task import Task

ROWS = 1024  # fixed: the hash of a data set must not depend on anything else


def subject(task: Task, train: Data) -> dict[str, str]:
    """The model, its objective and its training data.

    Parameters alone would not do: buffers, frozen layers, activations and `forward` count as well.

    Raises:
        SpecError: A part cannot be distinguished from another of its kind.
    """
    return {
        "loss": described(task.loss),
        "penalty": described(task.penalty),
        "parameters": repr(task.layout),
        "forward": described(task.forward),
        "model": model_described(task),
        "train": contents(train),
    }


def model_described(task: Task) -> str:
    """The model in words that hash: the same words where it is split over processes."""
    if task.sharded is None:
        return _module(task.model)
    with task.sharded.keeping():
        return _module(task.model, task.sharded.whole)


def contents(data: Data) -> str:
    """A hash of every example in order."""
    parts = []
    for start, stop, batch in progress(data.batches(ROWS), len(data), "hashing the data"):
        leaves, structure = tree_flatten(batch)
        parts.append(digest(repr(structure), *(described(leaf) for leaf in leaves)))
        places = data.places(start, stop)
        if not torch.equal(places, torch.arange(start, stop)):  # labels are drawn by them
            parts.append(digest(places))
    return digest(*parts)


def described(value: Any) -> str:
    """A text that is equal for equal things and differs where they differ.

    Raises:
        SpecError: The object says nothing but its address.
    """
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, np.ndarray):
        return _array(value)
    if hasattr(value, "iloc") and hasattr(value, "columns"):  # of pandas: its repr is cut short
        columns = [value.iloc[:, k] for k in range(value.shape[1])]
        return f"{type(value).__name__} {described([*value.columns])} {described(columns)}"
    if hasattr(value, "to_numpy") and hasattr(value, "dtype"):  # a column or an index
        dtype = value.dtype
        told = f"{type(value).__name__} {dtype.name if hasattr(dtype, 'name') else dtype}"
        if hasattr(dtype, "categories"):
            told += f" {described((dtype.categories, dtype.ordered))}"
        return f"{told} {described(value.to_numpy())}"
    if hasattr(value, "tocoo"):  # of SciPy
        found = value.tocoo()
        return f"sparse{found.shape} {described((*found.coords, found.data))}"
    if isinstance(value, type | enum.Enum):
        return f"{value.__module__}.{value}"
    if isinstance(value, nn.Module):
        return _module(value)
    if dataclasses.is_dataclass(value):
        return _named(value, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{described(k)}: {described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(described(v) for v in value) + ")"
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, types.MethodType):
        return f"{described(value.__func__)} of {described(value.__self__)}"
    if isinstance(value, functools.partial):
        return f"partial{described((value.func, value.args, value.keywords))}"
    if hasattr(value, "get_params"):  # an estimator: its repr is cut short where it is long
        return _named(value, value.get_params(deep=True))
    text = repr(value)
    if f"0x{id(value):x}" in text.lower() or " object at 0x" in text:
        raise SpecError(
            "What is kept on disk needs recipes, methods, losses and measures that say "
            "what they are.",
            f"{text}.",
            "an object without fields that can be read, so that another run could not tell "
            "whether it is the same.",
            "make it a frozen dataclass of its hyperparameters or a plain function, or leave "
            "the folder out of Resources.",
        )
    return f"{type(value).__qualname__} {text}"


def _array(value: np.ndarray) -> str:
    kind, size = value.dtype.kind, value.dtype.itemsize
    if (kind in "biuf" and size <= 8) or (kind == "c" and size <= 16):
        given = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        given = given if given.flags.writeable else given.copy()
        return digest(torch.as_tensor(given), str(value.dtype))
    # Texts or objects, whose repr is cut short, or extended precision, which PyTorch has not.
    return f"array{value.shape} {value.dtype} {digest(described(value.tolist()))}"


def _named(value: Any, fields: Mapping[str, Any]) -> str:
    inner = ", ".join(f"{name}={described(field)}" for name, field in fields.items())
    return f"{type(value).__module__}.{type(value).__qualname__}({inner})"


def _module(model: nn.Module, whole: Callable[[str, Tensor], Tensor] = lambda _, x: x) -> str:
    """Its layers, what they hold besides parameters, how they are called, and every parameter."""
    parts = []
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and isinstance(value, bool | int | float | str | tuple)
        }
        kind = kind_of(module)
        parts.append(f"{name}: {kind.__qualname__} {described(plain)}")
        if not kind.__module__.startswith("torch."):
            parts.append(described(kind.forward))
            parts.append(described(reads(kind.forward, kind)))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    told = (f"{described(name)}: {described(whole(name, x))}" for name, x in state.items())
    return f"{kind_of(model).__qualname__} {digest(*parts, '{' + ', '.join(told) + '}')}"


def _function(function: types.FunctionType) -> str:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    cells = [content for content in cells if content is not function]  # a recursive function
    held = described((function.__defaults__, function.__kwdefaults__, cells))
    code = digest(_code(function.__code__), held, described(reads(function)))
    return f"{function.__module__}.{function.__qualname__} {code}"


def _code(code: types.CodeType) -> str:
    constants = [_constant(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    # The order of a set differs between processes.
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
