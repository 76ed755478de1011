"""Trace, ends and density by random vectors: within their errors, exact where they say so."""

import math

import pytest
import torch

from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.linalg import Dense, DiagonalMatrix, Identity, LowRank, Tag
from upweight.linalg.spectrum import spectrum, trace

p = 80
G = torch.Generator().manual_seed(3)
Q, _ = torch.linalg.qr(torch.randn(p, p, generator=G, dtype=torch.float64))


def symmetric(eigenvalues):
    return Dense((Q * eigenvalues) @ Q.T, frozenset({Tag.SYMMETRIC}))


VALUES = torch.cat([torch.linspace(-2, 3, p - 5), torch.tensor([9.0, 12, 20, 30, 50])]).double()


@pytest.mark.parametrize("seed", range(3))
def test_trace_ends_and_shares_are_within_their_errors(seed):
    A = symmetric(VALUES)
    found = spectrum(A, probes=10, steps=30, seed=seed)
    off = abs(found.trace.value - float(VALUES.sum()))
    assert 0 < off <= 4 * found.trace.standard_error < float(VALUES.sum())
    assert float(VALUES[0]) - 1e-9 <= found.smallest <= float(VALUES[0]) + found.smallest_error
    assert found.largest == pytest.approx(50.0) and found.largest_error < 1e-6
    negative = found.below(0.0)
    truth = float((VALUES <= 0).double().mean())
    # One node of the quadrature may lie on either side: 1/30 of the mass
    assert abs(negative.value - truth) <= 4 * negative.standard_error + 1 / 30
    hutchpp = trace(A, 45, seed)
    assert abs(hutchpp.value - float(VALUES.sum())) <= 4 * hutchpp.standard_error
    assert hutchpp.standard_error < found.trace.standard_error


def test_density_is_that_of_the_eigenvalues():
    at, width = torch.linspace(-8, 60, 200).double(), 1.5
    found, error = spectrum(symmetric(VALUES), probes=12, steps=40).density(at, width)
    z = (at[:, None] - VALUES) / width
    truth = torch.exp(-0.5 * z.square()).mean(dim=1) / (width * math.sqrt(2 * math.pi))
    assert bool(((found - truth).abs() <= 5 * error + 1e-4).all())
    assert float(torch.trapezoid(found, at)) == pytest.approx(1.0, abs=1e-3)


def test_exact_where_they_say_so():
    few = spectrum(symmetric(torch.tensor([-1.0, 2.0, 7.0, 7.0]).repeat(p // 4).double()))
    for node, weight in zip(few.nodes, few.weights, strict=True):
        torch.testing.assert_close(node, torch.tensor([-1.0, 2.0, 7.0]).double())
        assert float(weight.sum()) == pytest.approx(1.0)
    one = spectrum(3.0 * Identity(p))
    assert one.trace.value == pytest.approx(3.0 * p) and one.trace.standard_error < 1e-9
    assert one.below(2.9).value == 0.0 and one.below(3.1).value == pytest.approx(1.0)
    d = torch.linspace(1.0, 5.0, p).double()
    assert spectrum(DiagonalMatrix(d)).trace.value == pytest.approx(float(d.sum()))
    A = LowRank(Q[:, :9] * torch.linspace(1, 4, 9))
    low = trace(A, 30)
    assert low.value == pytest.approx(float(A.trace())) and low.standard_error < 1e-9


def test_single_precision():
    A = Dense(symmetric(VALUES).matrix.float(), frozenset({Tag.SYMMETRIC}))
    found = spectrum(A)
    assert found.largest == pytest.approx(50.0, rel=1e-5)


def test_errors():
    with pytest.raises(ShapeError, match="square"):
        spectrum(Dense(torch.zeros(2, 3)))
    with pytest.raises(SpecError, match="at least two random vectors"):
        spectrum(Identity(3), probes=1)
    with pytest.raises(SpecError, match="at least 6 products"):
        trace(Identity(3), 5)
    broken = Dense(torch.full((3, 3), torch.nan))
    for function in (spectrum, trace):
        with pytest.raises(NonFinite, match="NaN or an infinity"):
            function(broken)
