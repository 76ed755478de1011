"""Every solver of the package, held to the contract that others are held to."""

import pytest

from upweight.linalg import CG, MINRES, Auto, BlockCG, Cholesky
from upweight.testing import check_solver

SOLVERS = [
    (Cholesky(rtol=1e-10), ("definite",)),
    (CG(rtol=1e-10), ("definite", "singular")),
    (BlockCG(rtol=1e-10), ("definite", "singular")),
    (MINRES(rtol=1e-10), ("definite", "singular", "indefinite")),
    (Auto(), ("definite",)),
]
CASES = [
    pytest.param(check, id=f"{type(solver).__name__}: {name}")
    for solver, accepts in SOLVERS
    for name, check in check_solver(solver, accepts)
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()
