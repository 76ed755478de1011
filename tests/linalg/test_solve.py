"""The entry point, the choice of a solver, and the solution that comes back."""

import dataclasses

import pytest
import torch

from upweight.errors import NotConverged, NotPositiveDefinite, ShapeError, UnsupportedModel
from upweight.linalg import (
    CG,
    MINRES,
    Auto,
    BlockCG,
    Cholesky,
    Dense,
    Identity,
    Result,
    Tag,
    inverse,
    solve,
)

PSD, SYMMETRIC = frozenset({Tag.PSD}), frozenset({Tag.SYMMETRIC})
X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A = Dense(X.T @ X, PSD)
INDEFINITE = Dense(A.matrix - 10.0 * torch.eye(6).double(), SYMMETRIC)
B = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_auto_can_be_asked():
    assert Auto().select(A) == Cholesky()
    assert Auto(largest_dense=5).select(A) == CG()
    assert Auto().select(INDEFINITE) == MINRES()
    assert Auto().select(Identity(10_001)) == CG()
    with pytest.raises(UnsupportedModel, match=r"(?s)PSD.*SYMMETRIC.*Dense\(6×6, float64\).*tags="):
        Auto().select(Dense(A.matrix))
    with pytest.raises(ShapeError, match="square"):
        Auto().select(Dense(X))


@pytest.mark.parametrize("operator", [A, INDEFINITE])
def test_solve_solves(operator):
    solution = solve(operator, B)
    torch.testing.assert_close(operator.mv(solution.value), B, rtol=0, atol=1e-5)
    assert solution.converged and solution.throw() is solution
    assert solution.stats.residuals.shape == (2, 3)


def test_failure_is_a_value_until_it_is_thrown():
    solution = solve(INDEFINITE, B, Cholesky(), throw=False)
    assert solution.result is Result.NOT_POSITIVE_DEFINITE
    assert bool(solution.value.isnan().all()) and bool(solution.stats.residuals.isnan().all())
    with pytest.raises(NotPositiveDefinite) as caught:
        solve(INDEFINITE, B, Cholesky())
    assert caught.value.solution.result is solution.result


def test_the_worst_right_hand_side_decides_and_the_others_are_answers():
    b = B.clone()
    b[0, 1, 2] = torch.nan
    solution = solve(A, b, throw=False)
    assert solution.result is Result.NON_FINITE
    good = ~b.isnan().any(-1)
    torch.testing.assert_close(A.mv(solution.value[good]), b[good])


def test_severity_orders_the_members():
    assert max(Result, key=lambda result: result.severity) is Result.NON_FINITE
    assert min(Result, key=lambda result: result.severity) is Result.CONVERGED


def test_inverse_factors_once_and_undoes():
    class Once(Cholesky):
        calls = 0

        def init(self, operator):
            Once.calls += 1
            return super().init(operator)

    undo = inverse(A, Once())
    torch.testing.assert_close(undo.mv(A.mv(B)), B)
    torch.testing.assert_close((A @ undo).dense(), torch.eye(6).double())
    assert Once.calls == 1 and undo.tags == A.tags
    assert float(undo.solution(B).stats.residuals.max()) <= 1e-12


def test_inverse_throws_and_needs_symmetry():
    with pytest.raises(NotConverged, match="max_steps"):
        inverse(A, CG(rtol=1e-12, max_steps=2)).mv(B)
    with pytest.raises(UnsupportedModel, match="tagged SYMMETRIC"):
        inverse(Dense(A.matrix))


@pytest.mark.parametrize("solver", [Auto(), Cholesky(), CG(rtol=1e-8), BlockCG(), MINRES()])
def test_specs_are_frozen_comparable_and_print_as_python(solver):
    assert eval(repr(solver)) == solver and hash(solver) == hash(eval(repr(solver)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.rtol = 1.0
