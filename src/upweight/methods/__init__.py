"""S[q, i] = ∂m_q/∂wᵢ: one file per idea in the literature.

influence.py      −(1/n) ∇mᵀ (H + λI)⁻¹ ∇ℓᵢ, and what else one factorization answers
removal.py        the Newton step for removals: leverage correction, groups
perturbation.py   changing a training input or a label instead of its weight
"""
