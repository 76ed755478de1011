"""An estimator and a curvature as somebody else would write them: one class each."""

from dataclasses import dataclass

import pytest
import torch

import upweight as uw
from tests.market import names, problem
from tests.reference import dense
from upweight.linalg import DiagonalMatrix
from upweight.methods.method import Method
from upweight.methods.points import Identity, PointMethod
from upweight.methods.scorer import BlockScorer
from upweight.task.point import Point
from upweight.testing import check_method

# -- an estimator that is not of the formula: 8 lines ---------------------------------------------


@dataclass(frozen=True)
class LossKernel(Method):
    """S[q, i] = −m_q ℓᵢ: the product of two numbers, which ranks."""

    unit = uw.Unit.RANK

    def prepare(self, fitting):
        task, losses = fitting.task, fitting.checked_losses()

        def score(queries, measure, start, stop):
            batch = task.to_device(queries.batch(0, len(queries)))
            values = measure(task, task.named(fitting.theta), batch).detach()
            return -values[:, None] * losses[None, start:stop]

        return BlockScorer(score, at_once=5, diagonal=lambda: -losses.square())


# -- an estimator of the formula: 6 lines ---------------------------------------------------------


@dataclass(frozen=True)
class TwoPoints(PointMethod):
    """The gradient product at θ̂ and half as much of it at 0.9 θ̂."""

    unit = uw.Unit.RANK
    preconditioner = Identity()

    def points(self, fitting):
        return [Point(fitting.theta), Point(0.9 * fitting.theta, 0.5)]


# -- a curvature: 7 lines -------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanSquare:
    """diag((1/n) Σ gᵢ²): what Adam divides by the root of."""

    def fit(self, task, data, theta, *, n=None):
        batches = [task.to_device(data.batch(i, i + 1)) for i in range(len(data))]
        rows = [
            torch.func.grad(lambda t, one=one: task.losses(t, one).sum())(theta) for one in batches
        ]
        return DiagonalMatrix(torch.stack(rows).square().sum(dim=0) / (n or len(data)))


METHODS = [
    (LossKernel(), {}),
    (TwoPoints(), {"rtol": 1e-10}),
    (uw.Influence(MeanSquare(), uw.solvers.Cholesky(), 0.1), {"damped": True, "rtol": 1e-10}),
]


def checks():
    for method, promises in METHODS:
        for name, check in check_method(method, **promises):
            yield pytest.param(check, id=f"{type(method).__name__}: {name}")


@pytest.mark.parametrize("check", list(checks()))
def test_laws(check):
    check()


@pytest.mark.parametrize("method", [m for m, _ in METHODS], ids=lambda m: type(m).__name__)
def test_every_reducer_and_verb_without_another_line(method, tmp_path):
    p = problem("softmax")
    fitted = method.fit(p.task, p.train)
    scores = fitted.attribute(p.queries)
    assert scores.values.shape == (5, p.n) and scores.unit is method.unit
    top = fitted.attribute(p.queries, into=uw.Top(3))
    assert torch.equal(top.raises_by, scores.values.topk(3, dim=1).values)
    sums = fitted.attribute(p.queries, into=uw.GroupSums([i % 2 for i in range(p.n)]))
    torch.testing.assert_close(sums.values[:, 0], scores.values[:, ::2].sum(dim=1))
    fitted.attribute(p.queries, into=uw.Shards(tmp_path))
    assert torch.equal(uw.Scores.load(tmp_path).values, scores.values)
    for verb in ("removal_step", "loo_outputs", "parameter_influence"):
        arguments = {"removal_step": ([0],), "parameter_influence": (0,)}.get(verb, ())
        if method.unit is uw.Unit.RANK:
            with pytest.raises(uw.errors.NotOffered, match="Way out"):
                getattr(fitted, verb)(*arguments)
        else:
            getattr(fitted, verb)(*arguments)


@pytest.mark.parametrize("name", names("linear", without=("float32",)))
def test_the_curvature_is_what_it_says(name):
    p = problem(name)
    g = dense.gradients(p.task, p.train)
    m = dense.measure_gradients(p.task, p.task.loss, p.queries)
    expected = -(m / (g.square().mean(dim=0) + 0.1)) @ g.T / p.n
    found = uw.Influence(MeanSquare(), uw.solvers.Cholesky(), 0.1).fit(p.task, p.train)
    torch.testing.assert_close(found.attribute(p.queries).values, expected, rtol=1e-9, atol=1e-11)


def test_the_points_are_added_up():
    p = problem("mlp_tanh")
    found = TwoPoints().fit(p.task, p.train).attribute(p.queries).values
    expected = 0.0
    for point in TwoPoints().points(uw.GradientDot().fit(p.task, p.train)):
        moved = p.task.moved_to(point.theta)
        g = dense.gradients(moved, p.train)
        m = dense.measure_gradients(moved, moved.loss, p.queries)
        expected = expected - point.weight * (m @ g.T) / p.n
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
