"""GGN, Fisher and empirical Fisher, each on a model where it is the Hessian."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.exactness.opaque import opaque
from tests.laws.subjects import assert_same
from tests.market import draw, names, problem
from tests.reference import dense
from upweight.task.data import as_data

LINEAR = names("linear", without=("float32",))


@pytest.mark.parametrize("name", LINEAR)
def test_the_ggn_is_the_hessian_where_f_is_linear(name):
    p = problem(name)
    data = as_data(p.train)
    expected = dense.hessian(p.task, p.train)
    assert_same(uw.GGN().fit(p.task, data, p.task.theta()).dense(), expected, 1e-10)
    assert_same(
        uw.GGN().fit(opaque(p.task, p.train), data, p.task.theta()).dense(), expected, 1e-10
    )
    assert_same(
        uw.Hessian().fit(opaque(p.task, p.train), data, p.task.theta()).dense(), expected, 1e-10
    )


@pytest.mark.parametrize("name", LINEAR)
def test_scores_do_not_depend_on_whether_the_model_was_recognized(name):
    p = problem(name)
    for curvature in (uw.Hessian(), uw.EmpiricalFisher()):
        method = uw.Influence(curvature, uw.solvers.Cholesky())
        known, unknown = method.fit(p.task, p.train), method.fit(opaque(p.task, p.train), p.train)
        assert_same(unknown.attribute(p.queries).values, known.attribute(p.queries).values, 1e-10)
        assert_same(unknown.self_influence(), known.self_influence(), 1e-10)


def test_the_hessian_is_more_than_the_ggn_elsewhere():
    p = problem("mlp_tanh")
    H, G = dense.hessian(p.task, p.train), dense.ggn(p.task, p.train)
    assert float((H - G).norm() / H.norm()) > 1e-2


def test_the_ggn_is_the_hessian_where_the_residuals_are_zero():
    """Σ (f − y) ∂²f/∂θ² vanishes for squares that fit exactly, whatever the model."""
    p = problem("mlp_gelu")
    X = p.train[0]
    with torch.no_grad():
        train = (X, p.task.model(X))
    H = dense.hessian(p.task, train)
    assert_same(uw.GGN().fit(p.task, as_data(train), p.task.theta()).dense(), H, 1e-10)


def test_the_empirical_fisher_is_the_fisher_where_the_labels_are_as_the_model_says():
    """At θ = 0 a logistic model says 1/2, and every x comes once with each label."""
    x = draw(torch.Generator().manual_seed(0), 6, 3)
    X, y = torch.cat([x, x]), torch.cat([torch.zeros(6), torch.ones(6)]).double()[:, None]
    model = nn.Linear(3, 1).double()
    for parameter in model.parameters():
        parameter.data.zero_()
    task = uw.Task(model, uw.Bernoulli(), uw.L2(0.1))
    found = uw.EmpiricalFisher().fit(task, as_data((X, y)), task.theta()).dense()
    assert_same(found, dense.hessian(task, (X, y)), 1e-10)


def test_the_empirical_fisher_vanishes_at_an_interpolating_solution_and_the_fisher_does_not():
    p = problem("mlp_gelu")
    X = p.train[0]
    with torch.no_grad():
        train = (X, p.task.model(X))
    task = uw.Task(p.task.model, p.task.loss)
    assert float(uw.EmpiricalFisher().fit(task, as_data(train), task.theta()).trace()) < 1e-20
    assert float(uw.GGN().fit(task, as_data(train), task.theta()).trace()) > 0.1


@pytest.mark.parametrize(
    "solver",
    [uw.solvers.CG(rtol=1e-9), uw.solvers.MINRES(rtol=1e-9), uw.solvers.BlockCG(rtol=1e-9)],
)
def test_krylov_solvers_are_exact_after_as_many_steps_as_parameters(solver):
    p = problem("softmax")
    exact = (
        uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(p.task, p.train).attribute(p.queries)
    )
    found = uw.Influence(uw.Hessian(), solver).fit(p.task, p.train).attribute(p.queries)
    assert_same(found.values, exact.values, 1e-8)
    steps = found.provenance.health["solver_steps"]
    assert 0 < steps <= p.task.layout.size + 2  # rounding may cost a step or a restart


def test_damping_is_an_extra_ridge_around_the_minimum():
    """(H + λI) is the Hessian of J with L2(λ) more, at the same θ."""
    p = problem("softmax_penalized_bias")
    more = uw.Task(p.task.model, p.task.loss, p.task.penalty + uw.L2(0.3))
    damped = uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), damping=0.3).fit(p.task, p.train)
    ridged = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(more, p.train)
    assert_same(damped.attribute(p.queries).values, ridged.attribute(p.queries).values, 1e-12)


def test_relative_damping_is_in_units_of_the_mean_eigenvalue():
    p = problem("mlp_tanh")
    mean = float(torch.linalg.eigvalsh(dense.ggn(p.task, p.train)).mean())
    relative = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), uw.Relative(0.2)).fit(p.task, p.train)
    absolute = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), uw.Absolute(0.2 * mean)).fit(
        p.task, p.train
    )
    assert relative.scorer.damping == pytest.approx(0.2 * mean, rel=1e-12)
    assert_same(relative.attribute(p.queries).values, absolute.attribute(p.queries).values, 1e-12)
