"""What can be said about A from a few products with it, and how well.

    trace       tr A    ≈ (1/s) Σ zᵀAz           diagonal   Aⱼⱼ ≈ (1/s) Σ zⱼ (Az)ⱼ
    extreme_eigenvalues  the ends of the spectrum, by Lanczos: A Q = Q T + β q eᵀ

Random estimates come with a standard error, Lanczos values with a residual bound. Rademacher probes
(entries ±1) leave no error from the diagonal of A: both are exact where A is diagonal.
Hutchinson (1990); Bekas, Kokiopoulou & Saad (2007); Golub & Van Loan (2013), Section 10.1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, SpecError
from upweight.linalg.operator import LinearOperator, square

PROBES = 64  # vectors handed to `mv` at once


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over random probes, and its standard error; the error is NaN for a single probe."""

    value: Float[Tensor, "*p"]
    error: Float[Tensor, "*p"]
    samples: int


def trace(A: LinearOperator, samples: int = 100, seed: int = 0) -> Estimate:
    """The trace of A from random probes, with its standard error (Hutchinson, 1990).

    The standard error is about √(2 (‖A‖²_F − Σ Aⱼⱼ²) / samples).

    Exact when: A is diagonal.
    Cost: `samples` products with A.
    """
    square(A, "A trace")
    products = [(z * A.mv(z)).sum(1) for z in _probes(A, samples, seed)]
    return _mean(torch.cat(products))


def diagonal(A: LinearOperator, samples: int = 100, seed: int = 0) -> Estimate:
    """Aⱼⱼ for each j from random probes, with standard errors (Bekas et al., 2007).

    The standard error of entry j is about √((Σ_{k≠j} Aⱼₖ²) / samples).

    Exact when: A is diagonal.
    Cost: `samples` products with A; memory O(p) beside one block of probes.
    """
    p = square(A, "A diagonal")
    mean = torch.zeros(p, dtype=A.dtype, device=A.device)
    spread, seen = torch.zeros_like(mean), 0
    for z in _probes(A, samples, seed):
        values = z * A.mv(z)
        # Chan, Golub & LeVeque (1983): merge means and sums of squares without cancellation.
        block, total = len(values), seen + len(values)
        shift = values.mean(0) - mean
        spread += (values - values.mean(0)).square().sum(0) + shift.square() * seen * block / total
        mean += shift * block / total
        seen = total
    error = (spread / (seen - 1) / seen).sqrt() if seen > 1 else torch.full_like(mean, torch.nan)
    return Estimate(mean, error, seen)


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
    A: LinearOperator, max_steps: int = 100, rtol: float = 1e-3, seed: int = 0
) -> ExtremeEigenvalues:
    """The smallest and largest eigenvalue of a symmetric A, by Lanczos.

    Every new vector is orthogonalized against all earlier ones, twice (Giraud et al., 2005):
    without it, copies of converged eigenvalues appear.

    Args:
        A: A symmetric operator.
        max_steps: Most products with A; the basis of `max_steps` vectors is kept.
        rtol: Stop when both errors are below rtol · max|eigenvalue|.
        seed: Of the start vector.

    Raises:
        NonFinite: A v has a NaN or an infinity.

    Exact when: max_steps ≥ the number of distinct eigenvalues (to rounding).
    Cost: at most `max_steps` products with A, O(p · max_steps²) and p · max_steps numbers.
    """
    p = square(A, "Eigenvalues")
    steps = min(max_steps, p)
    basis = torch.empty(steps, p, dtype=A.dtype, device=A.device)
    start = _normal(A, seed)
    basis[0] = start / torch.linalg.vector_norm(start)
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(steps):
        w = A.mv(basis[step])
        alphas.append(float(w @ basis[step]))
        known = basis[: step + 1]
        for _ in range(2):
            w = w - (known @ w) @ known
        betas.append(float(torch.linalg.vector_norm(w)))
        if not (torch.isfinite(w).all()):
            raise NonFinite(
                "Eigenvalues need a finite operator.",
                f"{A!r} gave a NaN or an infinity for a finite vector.",
                "a loss or an activation that overflowed.",
                "check the gradients of the examples one at a time, or use float64.",
            )
        ends = _ritz(alphas, betas)
        scale = max(abs(ends.smallest), abs(ends.largest))
        invariant = betas[-1] <= 10 * torch.finfo(A.dtype).eps * scale
        if invariant or max(ends.smallest_error, ends.largest_error) <= rtol * scale:
            break
        if step + 1 < steps:
            basis[step + 1] = w / betas[-1]
    return ends


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


def _normal(A: LinearOperator, seed: int) -> Tensor:
    # Drawn on the CPU in float64, so that the numbers are the same on every device.
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(A.shape[1], generator=generator, dtype=torch.float64)
    return draw.to(dtype=A.dtype, device=A.device)


def _probes(A: LinearOperator, samples: int, seed: int) -> Iterator[Tensor]:
    """Rademacher vectors [≤ PROBES p], `samples` of them in all."""
    if samples < 1:
        raise SpecError(
            "An estimate needs at least one probe.",
            f"samples={samples}.",
            "a budget that was divided down to nothing.",
            "use samples=100; two is the least that gives a standard error.",
        )
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, PROBES):
        shape = (min(PROBES, samples - start), A.shape[1])
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
        yield (2 * signs - 1).to(dtype=A.dtype, device=A.device)


def _mean(values: Tensor) -> Estimate:
    count = len(values)
    error = values.std() / count**0.5 if count > 1 else torch.full_like(values[0], torch.nan)
    return Estimate(values.mean(), error, count)
