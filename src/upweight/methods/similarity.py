"""S[q, i] = −(1/n) ⟨∇m_q, gᵢ⟩ and its cosine: the baselines without a curvature.

One small step of gradient descent on example i alone moves m_q by −η ⟨∇m_q, gᵢ⟩ (Pruthi et al.
2020, Eq. 1, at one checkpoint); the cosine takes the norms out (Hanawa et al. 2021). Neither knows
what training does next, so only the order within a row means anything.
"""

from dataclasses import dataclass

from upweight.methods.points import Identity, PointMethod
from upweight.scores import Unit


@dataclass(frozen=True)
class GradientDot(PointMethod):
    """S[q, i] = −(1/n) ⟨∇m_q, gᵢ⟩, which ranks."""

    unit = Unit.RANK
    preconditioner = Identity()


@dataclass(frozen=True)
class GradientCosine(PointMethod):
    """S[q, i] = −(1/n) cos(∇m_q, gᵢ), which ranks; 0 where a gradient is 0."""

    unit = Unit.RANK
    preconditioner = Identity(normalize=True)
