"""Answers from textbook formulas, with neither autograd nor a model object."""

import torch


def ridge(X, Y, strength):
    """Θ [c i] of J = (1/2n) Σ ‖Θ xᵢ − yᵢ‖² + (strength/2) ‖Θ‖²."""
    n = len(X)
    gram = X.T @ X + n * strength * torch.eye(X.shape[1], dtype=X.dtype)
    return torch.linalg.solve(gram, X.T @ Y).T


def ridge_without(X, Y, strength, i):
    """The same with wᵢ = 0: the mean keeps its n."""
    keep = torch.arange(len(X)) != i
    n = len(X)
    gram = X[keep].T @ X[keep] + n * strength * torch.eye(X.shape[1], dtype=X.dtype)
    return torch.linalg.solve(gram, X[keep].T @ Y[keep]).T


def ridge_removals(X, Y, strength, X_query):
    """Change of every query's prediction when each example is left out, by the hat matrix.

    Δf_q = x_qᵀ (XᵀX + nλI)⁻¹ xᵢ · eᵢ / (1 − hᵢ)        e = f − y, h = xᵀ (XᵀX + nλI)⁻¹ x
    """
    gram = X.T @ X + len(X) * strength * torch.eye(X.shape[1], dtype=X.dtype)
    hat = torch.linalg.solve(gram, X.T)
    residual = X @ hat @ Y - Y
    leverage = (X * hat.T).sum(dim=1)
    return (X_query @ hat)[:, :, None] * (residual / (1 - leverage)[:, None])


def softmax(X, y, strength, weights=None, steps=50):
    """W [c i] of J = (1/n) Σ wᵢ (logsumexp(W xᵢ) − (W xᵢ)[yᵢ]) + (strength/2) ‖W‖² by Newton."""
    n, i = X.shape
    c = int(y.max()) + 1
    w = torch.ones(n, dtype=X.dtype) if weights is None else weights
    Y = torch.nn.functional.one_hot(y, c).to(X.dtype)
    W = torch.zeros(c, i, dtype=X.dtype)
    for _ in range(steps):
        P = (X @ W.T).softmax(dim=1)
        gradient = ((w[:, None] * (P - Y)).T @ X) / n + strength * W
        H = softmax_hessian(X, P, w) + strength * torch.eye(c * i, dtype=X.dtype)
        W = W - torch.linalg.solve(H, gradient.reshape(-1)).reshape(c, i)
    return W


def softmax_hessian(X, P, w):
    """(1/n) Σ wᵢ (diag p − p pᵀ) ⊗ x xᵀ."""
    total = 0.0
    for x, p, weight in zip(X, P, w, strict=True):
        total = total + weight * torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x, x))
    return total / len(X)
