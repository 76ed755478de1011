"""What can this hardware do fast?"""

import contextlib
import time
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

SIZE, RUNS = 128, 6
"""Rows of a product that is timed, and how often; the first one warms up."""

EMULATED = 16
"""Times as slow as float32: emulation is some 200. Less than this a busy processor may cause, and
processes that share a computation must come to the same answer."""


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

    A processor that says it has them is asked by a product, once per process: where they turn out
    to be emulated they are hundreds of times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked) and not _is_emulated()


def has_fast_convolutions(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions of many groups run at the speed of products: oneDNN's on x86."""
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.enabled:
        return False
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()  # type: ignore[no-untyped-call]


@cache
def _is_emulated() -> bool:
    """By products of two square matrices, the fastest of some, in turns."""
    full = torch.ones(SIZE, SIZE, dtype=torch.float32)
    short = full.to(torch.bfloat16)
    pairs = [(product_seconds(full), product_seconds(short)) for _ in range(RUNS)][1:]
    return min(short for _, short in pairs) > EMULATED * min(full for full, _ in pairs)


def product_seconds(x: Tensor) -> float:
    """What one product of a matrix with itself takes."""
    start = time.perf_counter()
    x @ x
    return time.perf_counter() - start
