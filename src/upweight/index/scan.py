"""Scan: exact products of queries with coded rows, as fast as the codes can be read.

    products[q, i] = Σₖ q̂ₖ decode(rᵢ)ₖ,    q̂ = δ · round(q/δ),    δ = maxₖ |qₖ| / 32 639

Queries are rounded to whole numbers of 16 bits. What follows is whole numbers, and exact, up to the
multiplication with δ and the row's scale: all kernels give the same numbers. The rounding is

    |products − Σₖ qₖ decode(rᵢ)ₖ| ≤ δ/2 Σₖ |decode(rᵢ)ₖ|

at most, and δ/√12 ‖decode(rᵢ)‖ in root mean square, which is below 9e-6 ‖q‖ ‖decode(rᵢ)‖ whatever
the query. The error of 2 bits is a thousand times that and more.

    one to six queries     the compiled kernel (`upweight.index.kernel`; the extra `index`)
    more, or without it    bytes unpacked in cache, times 256·high + low bytes of q̂ (torch._int_mm)
    neither, or floats     a float32 product with q itself, of rows unpacked in cache
"""

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int8, Int16, Int32, UInt8
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NonFinite, ShapeError
from upweight.index.codes import FLOATS, Codes
from upweight.index.kernel import LARGEST, arranged, dot

FEW = 6
"""Queries up to which the kernel, which takes one at a time, is faster than unpacking."""

CACHED, WIDE = 2**21, 2048
"""Bytes that are unpacked at once, to stay in a core's cache, and how many of a row. About as many
rows as bytes of each: oneDNN multiplies a few queries by few wide rows half as fast."""

PIECE = 2**19
"""Bytes of codes that all of a few queries meet before the next."""


@dataclass(frozen=True, eq=False)
class _Whole:
    """Queries as δ times whole numbers of 16 bits."""

    numbers: Int16[Tensor, "q K"]
    step: Float[Tensor, " q"]


class Scan:
    """Some queries, made ready once, for shard after shard.

    Args:
        queries: On the shards' device.
        codes: How the rows are kept.

    Raises:
        NonFinite: NaN or infinity in a query.
    """

    def __init__(self, queries: Float[Tensor, "q K"], codes: Codes) -> None:
        _require_finite(queries)
        self.queries, self.codes = queries, codes

    def products(self, shard: Mapping[str, Tensor]) -> Float[Tensor, "q b"]:
        """Products of the queries with every row, in their dtype or float32.

        Args:
            shard: What `codes.encode` gave, also memory-mapped, and more of it is not read.

        Raises:
            ShapeError: Queries and rows are not of one length.

        Cost: one query takes a reading of the codes, with the extra `index` at about half of the
        read bandwidth, and up to six take as long each. More are multiplied together, faster than
        float32 rows where the processor has VNNI or AMX. Memory beside the result: some MB.
        """
        queries, rows, bits = self.queries, shard["codes"], self.codes.bits
        _require_as_long(queries, rows, self.codes)
        kind = torch.promote_types(queries.dtype, torch.float32)
        if not (len(queries) and len(rows) and queries.shape[1]):
            return queries.new_zeros(len(queries), len(rows), dtype=kind)
        if bits == 32:
            return (queries.float() @ rows.mT).to(kind)
        if bits in FLOATS or rows.device.type != "cpu":
            return self._as_floats(shard).to(kind)
        if len(queries) <= FEW and dot(bits) is not None:
            return self._one_by_one(shard).to(kind)
        largest = 256 * min(128, 2**bits) * queries.shape[1]
        # oneDNN's products over a single number are wrong.
        if _has_int8_products() and largest < 2**31 and rows.shape[1] % WIDE != 1:
            return self._by_bytes(shard).to(kind)
        return self._as_floats(shard).to(kind)

    @cached_property
    def _whole(self) -> _Whole:
        queries = self.queries.to(torch.promote_types(self.queries.dtype, torch.float32))
        step = _most(queries) / LARGEST
        numbers = (queries / torch.where(step > 0, step, 1.0)[:, None]).round_().short()
        return _Whole(numbers, step.double())

    @cached_property
    def _arranged(self) -> list[NDArray[np.int16]]:
        return [arranged(each.numpy(), self.codes.bits) for each in self._whole.numbers]

    @cached_property
    def _halves(self) -> tuple[Int32[Tensor, " h"], list[slice], list[list[Tensor]]]:
        """High and low bytes of the queries, for pieces of a row's bytes, field by field.

        Before them what a product has too much of, since codes count from 0.
        """
        numbers, bits = self._whole.numbers, self.codes.bits
        fields = 8 // bits
        low = numbers.to(torch.int8)  # the lower byte, signed
        halves = torch.cat([((numbers - low) >> 8).to(torch.int8), low])
        # 8 bits are unsigned in the codes and signed here: c − 128.
        top = 2**bits - 1 - (256 if bits == 8 else 0)
        offset = top * halves.sum(dim=1, dtype=torch.int64).int()
        width = halves.shape[1] // fields
        pieces = [slice(a, min(a + WIDE, width)) for a in range(0, width, WIDE)]
        parts = halves.view(len(halves), fields, width)
        told = [[parts[:, s, each].mT.contiguous() for s in range(fields)] for each in pieces]
        return offset, pieces, told

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(torch.get_num_threads())

    def _one_by_one(self, shard: Mapping[str, Tensor]) -> Float[Tensor, "q b"]:
        """By the compiled kernel, each thread some of the rows."""
        rows, whole, told, bits = shard["codes"], self._whole, self._arranged, self.codes.bits
        kernel = dot(bits)
        assert kernel is not None
        sums = torch.empty(len(told), len(rows), dtype=torch.int64)

        def some(first: int, last: int) -> None:
            size = max(PIECE // rows.shape[1], 1) if len(told) > 1 else max(last - first, 1)
            for start in range(first, last, size):
                stop = min(start + size, last)
                piece = rows[start:stop].contiguous().numpy()
                for query, out in zip(told, sums, strict=True):
                    kernel(piece, query, out[start:stop].numpy())

        threads = min(torch.get_num_threads(), -(-len(rows) * rows.shape[1] // PIECE))
        if threads == 1:
            some(0, len(rows))
        else:
            ends = [len(rows) * i // threads for i in range(threads + 1)]
            list(self._threads.map(some, ends[:-1], ends[1:]))
        top = 2**bits - 1
        centred = sums.mul_(2).sub_(top * whole.numbers.sum(dim=1, keepdim=True, dtype=torch.int64))
        return centred.double().mul_(whole.step[:, None]).mul_(shard["scales"].double())

    def _by_bytes(self, shard: Mapping[str, Tensor]) -> Float[Tensor, "q b"]:
        """By products of 8-bit numbers, summed in 32 bits: q̂ = 256·high + low."""
        rows, whole, bits = shard["codes"], self._whole, self.codes.bits
        offset, pieces, told = self._halves
        width = rows.shape[1]
        size = max(CACHED // min(WIDE, width), 1)
        spaces = torch.empty(2, min(size, len(rows)) * min(WIDE, width), dtype=torch.uint8)
        found = torch.empty(len(whole.step), len(rows), dtype=torch.float32)
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            sums = torch.zeros(len(block), len(offset), dtype=torch.int32)
            for piece, parts in zip(pieces, told, strict=True):
                for s, part in enumerate(parts):
                    c, shift = _field(block[:, piece], s, bits, spaces)
                    found_here = torch._int_mm(c, part)
                    sums += found_here.bitwise_right_shift_(shift) if shift else found_here
            upper, lower = sums.mul_(2).sub_(offset).float().mT.chunk(2)
            torch.add(lower, upper, alpha=256, out=found[:, start : start + size])
        return found.mul_(whole.step.float()[:, None]).mul_(shard["scales"])

    def _as_floats(self, shard: Mapping[str, Tensor]) -> Float[Tensor, "q b"]:
        """By float32 products with the queries as they are."""
        rows, q = shard["codes"], self.queries.float()
        size = max(CACHED // (4 * q.shape[1]), 1)
        levels = self.codes.levels
        parts = [q @ levels(rows[i : i + size]).mT for i in range(0, len(rows), size)]
        return torch.cat(parts, dim=1).mul_(shard["scales"])


def _field(
    codes: UInt8[Tensor, "b B"], s: int, bits: int, spaces: UInt8[Tensor, "2 c"]
) -> tuple[Int8[Tensor, "b B"], int]:
    """The numbers in field s of every byte times 2^shift, and shift; of 8 bits, c − 128."""
    whole = codes.shape[1] % 8 == codes.stride(0) % 8 == codes.storage_offset() % 8 == 0
    shifted, out = (space[: codes.numel()].view(codes.shape) for space in spaces)
    signed, ones = out.view(torch.int8), 1
    if whole and codes.stride(1) == 1:
        # Eight bytes at once: shifts of single bytes are not vectorized.
        codes, shifted, out = (each.view(torch.int64) for each in (codes, shifted, out))
        ones = 0x0101010101010101
    if bits == 8:
        torch.bitwise_xor(codes, _signed(128 * ones, ones), out=out)
        return signed, 0
    mask, shift = 2**bits - 1, bits * s
    if mask << shift < 128:  # fits where it is
        torch.bitwise_and(codes, (mask << shift) * ones, out=out)
        return signed, shift
    torch.bitwise_right_shift(codes, shift, out=shifted)
    torch.bitwise_and(shifted, mask * ones, out=out)
    return signed, 0


def _signed(number: int, ones: int) -> int:
    return number - 2**64 if ones > 1 and number >= 2**63 else number


def _most(queries: Float[Tensor, "q K"]) -> Float[Tensor, " q"]:
    """maxₖ |qₖ|, and NaN where there is one."""
    most: Tensor = torch.linalg.vector_norm(queries, torch.inf, dim=1)
    return most


@functools.cache
def _has_int8_products() -> bool:
    """Whether torch has the private product of 8-bit numbers, here, with exact sums.

    Without VNNI oneDNN adds pairs in 16 bits, where large ones are cut off.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    a = torch.arange(-128, 128).view(4, 64).to(torch.int8)
    try:
        found = torch._int_mm(a, a.mT)
    except (AttributeError, RuntimeError):
        return False
    return bool((found == a.int() @ a.int().mT).all())


def _require_as_long(queries: Float[Tensor, "q K"], rows: Tensor, codes: Codes) -> None:
    K = rows.shape[1] if codes.bits in FLOATS else rows.shape[1] * 8 // codes.bits
    if queries.shape[1] != K:
        raise ShapeError(
            "Queries have as many coordinates as rows.",
            f"queries of {queries.shape[1]}, rows of {K} in {codes.bits} bits.",
            "codes read with another number of bits, or queries of another transform.",
            f"use Codes(bits) with the bits that the rows were encoded with, and queries of {K}.",
        )


def _require_finite(queries: Float[Tensor, "q K"]) -> None:
    wrong = (~_most(queries).isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise NonFinite(
            "Queries are finite numbers.",
            f"NaN or infinity in query {', '.join(map(str, wrong[:6]))}.",
            "a measure that overflows, or an input with NaN.",
            "leave these queries out: Scan(queries[queries.isfinite().all(dim=1)], …).",
        )
