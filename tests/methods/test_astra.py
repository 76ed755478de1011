"""ASTRA against the factorization: all data in a batch to 1e-6, minibatches within their error."""

import pytest
import torch

import upweight as uw
from tests.laws.subjects import assert_same
from tests.market import problem
from upweight.errors import DtypeError, NotConverged, NotPositiveDefinite, SpecError
from upweight.testing import check_method
from upweight.testing.problems import ridge

EKFAC = uw.EKFAC(uw.labels.Expected())
pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")


def exact(p, lam):
    found = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=lam).fit(p.task, p.train)
    return found.attribute(p.queries).values


@pytest.mark.parametrize("name", ["mlp_tanh", "softmax"])
def test_all_data_in_a_batch(name):
    p, lam = problem(name), 0.3
    fitted = uw.ASTRA(lam, EKFAC, epochs=60, batch=None).fit(p.task, p.train)
    scores = fitted.attribute(p.queries)
    assert_same(scores.values, exact(p, lam), 1e-6)
    health = scores.provenance.health
    assert health["residual"] < 1e-6 and health["standard_error"] == 0
    told = next(fact for fact in scores.provenance.facts if fact.name == "Solver")
    assert "residual" in told.meaning


def test_minibatches_within_their_standard_error():
    p, lam = problem("softmax"), 0.3
    method = uw.ASTRA(lam, EKFAC, epochs=60, batch=7, averaged=0.8, seed=1)
    scores = method.fit(p.task, p.train).attribute(p.queries)
    expected, health = exact(p, lam), scores.provenance.health
    gaps = (scores.values - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < health["standard_error"] < 0.05
    assert float(gaps.max()) < 4 * health["standard_error"]
    assert 0 < health["residual"] < 0.1


def test_the_first_step_is_ekfac():
    p = problem("mlp_tanh")
    made = uw.ASTRA(0.2, EKFAC, epochs=1, batch=None, step=1.0).fit(p.task, p.train)
    layered = uw.Influence(EKFAC, damping=0.2, tolerance=0).fit(p.task, p.train)
    assert_same(made.attribute(p.queries).values, layered.attribute(p.queries).values, 1e-10)


LAWS = list(
    check_method(
        uw.ASTRA(0.5, EKFAC, epochs=25, batch=None),
        problems=[ridge()],
        damped=True,
        rtol=1e-7,
    )
)


@pytest.mark.parametrize("law", [law for _, law in LAWS], ids=[name for name, _ in LAWS])
def test_laws(law):
    law()


def test_queries_share_minibatches():
    p = problem("softmax")
    fitted = uw.ASTRA(0.3, EKFAC, epochs=2, batch=5).fit(p.task, p.train)
    both = fitted.attribute(p.queries).values
    X, y = p.queries
    assert_same(fitted.attribute((X[1:2], y[1:2])).values, both[1:2], 1e-12)


def test_divergence_is_an_error_with_a_way_out():
    p = problem("mlp_tanh")
    fitted = uw.ASTRA(0.1, EKFAC, epochs=5, batch=6, step=50.0).fit(p.task, p.train)
    with pytest.raises(NotConverged, match=r"(?s)step of 50.*leave the step out"):
        fitted.attribute(p.queries)


def test_refusals():
    p = problem("softmax")
    for wrong in ({"epochs": 0}, {"batch": 0}, {"averaged": 0.0}, {"step": -1.0}):
        with pytest.raises(SpecError, match="ASTRA needs"):
            uw.ASTRA(0.1, **wrong)
    with pytest.raises(SpecError, match="by layer"):
        uw.ASTRA(0.1, uw.GGN())
    own = uw.Task(p.task.model, lambda f, y: (f.square().sum(dim=1) - y).square())
    with pytest.raises(NotPositiveDefinite, match="not known to be convex"):
        uw.ASTRA(0.1).fit(own, p.train)
    half = uw.Task(torch.nn.Linear(4, 3).bfloat16().eval(), uw.CrossEntropy())
    with pytest.raises(DtypeError, match="half precision"):
        uw.ASTRA(0.1).fit(half, (torch.ones(6, 4).bfloat16(), torch.arange(6) % 3))


def test_one_example_and_a_group():
    p = problem("softmax")
    X, y = p.train
    one = uw.ASTRA(0.3, EKFAC, epochs=100).fit(p.task, (X[:1], y[:1]))
    dense = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=0.3).fit(p.task, (X[:1], y[:1]))
    assert_same(one.attribute(p.queries).values, dense.attribute(p.queries).values, 1e-5)
    fitted = uw.ASTRA(0.3, EKFAC, epochs=3, batch=None).fit(p.task, p.train)
    removed = fitted.removal(p.queries, groups=[[0, 3]]).values[:, 0]
    assert_same(removed, -fitted.attribute(p.queries).values[:, [0, 3]].sum(dim=1), 1e-10)
