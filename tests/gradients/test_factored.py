"""Algebra on factors against the same on gradients in full."""

import pytest
import torch

from tests.market import draw
from upweight.gradients.convolved import Convolved, Window
from upweight.gradients.factored import (
    Extended,
    Formed,
    Joined,
    Lookups,
    Rows,
    Summed,
    Tokens,
    any_nonzero,
    stacked,
)
from upweight.linalg.eigen import Eigen
from upweight.scoring.queries import rotated

EXACT = {"rtol": 1e-12, "atol": 1e-12}

# (positions, outputs, inputs): one position, few, and more than pay for pairs of positions.
SHAPES = {"one": (1, 3, 4), "few": (2, 7, 8), "many": (9, 2, 3), "none wide": (3, 1, 1)}


def tokens(shape, b=5):
    g = torch.Generator().manual_seed(0)
    t, o, i = shape
    return Tokens(draw(g, b, t, o), draw(g, b, t, i))


def lookups(t, b=5):
    g = torch.Generator().manual_seed(0)
    return Lookups(torch.randint(6, (b, t), generator=g), 6, draw(g, b, t, 3))


def formed():
    return Formed(draw(torch.Generator().manual_seed(0), 5, 3, 4))


def extended():
    g = torch.Generator().manual_seed(0)
    return Extended(draw(g, 5, 2, 7), draw(g, 5, 2, 8))


def convolved(dtype=torch.float64, b=5, k=1):
    g = torch.Generator().manual_seed(0)
    window = Window((3, 2), (1, 2), (2, 1))
    inputs = draw(g, b, k, 2, 8, 7).to(dtype)
    return Convolved(draw(g, b, 3, k * 4 * 3).to(dtype).mT, inputs, window)


def joined():
    return Joined([lookups(4), tokens((5, 6, 3))])


OTHERS = {
    "lookups": lambda: lookups(9),
    "formed": formed,
    "extended": extended,
    "joined": joined,
    "convolved": convolved,
    "convolved several": lambda: convolved(k=2),
}


@pytest.fixture(params=[*SHAPES, *OTHERS])
def factors(request):
    name = request.param
    return OTHERS[name]() if name in OTHERS else tokens(SHAPES[name])


@pytest.fixture
def full(factors):
    return torch.einsum("bto,bti->boi", factors.left, factors.right)


def test_matrices(factors, full):
    torch.testing.assert_close(factors.matrices(), full, **EXACT)


@pytest.mark.parametrize("has_bias", [False, True])
def test_form_writes_the_matrices(factors, full, has_bias):
    out, bias = torch.empty_like(full), full.new_empty(full.shape[:2])
    given = factors.with_ones() if has_bias else factors
    given.form(out, bias if has_bias else None)
    torch.testing.assert_close(out, full, **EXACT)
    if has_bias:
        torch.testing.assert_close(bias, factors.left.sum(dim=1), **EXACT)


def test_total(factors, full):
    torch.testing.assert_close(factors.total(), full.sum(dim=0), **EXACT)


def test_squared_norm(factors, full):
    torch.testing.assert_close(factors.squared_norm(), full.square().sum(dim=(1, 2)), **EXACT)


def test_inner(factors, full):
    v = draw(torch.Generator().manual_seed(1), 4, *full.shape[1:])
    expected = torch.einsum("qoi,boi->qb", v, full)
    torch.testing.assert_close(factors.inner(v), expected, **EXACT)


def test_absolute(factors):
    expected = torch.einsum("bto,bti->boi", factors.left.abs(), factors.right.abs())
    torch.testing.assert_close(factors.absolute().matrices(), expected, **EXACT)


def test_projected(factors, full):
    g = torch.Generator().manual_seed(1)
    left, right = draw(g, full.shape[1], 2), draw(g, full.shape[2], 3)
    found = factors.projected(left, right).matrices()
    torch.testing.assert_close(found, left.T @ full @ right, **EXACT)


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_rotated(factors, full, sides):
    g = torch.Generator().manual_seed(1)
    q, r = (torch.linalg.qr(draw(g, k, k))[0] for k in full.shape[1:])
    eigen = Eigen((q if sides[0] else None, r if sides[1] else None), full.new_ones(full.shape[1:]))
    left, right = q if sides[0] else torch.eye(len(q)), r if sides[1] else torch.eye(len(r))
    expected = left.to(full).T @ full @ right.to(full)
    torch.testing.assert_close(rotated(factors, eigen).matrices(), expected, **EXACT)


def test_lookups_are_rotated_without_rows_of_zeros_and_a_one(monkeypatch):
    part = lookups(4)
    q, r = torch.linalg.qr(part.left[0].new_ones(6, 6).tril())[0], torch.eye(3).double()
    expected = part.matrices()
    monkeypatch.setattr(Lookups, "left", property(lambda self: pytest.fail("written out")))
    found = rotated(part, Eigen((q, r), expected.new_ones(6, 3)))
    torch.testing.assert_close(found.matrices(), q.T @ expected, **EXACT)


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([4, 0, 0])], ids=["slice", "tensor"])
def test_take(factors, full, index):
    torch.testing.assert_close(factors.take(index).matrices(), full[index], **EXACT)


def test_scaled(factors, full):
    c = draw(torch.Generator().manual_seed(1), 5)
    expected = c[:, None, None] * full
    torch.testing.assert_close(factors.scaled(c).matrices(), expected, **EXACT)


def test_to(factors):
    assert factors.to(torch.float32).matrices().dtype == torch.float32


@pytest.mark.parametrize("memory", [1, 2**30], ids=["one at a time", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_convolved_of_any_number_at_a_time(monkeypatch, memory, dtype):
    monkeypatch.setattr("upweight.gradients.convolved.CACHE_BYTES", memory)
    made = convolved(dtype).with_ones()
    full = torch.einsum("bto,bti->boi", made.left, made.right)
    torch.testing.assert_close(made.matrices(), full)
    torch.testing.assert_close(made.total(), full.sum(dim=0))
    assert sum(len(part) for part in made.chunks()) == len(made)


def test_groups_of_a_convolution_are_the_products_with_patches(monkeypatch):
    made = convolved(torch.float32).with_ones()
    quick = made.matrices()
    assert made.take(slice(0, 0)).matrices().shape == (0, *quick.shape[1:])
    monkeypatch.setattr("upweight.gradients.convolved.SMALL", 0)
    torch.testing.assert_close(made.matrices(), quick)


def test_ones_add_the_total_of_left_as_a_column(factors, full):
    found = factors.with_ones().matrices()
    torch.testing.assert_close(found[..., :-1], full, **EXACT)
    torch.testing.assert_close(found[..., -1], factors.left.sum(dim=1), **EXACT)


def test_compact_is_the_same(factors, full):
    torch.testing.assert_close(factors.compact().matrices(), full, **EXACT)


@pytest.mark.parametrize("shape, is_formed", [((9, 2, 3), True), ((1, 3, 4), False)])
def test_what_is_smaller_is_kept_and_rounded(shape, is_formed):
    given = tokens(shape)
    assert isinstance(given.compact(), Formed) == is_formed
    short = given.rounded(torch.bfloat16)
    exact = given.matrices()
    expected = exact.bfloat16() if is_formed else given.to(torch.bfloat16).matrices()
    assert torch.equal(short.matrices(), expected)
    assert sum(x.nbytes for x in short.tensors) < sum(x.nbytes for x in given.tensors) / 3


def test_len_and_positions(factors):
    assert len(factors) == 5
    assert factors.positions == factors.left.shape[1]


def test_stacked_tokens_of_unequal_positions():
    parts = [tokens(shape, b) for b, shape in ((2, (1, 3, 4)), (1, (5, 3, 4)), (3, (2, 3, 4)))]
    found = stacked(parts)
    assert found.positions == 5
    expected = torch.cat([p.matrices() for p in parts])
    torch.testing.assert_close(found.matrices(), expected, **EXACT)


def test_stacked_lookups_stay_lookups():
    parts = [lookups(t, b) for b, t in ((2, 1), (1, 5), (3, 2))]
    found = stacked(parts)
    assert isinstance(found, Lookups)
    expected = torch.cat([p.matrices() for p in parts])
    torch.testing.assert_close(found.matrices(), expected, **EXACT)


def test_lookups_form_nothing_of_the_size_of_the_vocabulary_per_position():
    b, t, rows, i = 4, 8, 1_000_000, 2
    index = torch.randint(rows, (b, t))
    factors = Lookups(index, rows, torch.ones(b, t, i))
    # One-hot left factors would hold b·t·rows = 3.2e7 numbers, 256 MB: each of these fails on it.
    limit = rows * i
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    v = torch.ones(1, rows, i)
    with Sizes():
        factors.total()
        factors.squared_norm()
        factors.inner(v)
        factors.take(slice(2)).scaled(torch.ones(2)).projected(v[0], torch.eye(i))
    assert max(sizes) <= limit


def test_rows():
    g = torch.Generator().manual_seed(0)
    values, v = draw(g, 5, 3), draw(g, 2, 3)
    factors = Rows(values)
    assert len(factors) == 5
    torch.testing.assert_close(factors.total(), values.sum(dim=0), **EXACT)
    torch.testing.assert_close(factors.squared_norm(), values.square().sum(dim=1), **EXACT)
    torch.testing.assert_close(factors.inner(v), v @ values.T, **EXACT)
    torch.testing.assert_close(factors.take(slice(1, 3)).values, values[1:3], **EXACT)
    torch.testing.assert_close(factors.scaled(v[0, :1].expand(5)).values, v[0, 0] * values, **EXACT)
    torch.testing.assert_close(stacked([factors, factors]).values, values.repeat(2, 1), **EXACT)
    torch.testing.assert_close(factors.absolute().values, values.abs(), **EXACT)
    assert factors.to(torch.float32).values.dtype == torch.float32


def test_positions_that_add_something_are_told_in_every_size():
    x = torch.zeros(6, 3, 4, dtype=torch.float32)
    x[:, 0], x[:, 1] = 1.0, 1e-9  # the second is rounding of the first
    x[1] *= 1e-30  # squares of it are 0
    x[2] *= 1e30  # and of it ∞
    x[3] = 0.0
    x[4, 2, 0] = torch.nan
    x[5, 1] = 1e-3
    found = any_nonzero(x)
    assert torch.equal(any_nonzero(x.mT.contiguous().mT), found)
    assert found.tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, False],
        [False, False, False],
        [True, True, True],
        [True, True, False],
    ]
    assert any_nonzero(x.double())[1].tolist() == [True, True, False]


def test_sums_wait_until_they_are_asked_for():
    left = draw(torch.Generator().manual_seed(0), 5, 3, 4)
    waiting, rows = Summed(left), Rows(left.sum(dim=1))
    assert len(waiting) == 5 and "values" not in vars(waiting)
    assert torch.equal(waiting.values, rows.values)
    assert torch.equal(waiting.scaled(left[:, 0, 0]).values, rows.scaled(left[:, 0, 0]).values)
    assert torch.equal(stacked([waiting, rows]).values, torch.cat([rows.values] * 2))
