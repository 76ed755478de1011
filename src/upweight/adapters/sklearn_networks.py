"""MLPClassifier and MLPRegressor: networks of PyTorch in all but name.

    (1/B) Σ_{i in batch} ℓᵢ + (α/2B) Σ_layers ‖W‖²        B rows a batch; with lbfgs all n

is what their steps lower, so that J = (1/n) Σ ℓᵢ + (α/2B) Σ ‖W‖². Biases are free. `partial_fit`
takes all rows it is given for a batch; what it was given is not kept, and B is taken as in `fit`.
"""

from typing import Any

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import Tensor, nn

from upweight.adapters.sklearn_objectives import Encoding, Objective
from upweight.adapters.support import linear_map
from upweight.task.losses import Bernoulli, CrossEntropy, SquaredError

NETWORKS = (MLPClassifier, MLPRegressor)

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}


def network(final: Any) -> nn.Sequential:
    """The layers, in float64; outputs are logits of a classifier."""
    layers: list[nn.Module] = []
    for W, b in zip(final.coefs_, final.intercepts_, strict=True):
        weight, bias = (torch.from_numpy(np.array(part, np.float64)) for part in (W.T, b))
        layers += [linear_map(weight, bias), ACTIVATIONS[final.activation]()]
    return nn.Sequential(*layers[:-1]).eval()


def parameters(final: Any) -> dict[str, Tensor]:
    """θ by name in `network`."""
    return {name: value.detach() for name, value in network(final).named_parameters()}


def put(final: Any, params: Any) -> None:
    """Parameters of `network` back into the estimator, in its dtype."""
    for k, W in enumerate(final.coefs_):
        found = params[f"{2 * k}.weight"].detach().cpu().numpy()
        final.coefs_[k] = found.T.astype(W.dtype)
        bias = params[f"{2 * k}.bias"].detach().cpu().numpy()
        final.intercepts_[k] = bias.astype(final.intercepts_[k].dtype)


def refusal(final: Any) -> str | None:
    """Why it has no objective on all of its training data."""
    name = type(final).__name__
    if final.early_stopping and final.solver != "lbfgs":
        return (
            f"{name} with early_stopping holds back rows that are not known afterwards: fit with "
            "early_stopping=False and the max_iter that it chose (n_iter_)"
        )
    loss = getattr(final, "loss", "squared_error")
    if isinstance(final, MLPRegressor) and loss != "squared_error":
        return f"{name} with loss={loss!r} has no translation: fit with loss='squared_error'"
    if isinstance(final, MLPClassifier) and getattr(final, "n_outputs_", 1) > 1:
        if final.out_activation_ == "logistic":
            return f"{name} with several labels per example: fit one per label"
    return None


def objective(final: Any, _: float) -> Objective:
    """J, but for the data."""

    def strength(n: int, _: float) -> float:
        rows = final.batch_size if final.batch_size != "auto" else 200
        return float(final.alpha) / (n if final.solver == "lbfgs" else min(rows, n))

    if isinstance(final, MLPRegressor):
        return Objective(SquaredError(), Encoding.REAL, strength)
    if final.n_outputs_ == 1:
        return Objective(Bernoulli(), Encoding.ZERO_ONE, strength)
    return Objective(CrossEntropy(), Encoding.INDEX, strength)
