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
    assert abs(negative.value - truth) <= 4 * negative.standard_error + negative.bound
    assert negative.bound < 1 / 30 and negative.standard_error < 1 / 20
    hutchpp = trace(A, 45, seed)
    assert abs(hutchpp.value - float(VALUES.sum())) <= 4 * hutchpp.standard_error
    assert hutchpp.standard_error < found.trace.standard_error


def spread(count, low, high, seed):
    """Eigenvalues from 10^low to 10^high, evenly on a logarithmic axis but for chance."""
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 10 ** (low + (high - low) * draw)


SPECTRA = {
    "even, with outliers": VALUES,
    "tiny of both signs": torch.cat(
        [-spread(8, -10, -2, 0), spread(64, -9, -1, 1), spread(8, 0, 1, 2)]
    ),
    "singular": torch.cat([torch.zeros(50).double(), spread(30, -3, 0, 3)]),
    "tiny": spread(p, -10, 0, 4),
    "clusters": torch.cat([c + spread(20, -4, -2, 5) for c in (-1.0, 0.0, 1.0, 5.0)]),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SPECTRA)
def test_shares_and_densities_are_within_what_they_state(name, seed):
    """4 standard errors and the bound; before, `below` had 0.0000 ± 0.0000 where 0.08 was true."""
    values = SPECTRA[name]
    A = symmetric(values)
    found = spectrum(A, probes=4, steps=20, seed=seed)
    for x in (-1e-2, -1e-6, 0.0, 1e-6, 1e-2, 0.1, 1.0, 4.0):
        share = found.below(x)
        # Zeros are eigenvalues ≤ 0 that rounding moves to either side.
        truth = float((values <= x).double().mean())
        assert abs(share.value - truth) <= 4 * share.standard_error + share.bound
        assert 0 <= share.value - share.bound + 1e-12 and share.value + share.bound <= 1 + 1e-12
    for part in (0.02, 0.1):
        width = part * float(values.max() - values.min())
        at = torch.linspace(float(values.min()) - 3 * width, float(values.max()) + 3 * width, 40)
        density, error, bound = found.density(at.double(), width)
        z = (at[:, None].double() - values) / width
        truth = torch.exp(-0.5 * z.square()).mean(dim=1) / (width * math.sqrt(2 * math.pi))
        assert bool(((density - truth).abs() <= 4 * error + bound).all())


def test_the_bound_is_of_quadrature_and_the_error_of_the_draw():
    """For a vector that is known the bound alone holds, and more steps lower it."""
    A = symmetric(SPECTRA["tiny of both signs"])
    values, vectors = torch.linalg.eigh(A.matrix)
    draws = torch.randn(4, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masses = (torch.where(draws < 0, -1.0, 1.0).double() @ vectors).square() / p
    at, width = torch.linspace(-1, 11, 30).double(), 0.3
    kernel = torch.exp(-0.5 * ((at[:, None] - values) / width).square())
    smooth = (kernel @ masses.mean(dim=0)) / (width * math.sqrt(2 * math.pi))
    last = math.inf
    for steps in (5, 10, 20, 40, p):
        found = spectrum(A, probes=4, steps=steps)
        for x in (-1e-3, -1e-6, 0.0, 1e-3, 0.05, 2.0):
            share, truth = found.below(x), float(masses.mean(dim=0)[values <= x].sum())
            assert abs(share.value - truth) <= share.bound + 1e-9
        density, _, bound = found.density(at, width)
        assert bool(((density - smooth).abs() <= bound + 1e-9).all())
        assert float(bound.max()) < last and found.below(0.05).bound < 1.0
        last = float(bound.max())
    # All of the Krylov space: nothing is left to chance but the draw
    assert found.below(0.05).bound < 1e-9


def test_density_is_that_of_the_eigenvalues():
    at, width = torch.linspace(-8, 60, 200).double(), 1.5
    found, error, bound = spectrum(symmetric(VALUES), probes=12, steps=40).density(at, width)
    z = (at[:, None] - VALUES) / width
    truth = torch.exp(-0.5 * z.square()).mean(dim=1) / (width * math.sqrt(2 * math.pi))
    assert bool(((found - truth).abs() <= 4 * error + bound).all())
    assert float(bound.max()) < 0.05 * float(truth.max())
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
    # A zero eigenvalue is ±1e-7 ‖A‖ by rounding: at 0 it is on no side, at ±1e-4 ‖A‖ on one
    few = Dense(symmetric(torch.tensor([0.0, 1.0]).repeat(p // 2).double()).matrix.float())
    found = spectrum(Dense(few.matrix, frozenset({Tag.SYMMETRIC})))
    half = found.below(1e-4)
    assert half.value == pytest.approx(0.5, abs=0.1) and half.bound < 1e-5
    assert found.below(-1e-4).value < 1e-5 and found.below(0.0).bound > 0.2


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
