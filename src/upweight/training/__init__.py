"""𝒜 by gradient descent: how the model was trained, as a function of the data weights.

    θ_{t+1} = θ_t − η_t · direction(∇J_B(θ_t, w))          J_B: the mean over a batch

`training.py` is the recipe, `optimizers.py` and `schedules.py` are its parts, `function.py` takes a
training loop of the user's own.
"""
