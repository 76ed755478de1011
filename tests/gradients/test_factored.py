"""Algebra on factors against the same on gradients in full."""

import pytest
import torch

from tests.market import draw
from upweight.gradients.factored import Rows, Tokens, stacked

EXACT = {"rtol": 1e-12, "atol": 1e-12}

# (positions, outputs, inputs): one position, few, and more than pay for pairs of positions.
SHAPES = {"one": (1, 3, 4), "few": (2, 7, 8), "many": (9, 2, 3), "none wide": (3, 1, 1)}


def tokens(shape, b=5):
    g = torch.Generator().manual_seed(0)
    t, o, i = shape
    return Tokens(draw(g, b, t, o), draw(g, b, t, i))


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def factors(request):
    return tokens(request.param)


@pytest.fixture
def full(factors):
    return torch.einsum("bto,bti->boi", factors.left, factors.right)


def test_matrices(factors, full):
    torch.testing.assert_close(factors.matrices(), full, **EXACT)


def test_total(factors, full):
    torch.testing.assert_close(factors.total(), full.sum(dim=0), **EXACT)


def test_squared_norm(factors, full):
    torch.testing.assert_close(factors.squared_norm(), full.square().sum(dim=(1, 2)), **EXACT)


def test_inner(factors, full):
    v = draw(torch.Generator().manual_seed(1), 4, *full.shape[1:])
    expected = torch.einsum("qoi,boi->qb", v, full)
    torch.testing.assert_close(factors.inner(v), expected, **EXACT)


def test_projected(factors, full):
    g = torch.Generator().manual_seed(1)
    left, right = draw(g, full.shape[1], 2), draw(g, full.shape[2], 3)
    found = factors.projected(left, right).matrices()
    torch.testing.assert_close(found, left.T @ full @ right, **EXACT)


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([4, 0, 0])], ids=["slice", "tensor"])
def test_take(factors, full, index):
    torch.testing.assert_close(factors.take(index).matrices(), full[index], **EXACT)


def test_to(factors):
    assert factors.to(torch.float32).matrices().dtype == torch.float32


def test_len_and_positions(factors):
    assert len(factors) == 5
    assert factors.positions == factors.left.shape[1]


def test_stacked_tokens_of_unequal_positions():
    parts = [tokens(shape, b) for b, shape in ((2, (1, 3, 4)), (1, (5, 3, 4)), (3, (2, 3, 4)))]
    found = stacked(parts)
    assert found.positions == 5
    expected = torch.cat([p.matrices() for p in parts])
    torch.testing.assert_close(found.matrices(), expected, **EXACT)


def test_rows():
    g = torch.Generator().manual_seed(0)
    values, v = draw(g, 5, 3), draw(g, 2, 3)
    factors = Rows(values)
    assert len(factors) == 5
    torch.testing.assert_close(factors.total(), values.sum(dim=0), **EXACT)
    torch.testing.assert_close(factors.squared_norm(), values.square().sum(dim=1), **EXACT)
    torch.testing.assert_close(factors.inner(v), v @ values.T, **EXACT)
    torch.testing.assert_close(factors.take(slice(1, 3)).values, values[1:3], **EXACT)
    torch.testing.assert_close(stacked([factors, factors]).values, values.repeat(2, 1), **EXACT)
    assert factors.to(torch.float32).values.dtype == torch.float32
