"""M ≈ A⁻¹, as solvers take it: an operator, or how to make one from A."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from upweight.errors import SpecError
from upweight.linalg.operator import LinearOperator


@runtime_checkable
class MakesPreconditioner(Protocol):
    """A spec that makes M from A, as `Nystrom(rank)` does."""

    def preconditioner(self, A: LinearOperator) -> LinearOperator:
        """M ≈ A⁻¹, positive definite whatever A is: it changes how many steps, not the answer."""
        ...


@dataclass(frozen=True, eq=False)
class Preconditioned:
    """A and its M, or None where none was asked for: the state of an iterative solver."""

    A: LinearOperator
    M: LinearOperator | None

    @classmethod
    def of(cls, A: LinearOperator, given: Any) -> "Preconditioned":
        """With the preconditioner that was given, made if it is a spec.

        Raises:
            SpecError: It cannot be applied to a vector, nor made from A.
        """
        if given is None or isinstance(given, LinearOperator):
            return cls(A, given)
        if isinstance(given, MakesPreconditioner) and not isinstance(given, type):
            return cls(A, given.preconditioner(A))
        raise SpecError(
            "A preconditioner is an operator M ≈ A⁻¹, or a spec that makes one from A.",
            f"{given!r}.",
            "a curvature as it is specified, given to a solver outside of a method.",
            "Influence(GGN(), solver=CG(preconditioner=EKFAC())), which fits it; Nystrom(rank); or "
            "an operator such as inverse(DiagonalMatrix(d), Cholesky()).",
        )
