"""Codes: each row alone, products without bias, layout, and what is refused."""

import numpy as np
import pytest
import torch

from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.index.codes import Codes, packed, unpacked


def rows(b=24, K=1024, seed=0):
    """Heavy-tailed rows (a Student distribution) of norms from 1e-9 to 1e9, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, b, K, generator=generator)
    x = normal[0] / normal[1:].square().mean(0).sqrt().clamp_min(0.2)
    x *= torch.logspace(-9, 9, b)[:, None]
    x[3] = 0
    return x


# What the docstring says of ‖decode(r) − r‖/‖r‖ for normal coordinates; float16 has 11 bits.
@pytest.mark.parametrize("bits, error", [(1, 0.76), (2, 0.37), (4, 0.11), (8, 0.01), (16, 3e-4)])
def test_products_with_the_row_itself_are_its_square(bits, error):
    codes = Codes(bits)
    normal = torch.randn(30, 4096, generator=torch.Generator().manual_seed(0))
    for r in (rows(), normal):
        kept = codes.encode(r)
        assert sum(each[0].nbytes for each in kept.values()) == codes.bytes(r.shape[1])
        back, square = codes.decode(kept).double(), r.square().sum(1)
        assert (back[square == 0] == 0).all()
        slope = ((back * r).sum(1) / square)[square > 0]
        # In sums, coordinates are rounded to 2⁻¹⁶ of the largest.
        torch.testing.assert_close(slope, torch.ones_like(slope), rtol=0, atol=3e-4)
    assert ((back - r).norm(dim=1) / r.norm(dim=1)).mean() < error


def test_products_have_no_bias_where_those_of_least_squares_shrink():
    """Queries that resemble the rows, as a model's do: score on score has slope 1, not .87."""
    x = torch.randn(396, 512, generator=torch.Generator().manual_seed(1))
    r, q = x[:300] + 0.5 * x[300], x[301:] + 0.5 * x[300]
    codes = Codes(2)
    kept = codes.encode(r)
    exact, found = q @ r.mT, q @ codes.decode(kept).double().mT
    v = codes.levels(kept["codes"]).double()
    shrunk = q @ (v * ((v * r).sum(1) / v.square().sum(1))[:, None]).mT

    def slope(a):
        return (a * exact).sum() / exact.square().sum()

    assert abs(slope(found) - 1) < 0.03
    assert slope(shrunk) < 0.9


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
def test_a_code_depends_on_its_row_only(bits):
    codes, r = Codes(bits), rows(9)
    whole = codes.encode(r)
    for key, each in whole.items():
        parts = [codes.encode(r[i : i + 1])[key] for i in range(9)]
        assert torch.equal(each, torch.cat(parts))
    if bits != 32:
        # Nor on the order in which sums are taken: another one has the same scales, bit for bit.
        order = torch.randperm(r.shape[1], generator=torch.Generator().manual_seed(1))
        mixed = codes.encode(r[:, order])
        assert torch.equal(mixed["scales"], whole["scales"])
        some = [i for i in range(9) if i != 3]  # signs of zeros go by place
        assert torch.equal(codes.decode(mixed)[some], codes.decode(whole)[some][:, order])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [5, 64])
def test_layout_is_what_the_text_says(bits, width):
    c = torch.randint(0, 2**bits, (3, width * 8 // bits), dtype=torch.uint8)
    codes = packed(c, bits)
    told = codes.numpy().astype(np.uint16)
    for k in range(c.shape[1]):
        s, j = divmod(k, width)
        assert (((told[:, j] >> (bits * s)) & (2**bits - 1)) == c[:, k].numpy()).all()
    assert torch.equal(unpacked(codes, bits), c)
    assert torch.equal(unpacked(codes[1:, :], bits), c[1:])


def test_zeros_of_a_sparse_row_do_not_add_up():
    r = torch.zeros(1, 512)
    r[0, 100] = 1.0
    back = Codes(2).decode(Codes(2).encode(r)).double()
    ones = torch.ones(512)
    assert abs(back @ ones - r @ ones) < 10 * back.abs().min()  # of 511 that are all wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_other_dtypes(dtype):
    r = rows(b=8, K=64)[4:6].to(dtype)
    kept, same = Codes(4).encode(r), Codes(4).encode(r.double())
    assert torch.equal(kept["codes"], same["codes"])
    torch.testing.assert_close(kept["scales"], same["scales"], rtol=1e-6, atol=0)


def test_no_rows_are_no_codes():
    assert Codes(2).decode(Codes(2).encode(torch.zeros(0, 8))).shape == (0, 8)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e39])
@pytest.mark.parametrize("bits", [2, 16, 32])
def test_rows_that_are_not_finite_are_refused_and_the_others_are_not(bits, wrong):
    r = rows(b=6)
    r[2, 7] = wrong
    with pytest.raises(NonFinite, match="row 2"):
        Codes(bits).encode(r)
    kept = Codes(bits).encode(r[r.float().isfinite().all(dim=1)])
    assert torch.equal(kept["codes"][0], Codes(bits).encode(rows(b=6))["codes"][0])


def test_wrong_sizes_are_refused_with_the_way_out():
    with pytest.raises(SpecError, match="bits=1"):
        Codes(3)
    r = rows(b=5, K=1023)
    with pytest.raises(ShapeError, match=r"pad\(rows, \(0, 1\)\)"):
        Codes(2).encode(r)
    assert Codes(2).decode(Codes(2).encode(torch.nn.functional.pad(r, (0, 1)))).shape == (5, 1024)
