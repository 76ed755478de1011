"""H ≈ ∇²θ J: the curvature of the *mean* loss plus the penalty, as a linear operator.

    Hessian          (1/n) Σ ∇²ℓᵢ              + ∇²R
    GGN              (1/n) Σ Jᵢᵀ Λᵢ Jᵢ          + ∇²R        Λ = ∂²ℓ/∂f²
    Fisher           (1/n) Σ E_ŷ[g gᵀ]          + ∇²R        ŷ ~ p(· | f), by sampling
    EmpiricalFisher  (1/n) Σ gᵢ gᵢᵀ             + ∇²R        not the Fisher

    KFAC, EKFAC      ⊕ₗ Gₗ ⊗ Aₗ, ⊕ₗ Qₗ Λₗ Qₗᵀ   + ∇²R        a block per weight
    Diagonal         diag of the Fisher         + ∇²R        Blockwise: a choice per layer

Every batch counts by its number of examples. The penalty's own curvature is exact, by
layer where it is a multiple of the identity on each block.

`spectrum(operator)` and `trace(operator)` estimate what a curvature's eigenvalues are, with errors.
"""

from upweight.curvature.estimators import Expand, Reduce
from upweight.linalg.spectrum import spectrum, trace

__all__ = ["Expand", "Reduce", "spectrum", "trace"]
