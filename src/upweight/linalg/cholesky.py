"""A = L Lᵀ, for A positive definite with p² numbers in memory.

    x = L⁻ᵀ L⁻¹ b

Factorizes in float64 whatever the dtype of A, because a factorization in float32 loses all digits
at a condition number of 10⁷, which curvatures exceed; solutions come back in the dtype of b.

Refuses what it cannot solve: an indefinite A (with its smallest eigenvalue) and an A that is
singular to working precision. Damping is never added on its own account.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NotPositiveDefinite
from upweight.linalg.columns import Columns
from upweight.linalg.lanczos import extreme_eigenvalues
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.solution import Result, Solution, SolverStats
from upweight.linalg.solver import Solver

TILE = 1024  # rows and columns of a block that is looked at in one piece
LARGEST_EIGVALSH = 2000  # up to this p the smallest eigenvalue is computed, not estimated
INVERSE_ITERATIONS = 4


@dataclass(frozen=True, eq=False)
class CholeskyState:
    """The factorization, or why there is none.

    Args:
        operator: A itself, for the residuals.
        result: CONVERGED, or why A has no usable factor.
        factor: L, lower triangular, float64; None where there is none.
        extra: `condition` (a lower estimate, from the diagonal of L), `asymmetry` (largest
            |A − Aᵀ| over largest |A|), `smallest_scaled_eigenvalue` and, where the
            factorization failed, `smallest_eigenvalue`.
    """

    operator: LinearOperator
    result: Result
    factor: Float[Tensor, "p p"] | None
    extra: dict[str, float]


@dataclass(frozen=True)
class Cholesky(Solver[CholeskyState]):
    """x = L⁻ᵀ L⁻¹ b with A = L Lᵀ in float64.

    Args:
        rtol: Largest true residual ‖Ax − b‖/‖b‖ that counts as solved. None stands for 1e-6 in
            float64 and 1e-2 in lower precision, where rounding x to the dtype of b leaves a
            residual of about eps · condition.

    A is singular to working precision where, scaled to a unit diagonal, its smallest eigenvalue is
    below p·eps (or, in lower precision, below eps times its norm): such an eigenvalue is made of
    rounding errors (Demmel 1989; Higham 2002, Theorem 10.7). It is bounded from above by inverse
    iteration and by the smallest pivot. A residual above rtol in spite of a regular A is STAGNATED:
    the precision is not enough.

    Exact when: always, to rounding.
    Cost: p³/3 once; 2p² and one product with A for each right-hand side. Memory: one p × p array in
    float64 beside A. Each solve applies A to report the residual: where A reads a data set and
    there are more than p right-hand sides, `materialize(A)` first.
    """

    rtol: float | None = None

    def init(self, A: LinearOperator) -> CholeskyState:
        p = square(A, "Cholesky")
        matrix = torch.zeros(p, p, dtype=torch.float64, device=A.device)
        A.add_to(matrix)
        scales = _inspect(matrix, A)
        if scales.asymmetry != scales.asymmetry:
            return CholeskyState(A, Result.NON_FINITE, None, {})
        extra = {"asymmetry": scales.asymmetry}
        if not bool((scales.diagonal > 0).all()):
            return _failed(A, matrix, extra)
        # LAPACK works on columns; A is symmetric, so its transpose is itself, and the factor
        # replaces it without a second p × p array.
        factor, info = matrix.mT, torch.empty((), dtype=torch.int32, device=A.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info) != 0:
            return _failed(A, matrix, extra)
        smallest = _smallest_scaled_eigenvalue(factor, scales.diagonal)
        pivots = factor.diagonal().square()
        extra["condition"] = float(pivots.max() / pivots.min())
        extra["smallest_scaled_eigenvalue"] = smallest
        if smallest <= scales.rounding:
            return CholeskyState(A, Result.SINGULAR, None, extra)
        return CholeskyState(A, Result.CONVERGED, factor, extra)

    def solve(self, state: CholeskyState, b: Float[Tensor, "*k p"]) -> Solution:
        rtol = self.rtol
        if rtol is None:
            rtol = 1e-6 if b.dtype == torch.float64 else 1e-2
        columns = Columns(state.operator, b, rtol)
        columns.extra.update(state.extra)
        rows = columns.rows
        if state.factor is None:
            columns.close_without_answer(torch.arange(len(columns.units)), state.result)
        else:
            x = _substitute(state.factor, columns.units[rows].to(torch.float64).mT).mT
            columns.close(rows, x.to(b.dtype), Result.STAGNATED)
        return columns.solution(0, repr(self))

    def inverse_dense(self, state: CholeskyState) -> Float[Tensor, "p p"]:
        """A⁻¹ as a matrix, in float64.

        Raises:
            NotPositiveDefinite, NonFinite: There is no factor, for the reason `solve` would give.
        """
        if state.factor is None:
            nothing = torch.full((1,), torch.nan, dtype=torch.float64)
            stats = SolverStats(0, nothing[0], state.extra, repr(self))
            raise Solution(nothing, state.result, stats).error()
        return torch.cholesky_inverse(state.factor)


@dataclass(frozen=True, eq=False)
class _Scales:
    diagonal: Float[Tensor, " p"]
    asymmetry: float  # NaN where the matrix has a NaN or an infinity
    rounding: float  # eigenvalues below this, of the matrix with unit diagonal, are rounding errors


def _inspect(matrix: Float[Tensor, "p p"], A: LinearOperator) -> _Scales:
    """Symmetry, finiteness and scale, tile by tile: nothing of size p² is allocated."""
    diagonal = matrix.diagonal().clone()
    weights = diagonal.abs().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    largest, difference, scaled = 0.0, 0.0, 0.0
    for i in range(0, len(matrix), TILE):
        for j in range(i, len(matrix), TILE):
            upper = matrix[i : i + TILE, j : j + TILE]
            lower = matrix[j : j + TILE, i : i + TILE]
            largest = max(largest, float(upper.abs().max()), float(lower.abs().max()))
            gap = float((upper - lower.mT).abs().max())
            if not math.isfinite(gap):
                return _Scales(diagonal, math.nan, math.nan)
            difference = max(difference, gap)
            unit = weights[i : i + TILE, None] * upper * weights[j : j + TILE]
            scaled += float(unit.square().sum()) * (1 if i == j else 2)
    asymmetry = difference / largest if largest > 0 else 0.0
    eps = torch.finfo(A.dtype).eps
    if asymmetry > math.sqrt(eps):
        raise NotPositiveDefinite(
            "Cholesky needs a symmetric operator.",
            f"{A!r} with max|A − Aᵀ| = {difference:.1e}, where max|A| = {largest:.1e}.",
            "a product of operators, or only one triangle of a symmetric matrix.",
            "symmetrize it if that is what is meant, 0.5 * (A + A.T).",
        )
    p = len(matrix)
    rounding = p * torch.finfo(torch.float64).eps
    if A.dtype != torch.float64:
        # Entries rounded to eps perturb the spectrum by about eps·‖A‖_F/√p; 4 is a margin.
        rounding = max(rounding, 4 * eps * math.sqrt(scaled / p))
    return _Scales(diagonal, asymmetry, rounding)


def _smallest_scaled_eigenvalue(factor: Tensor, diagonal: Tensor) -> float:
    """An upper bound on the smallest eigenvalue of D^{-½} A D^{-½}, D = diag(A).

    The smaller of two bounds: the smallest pivot of the scaled matrix, and 1/‖·‖ of a few steps of
    inverse iteration. The pivots alone can miss it (Kahan's matrix); the iteration starts from a
    fixed vector, which could be orthogonal to the eigenvector only by design.
    """
    smallest = float((factor.diagonal().square() / diagonal).min())
    root = diagonal.sqrt()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(root), 2, generator=generator, dtype=torch.float64).to(factor.device)
    for _ in range(INVERSE_ITERATIONS):
        v = v / torch.linalg.vector_norm(v, dim=0)
        v = root[:, None] * _substitute(factor, root[:, None] * v)
        norms = torch.linalg.vector_norm(v, dim=0)
        if not bool(norms.isfinite().all()):
            return 0.0
        smallest = min(smallest, float((1 / norms).min()))
    return smallest


def _substitute(factor: Float[Tensor, "p p"], b: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """L⁻ᵀ L⁻¹ b. Two triangular solves, because `torch.cholesky_solve` copies the factor."""
    y = torch.linalg.solve_triangular(factor, b, upper=False)
    x: Tensor = torch.linalg.solve_triangular(factor.mT, y, upper=True)
    return x


def _failed(A: LinearOperator, matrix: Tensor, extra: dict[str, float]) -> CholeskyState:
    """Why there is no factor: the smallest eigenvalue, and whether it is a rounding error."""
    p = len(matrix)
    if p <= LARGEST_EIGVALSH:
        A.add_to(matrix.zero_())
        eigenvalues = torch.linalg.eigvalsh(matrix)
        smallest, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
    else:
        ends = extreme_eigenvalues(A)
        smallest, largest = ends.smallest, max(abs(ends.smallest), abs(ends.largest))
        extra = extra | {"smallest_eigenvalue_error": ends.smallest_error}
    negligible = abs(smallest) <= p * torch.finfo(A.dtype).eps * largest
    result = Result.SINGULAR if negligible else Result.NOT_POSITIVE_DEFINITE
    return CholeskyState(A, result, None, extra | {"smallest_eigenvalue": smallest})
