"""Every solver of the package, held to the contract that others are held to."""

import pytest

from upweight.linalg import (
    CG,
    MINRES,
    Auto,
    BlockCG,
    Cholesky,
    Lanczos,
    LiSSA,
    Neumann,
    Nystrom,
)
from upweight.testing import check_solver

SOLVERS = [
    (Cholesky(rtol=1e-10), ("definite",)),
    (CG(rtol=1e-10), ("definite", "singular")),
    (BlockCG(rtol=1e-10), ("definite", "singular")),
    (MINRES(rtol=1e-10), ("definite", "singular", "indefinite")),
    (Auto(), ("definite",)),
    (CG(rtol=1e-10, preconditioner=Nystrom(5)), ("definite", "singular")),
    (BlockCG(rtol=1e-10, preconditioner=Nystrom(5)), ("definite",)),
    (Nystrom(24), ("definite", "singular")),
    (Lanczos(24), ("definite", "singular", "indefinite")),
    (Neumann(1000, Nystrom(24), step_size=1.0, rtol=1e-10), ("definite",)),
    (Neumann(1000, rtol=1e-10), ()),
    (Neumann(5), ()),
    (LiSSA(depth=300), ()),
    (LiSSA(depth=5), ()),
    (Nystrom(6), ()),
    (Lanczos(6), ()),
]
CASES = [
    pytest.param(check, id=f"{solver!r}: {name}")
    for solver, accepts in SOLVERS
    for name, check in check_solver(solver, accepts)
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()
