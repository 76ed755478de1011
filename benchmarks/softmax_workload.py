"""The workload of `exact.py`: MNIST softmax regression, trained to a true stationary point.

    J(θ) = (1/n) Σᵢ ℓ(θ; zᵢ) + λ/2 ‖θ‖²,    ℓ = −log softmax(W x + b)[y],    θ = (W, b)

Run as a program it writes one `.npz`: X `[n, 784]`, y `[n]`, Xq `[q, 784]`, yq `[q]`, theta
`[c, 785]` (the bias is the last column), strength, gradient_norm. NumPy alone, in float64, so that
no contender has a part in it.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

CLASSES = 10
STRENGTH = 0.01
GRADIENT_NORM = 1e-10


def mnist(file: Path, n: int, q: int) -> tuple[Array, Labels, Array, Labels]:
    """The first n training and q test images, pixels in [0, 1]."""
    with np.load(file) as arrays:
        if n > len(arrays["X"]) or q > len(arrays["Xt"]):
            held = f"{len(arrays['X'])} training and {len(arrays['Xt'])} test images"
            refusal = f"{file} holds {held}; asked for {n} and {q}."
            raise SystemExit(refusal)
        X = arrays["X"][:n].reshape(n, -1) / 255.0
        Xq = arrays["Xt"][:q].reshape(q, -1) / 255.0
        return X, arrays["y"][:n].astype(np.int64), Xq, arrays["yt"][:q].astype(np.int64)


def with_bias(X: Array) -> Array:
    """z = (x, 1)."""
    return np.hstack([X, np.ones((len(X), 1))])


def probabilities(theta: Array, Z: Array) -> Array:
    """softmax(Z θᵀ), `[n, c]`."""
    F = Z @ theta.T
    E = np.exp(F - F.max(axis=1, keepdims=True))
    return np.asarray(E / E.sum(axis=1, keepdims=True))


def objective(theta: Array, Z: Array, y: Labels, strength: float) -> float:
    """J(θ)."""
    F = Z @ theta.T
    top = F.max(axis=1)
    losses = np.log(np.exp(F - top[:, None]).sum(axis=1)) + top - F[np.arange(len(y)), y]
    return float(losses.mean() + strength / 2 * (theta**2).sum())


def gradient(theta: Array, Z: Array, y: Labels, strength: float) -> Array:
    """∇J(θ), `[c, d]`."""
    residual = probabilities(theta, Z)
    residual[np.arange(len(y)), y] -= 1
    return np.asarray(residual.T @ Z / len(Z) + strength * theta)


def hessian_product(P: Array, Z: Array, strength: float, V: Array) -> Array:
    """∇²J v = (1/n) Σ (diag p − ppᵀ) V z zᵀ + λ V, `[c, d]`."""
    U = P * (Z @ V.T)
    U -= P * U.sum(axis=1, keepdims=True)
    return np.asarray(U.T @ Z / len(Z) + strength * V)


def train(X: Array, y: Labels, strength: float, max_steps: int = 60) -> tuple[Array, float]:
    """The minimizer of J and its gradient norm, by Newton's method with inner CG.

    The inner CG is preconditioned with (s · ZᵀZ/n + λ)⁻¹ for every class, where s is the mean of
    p(1 − p): the Hessian with its class structure averaged out.
    """
    Z = with_bias(X)
    theta = np.zeros((CLASSES, Z.shape[1]))
    gram = Z.T @ Z / len(Z)
    for _ in range(max_steps):
        g = gradient(theta, Z, y, strength)
        norm = float(np.linalg.norm(g))
        if norm <= GRADIENT_NORM:
            return theta, norm
        P = probabilities(theta, Z)
        mean_variance = float((P * (1 - P)).mean())
        averaged = mean_variance * gram + strength * np.eye(len(gram))
        inverse = np.asarray(np.linalg.inv(averaged), dtype=np.float64)
        step = _newton_step(P, Z, strength, -g, inverse, min(0.1, norm**0.5))
        theta = theta + _step_length(theta, step, g, Z, y, strength) * step
    refusal = f"training stopped at gradient norm {norm:.1e} after {max_steps} steps."
    raise SystemExit(refusal)


def _newton_step(
    P: Array, Z: Array, strength: float, b: Array, inverse: Array, rtol: float
) -> Array:
    """Preconditioned CG for ∇²J s = b, to ‖residual‖ ≤ rtol ‖b‖."""
    s, r = np.zeros_like(b), b
    z = r @ inverse
    d, rz = z, float((r * z).sum())
    for _ in range(500):
        Hd = hessian_product(P, Z, strength, d)
        alpha = rz / float((d * Hd).sum())
        s, r = s + alpha * d, r - alpha * Hd
        if np.linalg.norm(r) <= rtol * np.linalg.norm(b):
            break
        z = r @ inverse
        rz, previous = float((r * z).sum()), rz
        d = z + rz / previous * d
    return s


def _step_length(
    theta: Array, step: Array, g: Array, Z: Array, y: Labels, strength: float
) -> float:
    """Halve from 1 until J falls by Armijo's measure; near the minimum J cannot resolve it."""
    slope = float((step * g).sum())
    if abs(slope) < 1e-12:
        return 1.0
    start, t = objective(theta, Z, y, strength), 1.0
    while objective(theta + t * step, Z, y, strength) > start + 1e-4 * t * slope and t > 1e-6:
        t /= 2
    return t


def main() -> None:
    """Draw, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mnist", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--queries", type=int, required=True)
    given = parser.parse_args()
    X, y, Xq, yq = mnist(given.mnist, given.n, given.queries)
    theta, norm = train(X, y, STRENGTH)
    unfinished = given.out.with_suffix(".unfinished.npz")
    np.savez(unfinished, X=X, y=y, Xq=Xq, yq=yq, theta=theta, strength=STRENGTH, gradient_norm=norm)
    unfinished.replace(given.out)


if __name__ == "__main__":
    main()
