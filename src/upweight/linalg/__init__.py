"""Operators and solvers: A v, and x with A x = b. Has never heard of a model.

    A : ℝᵖ → ℝᵖ        (A + λI) x = b        S = −(1/n) ∇mᵀ x

`operator.py` says what an operator is and how they combine, `matrices.py` and `finite_sum.py` are
the leaves. `damping.py` chooses λ. `solver.py` is the contract of a solver, each solver has its
file, and `solve.py` is the entry point. `solution.py` is what comes back. `lanczos.py` finds the
ends of a spectrum, and `spectrum.py` its trace and density with their standard errors.

All solvers here are for symmetric operators:

                 needs                       for
    Cholesky     A ≻ 0, p² numbers           p up to about 10 000; many right-hand sides
    CG           A ≻ 0                       large p; each right-hand side by itself
    BlockCG      A ≻ 0                       large p, many right-hand sides, a few far eigenvalues
    MINRES       A = Aᵀ, may be singular     indefinite Hessians; solutions of least norm
    Neumann      ρ(I − ωPA) < 1              a series, cut off early or preconditioned
    LiSSA        0 ≺ A_t ≺ 2s                the same on minibatches, with a standard error
    Nystrom      A − μI ⪰ 0                  a few large eigenvalues beside damping; preconditioner
    Lanczos      A = Aᵀ                      the same at both ends of the spectrum
    Auto                                     chooses by what is known: `Auto().select(A)`
"""

from upweight.linalg.block_cg import BlockCG
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Absolute, Damping, Relative, as_damping, damped
from upweight.linalg.finite_sum import FiniteSum
from upweight.linalg.lanczos_inverse import Lanczos
from upweight.linalg.lissa import LiSSA
from upweight.linalg.matrices import Dense, DiagonalMatrix, Identity, LowRank, materialize
from upweight.linalg.minres import MINRES
from upweight.linalg.neumann import Neumann
from upweight.linalg.nystrom import Nystrom
from upweight.linalg.operator import LinearOperator, Product, Scaled, Sum, Tag
from upweight.linalg.partial_eigen import PartialEigen
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
    "Lanczos",
    "LiSSA",
    "LinearOperator",
    "LowRank",
    "Neumann",
    "Nystrom",
    "PartialEigen",
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
