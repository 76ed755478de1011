"""min over x ≥ 0 of ½ xᵀAx − bᵀx, against all sets of bounds."""

import itertools

import pytest
import torch

from upweight.linalg.nonnegative import nonnegative


def by_all_sets(matrix, rhs):
    """The best of the minima with some unknowns at zero and the others free."""
    best, found = 0.0, torch.zeros_like(rhs)
    for count in range(1, len(rhs) + 1):
        for free in itertools.combinations(range(len(rhs)), count):
            x = torch.zeros_like(rhs)
            at = list(free)
            x[at] = torch.linalg.solve(matrix[at][:, at], rhs[at])
            value = float(0.5 * x @ matrix @ x - rhs @ x)
            if bool((x >= 0).all()) and value < best:
                best, found = value, x
    return found


@pytest.mark.parametrize("seed", range(20))
def test_is_the_minimum(seed):
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(7, 6, generator=draw, dtype=torch.float64)
    matrix, rhs = root.T @ root, torch.randn(6, generator=draw, dtype=torch.float64)
    found = nonnegative(matrix, rhs)
    torch.testing.assert_close(found, by_all_sets(matrix, rhs), rtol=1e-8, atol=1e-10)
    slope = matrix @ found - rhs
    assert bool((found >= 0).all()) and bool((slope >= -1e-10).all())


def test_nothing_to_gain_is_zero():
    assert nonnegative(torch.eye(3), -torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
