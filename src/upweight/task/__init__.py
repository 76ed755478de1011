"""What was trained, and what is asked.

    J(θ, w) = (1/n) Σᵢ wᵢ ℓ(θ; zᵢ) + R(θ)

`task.py` holds J: the model f, the loss ℓ and the penalty R. `measures.py` holds the question m.
`data.py` puts examples in a fixed order, `params.py` lays θ out as one flat vector, and `check.py`
refuses what could not be answered honestly.
"""
