"""S[q, i] = −(1/n) ∇m_qᵀ (H + λI)⁻¹ ∇ℓᵢ: influence functions.

Hampel (1974); Cook & Weisberg (1982); for neural networks Koh & Liang (2017), Eq. 2; with K-FAC or
EK-FAC for H Grosse et al. (2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from upweight.curvature.curvature import Curvature
from upweight.curvature.hessian import Hessian
from upweight.errors import SpecError
from upweight.linalg.damping import Damping, FromTraining, as_damping
from upweight.linalg.solve import Auto
from upweight.linalg.solver import Solver
from upweight.methods.points import Inverse, PointMethod
from upweight.scores import Unit

CURVATURES = ("EKFAC", "KFAC", "Diagonal", "GGN", "Hessian", "Fisher", "EmpiricalFisher")
SOLVERS = ("solvers.Auto", "solvers.Cholesky", "solvers.CG", "solvers.MINRES")

TOLERANCE = 1e-2
"""Relative error of a query's scores that the contraction may have: far below what a curvature from
sampled labels has anyway."""


@dataclass(frozen=True)
class Influence(PointMethod):
    """Influence functions: which H, how to invert it, how much to damp it.

    Args:
        curvature: H: `Hessian()`, `GGN()`, `Fisher()`, `EmpiricalFisher()`, or by layer `EKFAC()`,
            `KFAC()`, `Diagonal()`, `Blockwise(...)`.
        solver: How (H + λI)⁻¹ is applied. `Auto()` inverts a curvature by layer in its own
            eigenbases, and goes by size and definiteness for any other.
        damping: λ as a number, `Absolute(λ)`, `Relative(factor)`, `Evidence()`, or
            `FromTraining()`, which takes it from `fit(..., history=)`. 0.0 adds nothing.
        tolerance: Relative error that products of a curvature by layer may have, ‖Ŝ_q − S_q‖/‖S_q‖,
            root mean square over the queries; measured, and recorded in the provenance. 0 is exact,
            and other curvatures always are.

    Exact when: J is at a strict minimum with its exact Hessian and λ = 0; then S is the derivative
    itself, whatever the model.

    Raises:
        SpecError: The curvature or solver is a name or a class, not an object; or the tolerance is
            no relative error.
    """

    curvature: Curvature = field(default_factory=Hessian)
    solver: Solver[Any] = field(default_factory=Auto)
    damping: Damping | float = 0.0
    tolerance: float = TOLERANCE

    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        _require_kind("curvature", self.curvature, Curvature, CURVATURES)
        _require_kind("solver", self.solver, Solver, SOLVERS)
        as_damping(self.damping)
        if not 0 <= self.tolerance < 1:
            raise SpecError(
                "A tolerance is a relative error from 0 (exact) to below 1.",
                f"tolerance={self.tolerance!r}.",
                "a percentage, or a number of digits.",
                "0.01 allows an error of one per cent of a query's scores.",
            )

    @property
    def takes_history(self) -> bool:  # type: ignore[override]
        return isinstance(self.damping, FromTraining)

    @property
    def preconditioner(self) -> Inverse:
        return Inverse(self.curvature, self.solver, self.damping, self.tolerance)


def require_curvature(spec: Any, given: Any) -> None:
    """Refuse, by a SpecError, a name or a class in the place of a curvature."""
    _require_kind("curvature", given, Curvature, CURVATURES, type(spec).__name__)


def _require_kind(
    name: str, given: Any, kind: type, known: Sequence[str], of: str = "Influence"
) -> None:
    """Refuse a name, a class or another argument in the place of a curvature or solver."""
    if isinstance(given, kind) and not isinstance(given, type):
        return
    called = given.__name__ if isinstance(given, type) else str(given)
    meant = [word for word in known if word.lower().rpartition(".")[2] == called.lower()]
    raise SpecError(
        f"{of} takes its {name} as an object.",
        f"{name}={given!r}.",
        "a class that was not called."
        if isinstance(given, type)
        else "a name in its place."
        if isinstance(given, str)
        else "an argument in another's place.",
        f"{of}({name}=upweight.{meant[0]}())."
        if meant
        else f"{of}({name}=...) with one of {', '.join(f'{word}()' for word in known)}.",
    )
