"""Law 1: S[q, i] is the derivative of m_q(θ(w)) in wᵢ, by actual retraining.

Binds: the exact Hessian at a strict minimum. Central differences of fourth order with a step of
h = 0.005 in one weight; the largest error seen is 4e-9, while leaving out H's term in ∂²f/∂θ²
(the GGN) or one factor n changes every entry by more than 1e-3.
"""

import pytest
import torch

import upweight as uw
from tests.laws.subjects import assert_same, first_output
from tests.market import names, problem
from tests.reference.retrain import measured, minimize, weight_derivative

MEASURES = {"loss": uw.Loss(), "output": first_output}
SOLVERS = {
    "CG": (uw.solvers.CG(rtol=1e-11), 1e-7),
    "MINRES": (uw.solvers.MINRES(rtol=1e-11), 1e-7),
    "Auto": (
        uw.solvers.Auto(),
        1e-5,
    ),  # MINRES with its own rtol of 1e-6, where H is not known to be PSD
}


def retrained_derivatives(p, example):
    """∂m_q/∂wᵢ of the loss and of the output, from the same retrainings."""

    def response(weights):
        theta = minimize(p.task, p.train, weights, start=p.task.theta())
        functions = [p.task.loss, first_output]
        return torch.stack([measured(p.task, theta, f, p.queries) for f in functions])

    return dict(zip(MEASURES, weight_derivative(response, p.n, example), strict=True))


@pytest.mark.parametrize("name", names(without=("float32", "untrained")))
def test_score_is_the_derivative_in_the_weight(name):
    p = problem(name)
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(p.task, p.train)
    for example in {0, p.n - 1}:
        expected = retrained_derivatives(p, example)
        for key, measure in MEASURES.items():
            values = fitted.attribute(p.queries, measure).values
            assert_same(values[:, example], expected[key], rtol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
def test_whatever_the_solver(name, solver):
    p = problem(name)
    solver, rtol = SOLVERS[solver]
    values = uw.Influence(uw.Hessian(), solver).fit(p.task, p.train).attribute(p.queries).values
    assert_same(values[:, 1], retrained_derivatives(p, 1)["loss"], rtol)


def test_the_generalized_gauss_newton_matrix_does_not_obey_off_linear_models():
    """The test above can fail: where f is not linear in θ the GGN's scores are not derivatives."""
    p = problem("mlp_tanh")
    values = (
        uw.Influence(uw.GGN(), uw.solvers.Cholesky())
        .fit(p.task, p.train)
        .attribute(p.queries)
        .values
    )
    expected = retrained_derivatives(p, 1)["loss"]
    assert float((values[:, 1] - expected).norm() / expected.norm()) > 1e-3
