"""gᵢ = ∇θ ℓ(θ; zᵢ): one gradient per training example.

`functional.py` is the reference, for any model; `linear.py` recognizes f(θ, x) = W z(x) + b and
keeps gᵢ = δᵢ ⊗ zᵢ factored; `source.py` offers both to methods under one protocol.
"""
