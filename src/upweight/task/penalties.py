"""R(θ): what was added to the mean loss, with ∇R and ∇²R.

    J(θ) = (1/n) Σᵢ ℓᵢ(θ) + R(θ)

A penalty is added to the *mean* loss. An optimizer's `weight_decay=λ` on a mean loss is `L2(λ)`;
scikit-learn's `C` is `L2(1/(nC))`.
"""

import abc
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Params
from upweight.errors import SpecError
from upweight.linalg.matrices import Dense, DiagonalMatrix, LowRank
from upweight.linalg.operator import SYMMETRIC, LinearOperator
from upweight.runtime.fingerprint import described
from upweight.task.params import Layout


class Penalty(abc.ABC):
    """R(θ) as a function of the parameters by name."""

    @abc.abstractmethod
    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        """R(θ), a scalar."""

    def gradient(self, theta: Float[Tensor, " p"], layout: Layout) -> Float[Tensor, " p"]:
        """∇R(θ), by automatic differentiation unless overridden."""
        return torch.func.grad(lambda t: self(layout.unflatten(t), layout))(theta)

    def curvature(self, theta: Float[Tensor, " p"], layout: Layout) -> LinearOperator | None:
        """∇²R(θ), or None where it is zero. Automatic differentiation makes it dense, p × p."""
        # Reverse over reverse: needs only operations that have a backward pass.
        gradient = torch.func.jacrev(lambda t: self(layout.unflatten(t), layout))
        hessian = torch.func.jacrev(gradient)(theta)
        return Dense(hessian, tags=SYMMETRIC)

    def __add__(self, other: "Penalty") -> "Penalty":
        return PenaltySum((self, other))


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """R(θ) = 0."""

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        return torch.zeros((), dtype=layout.dtype, device=layout.device)

    def gradient(self, theta: Float[Tensor, " p"], layout: Layout) -> Float[Tensor, " p"]:
        return torch.zeros_like(theta)

    def curvature(self, theta: Float[Tensor, " p"], layout: Layout) -> None:
        return None


@dataclass(frozen=True)
class L2(Penalty):
    """R(θ) = (strength/2) Σ θⱼ², over the chosen parameters that `exclude` does not match.

    Args:
        strength: λ; what an optimizer calls weight decay when it minimizes the mean loss.
        exclude: Globs of parameter names left out, for example `("*bias",)`.
    """

    strength: float
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))
        if not self.strength >= 0:
            raise SpecError(
                "L2 needs a strength of at least 0.",
                f"strength={self.strength!r}.",
                "a sign slip, or a strength computed from a NaN.",
                "use the weight decay that was trained with; 0 means none.",
            )

    def _diagonal(self, layout: Layout) -> Float[Tensor, " p"]:
        penalized = ~layout.mask(self.exclude)
        return penalized.to(layout.dtype) * self.strength

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        theta = layout.flatten(params)
        return 0.5 * (self._diagonal(layout) * theta * theta).sum()

    def gradient(self, theta: Float[Tensor, " p"], layout: Layout) -> Float[Tensor, " p"]:
        return self._diagonal(layout) * theta

    def curvature(self, theta: Float[Tensor, " p"], layout: Layout) -> LinearOperator:
        return DiagonalMatrix(self._diagonal(layout))


@dataclass(frozen=True)
class SumToZero(Penalty):
    """R(θ) = (strength/2) (Σⱼ θⱼ)² / c over the c entries that `pattern` matches.

    The outputs of a softmax do not change when all its biases move together, so an unpenalized bias
    leaves H singular along that one direction. Estimators resolve it by convention (the biases sum
    to zero); this penalty states the convention. At a solution with that sum it adds nothing to ∇J,
    and no score of a shift-invariant measurement depends on its strength.
    """

    pattern: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise SpecError(
                "SumToZero needs a strength of at least 0.",
                f"strength={self.strength!r}.",
                "a sign slip, or a strength computed from a NaN.",
                "keep the default of 1.0: shift-invariant scores do not depend on it.",
            )

    def _direction(self, layout: Layout) -> Float[Tensor, " p"]:
        mask = layout.mask((self.pattern,)).to(layout.dtype)
        if not bool(mask.any()):
            raise SpecError(
                "SumToZero's pattern must match a chosen parameter.",
                f"pattern={self.pattern!r}; the parameters are {', '.join(layout.names)}.",
                "the name of another model, or a parameter that is frozen or not chosen.",
                "name the biases as model.named_parameters() does.",
            )
        return mask / mask.sum().sqrt()

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        return 0.5 * self.strength * (self._direction(layout) @ layout.flatten(params)) ** 2

    def gradient(self, theta: Float[Tensor, " p"], layout: Layout) -> Float[Tensor, " p"]:
        direction = self._direction(layout)
        return self.strength * (direction @ theta) * direction

    def curvature(self, theta: Float[Tensor, " p"], layout: Layout) -> LinearOperator:
        return LowRank((self.strength**0.5 * self._direction(layout))[:, None])


@dataclass(frozen=True)
class PenaltySum(Penalty):
    """R(θ) = Σₖ Rₖ(θ)."""

    terms: tuple[Penalty, ...]

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        return torch.stack([term(params, layout) for term in self.terms]).sum()

    def gradient(self, theta: Float[Tensor, " p"], layout: Layout) -> Float[Tensor, " p"]:
        return torch.stack([term.gradient(theta, layout) for term in self.terms]).sum(dim=0)

    def curvature(self, theta: Float[Tensor, " p"], layout: Layout) -> LinearOperator | None:
        parts = [term.curvature(theta, layout) for term in self.terms]
        curved = [part for part in parts if part is not None]
        return functools.reduce(operator.add, curved) if curved else None


@dataclass(frozen=True)
class CustomPenalty(Penalty):
    """Any scalar function of the parameters by name, differentiated automatically."""

    function: Callable[[Params], Tensor]

    def __repr__(self) -> str:
        return f"CustomPenalty({described(self.function)})"

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        return self.function(params)


def as_penalty(penalty: Penalty | Callable[[Params], Tensor] | None) -> Penalty:
    """A penalty from what the user holds: one of ours, a function of the parameters, or None."""
    if penalty is None:
        return NoPenalty()
    return penalty if isinstance(penalty, Penalty) else CustomPenalty(penalty)
