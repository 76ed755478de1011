"""Ridge and softmax regression by formula, without autograd or a model object."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import assert_same
from tests.market import draw, labels
from tests.reference import closed_form
from tests.reference.retrain import minimize

STRENGTH = 0.07
EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())


@pytest.fixture(scope="module")
def ridge():
    g = torch.Generator().manual_seed(11)
    X, Y, queries = draw(g, 12, 4), draw(g, 12, 2), (draw(g, 5, 4), draw(g, 5, 2))
    model = nn.Linear(4, 2, bias=False).double()
    model.weight.data.copy_(closed_form.ridge(X, Y, STRENGTH))
    return uw.Task(model, uw.SquaredError(), uw.L2(STRENGTH)), (X, Y), queries


@pytest.fixture(scope="module")
def softmax():
    g = torch.Generator().manual_seed(12)
    X, y, queries = draw(g, 15, 3), labels(g, 15, 3), (draw(g, 4, 3), labels(g, 4, 3))
    model = nn.Linear(3, 3, bias=False).double()
    model.weight.data.copy_(closed_form.softmax(X, y, STRENGTH))
    return uw.Task(model, uw.CrossEntropy(), uw.L2(STRENGTH)), (X, y), queries


def test_the_references_agree_with_each_other(ridge, softmax):
    for task, train, _ in (ridge, softmax):
        assert_same(minimize(task, train, start=task.theta() + 0.1), task.theta(), 1e-10)


def test_ridge_scores(ridge):
    """S = −(1/n) x_qᵀ (XᵀX/n + λI)⁻¹ xᵢ eᵢ for a prediction, e = f − y."""
    task, (X, Y), queries = ridge
    G = X.T @ X / 12 + STRENGTH * torch.eye(4).double()
    residual = X @ task.model.weight.detach().T - Y
    kernel = queries[0] @ torch.linalg.solve(G, X.T)
    for output in (0, 1):
        found = EXACT.fit(task, (X, Y)).attribute(queries, uw.Logit(output)).values
        assert_same(found, -kernel * residual[:, output] / 12, 1e-12)


def test_leaving_one_out_of_ridge_regression_is_exact(ridge):
    task, (X, Y), queries = ridge
    expected = closed_form.ridge_removals(X, Y, STRENGTH, queries[0])
    before = queries[0] @ task.model.weight.detach().T
    for output in (0, 1):
        removed = EXACT.fit(task, (X, Y)).removal(queries, uw.Logit(output))
        assert removed.how == "Newton step"
        assert_same(removed.values, expected[:, :, output], 1e-10)
        for i in range(12):
            theta = closed_form.ridge_without(X, Y, STRENGTH, i)
            change = (queries[0] @ theta.T - before)[:, output]
            assert_same(removed.values[:, i], change, 1e-10)


def test_softmax_scores(softmax):
    task, (X, y), queries = softmax
    W = task.model.weight.detach()
    P = (X @ W.T).softmax(dim=1)
    H = closed_form.softmax_hessian(X, P, torch.ones(15)) + STRENGTH * torch.eye(9).double()
    g = ((P - nn.functional.one_hot(y, 3))[:, :, None] * X[:, None, :]).reshape(15, -1)
    Q = (queries[0] @ W.T).softmax(dim=1) - nn.functional.one_hot(queries[1], 3)
    m = (Q[:, :, None] * queries[0][:, None, :]).reshape(4, -1)
    found = EXACT.fit(task, (X, y)).attribute(queries).values
    assert_same(found, -m @ torch.linalg.solve(H, g.T) / 15, 1e-12)


def test_softmax_scores_are_derivatives_of_refitting(softmax):
    task, (X, y), queries = softmax

    def logits(weights):
        return queries[0] @ closed_form.softmax(X, y, STRENGTH, weights).T

    up, down = torch.ones(15).double(), torch.ones(15).double()
    up[3] += 1e-3
    down[3] -= 1e-3
    expected = (logits(up) - logits(down)) / 2e-3
    for c in range(3):
        found = EXACT.fit(task, (X, y)).attribute(queries, uw.Logit(c)).values[:, 3]
        assert_same(found, expected[:, c], 1e-7)
