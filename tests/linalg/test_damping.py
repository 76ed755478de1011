"""A + λI, and how λ is chosen."""

import re

import pytest
import torch

from upweight.errors import NonFinite, NotPositiveDefinite
from upweight.linalg import (
    Absolute,
    Dense,
    DiagonalMatrix,
    Identity,
    Relative,
    Tag,
    as_damping,
    damped,
)
from upweight.linalg.operator import PSD, SymmetricOperator

X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A = Dense(X.T @ X, frozenset({Tag.PSD}))


def test_relative_damping_is_a_fraction_of_the_mean_eigenvalue():
    mean = float(torch.linalg.eigvalsh(A.matrix).mean())
    assert Relative(0.1).of(A) == pytest.approx(0.1 * mean, rel=1e-12)


def test_relative_damping_follows_a_rescaled_loss_and_absolute_does_not():
    assert Relative(0.1).of(7.0 * A) == pytest.approx(7.0 * Relative(0.1).of(A), rel=1e-12)
    assert Absolute(0.1).of(7.0 * A) == Absolute(0.1).of(A) == 0.1


def test_damped_shifts_every_eigenvalue():
    shifted = damped(A, 0.3)
    before, after = (torch.linalg.eigvalsh(B.dense()) for B in (A, shifted))
    torch.testing.assert_close(after, before + 0.3)
    assert shifted.is_psd and damped(A, 0.0) is A
    assert not damped(Dense(-A.matrix, frozenset({Tag.SYMMETRIC})), 100.0).is_psd


def test_a_number_is_an_absolute_damping():
    assert as_damping(0.25) == Absolute(0.25) and as_damping(Relative(0.1)) == Relative(0.1)


@pytest.mark.parametrize("spec", [Absolute(0.5), Relative(0.1)])
def test_repr_is_python(spec):
    assert eval(repr(spec)) == spec


@pytest.mark.parametrize("make", [Absolute, Relative, as_damping, lambda lam: damped(A, lam)])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_a_damping_is_finite_and_not_negative(make, value):
    with pytest.raises(ValueError, match=rf"(?s)≥ 0.*{value}"):
        make(value)


def test_relative_damping_needs_a_positive_trace():
    with pytest.raises(NotPositiveDefinite, match=r"(?s)tr\(A\)/p = -2.000e\+00.*GGN\(\)"):
        Relative(0.1).of(-2.0 * Identity(4))
    with pytest.raises(NotPositiveDefinite, match=r"tr\(A\)/p = 0"):
        Relative(0.1).of(DiagonalMatrix(torch.zeros(3)))
    with pytest.raises(NonFinite, match="nan"):
        Relative(0.1).of(Dense(torch.full((2, 2), torch.nan)))


class Products(SymmetricOperator):
    """A matrix that knows nothing but its products."""

    tags = PSD

    def __init__(self, matrix):
        self.matrix = matrix

    shape = property(lambda self: tuple(self.matrix.shape))
    like = property(lambda self: self.matrix)

    def mv(self, v):
        return v @ self.matrix


@pytest.mark.parametrize("p", [200, 1100])
def test_a_trace_of_too_many_products_is_estimated_and_said(p):
    """By products alone: exact up to 1 000 of them, then within 4 standard errors, in the note."""
    generator = torch.Generator().manual_seed(p)
    values = torch.arange(1, p + 1).double() ** -1.0
    Q = torch.linalg.qr(torch.randn(p, p, generator=generator).double())[0]
    A = Products(Q * values @ Q.mT)
    assert A.trace_products == (2.0 * A + DiagonalMatrix(values)).trace_products == p
    lam, notes = Relative(0.5).chosen(A)
    assert lam == Relative(0.5).of(A)
    exact = 0.5 * float(values.mean())
    if p <= 1000:
        assert notes == () and lam == pytest.approx(exact, rel=1e-12)
        return
    (note,) = notes
    mean, error = map(float, re.search(r"estimated as (\S+) ± (\S+) from", note).groups())
    assert mean == pytest.approx(2 * lam, rel=1e-2)
    assert abs(2 * lam - 2 * exact) <= 4 * error and error < 0.1 * mean
