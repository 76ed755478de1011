"""U diag(values) Uᵀ + rest (I − UUᵀ): known on a few directions, a number on all others.

The inverse of a low-rank matrix plus a multiple of the identity is of this form (Woodbury), and so
is every function of it: the function of the numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError
from upweight.linalg.operator import PSD, SYMMETRIC, SymmetricOperator, Tag


@dataclass(frozen=True, eq=False, repr=False)
class PartialEigen(SymmetricOperator):
    """U diag(values) Uᵀ + rest (I − UUᵀ), U with k orthonormal rows as it is kept.

    Args:
        vectors: Uᵀ, an eigenvector a row.
        values: The eigenvalue of each.
        rest: The eigenvalue of whatever is orthogonal to them.

    Raises:
        ShapeError: Not as many values as vectors.
    """

    vectors: Float[Tensor, "k p"]
    values: Float[Tensor, " k"]
    rest: float

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.values):
            raise ShapeError(
                "Every eigenvector needs an eigenvalue.",
                f"{len(self.vectors)} vectors and {len(self.values)} values.",
                "eigenvectors stored as columns.",
                "put them along the first axis: vectors.mT.",
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape[1], self.vectors.shape[1]

    @property
    def like(self) -> Tensor:
        return self.vectors

    @property
    def tags(self) -> frozenset[Tag]:
        psd = self.rest >= 0 and bool((self.values >= 0).all())
        return PSD if psd else SYMMETRIC

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        along = v @ self.vectors.mT
        return self.rest * v + (along * (self.values - self.rest)) @ self.vectors

    def diagonal(self) -> Float[Tensor, " p"]:
        return self.rest + (self.values - self.rest) @ self.vectors.square()

    def function(self, f: Callable[[Tensor], Tensor]) -> "PartialEigen":
        """f of the matrix: of each of its eigenvalues."""
        rest = float(f(torch.tensor(self.rest, dtype=torch.float64)))
        return PartialEigen(self.vectors, f(self.values), rest)
