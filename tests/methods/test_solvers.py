"""Every solver on one convex task and on networks: the direct solve's scores, to what it states."""

import warnings

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import problem
from upweight.errors import AssumptionWarning, NotConverged
from upweight.linalg.finite_sum import examples_of, minibatch
from upweight.task.data import as_data

S = uw.solvers


@pytest.fixture(scope="module")
def digits():
    """Softmax regression of scikit-learn's digits at its minimum, penalized; the direct scores."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    X, y = torch.tensor(X / 16.0)[:, 2::4], torch.tensor(y)  # 16 of 64 pixels
    train, queries = (X[:500], y[:500]), (X[500:505], y[500:505])
    model = nn.Linear(16, 10).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-2))

    def loss():
        optimizer.zero_grad()
        penalty = 0.5e-2 * sum(x.square().sum() for x in model.parameters())
        value = nn.functional.cross_entropy(model(train[0]), train[1]) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    direct = uw.Influence(uw.Hessian(), S.Cholesky()).fit(task, train).attribute(queries)
    return task, train, queries, direct.values


@pytest.mark.parametrize(
    "solver, error",
    [
        (S.CG(), 1e-5),
        (S.BlockCG(), 1e-5),
        (S.MINRES(), 1e-5),
        (S.CG(preconditioner=S.Nystrom(40)), 1e-5),
        (S.BlockCG(preconditioner=S.Nystrom(40)), 1e-5),
        (S.CG(preconditioner=uw.EKFAC()), 1e-5),
        (S.Neumann(400, S.Nystrom(80)), 1e-5),
        (S.Neumann(200, uw.EKFAC()), 1e-5),
        (S.Nystrom(170), 1e-8),
        (S.Lanczos(170), 1e-8),
        (S.Lanczos(60), 0.2),
        (S.Nystrom(120), 0.2),
        (S.Neumann(50), 0.3),
    ],
    ids=repr,
)
def test_agrees_with_the_direct_solve(digits, solver, error):
    task, train, queries, direct = digits
    scores = uw.Influence(uw.Hessian(), solver).fit(task, train).attribute(queries)
    assert float((scores.values - direct).norm() / direct.norm()) <= error
    said = scores.provenance.health
    assert said["largest_residual"] <= (1e-6 if error <= 1e-5 else 3 * error)
    is_noted = any("residual" in note for note in scores.provenance.notes)
    assert is_noted == (said["largest_residual"] > 1e-3)


def test_a_residual_that_was_asked_for_is_noted_and_no_warning(digits):
    task, train, queries, _ = digits
    fitted = uw.Influence(uw.GGN(), S.CG(rtol=0.05)).fit(task, train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = fitted.attribute(queries)
        removed = fitted.removal(queries, groups=[[0]], evaluate="plugin")
    assert 1e-3 < scores.provenance.health["largest_residual"] <= 0.05
    for found in (scores, removed):
        (note,) = [note for note in found.provenance.notes if "residual" in note]
        assert "as rtol=0.05 allows" in note
    # One that was not reached is one.
    early = uw.Influence(uw.Hessian(), S.Lanczos(20)).fit(task, train)
    with pytest.warns(AssumptionWarning, match="left with a residual"):
        assert early.attribute(queries).provenance.health["largest_residual"] > 0.05


def test_lissa_is_within_its_errors_of_the_direct_solve(digits):
    task, train, queries, direct = digits
    solver = S.LiSSA(batch=50, depth=150, repeats=3)
    scores = uw.Influence(uw.Hessian(), solver).fit(task, train).attribute(queries)
    said = scores.provenance.health
    error = float((scores.values - direct).norm() / direct.norm())
    assert error <= 4 * said["solver_standard_error"] + said["solver_bias"]
    assert 0.01 < said["solver_standard_error"] < 0.2


CURVATURES = [uw.Hessian(), uw.GGN(), uw.EmpiricalFisher(), uw.Fisher(2)]


@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
@pytest.mark.parametrize("curvature", CURVATURES, ids=repr)
def test_minibatches_of_one_have_the_curvature_as_their_mean(name, curvature):
    p = problem(name)
    A = curvature.fit(p.task, as_data(p.train), p.task.theta())
    n = examples_of(A)
    assert n == p.n
    terms = next(t for t in getattr(A, "terms", (A,)) if hasattr(t, "minibatch"))
    order = iter(range(n))

    class Once(torch.Generator):
        """Draws each example once."""

    def drawn(count, generator):
        first = next(order)
        return torch.tensor([first, *(k for k in range(count) if k != first)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", drawn)
        parts = [terms.minibatch(1, Once()).dense() for _ in range(n)]
    torch.testing.assert_close(torch.stack(parts).mean(dim=0), terms.dense())
    assert minibatch(A, n, torch.Generator()).dense().allclose(A.dense())


def test_lanczos_sees_the_negative_eigenvalues_of_a_hessian():
    p = problem("mlp_tanh")
    eigenvalues = torch.linalg.eigvalsh(
        uw.Hessian().fit(p.task, as_data(p.train), p.task.theta()).dense()
    )
    solver = S.Lanczos(p.task.layout.size)
    fitted = uw.Influence(uw.Hessian(), solver, damping=0.01).fit(p.task, p.train)
    said = fitted.attribute(p.queries).provenance.health
    assert said["solver_smallest_eigenvalue"] == pytest.approx(float(eigenvalues[0]) + 0.01)
    assert said["solver_negative"] == int((eigenvalues + 0.01 < 0).sum())


def test_divergence_reaches_the_user():
    p = problem("mlp_tanh")
    method = uw.Influence(uw.GGN(), S.LiSSA(batch=4, scale=1e-3, depth=50), damping=0.01)
    with pytest.raises(NotConverged, match="spectral radius"):
        method.fit(p.task, p.train).attribute(p.queries)


@pytest.mark.parametrize("preconditioner", [uw.EKFAC(uw.labels.Observed()), S.Nystrom(5)], ids=repr)
def test_removals_with_a_preconditioner(preconditioner):
    p = problem("mlp_tanh")
    solvers = S.Cholesky(), S.CG(rtol=1e-11, preconditioner=preconditioner)
    exact, found = (uw.Influence(uw.GGN(), s, damping=0.05).fit(p.task, p.train) for s in solvers)
    expected = exact.removal(p.queries, groups=[[0, 1], [2]]).values
    torch.testing.assert_close(found.removal(p.queries, groups=[[0, 1], [2]]).values, expected)
