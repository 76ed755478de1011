"""Law 10: ℓ ↦ cℓ, R ↦ cR, λ ↦ cλ leaves S unchanged. (Linear in m: `test_methods.py`.)

Scale the Hessian and the GGN. The empirical Fisher is quadratic in ℓ and
scales as c², so that its scores of a fixed measurement scale as 1/c.
"""

from dataclasses import dataclass

import pytest

import upweight as uw
from tests.laws.subjects import (
    assert_same,
    first_output,
    scores,
)
from tests.market import problem
from upweight.linalg import Tag
from upweight.task.losses import Loss


@dataclass(frozen=True)
class Times(Loss):
    """c ℓ."""

    base: Loss
    c: float
    convex = True

    def __call__(self, outputs, targets):
        return self.c * self.base(outputs, targets)


def scaled(task, c):
    def penalty(params):
        return c * task.penalty(params, task.layout)

    return uw.Task(task.model, Times(task.loss, c), penalty, task.params, task.forward)


SCALING = [
    (curvature, name)
    for curvature in (
        uw.Hessian(),
        uw.GGN(),
        uw.KFAC(uw.labels.Expected()),
        uw.EKFAC(uw.labels.Expected()),
    )
    for name in ("softmax", "poisson", "mlp_tanh", "tied")
    # An embedding that is also the head has inputs (of no scale) and δ (of the loss's) in one G.
    if name != "tied" or isinstance(curvature, uw.Hessian | uw.GGN)
]


@pytest.mark.parametrize("curvature, name", SCALING)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_scale_of_the_objective_does_not_matter(curvature, damping, name):
    p, c = problem(name), 7.0
    solver = (
        uw.solvers.Cholesky() if isinstance(curvature, uw.Hessian | uw.GGN) else uw.solvers.Auto()
    )
    method = uw.Influence(curvature, solver, damping, tolerance=0)
    other = uw.Influence(curvature, solver, c * damping, tolerance=0)
    expected = scores(method, p.task, p.train, p.queries, first_output)
    found = scores(other, scaled(p.task, c), p.train, p.queries, first_output)
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
@pytest.mark.parametrize("curvature", [uw.GGN(), uw.EKFAC(uw.labels.Expected())], ids=repr)
def test_relative_damping_follows_the_scale(curvature, name):
    p, c = problem(name), 7.0
    solver = uw.solvers.Cholesky() if curvature == uw.GGN() else uw.solvers.Auto()
    method = uw.Influence(curvature, solver, uw.Relative(0.3), tolerance=0)
    expected = scores(method, p.task, p.train, p.queries, first_output)
    found = scores(method, scaled(p.task, c), p.train, p.queries, first_output)
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
def test_the_empirical_fisher_scales_as_the_square(name):
    p, c = problem(name), 7.0
    plain = uw.Task(p.task.model, p.task.loss)
    times = uw.Task(p.task.model, Times(p.task.loss, c))
    F, F_times = (
        uw.EmpiricalFisher().fit(plain, _data(p), plain.theta()),
        uw.EmpiricalFisher().fit(times, _data(p), times.theta()),
    )
    assert_same(F_times.dense(), c**2 * F.dense(), 1e-10)
    assert Tag.PSD in F.tags
    for damped in (_damped, _damped_by_layer):
        expected = scores(damped(0.1), plain, p.train, p.queries, first_output)
        found = scores(damped(0.1 * c**2), times, p.train, p.queries, first_output)
        assert_same(found, expected / c, 1e-10)


def _damped(value):
    return uw.Influence(uw.EmpiricalFisher(), uw.solvers.Cholesky(), value)


def _damped_by_layer(value):
    return uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=value, tolerance=0)


def _data(p):
    return uw.as_data(p.train)
