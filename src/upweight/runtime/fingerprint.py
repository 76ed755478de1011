"""Is it still the same? A hash of tensors and texts, equal across processes and machines."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Tensor | str | Iterable[Tensor]) -> str:
    """SHA-256 over dtypes, shapes and bytes of tensors, and over texts, in the order given."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            state.update(b"text")
            state.update(part.encode())
        elif isinstance(part, Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().data)
        else:
            state.update(digest(*part).encode())
    return state.hexdigest()


def described(function: Any) -> str:
    """A user's function by module and name, without its address, which differs between runs."""
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{function.__module__}.{name}"
