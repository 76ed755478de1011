"""What does a function read besides its arguments?

Globals, class attributes and closures are no part of a model, and what they hold when it is called
decides what it computes. Followed through functions and methods of the user's own; code that is
installed (PyTorch, transformers) is taken to read nothing that changes.
"""

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, Tensor, np.ndarray, np.generic)
"""What says by its value all that it is."""

OWN = str(PurePath(__file__).parents[1])
"""This package."""

_MISSING = object()


def reads(function: Any, owner: type | None = None) -> dict[str, Any]:
    """Plain values by name, and the code of functions that are called, as they are now.

    What the code assigns to a global itself is left out: a counter says nothing of the model.
    """
    found: dict[str, Any] = {}
    left, seen, assigned = [function], set(), set()
    while left:
        function = left.pop()
        if not isinstance(function, types.FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        if _is_installed(function.__code__.co_filename):
            continue
        space = function.__globals__
        loaded, of, attributes, stored = _names(function.__code__)
        assigned |= {f"{function.__module__}.{name}" for name in stored}
        some = [(f"{function.__module__}.{name}", space.get(name, _MISSING)) for name in loaded]
        some += _closed_over(function)
        for name, attribute in of:
            held = space.get(name)
            if isinstance(held, types.ModuleType | type) and not _is_installed(_file_of(held)):
                some.append((f"{held.__name__}.{attribute}", getattr(held, attribute, _MISSING)))
        if owner is not None:
            some += [(f"{owner.__qualname__}.{a}", _of_class(owner, a)) for a in attributes]
        for name, value in some:
            value = value.fget if isinstance(value, property) else value
            if isinstance(value, types.FunctionType):
                left.append(value)
                found[f"{name}()"] = value.__code__
            elif _is_plain(value) or isinstance(value, types.BuiltinFunctionType):
                found[name] = value
    return {name: found[name] for name in sorted(found.keys() - assigned)}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) is tuple else isinstance(value, PLAIN)


def _of_class(owner: type, name: str) -> Any:
    """An attribute of a class, if not of one that is installed."""
    for kind in owner.__mro__:
        if name in vars(kind):
            return _MISSING if _is_installed(_file_of(kind)) else vars(kind)[name]
    return _MISSING


def _closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield f"{function.__qualname__}.{name}", cell.cell_contents
        except ValueError:  # not yet assigned
            continue


@functools.lru_cache(maxsize=4096)
def _names(
    code: types.CodeType,
) -> tuple[frozenset[str], frozenset[tuple[str, str]], frozenset[str], frozenset[str]]:
    """Globals that are loaded, with the attributes taken of them; attributes; globals assigned."""
    loaded, of, attributes, stored = set(), set(), set(), set()
    name = ""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(step.argval)
            of.add((name, step.argval))
        name = step.argval if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ""
        if name:
            loaded.add(name)
        if step.opname == "STORE_GLOBAL":
            stored.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            its = _names(inner)
            loaded |= its[0]
            of |= its[1]
            attributes |= its[2]
            stored |= its[3]
    return frozenset(loaded), frozenset(of), frozenset(attributes), frozenset(stored)


def _file_of(held: Any) -> str:
    name = held.__name__ if isinstance(held, types.ModuleType) else held.__module__
    # What is written in C has no file; a notebook has none either.
    found = getattr(sys.modules.get(name, held), "__file__", None)
    return found or ("" if name == "__main__" else "<C>")


@functools.lru_cache(maxsize=4096)
def _is_installed(file: str) -> bool:
    # This package too, installed or not: what is kept on disk names its version.
    known = file.startswith((sysconfig.get_path("stdlib"), OWN))
    return file == "<C>" or known or "site-packages" in PurePath(file).parts
