"""Operators and solvers: A v, and x with A x = b. Has never heard of a model.

    A : ℝᵖ → ℝᵖ        (A + λI) x = b        S = −(1/n) ∇mᵀ x

`operator.py` says what an operator is and how they combine, `matrices.py` and `finite_sum.py` are
the leaves. `damping.py` chooses λ. `solver.py` is the contract of a solver, each solver has its
file, and `solve.py` is the entry point. `solution.py` is what comes back, and `lanczos.py` finds
the ends of a spectrum.

All solvers here are for symmetric operators:

                 needs                       for
    Cholesky     A ≻ 0, p² numbers           p up to about 10 000; many right-hand sides
    CG           A ≻ 0                       large p; each right-hand side by itself
    BlockCG      A ≻ 0                       large p, many right-hand sides, a few far eigenvalues
    MINRES       A = Aᵀ, may be singular     indefinite Hessians; solutions of least norm
    Auto                                     chooses by what is known: `Auto().select(A)`
"""

from upweight.linalg.block_cg import BlockCG
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Absolute, Damping, Relative, as_damping, damped
from upweight.linalg.finite_sum import FiniteSum
from upweight.linalg.matrices import Dense, DiagonalMatrix, Identity, LowRank, materialize
from upweight.linalg.minres import MINRES
from upweight.linalg.operator import LinearOperator, Product, Scaled, Sum, Tag
from upweight.linalg.solution import Result, Solution, SolverStats
from upweight.linalg.solve import Auto, Inverse, inverse, solve
from upweight.linalg.solver import Solver

__all__ = [
    "CG",
    "MINRES",
    "Absolute",
    "Auto",
    "BlockCG",
    "Cholesky",
    "Damping",
    "Dense",
    "DiagonalMatrix",
    "FiniteSum",
    "Identity",
    "Inverse",
    "LinearOperator",
    "LowRank",
    "Product",
    "Relative",
    "Result",
    "Scaled",
    "Solution",
    "Solver",
    "SolverStats",
    "Sum",
    "Tag",
    "as_damping",
    "damped",
    "inverse",
    "materialize",
    "solve",
]
