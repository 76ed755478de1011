"""Is it still the same? A hash of tensors and texts, equal across processes and machines."""

import hashlib
from collections.abc import Iterable

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
