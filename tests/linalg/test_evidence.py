"""Evidence damping: its own defining equation, and that it is the maximum of the evidence."""

import math

import pytest
import torch

import upweight as uw
from upweight.errors import NonFinite, SpecError
from upweight.linalg.eigen import Eigen
from upweight.linalg.matrices import Dense

VALUES = torch.tensor([[3.0, 0.5, 1e-3], [0.0, 1e-6, 20.0]])
THETA = torch.tensor([0.3, -0.2, 1.5, 0.0, 0.7, -0.1])


def log_evidence(lam, n):
    """Laplace: −½ α‖θ‖² + ½ Σ log α − ½ Σ log(nΛ + α), with α = nλ, up to a constant."""
    alpha = n * lam
    logs = torch.log(alpha / (n * VALUES.flatten() + alpha))
    return float(-0.5 * alpha * THETA.square().sum() + 0.5 * logs.sum())


@pytest.mark.parametrize("n", [1, 10, 60_000])
def test_it_solves_its_equation(n):
    lam = uw.Evidence().of(Eigen((None, None), VALUES), THETA, n)
    gamma = float((VALUES / (VALUES + lam)).sum())
    assert lam * n * float(THETA.square().sum()) == pytest.approx(gamma, rel=1e-10)


@pytest.mark.parametrize("n", [1, 10, 60_000])
def test_it_makes_the_data_most_probable(n):
    lam = uw.Evidence().of(Eigen((None, None), VALUES), THETA, n)
    best = log_evidence(lam, n)
    assert all(log_evidence(lam * factor, n) < best for factor in (0.5, 0.99, 1.01, 2.0))


def test_it_follows_a_rescaling_of_loss_and_data():
    """ℓ ↦ cℓ with n ↦ n/c is the same posterior, in other units."""
    one = uw.Evidence().of(Eigen((None, None), VALUES), THETA, 100)
    other = uw.Evidence().of(Eigen((None, None), 4 * VALUES), THETA, 25)
    assert math.isclose(other, 4 * one, rel_tol=1e-10)


def test_it_needs_a_spectrum():
    with pytest.raises(SpecError, match=r"use it with EKFAC\(\)"):
        uw.Evidence().of(Dense(torch.eye(3)), torch.ones(3), 10)


def test_zero_parameters_have_no_prior_precision():
    with pytest.raises(NonFinite, match=r"Relative\(0.1\)"):
        uw.Evidence().of(Eigen((None, None), VALUES), torch.zeros(6), 10)
