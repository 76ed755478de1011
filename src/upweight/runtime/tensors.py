"""Tensors in one file with the hash of them all: what is read is what was written.

The file is safetensors. Its header holds what the tensors are about, and the hash of that and of
every name, dtype, shape and byte. No pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upweight.errors import StaleStore, message
from upweight.runtime.fingerprint import digest
from upweight.runtime.whole import ELSEWHERE, replacing

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], way_out: str = ELSEWHERE
) -> str:
    """Write a file whole or not at all. Its tensors are not copied.

    Returns:
        The hash of tensors and texts.

    Raises:
        NotWritten: The disk is full or not writable.
    """
    whole = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    found = tensors_digest(whole, about)
    write_plain(path, whole, {**about, "digest": found}, way_out)
    return found


def write_plain(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], way_out: str = ELSEWHERE
) -> None:
    """The same of contiguous tensors on the CPU, without a hash: another file holds it.

    Raises:
        NotWritten: The disk is full or not writable.
    """
    # The format wants every tensor aligned: those of wide numbers first.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    fields: dict[str, Any] = {"__metadata__": dict(header)} if header else {}
    end = 0
    for name in order:
        each = tensors[name]
        begin, end = end, end + each.nbytes
        fields[name] = {
            "dtype": DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    told = json.dumps(fields, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    with replacing(path, way_out) as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name in order:
            file.write(_bytes(tensors[name]))


def read_tensors(path: Path, way_out: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and what they are about.

    Raises:
        FileNotFoundError: There is none.
        StaleStore: They are not what was written.
    """
    tensors, about = read_plain(path, way_out)
    if about.pop("digest", None) != tensors_digest(tensors, about):
        raise StaleStore(stale(path, "altered numbers", way_out))
    return tensors, about


def read_plain(path: Path, way_out: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same without asking for a hash.

    Raises:
        FileNotFoundError: There is none.
        StaleStore: It is no safetensors file.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise StaleStore(stale(path, "no file in its place", way_out))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise StaleStore(stale(path, f"unreadable bytes: {error}", way_out)) from error


UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError)
"""What safetensors and PyTorch raise for hostile bytes, RuntimeError for 2⁴⁰ × 0 numbers."""


def tensors_digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """The hash of tensors and of what they are about."""
    parts = [part for name in sorted(tensors) for part in (name, tensors[name])]
    return digest(json.dumps(dict(about), sort_keys=True), *parts)


def stale(path: Path, given: str, way_out: str) -> str:
    """The message about a file that is not what was written."""
    return message(
        "A file of numbers must be what was written.",
        f"{path} with {given}.",
        "a file edited, copied from elsewhere, or damaged by the disk or on its way.",
        way_out,
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
