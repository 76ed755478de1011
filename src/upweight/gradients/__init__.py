"""gᵢ = ∇θ ℓ(θ; zᵢ): one gradient per training example.

`functional.py` is the reference, for any model; `linear.py` recognizes f(θ, x) = W z(x) + b and
keeps gᵢ = δᵢ ⊗ zᵢ factored; `source.py` offers both to methods under one protocol.

For networks, block by block: `hooks.py` records what each layer saw, `layers.py` has a rule per
layer type, `factored.py` what comes of it, `gᵢ = Σ_t δ_t ⊗ a_t` unformed; `broadcast.py` is for
parameters without a layer. `planning.py` assigns every parameter to a rule and checks the
assignment, `passes.py` follows it.
"""
