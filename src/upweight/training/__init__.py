"""𝒜: how the model was trained, as a function of the data weights.

    θ_{t+1} = θ_t − η_t · direction(∇J_B(θ_t, w))     J_B: the mean over a batch      training.py
    θ(w) = argmin_θ J(θ, w)                           for strictly convex J           newton.py

`trainer.py` trains as `training.py` says, by `optimizers.py` and `schedules.py`, one step of
`steps.py` after the other; `trajectory.py` hands the steps out, and
`adjoint.py` goes backwards over one. `descent.py` and `objective.py` are
parts of `newton.py`. `pbrf.py` trains on the proximal Bregman objective, and `function.py` takes a
training loop of the user's own.

`record.py` writes a loop of the user's own to disk as it runs; `history.py` is what a method may
ask of either.

`retrain.py` trains many models, one for each row of `weights.py`, and measures them (`pool.py` runs
them, in several processes too). `subset_models.py` trains models of random subsets, with their
parameters, for methods that are fitted to them.
"""

from upweight.training.function import FromFunction
from upweight.training.newton import Newton
from upweight.training.pbrf import PBRF
from upweight.training.record import Recorded, read_record
from upweight.training.retrain import Retrained, retrain
from upweight.training.schedules import Constant, Cosine, LinearDecay, Stepwise
from upweight.training.subset_models import SubsetModels, subset_models
from upweight.training.trajectory import Trajectory
from upweight.training.weights import removal_weights, subset_weights

__all__ = [
    "PBRF",
    "Constant",
    "Cosine",
    "FromFunction",
    "LinearDecay",
    "Newton",
    "Recorded",
    "Retrained",
    "Stepwise",
    "SubsetModels",
    "Trajectory",
    "read_record",
    "removal_weights",
    "retrain",
    "subset_models",
    "subset_weights",
]
