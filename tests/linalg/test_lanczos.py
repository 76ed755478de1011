"""Ends of a spectrum: within their stated errors of the truth, and exact where they say so."""

import pytest
import torch

from upweight.errors import NonFinite, ShapeError
from upweight.linalg import Dense, Tag
from upweight.linalg.lanczos import extreme_eigenvalues

G = torch.Generator().manual_seed(3)
Q, _ = torch.linalg.qr(torch.randn(60, 60, generator=G, dtype=torch.float64))


def symmetric(eigenvalues):
    return Dense((Q * eigenvalues) @ Q.T, frozenset({Tag.SYMMETRIC}))


DECAYING = symmetric(torch.logspace(-3, 1, 60, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_lanczos_bounds_hold_and_are_tight(seed):
    for A in (DECAYING, -1.0 * DECAYING, symmetric(torch.linspace(-2.0, 5.0, 60).double())):
        eigenvalues = torch.linalg.eigvalsh(A.dense())
        low, high = float(eigenvalues[0]), float(eigenvalues[-1])
        ends = extreme_eigenvalues(A, rtol=1e-6, seed=seed)
        scale = max(abs(low), abs(high))
        assert low - 1e-12 <= ends.smallest <= low + ends.smallest_error + 1e-12
        assert high - ends.largest_error - 1e-12 <= ends.largest <= high + 1e-12
        assert max(ends.smallest_error, ends.largest_error) <= 1e-6 * scale


def test_lanczos_is_exact_after_as_many_steps_as_distinct_eigenvalues():
    values = torch.tensor([-1.0, 2.0, 7.0]).repeat(20).double()
    ends = extreme_eigenvalues(symmetric(values), rtol=0.0)
    assert ends.steps == 3
    assert ends.smallest == pytest.approx(-1.0, abs=1e-10)
    assert ends.largest == pytest.approx(7.0, abs=1e-10)


def test_lanczos_stops_at_max_steps_with_an_honest_error():
    values = torch.linspace(0.0, 1.0, 60).double()
    ends = extreme_eigenvalues(symmetric(values), max_steps=8, rtol=0.0)
    assert ends.steps == 8 and ends.smallest_error > 1e-4
    assert 0.0 <= ends.smallest <= ends.largest <= 1.0
    for value, error in [
        (ends.smallest, ends.smallest_error),
        (ends.largest, ends.largest_error),
    ]:
        assert float((values - value).abs().min()) <= error  # of *an* eigenvalue


def test_errors():
    with pytest.raises(ShapeError, match="square"):
        extreme_eigenvalues(Dense(torch.zeros(2, 3)))
    with pytest.raises(NonFinite, match="NaN or an infinity"):
        extreme_eigenvalues(Dense(torch.full((3, 3), torch.nan)))
