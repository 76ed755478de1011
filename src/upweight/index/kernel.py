"""A compiled kernel for the products of one query with coded rows, for the extra `index` (Numba).

    S = Σₖ cₖ q̂ₖ        c in 1, 2, 4 or 8 bits, q̂ whole numbers of 16 bits

A vector of 16 words of 16 bits holds 256/bits numbers c. And-ing it with a mask leaves one of them
in every word, multiplied by a power of two that is taken out of the sum at its end, so that one
shift serves all. Products of 16 bits are summed in pairs into 32 bits by one instruction of AVX2
(vpmaddwd) or VNNI (vpdpwssd), which LLVM chooses for the machine. Two rows share loads of q̂, and
the memory 8 kB ahead is asked for. No sum overflows, so S is exact, and the same on every machine.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 16
"""Words in a vector: 256 bits, for AVX2; as fast as 512 bits where memory is the limit."""

AHEAD = 8192

LARGEST = 127 * 256 + 127
"""Of |q̂|, so that it is 256 times a number of 8 bits and another one."""

Dot = Callable[[NDArray[np.uint8], NDArray[np.int16], NDArray[np.int64]], None]


def arranged(whole: NDArray[np.int16], bits: int) -> NDArray[np.int16]:
    """A query's numbers in the order in which the kernel meets them.

    Byte j of a row has coordinates s·B + j in its fields s; vector t has the bytes 32t … 32t + 31,
    of which words have the even ones below. Coordinates in the bytes behind the last whole vector
    stay in their order.
    """
    planes = whole.reshape(8 // bits, -1)
    vectors = planes.shape[1] // (2 * LANES)
    head = planes[:, : vectors * 2 * LANES].reshape(8 // bits, vectors, LANES, 2)
    tail = planes[:, vectors * 2 * LANES :]
    return np.concatenate([head.transpose(1, 0, 3, 2).ravel(), tail.ravel()])


@functools.cache
def dot(bits: int) -> Dot | None:
    """The kernel, (codes [n, B], arranged q̂, out [n]) ↦ S in `out`; None without Numba.

    Cost: a second to compile, once in a process and for each number of bits.
    """
    if sys.byteorder != "little":
        return None
    try:
        import numba
    except ImportError:
        return None
    two_rows = _two_rows(bits)
    fields = np.int64(8 // bits)
    mask = np.int64(2**bits - 1)
    # Vectors after which 32 bits of a lane might be full.
    most = np.int64((2**31 - 1) // (LARGEST * (2**bits - 1) * 2 ** (8 - bits) * 4))

    def scan(codes: Any, q: Any, out: Any) -> None:
        n, width = codes.shape
        vectors = width // (2 * LANES)
        behind = width - vectors * 2 * LANES
        start = vectors * 2 * LANES * fields
        for r in range(0, n, 2):
            other = min(r + 1, n - 1)
            first = second = np.int64(0)
            for t in range(0, vectors, most):
                a, b = two_rows(
                    codes.ctypes.data + r * width + t * 2 * LANES,
                    codes.ctypes.data + other * width + t * 2 * LANES,
                    q.ctypes.data + t * 4 * LANES * fields,
                    min(most, vectors - t),
                )
                first += a
                second += b
            for j in range(behind):
                for s in range(fields):
                    value = np.int64(q[start + s * behind + j])
                    at = width - behind + j
                    first += ((np.int64(codes[r, at]) >> (bits * s)) & mask) * value
                    second += ((np.int64(codes[other, at]) >> (bits * s)) & mask) * value
            out[r], out[other] = first, second

    return numba.njit(nogil=True)(scan)


def _two_rows(bits: int) -> Any:
    """two_rows(address of a row, of another, of q̂, vectors) → S of both, in LLVM's own words."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    fields = 8 // bits
    byte, i16, i32, i64 = (ir.IntType(size) for size in (8, 16, 32, 64))
    words = ir.VectorType(i16, LANES)
    products = ir.VectorType(i32, LANES)
    sums = ir.VectorType(i32, LANES // 2)
    wide = ir.VectorType(i64, LANES // 2)

    def all_of(kind: Any, value: int) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    even, odd = (ir.Constant(sums, list(range(first, LANES, 2))) for first in (0, 1))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *rows, query, count = arguments
        rows = [builder.inttoptr(row, words.as_pointer()) for row in rows]
        query = builder.inttoptr(query, words.as_pointer())
        totals = [
            [cgutils.alloca_once_value(builder, all_of(sums, 0)) for _ in range(fields)]
            for _ in rows
        ]
        of = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0")
        with cgutils.for_range(builder, count) as loop:
            halves = []
            for row in rows:
                place = builder.gep(row, [loop.index])
                word = builder.load(place, align=1)
                halves.append((word, builder.lshr(word, all_of(words, 8))))
                ahead = builder.gep(
                    builder.bitcast(place, byte.as_pointer()), [ir.Constant(i64, AHEAD)]
                )
                builder.call(prefetch, [ahead, *(ir.Constant(i32, x) for x in (0, 3, 1))])
            first = builder.mul(loop.index, ir.Constant(i64, 2 * fields))
            for s in range(fields):
                mask = all_of(words, (2**bits - 1) << (bits * s))
                for half in (0, 1):
                    at = builder.add(first, ir.Constant(i64, 2 * s + half))
                    q = builder.sext(builder.load(builder.gep(query, [at]), align=2), products)
                    for word, total in zip(halves, totals, strict=True):
                        c = builder.sext(builder.and_(word[half], mask), products)
                        each = builder.mul(c, q)
                        # In pairs, which LLVM knows as one instruction
                        pairs = (builder.shuffle_vector(each, each, part) for part in (even, odd))
                        more = builder.add(*pairs)
                        builder.store(builder.add(builder.load(total[s]), more), total[s])
        of = ir.FunctionType(i64, [wide])
        name = f"llvm.vector.reduce.add.v{LANES // 2}i64"
        reduced = cgutils.get_or_insert_function(builder.module, of, name)
        found = []
        for total in totals:
            lanes = all_of(wide, 0)
            for s in range(fields):
                exact = builder.ashr(builder.load(total[s]), all_of(sums, bits * s))
                lanes = builder.add(lanes, builder.sext(exact, wide))
            found.append(builder.call(reduced, [lanes]))
        return context.make_tuple(builder, signature.return_type, found)

    def two_rows(typing_context: Any, a: Any, b: Any, query: Any, count: Any) -> Any:
        signature = types.UniTuple(types.int64, 2)(types.intp, types.intp, types.intp, types.intp)
        return signature, generate

    return intrinsic(two_rows)
