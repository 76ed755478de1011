"""Law 8: for θ = Aφ, S is unchanged.

Binds curvatures that transform as AᵀHA, without damping: λI does not transform so. The penalty is
the same function of θ in both.
"""

import copy

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import ITERATIVE, SAMPLED, assert_same, scores
from tests.market import draw, problem, train_in_place
from upweight.gradients.linear import linear_form
from upweight.task.data import as_data

METHODS = {
    name: uw.Influence(curvature, uw.solvers.Cholesky())
    for name, curvature in {
        "Hessian": uw.Hessian(),
        "GGN": uw.GGN(),
        "EmpiricalFisher": uw.EmpiricalFisher(),
    }.items()
} | SAMPLED


class Reparametrized(nn.Module):
    """The same function with parameters φ, θ = Aφ."""

    def __init__(self, task, A):
        super().__init__()
        self.phi = nn.Parameter(torch.linalg.solve(A, task.theta()))
        self.A = A
        # In a tuple, so that the base model's own parameters are not registered.
        self.base = (copy.deepcopy(task.model), task.layout)

    def theta(self, phi):
        return self.base[1].unflatten(self.A @ phi)

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.base[0], self.theta(self.phi), args, kwargs)


def reparametrized(task):
    p = task.layout.size
    g = torch.Generator().manual_seed(3)
    A = torch.eye(p, dtype=torch.float64) + 0.4 * draw(g, p, p) / p**0.5
    model = Reparametrized(task, A)

    def penalty(params):
        return task.penalty(model.theta(params["phi"]), task.layout)

    return uw.Task(model, task.loss, penalty)


NAMES = ["ridge_two_outputs", "softmax", "mlp_tanh", "tied", "dict_batch", "two_inputs"]
# Every other problem for each method, the others for the next one.
CASES = [(m, name) for k, m in enumerate(METHODS) for j, name in enumerate(NAMES) if (j + k) % 2]


@pytest.mark.parametrize("method, name", CASES)
def test_scores_do_not_depend_on_the_coordinates(method, name):
    p = problem(name)
    expected = scores(METHODS[method], p.task, p.train, p.queries)
    found = scores(METHODS[method], reparametrized(p.task), p.train, p.queries)
    assert_same(found, expected, 1e-9)  # conditions of A and H: rounding seen 2e-12


@pytest.mark.parametrize("method", METHODS)
def test_other_units_of_the_inputs(method):
    """f = W x = (W M⁻¹)(M x): both recognized as linear models, without a penalty."""
    g = torch.Generator().manual_seed(8)
    X, Y, M = draw(g, 30, 3), draw(g, 30, 2), torch.eye(3) + 0.3 * draw(g, 3, 3)
    queries = (draw(g, 4, 3), draw(g, 4, 2))
    task = uw.Task(nn.Linear(3, 2, bias=False).double(), uw.SquaredError())
    train_in_place(task, (X, Y))
    other = nn.Linear(3, 2, bias=False).double()
    other.weight.data.copy_(task.model.weight.data @ torch.linalg.inv(M))
    moved = uw.Task(other, uw.SquaredError())
    assert linear_form(moved, moved.theta(), as_data((X @ M.T, Y)).batch(0, 4)) is not None
    expected = scores(METHODS[method], task, (X, Y), queries)
    found = scores(METHODS[method], moved, (X @ M.T, Y), (queries[0] @ M.T, queries[1]))
    assert_same(found, expected, 1e-10)


def test_damping_is_not_invariant():
    """The law says λ = 0 because it must: with damping the coordinates matter."""
    p = problem("mlp_tanh")
    method = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=0.5)
    expected = scores(method, p.task, p.train, p.queries)
    found = scores(method, reparametrized(p.task), p.train, p.queries)
    assert float((found - expected).norm() / expected.norm()) > 1e-2


def test_iterative_solvers_too():
    p = problem("mlp_tanh")
    for method in ITERATIVE.values():
        expected = scores(method, p.task, p.train, p.queries)
        found = scores(method, reparametrized(p.task), p.train, p.queries)
        assert_same(found, expected, 1e-9)
