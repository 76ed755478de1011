"""The truth of `exact.py`: every score in closed form, by NumPy alone, in float64.

    S = −(1/n) ∇m_qᵀ H⁻¹ ∇ℓᵢ,    H = (1/n) Σᵢ (diag pᵢ − pᵢpᵢᵀ) ⊗ zᵢzᵢᵀ + λI

with z = (x, 1), ∇ℓ = (p − e_y) ⊗ z, and m the loss of a test image. It imports nothing of upweight
and shares no formula with it but these. It writes S `[q, n]` and reports how far it checks out:
the residual of the solves, and H against a difference quotient of the gradient.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from softmax_workload import CLASSES, Array, Labels, gradient, probabilities, with_bias


def hessian(P: Array, Z: Array, strength: float) -> Array:
    """H, `[c·d, c·d]`, one block of d × d per pair of classes."""
    n, d = Z.shape
    blocks = np.zeros((CLASSES, d, CLASSES, d))
    for a in range(CLASSES):
        for b in range(a, CLASSES):
            weight = P[:, a] * ((a == b) - P[:, b]) / n
            blocks[a, :, b, :] = Z.T @ (weight[:, None] * Z)
            blocks[b, :, a, :] = blocks[a, :, b, :].T
    H = blocks.reshape(CLASSES * d, CLASSES * d)
    H[np.diag_indices(CLASSES * d)] += strength
    return H


def output_gradients(theta: Array, Z: Array, y: Labels) -> Array:
    """δ = p − e_y, `[n, c]`, so that ∇ℓ = δ ⊗ z."""
    delta = probabilities(theta, Z)
    delta[np.arange(len(y)), y] -= 1
    return delta


def difference_error(H: Array, theta: Array, Z: Array, y: Labels, strength: float) -> float:
    """‖Hv − [∇J(θ + hv) − ∇J(θ − hv)] / 2h‖ / ‖Hv‖ for a random direction v."""
    v = np.random.default_rng(0).standard_normal(theta.shape)
    v /= np.linalg.norm(v)
    h = 1e-4
    quotient = gradient(theta + h * v, Z, y, strength) - gradient(theta - h * v, Z, y, strength)
    product = H @ v.ravel()
    error = np.linalg.norm(product - quotient.ravel() / (2 * h))
    return float(error / np.linalg.norm(product))


def main() -> None:
    """Read the workload, write the scores and what was checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    with np.load(given.workload) as w:
        Z, Zq, y, yq = with_bias(w["X"]), with_bias(w["Xq"]), w["y"], w["yq"]
        theta, strength, norm = w["theta"], float(w["strength"]), float(w["gradient_norm"])
    H = hessian(probabilities(theta, Z), Z, strength)
    delta, delta_q = output_gradients(theta, Z, y), output_gradients(theta, Zq, yq)
    M = (delta_q[:, :, None] * Zq[:, None, :]).reshape(len(Zq), -1)
    A = np.linalg.solve(H, M.T).T
    residual = np.linalg.norm(A @ H - M, axis=1) / np.linalg.norm(M, axis=1)
    directions = A.reshape(len(Zq), CLASSES, -1)
    S = np.zeros((len(Zq), len(Z)))
    for c in range(CLASSES):
        S -= (directions[:, c] @ Z.T) * delta[:, c] / len(Z)
    np.save(given.out, S)
    checks = {
        "gradient_norm": norm,
        "largest_relative_residual": float(residual.max()),
        "hessian_against_difference_quotient": difference_error(H, theta, Z, y, strength),
        "parameters": H.shape[0],
    }
    given.out.with_suffix(".json").write_text(json.dumps(checks, indent=1))


if __name__ == "__main__":
    main()
