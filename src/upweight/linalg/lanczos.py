"""What a few products with A tell of its spectrum: its ends, by Lanczos, A Q = Q T + β q eᵀ.

Each value comes with a residual bound. Golub & Van Loan (2013), Section 10.1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite
from upweight.linalg.operator import LinearOperator, square


@dataclass(frozen=True, eq=False)
class ExtremeEigenvalues:
    """The ends of the spectrum of a symmetric operator, as Ritz values.

    `smallest` is never below the smallest eigenvalue and `largest` never above the largest; each is
    within its error of *an* eigenvalue, which is the extreme one unless the start vector missed it.
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    steps: int


def extreme_eigenvalues(
    A: LinearOperator,
    max_steps: int = 100,
    rtol: float = 1e-3,
    seed: int = 0,
    preconditioner: LinearOperator | None = None,
) -> ExtremeEigenvalues:
    """The smallest and largest eigenvalue of a symmetric A, or of M A, by Lanczos.

    Every new vector is orthogonalized against all earlier ones, twice (Giraud et al., 2005):
    without it, copies of converged eigenvalues appear.

    Args:
        A: A symmetric operator.
        max_steps: Most products with A; the basis of `max_steps` vectors is kept.
        rtol: Stop when both errors are below rtol · max|eigenvalue|.
        seed: Of the start vector.
        preconditioner: M, positive definite: the eigenvalues are then those of M A, which are
            M½ A M½'s, and lengths are √(vᵀMv).

    Raises:
        NonFinite: A v has a NaN or an infinity.

    Exact when: max_steps ≥ the number of distinct eigenvalues (to rounding).
    Cost: at most `max_steps` products with A, O(p · max_steps²) and p · max_steps numbers, twice
    with a preconditioner.
    """
    p = square(A, "Eigenvalues")
    steps = min(max_steps, p)
    M = preconditioner
    basis = torch.empty(steps, p, dtype=A.dtype, device=A.device)
    dual = basis if M is None else torch.empty_like(basis)  # M v of each: vᵢᵀ M vⱼ = δᵢⱼ
    w = normal(A, seed)
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(steps):
        z = w if M is None else M.mv(w)
        length = float((w @ z).clamp_min(0.0).sqrt())
        if step > 0:
            betas.append(length)
            ends = _ritz(alphas, betas)
            scale = max(abs(ends.smallest), abs(ends.largest))
            invariant = betas[-1] <= 10 * torch.finfo(A.dtype).eps * scale
            if invariant or max(ends.smallest_error, ends.largest_error) <= rtol * scale:
                return ends
        basis[step] = w / length
        if M is not None:
            dual[step] = z / length
        w = finite(A, A.mv(dual[step]))
        alphas.append(float(w @ dual[step]))
        for _ in range(2):
            w = w - (dual[: step + 1] @ w) @ basis[: step + 1]
    z = w if M is None else M.mv(w)
    return _ritz(alphas, [*betas, float((w @ z).clamp_min(0.0).sqrt())])


def finite(A: LinearOperator, w: Tensor) -> Tensor:
    """A product A v; a NonFinite where it has a NaN or an infinity."""
    if not bool(w.isfinite().all()):
        raise NonFinite(
            "Eigenvalues need a finite operator.",
            f"{A!r} gave a NaN or an infinity for a finite vector.",
            "a loss or an activation that overflowed.",
            "check the gradients of the examples one at a time, or use float64.",
        )
    return w


def _ritz(alphas: list[float], betas: list[float]) -> ExtremeEigenvalues:
    """Ends of the spectrum of T, with errors |β sⱼ|: Golub & Van Loan (2013), Section 10.1."""
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    T = T + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(T)
    bounds = (betas[-1] * vectors[-1]).abs()
    return ExtremeEigenvalues(
        float(values[0]), float(values[-1]), float(bounds[0]), float(bounds[-1]), len(alphas)
    )


def normal(A: LinearOperator, seed: int, *leading: int) -> Float[Tensor, "*k p"]:
    """Standard normal vectors that A can take."""
    # Drawn on the CPU in float64, so that the numbers are the same on every device.
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(*leading, A.shape[1], generator=generator, dtype=torch.float64)
    return draw.to(dtype=A.dtype, device=A.device)
