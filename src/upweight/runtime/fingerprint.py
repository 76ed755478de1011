"""Is it still the same? A hash of tensors and texts, equal across processes and machines.

A checksum tells the same within one process, at the speed of memory and where the tensor is.
"""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

WORDS = 2**16
"""Words of a tensor that are multiplied at once: what is formed stays in the cache."""

COMBINE = 1_000_003
"""Odd, so that multiplying by it loses nothing modulo 2⁶⁴."""


def digest(*parts: Tensor | str | Iterable[Tensor]) -> str:
    """SHA-256 over dtypes, shapes and bytes of tensors, and over texts, in the order given."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            state.update(b"text")
            state.update(part.encode())
        elif isinstance(part, Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
            if part.numel():
                state.update(_bytes(part.detach().cpu().reshape(1, -1)).numpy().data)
        else:
            state.update(digest(*part).encode())
    return state.hexdigest()


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(function: Any) -> str:
    """A user's function by module and name, without its address, which differs between runs."""
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{function.__module__}.{name}"


def checksum(tensor: Tensor) -> int:
    """A number that differs, but for one case in 2⁶⁴, where any bit of the tensor does.

    Words of 64 bits times fixed random numbers, added modulo 2⁶⁴: a swap of two values shows too.
    """
    if not tensor.numel():
        return 0
    flat = _bytes(tensor.detach().reshape(1, -1))[0]
    whole = len(flat) // WORDS * WORDS  # in rows of WORDS bytes
    parts = [row_checksums(flat[:whole].reshape(-1, WORDS))] if whole else []
    if whole < len(flat):
        parts.append(row_checksums(flat[None, whole:]))
    total = 0
    for part in torch.cat(parts).tolist() if parts else []:
        total = (total * COMBINE + part) % 2**64
    return total


@torch.no_grad()
def row_checksums(tensor: Tensor) -> Int[Tensor, " b"]:
    """The checksum of each entry of the leading axis."""
    if not tensor.numel():
        return torch.zeros(len(tensor), dtype=torch.int64, device=tensor.device)
    rows = _bytes(tensor.detach().reshape(len(tensor), -1))
    size, word = next((s, w) for s, w in _WORDS if rows.shape[1] % s == 0)
    if rows.storage_offset() % size:
        rows = rows.clone()
    words = rows.view(word)
    factors = _factors(words.shape[1], words.device)
    at_once = max(1, WORDS // words.shape[1])
    # One place for all products: memory that is new each time costs more than the arithmetic.
    products = factors.new_empty(min(at_once, len(words)), len(factors))
    sums = [
        torch.mul(some, factors, out=products[: len(some)]).sum(dim=1)
        for some in torch.split(words, at_once)
    ]
    return torch.cat(sums)


_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def _bytes(rows: Tensor) -> Tensor:
    rows = (torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows).contiguous()
    # An axis of one entry counts as contiguous with any stride, and may have 0.
    rows = rows if rows.stride(-1) == 1 else rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


@functools.lru_cache(maxsize=16)
def _factors(length: int, device: torch.device) -> Int[Tensor, " length"]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**62), 2**62, (length,), generator=generator)
    return (2 * drawn + 1).to(device)


def item_checksum(item: Any, start: int = 0) -> int:
    """A checksum of one example as a data set gives it: nested arrays, numbers and texts.

    What an object of another kind holds is not looked at.
    """
    found = start
    for leaf in item if type(item) is tuple else tree_leaves(item):
        if isinstance(leaf, Tensor):
            found = zlib.crc32(_readable(leaf), found)
        elif isinstance(leaf, str | bytes | int | float | complex | np.generic):
            found = zlib.crc32(repr(leaf).encode(), found)
        elif isinstance(leaf, tuple | list | dict):
            found = item_checksum(leaf, found)
        elif isinstance(leaf, Mapping):
            found = item_checksum(dict(leaf), found)
        elif dataclasses.is_dataclass(leaf) and hasattr(leaf, "__dict__"):
            found = item_checksum(vars(leaf), found)
        elif hasattr(leaf, "tobytes") and getattr(getattr(leaf, "dtype", None), "kind", "") != "O":
            found = zlib.crc32(leaf.tobytes(), found)
    return found


def _readable(tensor: Tensor) -> Any:
    """The bytes of a tensor, or its checksum as bytes where it is elsewhere."""
    if tensor.layout is not torch.strided:
        return b""
    if tensor.device.type != "cpu":
        return str(checksum(tensor)).encode()
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:  # NumPy has none
        tensor = _bytes(tensor.reshape(1, -1))
    return np.ascontiguousarray(tensor.numpy())
