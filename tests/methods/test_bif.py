"""BIF on a Gaussian posterior: the covariance that its sampler has, and influence in the limit."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import assert_same
from upweight.errors import DtypeError, NotConverged, NotOffered, SpecError
from upweight.testing import check_method
from upweight.testing.problems import ridge

pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")
LAM, GAMMA, B, STEP = 0.1, 5.0, 60.0, 0.012
OUTPUT = uw.Logit(0)


def regression(n=12):
    """Ridge regression at its minimum; H by hand."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, 2, generator=g, dtype=torch.float64)
    y = torch.randn(n, 1, generator=g, dtype=torch.float64)
    H = X.T @ X / n + LAM * torch.eye(2, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(H, X.T @ y / n).T)
    return uw.Task(model, uw.SquaredError(), uw.L2(LAM)), (X, y), H


def by_hand(task, train, H, step):
    """−(B/n) gᵢᵀ Σ ∇m of the stationary distribution of steps ε: Σ = [A (I − εA/4)]⁻¹."""
    X, y = train
    A = B * H + GAMMA * torch.eye(2, dtype=torch.float64)
    covariance = torch.linalg.inv(A @ (torch.eye(2, dtype=torch.float64) - step * A / 4))
    with torch.no_grad():
        g = (task.model(X) - y) * X
    return -(B / len(X)) * X[:3] @ covariance @ g.T


def test_the_limit_of_small_steps_is_influence():
    task, train, H = regression()
    exact = uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), damping=GAMMA / B).fit(task, train)
    queries = (train[0][:3], train[1][:3])
    expected = exact.attribute(queries, OUTPUT).values
    assert_same(by_hand(task, train, H, 0.0), expected, 1e-10)


@pytest.mark.parametrize("rmsprop", [None, 0.9])
def test_draws_have_the_covariance_of_the_sampler(rmsprop):
    task, train, H = regression()
    method = uw.BIF(STEP, GAMMA, B, draws=60, chains=6, burn_in=12, thinning=3, rmsprop=rmsprop)
    scores = method.fit(task, train).attribute((train[0][:3], train[1][:3]), OUTPUT)
    expected = by_hand(task, train, H, STEP)
    error = scores.provenance.health["standard_error_over_chains"]
    gaps = (scores.values - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0.01 < error < 0.2
    assert float(gaps.max()) < 4 * error
    # Noise of single scores is large; their common factor is known better.
    slope = float((scores.values * expected).sum() / expected.square().sum())
    assert abs(slope - 1) < 0.2
    assert scores.provenance.health["damping"] == pytest.approx(GAMMA / B)
    assert any("MiB" in note for note in scores.provenance.notes)


LAWS = list(
    check_method(
        uw.BIF(0.002, 1.0, 20.0, draws=4, chains=2, burn_in=2, thinning=1),
        problems=[ridge()],
        damped=True,
    )
)


@pytest.mark.parametrize("law", [law for _, law in LAWS], ids=[name for name, _ in LAWS])
def test_laws(law):
    law()


def test_minibatches_and_seeds():
    task, train, _ = regression()

    def made(seed):
        method = uw.BIF(0.001, 1.0, draws=3, chains=1, burn_in=0, thinning=1, batch=5, seed=seed)
        return method.fit(task, train).attribute(train)

    first = made(0)
    assert torch.equal(first.values, made(0).values)
    assert not torch.equal(first.values, made(1).values)
    assert "one chain: no standard error" in first.provenance.notes


def test_divergence_and_refusals():
    task, train, H = regression()
    beyond = 4.2 / float(torch.linalg.eigvalsh(B * H)[-1])
    with pytest.raises(NotConverged, match=r"(?s)chain 0.*a step well below"):
        uw.BIF(beyond, 0.0, B, draws=200, chains=1, burn_in=0).fit(task, train)
    for wrong in ({"draws": 1}, {"chains": 0}, {"rmsprop": 1.0}, {"batch": 0}):
        with pytest.raises(SpecError, match="BIF needs"):
            uw.BIF(0.01, 1.0, **wrong)
    half = uw.Task(nn.Linear(2, 1).bfloat16().eval(), uw.SquaredError())
    with pytest.raises(DtypeError, match="half precision"):
        uw.BIF(0.01, 1.0).fit(half, tuple(x.bfloat16() for x in train))
    fitted = uw.BIF(0.001, 1.0, draws=2, chains=1, burn_in=0, thinning=1).fit(task, train)
    with pytest.raises(NotOffered):
        fitted.attribute(train, into=uw.PerLayer())
