"""Law 9: λ S → −(1/n) ∇m·g as λ → ∞: influence becomes the dot product of gradients.

λ S = −(1/n) ∇mᵀ (I + H/λ)⁻¹ g,  so the error is at most ‖H‖/λ of ‖∇m‖‖g‖/n
"""

import dataclasses

import pytest
import torch

from tests.laws.subjects import EVERYONE, scores
from tests.market import problem
from tests.reference import dense

NAMES = ["softmax", "mlp_tanh", "tied"]
# Two of the three problems for each method, each pair in its turn.
CASES = [(m, name) for k, m in enumerate(EVERYONE) for name in NAMES if name != NAMES[k % 3]]


@pytest.mark.parametrize("method, name", CASES)
def test_scores_become_gradient_products(method, name):
    p = problem(name)
    m, g = dense.measure_gradients(p.task, p.task.loss, p.queries), dense.gradients(p.task, p.train)
    limit = -(m @ g.T) / p.n
    norms = m.norm(dim=1)[:, None] * g.norm(dim=1)[None, :] / p.n
    size = float(torch.linalg.matrix_norm(dense.hessian(p.task, p.train), 2))
    bound = 30.0 * size  # of any of these curvatures, here
    for damping in (1e3, 1e7):
        damped = dataclasses.replace(EVERYONE[method], damping=damping)
        gap = (damping * scores(damped, p.task, p.train, p.queries) - limit).abs()
        assert bool((gap <= (bound / damping + 1e-10) * norms).all())
