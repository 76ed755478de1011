"""Σ xxᵀ over very many rows: panels, mirrors, and a total that does not drift."""

import pytest
import torch

from upweight.linalg import gram
from upweight.linalg.gram import LongSum

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 11])
def test_panels_below_at_and_above_their_width(width, monkeypatch):
    monkeypatch.setattr(gram, "PANEL", 4)
    total = LongSum((width, width), torch.float64, CPU)
    batches = [draw(m, width, seed=m) for m in (1, 2, 7)]
    for x in batches:
        total.add_gram(x)
    every = torch.cat(batches)
    torch.testing.assert_close(total.gram, every.T @ every, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [gram.PANEL - 1, gram.PANEL, gram.PANEL + 1])
def test_panels_of_their_real_width(width):
    x, total = draw(5, width), LongSum((width, width), torch.float64, CPU)
    total.add_gram(x)
    torch.testing.assert_close(total.gram, x.T @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, gram.BATCHES - 1, gram.BATCHES, gram.BATCHES + 1, 40])
def test_terms_of_every_kind_are_all_counted(count):
    """Before, at and after the move of recent products to the total."""
    total = LongSum((3, 2), torch.float64, CPU)
    expected = torch.zeros(3, 2)
    for k in range(count):
        x, y = draw(4, 3, seed=k), draw(4, 2, seed=100 + k)
        total.add_product(x, y)
        total.add(y[:3])
        expected += x.T @ y + y[:3]
    torch.testing.assert_close(total.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.total, expected, rtol=1e-12, atol=1e-12)  # asked twice


def test_a_long_sum_of_float32_products_does_not_drift():
    """20 000 products of ones times 0.1. Off by 1.5e-7 with the total in float64; by 1.7e-4 in
    float32 throughout."""
    count = 20_000
    x = torch.full((1, 1), 0.1, dtype=torch.float32)
    one = torch.ones(1, 1, dtype=torch.float32)
    total, plain = LongSum((1, 1), torch.float32, CPU), torch.zeros(1, 1, dtype=torch.float32)
    for _ in range(count):
        total.add_product(x, one)
        plain.addmm_(x.T, one)
    expected = count * float(x)
    drift = abs(float(total.total) - expected) / expected
    assert total.total.dtype == torch.float64
    assert drift < 1e-6
    assert abs(float(plain) - expected) / expected > 1e-4, "float32 alone would do: test it longer"


def test_going_on_from_a_restored_total_is_as_if_never_stopped():
    batches = [draw(2, 3, seed=k) for k in range(21)]
    whole = LongSum((3, 3), torch.float64, CPU)
    for x in batches:
        whole.add_gram(x)
    first, second = (LongSum((3, 3), torch.float64, CPU) for _ in range(2))
    for x in batches[:9]:
        first.add_gram(x)
    second.add(torch.ones(3, 3))  # what was there before is forgotten
    second.restore({name: x.clone() for name, x in first.tensors().items()})
    for x in batches[9:]:
        second.add_gram(x)
    assert torch.equal(second.gram, whole.gram)
