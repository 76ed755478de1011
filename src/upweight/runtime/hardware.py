"""What can this hardware do fast?"""

import contextlib
import time
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this hardware.

    Of a processor that says it has them it is measured, once per process, in a few milliseconds:
    where the products turn out to be emulated they are hundreds of times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_any = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return has_any and _is_faster_in_bfloat16()


SIZES = (64, 128, 256, 512)
"""Rows of the products that are timed, one after the other: a small one tells emulation."""

EMULATED = 4
"""Times as slow as float32: nothing larger need be tried."""


@cache
def _is_faster_in_bfloat16() -> bool:
    """By products of two square matrices, the fastest of three each, in turns."""
    ratio = 0.0
    for size in SIZES:
        full = torch.ones(size, size)
        short = full.to(torch.bfloat16)
        pairs = [(_seconds(full), _seconds(short)) for _ in range(4)][1:]  # the first one warms up
        ratio = min(full for full, _ in pairs) / min(short for _, short in pairs)
        if ratio < 1 / EMULATED:
            return False
    return ratio > 1


def _seconds(x: Tensor) -> float:
    """What one product of a matrix with itself takes."""
    start = time.perf_counter()
    x @ x
    return time.perf_counter() - start
