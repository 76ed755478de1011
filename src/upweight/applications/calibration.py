"""Probabilities of classes that agree with some trusted rows, from the losses of every label.

    ℓ̃(f, c) = −log softmax(−s ℓ(f, ·) + b)_c,
    (s, b) = argmin Σⱼ ℓ̃(f(xⱼ), yⱼ) + ½ (s − 1)² + ½ ‖b‖²            j: the trusted rows

For a cross-entropy −ℓ is log p, and s is an inverse temperature: temperature scaling with a shift
of each class (Alexandari, Kundaje & Shrikumar 2020). Where labels of one class were taken for
another, the model has learned too little of the first, and b gives it back.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.runtime.packages import missing


@dataclass(frozen=True, eq=False)
class Calibration:
    """ℓ ↦ ℓ̃, with `scale` s and `shifts` b. Made by `calibration`."""

    scale: float
    shifts: Float[Tensor, " c"]

    def __call__(self, losses: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """ℓ̃ of every label."""
        return -torch.log_softmax(self.shifts.to(losses) - self.scale * losses, dim=1)


def calibration(losses: Float[Tensor, "m c"], labels: Int[Tensor, " m"]) -> Calibration:
    """The calibration of ℓ of every label to the labels of the trusted rows.

    Cost: some ten passes over m·c numbers. The objective is convex, and has one minimum also where
    a class has no row.

    Raises:
        MissingPackage: SciPy is not installed.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise missing("A calibration", "scipy", "sklearn", error) from error

    ell = losses.double().cpu().numpy()
    m, c = ell.shape
    own, y = np.arange(m), labels.cpu().numpy()

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        s, b = point[0], point[1:]
        z = b - s * ell
        z -= z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
        residual = np.exp(z)
        residual[own, y] -= 1.0
        value = -z[own, y].sum() + 0.5 * (s - 1) ** 2 + 0.5 * b @ b
        return value, np.r_[s - 1 - (residual * ell).sum(), residual.sum(axis=0) + b]

    start = np.r_[1.0, np.zeros(c)]
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return Calibration(float(found.x[0]), torch.tensor(found.x[1:]))
