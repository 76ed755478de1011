"""H ≈ ∇²θ J: the curvature of the *mean* loss plus the penalty, as a linear operator.

    Hessian          (1/n) Σ ∇²ℓᵢ              + ∇²R
    GGN              (1/n) Σ Jᵢᵀ Λᵢ Jᵢ          + ∇²R        Λ = ∂²ℓ/∂f²
    Fisher           (1/n) Σ E_ŷ[g gᵀ]          + ∇²R        ŷ ~ p(· | f), by sampling
    EmpiricalFisher  (1/n) Σ gᵢ gᵢᵀ             + ∇²R        not the Fisher

Every batch counts by its number of examples. The penalty's own curvature is always exact.
"""
