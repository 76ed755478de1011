"""A + λI: how much to add, as a number or relative to the spectrum.

    Absolute(value)     λ = value
    Relative(factor)    λ = factor · tr(A)/p, the factor times the mean eigenvalue
    Evidence()          λ = γ/(n ‖θ‖²), the most probable prior precision given the data
    FromTraining()      λ = 1/(step size × steps), what training had the time to resolve

Damping changes the answer: with λ > 0 influence is that of an objective with an extra (λ/2)‖θ −
θ̂‖². It is therefore never implied: the default everywhere is none, and λ in use is part of the
result. `Relative(0.1)` is the heuristic that Grosse et al. (2023) use for EK-FAC.
"""

import abc
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, NotPositiveDefinite, SpecError
from upweight.linalg.eigen import Eigen
from upweight.linalg.matrices import DiagonalMatrix, Identity
from upweight.linalg.operator import LinearOperator, Scaled, Sum, square, terms_of
from upweight.linalg.spectrum import trace

Theta: TypeAlias = Float[Tensor, "..."] | None
"""The parameters that an operator acts on, where they are known."""


EXACT = 1000
"""Products with an operator that an exact trace may take."""


class Damping(abc.ABC):
    """How to choose λ ≥ 0 for an operator."""

    @abc.abstractmethod
    def of(self, operator: LinearOperator, theta: Theta = None, n: int | None = None) -> float:
        """λ for this operator, in units of its eigenvalues.

        Args:
            operator: The curvature of the mean loss, of one block where there are blocks.
            theta: The parameters that it acts on.
            n: Size of the training set.
        """

    def chosen(
        self, operator: LinearOperator, theta: Theta = None, n: int | None = None
    ) -> tuple[float, tuple[str, ...]]:
        """The same, and what is to be said of how it came about."""
        return self.of(operator, theta, n), ()


@dataclass(frozen=True)
class Absolute(Damping):
    """λ = value, in units of the eigenvalues: curvature of the *mean* loss."""

    value: float = 0.0

    def __post_init__(self) -> None:
        _not_negative(self.value, "Absolute")

    def of(self, operator: LinearOperator, theta: Theta = None, n: int | None = None) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Relative(Damping):
    """λ = factor · tr(A)/p: a fraction of the mean eigenvalue.

    Unlike an absolute value it follows a rescaling of the loss: A ↦ cA gives λ ↦ cλ.

    Raises:
        NotPositiveDefinite: tr(A) ≤ 0, where a fraction of the mean eigenvalue is not a damping.
        NonFinite: tr(A) is NaN or infinite.

    Exact when: tr(A) takes at most 1 000 products with A (`operator.trace_products`). Otherwise it
        is estimated (`spectrum.trace`, Hutch++ with 60 products), with its standard error in the
        notes of the fit: of the GGN of a language model, with an output for every token of the
        vocabulary at every position, or of the Hessian of more than 1 000 parameters.
    Cost: up to 1 000 products, or 60.
    """

    factor: float

    def __post_init__(self) -> None:
        _not_negative(self.factor, "Relative")

    def of(self, operator: LinearOperator, theta: Theta = None, n: int | None = None) -> float:
        return self.chosen(operator, theta, n)[0]

    def chosen(
        self, operator: LinearOperator, theta: Theta = None, n: int | None = None
    ) -> tuple[float, tuple[str, ...]]:
        p = square(operator, "Relative damping")
        notes: tuple[str, ...] = ()
        if operator.trace_products <= EXACT:
            mean = float(operator.trace()) / p
        else:
            found = trace(operator)
            mean = found.value / p
            notes = (
                f"λ is {self.factor:g} times the mean eigenvalue, estimated as {mean:.3g} ± "
                f"{found.standard_error / p:.1g} from 60 random products",
            )
        if not math.isfinite(mean):
            raise NonFinite(
                "Relative damping needs the mean eigenvalue tr(A)/p.",
                f"tr(A)/p = {mean} for {operator!r}.",
                "a loss or an activation that overflowed.",
                "check the loss at these parameters, or use float64.",
            )
        if mean <= 0:
            raise NotPositiveDefinite(
                "Relative damping needs a positive mean eigenvalue tr(A)/p.",
                f"tr(A)/p = {mean:.3e} for {operator!r}.",
                "a Hessian far from a minimum, or a curvature that is zero because the data "
                "do not reach these parameters (a unit that never fires).",
                "use a positive semi-definite curvature, GGN(), or Absolute(value); or leave "
                "these parameters out with Task(params=...).",
            )
        return self.factor * mean, notes


@dataclass(frozen=True)
class Evidence(Damping):
    """λ that makes the data most probable under a Gaussian prior on θ.

    It is the root of

        λ n ‖θ‖² = γ(λ),    γ = Σⱼ Λⱼ/(Λⱼ + λ)

    With a prior θ ~ N(0, I/α), α = nλ, the Laplace approximation of log p(data) is largest where
    α ‖θ‖² equals γ, the number of parameters that the data determine (MacKay 1992, "Bayesian
    interpolation", §4). The left side grows with λ and γ falls, so there is one root.

    Block by block where the curvature is. For models trained without a penalty; with one, its own
    strength is the damping that belongs to it, and it is part of Λ already.

    Raises:
        SpecError: The curvature has no eigendecomposition at hand: use `EKFAC()` or its kin.
        NonFinite: All parameters of a block are zero, or its curvature is.
    """

    def of(self, operator: LinearOperator, theta: Theta = None, n: int | None = None) -> float:
        if not isinstance(operator, Eigen) or theta is None or n is None:
            raise SpecError(
                "Evidence damping needs the eigenvalues of the curvature.",
                f"{operator!r}, which does not know them.",
                "a Hessian or GGN, whose spectrum would take p³ operations.",
                "use it with EKFAC(), KFAC() or Diagonal(), or give Absolute(λ).",
            )
        values = operator.values.double().flatten()
        squared = float(theta.double().square().sum())
        if not squared > 0 or not bool((values > 0).any()):
            raise NonFinite(
                "Evidence damping weighs the parameters against their curvature.",
                f"‖θ‖² = {squared:.3g} and a largest eigenvalue of {float(values.max()):.3g}.",
                "biases that were never trained, or a layer that the data do not reach.",
                "leave these parameters out with Task(params=...), or use Relative(0.1), and "
                "Absolute(λ) where the curvature is 0.",
            )
        positive = values[values > 0]
        # γ lies between 0 and the number of positive eigenvalues, hence the root below `high`.
        low, high = 0.0, len(positive) / (n * squared)
        for _ in range(200):
            middle = 0.5 * (low + high)
            gamma = float((positive / (positive + middle)).sum())
            low, high = (low, middle) if middle * n * squared > gamma else (middle, high)
        return high


@dataclass(frozen=True)
class FromTraining(Damping):
    """λ = 1/(Σ_t η_t), of the steps that the model was trained with: of `fit(..., history=)`.

    Gradient descent from 0 goes 1 − exp(−h Σ η) of the way to the minimum along an eigenvalue h, a
    ridge penalty λ goes h/(h + λ): for λ = 1/Σ η the two are within a factor of 1.3 for every h
    (Ali, Kolter & Tibshirani 2019, "A continuous-time view of early stopping for least squares").
    What training had no time to resolve is damped away.

    With momentum μ the steps are η/(1 − μ). The optimizer's own weight decay is added, for it is
    part of no penalty. One λ for all blocks.

    Raises:
        SpecError: The method was fitted without a history, or that of Adam, which has a step size
            for each parameter.
    """

    def of(self, operator: LinearOperator, theta: Theta = None, n: int | None = None) -> float:
        raise SpecError(
            "Damping from training needs to know the steps of training.",
            "FromTraining() where no history is asked for.",
            "a damping of influence functions in another place.",
            "use it as Influence(..., damping=FromTraining()).fit(task, train, history=recipe), "
            "or give Absolute(λ).",
        )


def as_damping(damping: Any) -> Damping:
    """A number is an absolute damping.

    Raises:
        SpecError: It is neither a damping nor a number.
    """
    if isinstance(damping, type) or not (
        isinstance(damping, Damping) or hasattr(damping, "__float__")
    ):
        raise SpecError(
            "Damping is a number, Absolute(λ), Relative(factor), Evidence() or FromTraining().",
            f"damping={damping!r}.",
            "a name, or a class that was not called.",
            "damping=Relative(0.1) adds a tenth of the mean eigenvalue; 0.0 adds nothing.",
        )
    return damping if isinstance(damping, Damping) else Absolute(float(damping))


def damped(A: LinearOperator, lam: float) -> LinearOperator:
    """A + λI; A itself for λ = 0. Keeps the tags of A, since λ ≥ 0."""
    p = square(A, "Damping")
    _not_negative(lam, "damped")
    if lam == 0:
        return A
    return Sum((A, Scaled(float(lam), Identity(p, A.dtype, A.device))))


def undamped(A: LinearOperator) -> tuple[LinearOperator, float]:
    """B and μ ≥ 0 with A = B + μI: what of A is seen to be a multiple of the identity.

    Seen are the terms of a sum that are diagonal: λI, and the least strength of an L2 penalty.
    """
    shift, rest = 0.0, list[LinearOperator]()
    for term in terms_of(A):
        scale, inner = (term.scale, term.operator) if isinstance(term, Scaled) else (1.0, term)
        low = 0.0
        if isinstance(inner, Identity | DiagonalMatrix):
            entries = scale * inner.diagonal()
            low = max(0.0, float(entries.min()))
            left = entries - low
            term = DiagonalMatrix(left)
        shift += low
        if low == 0.0 or bool(left.any()):
            rest.append(term)
    if not rest:
        rest.append(DiagonalMatrix(torch.zeros(A.shape[1], dtype=A.dtype, device=A.device)))
    return (Sum(tuple(rest)) if len(rest) > 1 else rest[0]), shift


def _not_negative(value: float, name: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise SpecError(
            f"{name} needs a finite number ≥ 0.",
            f"{value!r}.",
            "a sign slip, or a number that overflowed.",
            "0.0 means no damping; a negative λ would make A less definite, not more.",
        )
