"""Every kernel of the scan against decoded rows and a float64 product."""

import pytest
import torch

from upweight.errors import NonFinite, ShapeError
from upweight.index import scan
from upweight.index.codes import Codes
from upweight.index.kernel import LARGEST, arranged, dot
from upweight.index.scan import Scan


def products(queries, shard, codes):
    return Scan(queries, codes).products(shard)


def case(bits, K, b=37, q=5):
    generator = torch.Generator().manual_seed(bits + K)
    queries = torch.randn(q, K, generator=generator) ** 3  # heavy tails
    queries *= torch.logspace(-12, 12, q)[:, None]
    r = torch.randn(b, K, generator=generator) * torch.logspace(-6, 6, b)[:, None]
    r[4] = 0
    return queries, Codes(bits).encode(r)


def bound(queries, shard, codes):
    """What the text states: δ/2 Σ|decode(r)|, and float32 behind it."""
    delta = queries.abs().amax(1) / LARGEST
    v = codes.decode(shard).double()
    size = queries.norm(dim=1)[:, None] * v.norm(dim=1)
    return delta[:, None] / 2 * v.abs().sum(1) + 2e-7 * size


# Of 576 bytes, of whole vectors and not; 264 is a row with a tail at every number of bits.
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("K", [8, 264, 4608])
def test_products_are_those_of_decoded_rows(bits, K):
    queries, shard = case(bits, K)
    codes = Codes(bits)
    exact = queries @ codes.decode(shard).double().mT
    for some in (slice(0, 1), slice(0, 5)):
        found = products(queries[some], shard, codes)
        assert found.dtype == torch.float64
        error = (found - exact[some]).abs()
        assert (error <= bound(queries, shard, codes)[some]).all()
    assert (found[:, 4] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_sums_of_whole_numbers_are_exact_in_every_kernel(bits):
    """Queries that are whole numbers of 16 bits: nothing is rounded but the result."""
    K, b = 36_864 // bits, 9  # longer than what 32 bits of a lane hold
    generator = torch.Generator().manual_seed(bits)
    queries = torch.randint(-LARGEST, LARGEST + 1, (2, K), generator=generator)
    queries[0], queries[:, 0] = LARGEST, LARGEST  # the largest sums that there are
    c = torch.randint(0, 256, (b, K * bits // 8), dtype=torch.uint8, generator=generator)
    c[0] = 255
    shard = {"codes": c, "scales": torch.full((b,), 0.5, dtype=torch.float32)}
    codes = Codes(bits)
    v = codes.levels(c).long()
    exact = (queries @ v.mT).double() / 2
    asked = Scan(queries.double(), codes)
    assert torch.equal(asked._whole.numbers.long(), queries)
    if scan._has_int8_products():
        found = asked._by_bytes(shard).double()
        torch.testing.assert_close(found, exact, rtol=3e-7, atol=exact.abs().max() * 1e-7)
    if dot(bits) is not None:
        torch.testing.assert_close(asked._one_by_one(shard), exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_compiled_kernel_on_all_threads(bits, monkeypatch):
    pytest.importorskip("numba")
    queries, shard = case(bits, 4608, b=101)
    codes = Codes(bits)
    exact = queries @ codes.decode(shard).double().mT
    monkeypatch.setattr(scan, "PIECE", 5 * 4608)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = Scan(queries, codes)._one_by_one(shard)
    assert ((found - exact).abs() <= bound(queries, shard, codes)).all()


def test_the_kernel_meets_numbers_in_the_order_of_bytes():
    whole = torch.arange(4 * 70).short()  # 70 bytes of 2 bits: two vectors of 32 and 6 behind
    told = arranged(whole.numpy(), 2)
    assert told[:3].tolist() == [0, 2, 4]  # lower bytes of the words, lowest field
    assert told[16:19].tolist() == [1, 3, 5]  # upper bytes, the same field
    assert told[32:34].tolist() == [70, 72]
    assert told[-6:].tolist() == list(range(3 * 70 + 64, 4 * 70))


def test_without_a_compiler_and_without_8_bit_products_numbers_are_the_same(monkeypatch):
    queries, shard = case(2, 264)
    codes = Codes(2)
    exact = queries @ codes.decode(shard).double().mT
    monkeypatch.setattr(scan, "dot", lambda bits: None)
    by_bytes = products(queries[:1], shard, codes)
    assert ((by_bytes - exact[:1]).abs() <= bound(queries, shard, codes)[:1]).all()
    monkeypatch.setattr(scan, "_has_int8_products", lambda: False)
    found = products(queries, shard, codes)
    size = queries.norm(dim=1)[:, None] * codes.decode(shard).double().norm(dim=1)
    assert ((found - exact).abs() <= 2e-7 * size).all()


@pytest.mark.parametrize("some", [slice(3, 20), torch.tensor([30, 2, 2, 7]), slice(5, 5)])
def test_parts_of_a_shard(some):
    queries, shard = case(2, 264)
    whole = products(queries, shard, Codes(2))
    part = {key: each[some] for key, each in shard.items()}
    for q in (1, 5):
        found = products(queries[:q], part, Codes(2))
        torch.testing.assert_close(found, whole[:q, some], rtol=1e-6, atol=0)
    assert products(queries[:0], part, Codes(2)).shape == (0, found.shape[1])


def test_what_does_not_fit_is_refused():
    queries, shard = case(2, 264)
    with pytest.raises(ShapeError, match="rows of 264 in 2 bits"):
        products(queries[:, :260], shard, Codes(2))
    queries[1, 5] = torch.nan
    with pytest.raises(NonFinite, match="query 1"):
        products(queries, shard, Codes(2))
    kept = queries[queries.isfinite().all(dim=1)]
    assert products(kept, shard, Codes(2)).isfinite().all()
    assert (products(torch.zeros(1, 264), shard, Codes(2)) == 0).all()
