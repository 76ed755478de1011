"""What a solve gives back: a value, whether it is an answer, and the numbers that say so.

    x ≈ A⁻¹ b        residual = ‖A x − b‖ / ‖b‖, computed from x with A itself

A numerical failure is a value first: `Solution.result` names it, and the members of `Result` are
the messages. `Solution.throw()` turns it into an error that carries the solution; `solve` does so
unless told otherwise. Where there is no answer at all the value is NaN, so that nothing can be
mistaken for one; an iterative solver that stopped early returns what it had reached.

Some solvers promise no tolerance: a low-rank inverse, a series cut off after so many terms, an
average over minibatches. Where their residual is above what other solvers reach, the result is
APPROXIMATE: an answer, with the residual that it leaves. Where that is above 1, x = 0 leaves less:
the result is DIVERGED, and no answer.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, NotConverged, NotPositiveDefinite, UpweightError


class Result(enum.Enum):
    """How a solve ended, from best to worst: of many right-hand sides the worst is reported."""

    CONVERGED = "The residual is within tolerance."
    APPROXIMATE = "An approximation by design: its residual is stated, and not promised."
    MAX_STEPS = "The solver used all its steps before the residual was within tolerance."
    STAGNATED = "The residual stopped falling above the tolerance: rounding dominates."
    SINGULAR = "The operator is numerically singular: A x = b has no unique solution."
    NEGATIVE_CURVATURE = "A direction v with vᵀAv < 0 was met: the operator is indefinite."
    NOT_POSITIVE_DEFINITE = "The factorization needs a positive definite operator."
    DIVERGED = "Moved away from the solution: ‖b − Ax‖ grew, or is above ‖b‖, that of x = 0."
    NON_FINITE = "The operator or the right-hand side has a NaN or an infinity."

    @property
    def severity(self) -> int:
        """Position from best, 0, to worst."""
        return list(Result).index(self)


@dataclass(frozen=True, eq=False)
class SolverStats:
    """What a solve cost and how well it went.

    Args:
        steps: Products with A in sequence (each for many vectors at once); 0 for a direct solver.
        residuals: ‖A x − b‖/‖b‖ for each right-hand side, the *true* residual, not a recurrence; 0
            where b = 0 and x = 0, NaN where there is no x.
        extra: Other numbers by name: `rtol`, `condition`, `smallest_eigenvalue`, ….
        solver: The repr of the solver, for messages and provenance.
        is_psd: Whether A is known to be positive semi-definite: what denies it is rounding.
    """

    steps: int
    residuals: Float[Tensor, "*k"]
    extra: Mapping[str, float] = field(default_factory=dict)
    solver: str = ""
    is_psd: bool = False


@dataclass(frozen=True, eq=False)
class Solution:
    """x with A x ≈ b, and whether it is an answer.

    Args:
        value: x, in the shape and dtype of b. NaN where there is no answer.
        result: How the solve ended; the worst over all right-hand sides.
        stats: What it cost, and the true residuals.
        standard_error: Of each entry of x, where x is a mean over random repeats.
    """

    value: Float[Tensor, "*k p"]
    result: Result
    stats: SolverStats
    standard_error: Float[Tensor, "*k p"] | None = None

    @property
    def converged(self) -> bool:
        """Whether every right-hand side was solved to tolerance."""
        return self.result is Result.CONVERGED

    @property
    def is_answer(self) -> bool:
        """Whether every right-hand side has one: to tolerance, or by a stated approximation."""
        return self.result in (Result.CONVERGED, Result.APPROXIMATE)

    def throw(self) -> "Solution":
        """This solution, if it is one.

        Raises:
            NotPositiveDefinite: NOT_POSITIVE_DEFINITE, NEGATIVE_CURVATURE or SINGULAR.
            NotConverged: MAX_STEPS, STAGNATED or DIVERGED.
            NonFinite: NON_FINITE.
            All three carry this solution as `.solution`.
        """
        if self.is_answer:
            return self
        raise self.error()

    def error(self) -> UpweightError:
        """The error that `throw` raises, for callers that would add to it."""
        assert not self.is_answer
        parts = _EXPLAIN[self.result](self.stats)
        if self.result is Result.NON_FINITE:
            error: UpweightError = NonFinite(*parts)
        elif self.result in (Result.MAX_STEPS, Result.STAGNATED, Result.DIVERGED):
            return NotConverged(*parts, solution=self)
        else:
            error = NotPositiveDefinite(
                *parts, smallest=self.stats.extra.get("smallest_eigenvalue")
            )
        error.solution = self  # type: ignore[attr-defined]
        return error


def _worst(stats: SolverStats) -> str:
    """The residuals against the tolerance, in words."""
    residuals = stats.residuals.flatten()
    rtol = stats.extra.get("rtol", 0.0)
    late = int((~(residuals <= rtol)).sum())
    largest = float(residuals.max()) if len(residuals) else 0.0
    return (
        f"{stats.solver} after {stats.steps} steps: {late} of {len(residuals)} right-hand sides "
        f"above rtol = {rtol:.1e}; largest residual ‖Ax − b‖/‖b‖ = {largest:.1e}."
    )


def _max_steps(stats: SolverStats) -> tuple[str, str, str, str]:
    return (
        Result.MAX_STEPS.value,
        _worst(stats),
        "an ill-conditioned operator: the steps needed grow with √(largest/smallest eigenvalue).",
        "raise max_steps, loosen rtol, add damping or a preconditioner, or use Cholesky() where "
        "p × p numbers fit in memory.",
    )


def _stagnated(stats: SolverStats) -> tuple[str, str, str, str]:
    return (
        Result.STAGNATED.value,
        _worst(stats),
        "a tolerance below what this precision can reach at this condition number, or an operator "
        "that gives another answer each time.",
        "loosen rtol above the residual reached, compute in float64, or add damping.",
    )


def _diverged(stats: SolverStats) -> tuple[str, str, str, str]:
    if stats.solver.startswith(("Nystrom", "Lanczos")):
        instead = "CG(), or MINRES() where A is indefinite"
        if stats.solver.startswith("Nystrom"):
            instead = f"CG(preconditioner={stats.solver}), which goes on from there to its rtol"
        return (
            "A low-rank inverse is an answer where it leaves a residual of at most 1, that of "
            "x = 0.",
            _worst(stats),
            "eigenvalues that the rank leaves out and that are far above damping and penalty.",
            f"raise the rank or the damping, or use {instead}.",
        )
    radius, smallest = stats.extra.get("spectral_radius"), stats.extra.get("smallest_eigenvalue")
    said = "" if radius is None else f" The spectral radius of I − ωPA is {radius:.4g} or more."
    if smallest is not None and smallest < 0:
        cause, way_out = _indefinite(stats, f"above {abs(smallest):.1e} (at least)")
    else:
        cause = "a step too long for the largest eigenvalue of PA, or of a minibatch."
        way_out = (
            "leave the step or scale out, so that it is chosen from the spectrum; or use CG(), "
            "which chooses every step."
        )
        if stats.extra.get("standard_error", 0.0) > 0:
            cause = f"{cause[:-1]}; or the noise of minibatches."
            way_out = f"{way_out[:-1]}; against noise raise batch or repeats."
    return (
        "x ← x + ωP(b − Ax) converges where the spectral radius of I − ωPA is below 1.",
        _worst(stats) + said,
        cause,
        way_out,
    )


def _singular(stats: SolverStats) -> tuple[str, str, str, str]:
    smallest = stats.extra.get("smallest_eigenvalue")
    scaled = stats.extra.get("smallest_scaled_eigenvalue")
    if smallest is not None:
        given = f"{stats.solver}; the smallest eigenvalue is about {smallest:.1e}."
    elif scaled is not None and not bool(stats.residuals.isfinite().any()):
        given = f"{stats.solver}; with A scaled to a unit diagonal the smallest eigenvalue is at "
        given += f"most {scaled:.1e}."
    else:
        given = _worst(stats)
    if stats.solver.startswith("MINRES"):
        return (
            "A x = b needs a solution: b must lie in the range of A.",
            given,
            "an operator that is singular to this precision: float32 cannot tell an eigenvalue of "
            "1e-7 of the largest from zero, and b has a part along it.",
            "add damping or a penalty, or compute in float64."
            if stats.is_psd
            else "add damping or a penalty, use a positive semi-definite curvature, "
            "curvature=GGN(), or compute in float64.",
        )
    return (
        Result.SINGULAR.value,
        given,
        "parameters that the objective does not pin down: collinear or duplicated features, dead "
        "units, or a softmax with unpenalized biases, which is flat along their common shift.",
        "add damping or a penalty, or use MINRES(), which returns the solution of least norm "
        "where A x = b has one.",
    )


def _negative_curvature(stats: SolverStats) -> tuple[str, str, str, str]:
    curvature = stats.extra.get("curvature", float("nan"))
    return (
        f"{stats.solver} needs an operator A ≻ 0.",
        f"a direction v with vᵀAv/vᵀv = {curvature:.1e} after {stats.steps} steps.",
        *_indefinite(stats, f"above {abs(curvature):.1e} (at least)"),
    )


def _indefinite(stats: SolverStats, damping: str) -> tuple[str, str]:
    """Why A has a negative eigenvalue, and what to do about it."""
    if stats.is_psd:
        return (
            "rounding: no eigenvalue is negative by the definition of this curvature, and the "
            "model's dtype does not resolve the small ones.",
            f"raise damping {damping}; or compute in float64, model.double().",
        )
    return (
        "a Hessian away from a strict minimum is usually indefinite.",
        f"use a positive semi-definite curvature, curvature=GGN(); raise damping {damping}; or use "
        "solver=MINRES(), which accepts indefinite operators.",
    )


def _not_positive_definite(stats: SolverStats) -> tuple[str, str, str, str]:
    smallest = stats.extra.get("smallest_eigenvalue")
    if smallest is None:  # the preconditioner of an iterative solver
        return (
            f"{stats.solver} needs a positive definite preconditioner M.",
            f"rᵀMr/rᵀr = {stats.extra.get('preconditioner_curvature', float('nan')):.1e}.",
            "a preconditioner with a negative entry or eigenvalue.",
            "add damping to the preconditioner, or leave it out.",
        )
    return (
        f"{stats.solver.partition('(')[0]} needs A ≻ 0, where A already includes damping.",
        f"its smallest eigenvalue is {smallest:.1e}{_plus_minus(stats)}.",
        *_indefinite(stats, f"by more than {abs(smallest):.1e}"),
    )


def _plus_minus(stats: SolverStats) -> str:
    """The error of a smallest eigenvalue that was estimated rather than computed."""
    error = stats.extra.get("smallest_eigenvalue_error")
    return "" if error is None else f" or below (estimated, ± {error:.0e})"


def _non_finite(stats: SolverStats) -> tuple[str, str, str, str]:
    bad = int((~stats.residuals.isfinite()).sum())
    return (
        f"{stats.solver.partition('(')[0]} needs finite numbers. {Result.NON_FINITE.value}",
        f"{bad} of {stats.residuals.numel()} right-hand sides without a finite answer.",
        "a gradient or curvature that overflowed, often in float32 or for one extreme example.",
        "check the gradients of the examples and queries one at a time, or use float64.",
    )


_EXPLAIN = {
    Result.MAX_STEPS: _max_steps,
    Result.STAGNATED: _stagnated,
    Result.SINGULAR: _singular,
    Result.NEGATIVE_CURVATURE: _negative_curvature,
    Result.NOT_POSITIVE_DEFINITE: _not_positive_definite,
    Result.DIVERGED: _diverged,
    Result.NON_FINITE: _non_finite,
}
