"""Σₗ ⟨(Hₗ + λₗ)⁻¹ ∇m_q, gᵢ⟩ for all q and i: the products that scores are made of.

`kernels.py` has the ways to multiply one block out, `separable.py` the sum of products that stands
in for a dense one, `choose.py` decides per block by operation count, memory and measured error, and
`stream.py` takes the training set past all of them in one pass.
"""
