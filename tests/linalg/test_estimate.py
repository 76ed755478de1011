"""Estimates: within their stated errors of the truth, and exact where they say so."""

import pytest
import torch

from upweight.errors import NonFinite, ShapeError
from upweight.linalg import Dense, Diagonal, Tag
from upweight.linalg import estimate as estimate_module
from upweight.linalg.estimate import diagonal, extreme_eigenvalues, trace

G = torch.Generator().manual_seed(3)
Q, _ = torch.linalg.qr(torch.randn(60, 60, generator=G, dtype=torch.float64))


def symmetric(eigenvalues):
    return Dense((Q * eigenvalues) @ Q.T, frozenset({Tag.SYMMETRIC}))


DECAYING = symmetric(torch.logspace(-3, 1, 60, dtype=torch.float64))


def test_trace_is_within_its_error_and_the_error_is_right():
    exact = DECAYING.trace()
    off_diagonal = DECAYING.matrix - torch.diag(DECAYING.matrix.diagonal())
    expected = (2 * off_diagonal.square().sum() / 400).sqrt()  # Hutchinson (1990)
    for seed in range(5):
        estimate = trace(DECAYING, samples=400, seed=seed)
        assert abs(estimate.value - exact) <= 4 * estimate.error
        torch.testing.assert_close(estimate.error, expected, rtol=0.2, atol=0)
        assert estimate.samples == 400


def test_diagonal_is_within_its_errors_and_the_errors_are_right():
    # More than one block of probes, so that the merging of blocks is tested too.
    estimate = diagonal(DECAYING, samples=1000, seed=1)
    error = estimate.value - DECAYING.diagonal()
    assert bool((error.abs() <= 4.5 * estimate.error).all())  # 60 entries: P ≈ 4e-4
    off = DECAYING.matrix - torch.diag(DECAYING.matrix.diagonal())
    torch.testing.assert_close(
        estimate.error, (off.square().sum(1) / 1000).sqrt(), rtol=0.2, atol=0
    )


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_diagonal_merges_blocks_of_probes_exactly(block, monkeypatch):
    monkeypatch.setattr(estimate_module, "PROBES", block)
    values = torch.cat([z * DECAYING.mv(z) for z in estimate_module._probes(DECAYING, 100, seed=2)])
    estimate = diagonal(DECAYING, samples=100, seed=2)
    torch.testing.assert_close(estimate.value, values.mean(0))
    torch.testing.assert_close(estimate.error, values.std(0) / 10)


def test_both_are_exact_for_a_diagonal_operator():
    D = Diagonal(torch.linspace(-1.0, 3.0, 11, dtype=torch.float64))
    torch.testing.assert_close(trace(D, samples=2).value, D.trace())
    torch.testing.assert_close(diagonal(D, samples=70).value, D.diagonal())
    assert float(trace(D, samples=3).error) <= 1e-14 and bool(trace(D, samples=1).error.isnan())


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
    with pytest.raises(ValueError, match=r"(?s)at least one probe.*samples=0"):
        trace(DECAYING, samples=0)
