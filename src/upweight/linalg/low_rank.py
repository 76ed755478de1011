"""Â⁻¹ with Â = U Λ Uᵀ + μI of rank k beside the identity: what `Nystrom` and `Lanczos` solve with.

    x = U (Λ + μ)⁻¹ Uᵀ b + (1/μ) (b − U Uᵀ b)

Where A shows no μ the second part is left out, and x is the solution of least norm of the low-rank
system. The residual is that of A itself, not of Â.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError
from upweight.linalg.columns import Columns
from upweight.linalg.operator import LinearOperator
from upweight.linalg.partial_eigen import PartialEigen
from upweight.linalg.solution import Result, Solution


@dataclass(frozen=True, eq=False)
class LowRankState:
    """What was learned of A.

    Args:
        operator: A itself, for the residuals.
        inverse: Â⁻¹; None where there is none, for the reason of `result`.
        steps: Products with A in sequence that it took.
        result: Why there is no inverse.
        extra: Numbers for `SolverStats.extra`.
    """

    operator: LinearOperator
    inverse: PartialEigen | None
    steps: int
    result: Result = Result.CONVERGED
    extra: dict[str, float] = field(default_factory=dict)

    def solution(self, b: Float[Tensor, "*k p"], name: str) -> Solution:
        """Â⁻¹ b for each right-hand side."""
        columns = Columns(self.operator, b, None)
        columns.extra.update(self.extra)
        if self.inverse is None:
            columns.close_without_answer(torch.arange(len(columns.units)), self.result)
        else:
            x = self.inverse.mv(columns.units[columns.rows])
            columns.close(columns.rows, x, Result.APPROXIMATE)
        return columns.solution(self.steps, name)


def pseudo_inverse(
    vectors: Float[Tensor, "k p"], values: Float[Tensor, " k"], shift: float
) -> PartialEigen:
    """(U diag(values) Uᵀ + μI)⁻¹; eigenvalues of zero, to rounding, have the inverse 0."""
    total = values + shift
    largest = float(total.abs().max()) if len(total) else 0.0
    zero = total.abs() <= 10 * len(vectors.mT) * torch.finfo(values.dtype).eps * largest
    inverse = torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, total))
    return PartialEigen(vectors, inverse, 1.0 / shift if shift > 0 else 0.0)


def require_rank(rank: int, name: str) -> None:
    """Refuse, by a SpecError, a rank that is not a whole number ≥ 1."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SpecError(
            f"{name} keeps a whole number of directions, at least one.",
            f"rank={rank!r}.",
            "a share of the spectrum where a count is meant, or a zero.",
            f"{name}(rank=50); a rank of p or more is exact.",
        )
