"""The whole idea in a hundred lines of NumPy: which training rows made the model do that?

    S[q, i] = ∂m_q/∂wᵢ = −(1/n) ∇m_qᵀ H⁻¹ ∇ℓᵢ

Softmax regression on the wine data, by hand: gradients, Hessian, scores, and the proof: remove the
most influential training rows, one at a time, train again, and compare. The library gives the same
numbers; `tests/examples` holds the two together.
"""

import numpy as np
from sklearn.datasets import load_wine

PENALTY = 0.01  # λ in J(θ) = (1/n) Σ wᵢ ℓᵢ + (λ/2) ‖θ‖²


def softmax(logits: np.ndarray) -> np.ndarray:
    """p [n c] from logits [n c]."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def losses(theta: np.ndarray, Z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ℓᵢ = −log p[yᵢ], one per row: never reduced."""
    return -np.log(softmax(Z @ theta.reshape(-1, Z.shape[1]).T)[np.arange(len(y)), y])


def gradients(theta: np.ndarray, Z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """gᵢ = (pᵢ − onehot(yᵢ)) ⊗ zᵢ, rows of length p = c·i."""
    delta = softmax(Z @ theta.reshape(-1, Z.shape[1]).T)
    delta[np.arange(len(y)), y] -= 1
    return np.einsum("nc,ni->nci", delta, Z).reshape(len(y), -1)


def hessian(theta: np.ndarray, Z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """∇²J = (1/n) Σ wᵢ (diag p − p pᵀ) ⊗ z zᵀ + λI."""
    p = softmax(Z @ theta.reshape(-1, Z.shape[1]).T)
    curvature = np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - np.einsum("nc,nd->ncd", p, p)
    H = np.einsum("n,ncd,ni,nj->cidj", w / len(Z), curvature, Z, Z, optimize=True)
    return H.reshape(theta.size, theta.size) + PENALTY * np.eye(theta.size)


def train(Z: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """θ(w) = argmin J(θ, w), by Newton's method to a gradient of 1e-12."""
    theta = np.zeros((y.max() + 1) * Z.shape[1])
    for _ in range(50):
        gradient = w @ gradients(theta, Z, y) / len(Z) + PENALTY * theta
        if np.linalg.norm(gradient) < 1e-12:
            return theta
        theta = theta - np.linalg.solve(hessian(theta, Z, w), gradient)
    raise RuntimeError(f"not converged: gradient {np.linalg.norm(gradient):.1e}")


def scores(
    theta: np.ndarray, Z: np.ndarray, y: np.ndarray, Zq: np.ndarray, yq: np.ndarray
) -> np.ndarray:
    """S [q n]: upweight row i, watch the loss of query q."""
    G, M = gradients(theta, Z, y), gradients(theta, Zq, yq)
    return -M @ np.linalg.solve(hessian(theta, Z, np.ones(len(Z))), G.T) / len(Z)


def wine() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Standardized features with a 1 for the bias; every fifth row is a query."""
    X, y = load_wine(return_X_y=True)
    Z = np.column_stack([(X - X.mean(axis=0)) / X.std(axis=0), np.ones(len(X))])
    query = np.arange(len(X)) % 5 == 0
    return Z[~query], y[~query], Z[query], y[query]


def main() -> None:
    """Score, remove, retrain, compare."""
    Z, y, Zq, yq = wine()
    w = np.ones(len(Z))
    theta = train(Z, y, w)
    S = scores(theta, Z, y, Zq, yq)
    hardest = int(np.argmax(losses(theta, Zq, yq)))
    top = np.argsort(-np.abs(S[hardest]))[:20]

    predicted, actual = -S[hardest, top], []
    for i in top:
        without = w.copy()
        without[i] = 0.0
        change = losses(train(Z, y, without), Zq, yq) - losses(theta, Zq, yq)
        actual.append(change[hardest])

    print(f"query {hardest}: removing row i changes its loss by")
    for i, guess, truth in list(zip(top, predicted, actual, strict=True))[:5]:
        print(f"  row {i:>3}   predicted {guess:+.4f}   retrained {truth:+.4f}")
    correlation = np.corrcoef(predicted, actual)[0, 1]
    print(f"{len(top)} removals: Pearson {correlation:.4f} between predicted and retrained")


if __name__ == "__main__":
    main()
