"""Removals that are evaluated, and outputs without each example: against refits."""

import functools

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import upweight as uw
import upweight.adapters.sklearn as sk
from tests.market import names, problem
from tests.reference.retrain import measured, minimize
from upweight.errors import SpecError
from upweight.training.newton import Newton

EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())
# Leaving out an outlier is no small step: each test holds the numbers themselves to refits.
pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")


@functools.cache
def cancer(C):
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    estimator = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(X, y)
    task, train = sk.task(estimator, X, y)
    return EXACT.fit(task, train), torch.as_tensor(y, dtype=torch.float64)


@pytest.mark.parametrize(
    "C, true, plugin, linear", [(1.0, 0.0757, 0.0759, 0.0687), (10.0, 0.1160, 0.1138, 0.0740)]
)
def test_leave_one_out_loss_of_the_cancer_data(C, true, plugin, linear):
    """(1/n) Σᵢ ℓᵢ(θ̂₋ᵢ): with n refits, evaluated at θ̂ + Δθ, and linearised in ℓ."""
    fitted, y = cancer(C)
    task, train, n = fitted.task, fitted.train, len(fitted.train)
    trained = Newton().prepare(task, train)
    batch = task.to_device(train.batch(0, n))
    total, at_once = 0.0, trained.at_once
    for start in range(0, n, at_once):
        rows = range(start, min(start + at_once, n))
        weights = torch.ones(len(rows), n, dtype=torch.float64)
        weights[range(len(rows)), rows] = 0.0
        for i, theta in zip(rows, trained(weights).theta, strict=True):
            total += float(task.losses(theta, batch)[i])
    assert total / n == pytest.approx(true, abs=6e-5)

    found = {
        evaluate: fitted.removal(train, evaluate=evaluate).values.diagonal()
        for evaluate in ("linear", "plugin")
    }
    assert float((fitted.losses + found["linear"]).mean()) == pytest.approx(linear, abs=6e-5)
    assert float((fitted.losses + found["plugin"]).mean()) == pytest.approx(plugin, abs=6e-5)
    # The same without n × n numbers.
    outputs = fitted.loo_outputs()
    assert outputs.shape == (n, 1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="none")
    torch.testing.assert_close(bce, fitted.losses + found["plugin"], rtol=1e-8, atol=1e-10)


def refitted_outputs(p):
    """f₋ᵢ(xᵢ) by n refits."""
    rows = []
    for i in range(p.n):
        weights = torch.ones(p.n, dtype=torch.float64)
        weights[i] = 0.0
        theta = minimize(p.task, p.train, weights, start=p.task.theta())
        rows.append(measured(p.task, theta, lambda f, y: f, p.train)[i])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["ridge", "ridge_two_outputs", "buffers"])
def test_outputs_without_each_example_are_exact_for_quadratic_objectives(name):
    p = problem(name)
    found = EXACT.fit(p.task, p.train).loo_outputs()
    torch.testing.assert_close(found, refitted_outputs(p), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name, limit", [("logistic", 0.5), ("softmax", 0.5), ("poisson", 0.5), ("mlp_tanh", 0.8)]
)
def test_outputs_without_each_example_are_nearer_than_those_with_it(name, limit):
    p = problem(name)
    expected = refitted_outputs(p)
    found = EXACT.fit(p.task, p.train).loo_outputs()
    before = measured(p.task, p.task.theta(), lambda f, y: f, p.train)
    assert found.shape == expected.shape
    error = float((found - expected).norm() / (before - expected).norm())
    assert error < limit, f"{error:.2f} of the whole change"


@pytest.mark.parametrize("name", ["ridge", "logistic_without_bias"])
def test_outputs_by_layer_are_the_same_where_the_layer_is_all_there_is(name):
    """One output: EK-FAC of the expected labels is Σ Λᵢ zᵢzᵢᵀ; with Λ = 1 it is H itself."""
    p = problem(name)
    by_layer = uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.1, tolerance=0)
    dense = uw.Influence(uw.EKFAC(uw.labels.Expected()), uw.solvers.Cholesky(), damping=0.1)
    found = by_layer.fit(p.task, p.train).loo_outputs()
    expected = dense.fit(p.task, p.train).loo_outputs()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", names(without=("float32",)))
def test_plug_in_removals_are_measured_where_the_step_ends(name):
    p = problem(name)
    fitted = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=0.5).fit(p.task, p.train)
    groups = [[0], [p.n - 1]] if p.n > 2 else [[0]]
    found = fitted.removal(p.queries, groups=groups, evaluate="plugin")
    before = measured(p.task, p.task.theta(), p.task.loss, p.queries)
    for column, group in enumerate(groups):
        theta = p.task.theta() + p.task.layout.flatten(fitted.removal_step(group))
        after = measured(p.task, theta, p.task.loss, p.queries)
        torch.testing.assert_close(found.values[:, column], after - before, rtol=1e-9, atol=1e-10)


def test_folds_of_the_digits():
    """A tenth of the data at a time: one Newton step each, against the minima without them."""
    X, y = load_digits(return_X_y=True)
    X, y = X[::3] / 16, y[::3]
    estimator = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(X, y)
    task, train = sk.task(estimator, X, y)
    n = len(train)
    folds = [list(range(k, n, 10)) for k in (0, 1)]
    fitted = EXACT.fit(task, train)
    weights = torch.ones(2, n, dtype=torch.float64)
    for k, fold in enumerate(folds):
        weights[k, fold] = 0.0
    theta = Newton().prepare(task, train)(weights).theta
    moved = theta - task.theta()
    steps = torch.stack([task.layout.flatten(fitted.removal_step(fold)) for fold in folds])
    assert float((steps - moved).norm() / moved.norm()) < 0.05
    # The larger side of min(|U| c, p) gives the same step as the smaller.
    linear = fitted.scorer.linear_removals
    some = folds[0][: task.layout.size // 10 - 1]
    assert not linear._is_larger_than_theta(some)
    torch.testing.assert_close(
        linear.step(some), linear._step_in_parameters(some), rtol=1e-8, atol=1e-10
    )
    queries = train.subset(range(50))
    batch = task.to_device(queries.batch(0, 50))
    change = torch.stack(
        [task.losses(t, batch) - task.losses(task.theta(), batch) for t in theta], dim=1
    )
    plugin = fitted.removal(queries, groups=folds, evaluate="plugin").values
    assert float((plugin - change).norm() / change.norm()) < 0.05


def test_outputs_without_each_example_take_no_memory_of_n_by_n():
    """n = 4000 would be 128 MB; the leverage blocks of all are n c²."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.untyped_storage().nbytes() // 8)
            return out

    n = 4000
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, 6, generator=g, dtype=torch.float64)
    model = torch.nn.Linear(6, 1).double()
    task = uw.Task(model, uw.SquaredError(), uw.L2(0.1))
    for method in (EXACT, uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.1)):
        fitted = method.fit(task, (X, X[:, :1]))
        with Largest() as largest:
            fitted.loo_outputs()
        assert largest.numbers < n * n / 50


def test_leverage_of_the_others_curvature_is_below_one_and_the_same_where_it_is_theirs():
    X = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None] ** torch.arange(3)
    y = X[:, 1:2] + 0.1 * X[:, 2:]
    task = uw.Task(torch.nn.Linear(3, 1, bias=False).double(), uw.SquaredError(), uw.L2(0.1))
    own = uw.Influence(uw.Hessian()).fit(task, (X, y))
    H = X.T @ X / 7 + 0.1 * torch.eye(3, dtype=torch.float64)
    for i in range(7):
        x = X[i]
        h = x @ torch.linalg.solve(H, x) / 7
        torch.testing.assert_close(own.leverage()[i], h)
        without = x @ torch.linalg.solve(H - torch.outer(x, x) / 7, x) / 7
        torch.testing.assert_close(without / (1 + without), h)
    taken = x @ torch.linalg.solve(H, x) / 7
    torch.testing.assert_close(own.leverage("others")[6], taken / (1 + taken))


def test_a_jacobian_that_memory_cannot_hold_is_refused_before_it_is_formed(monkeypatch):
    p = problem("mlp_tanh")
    fitted = uw.Influence(uw.GGN(), uw.solvers.CG(), damping=0.1).fit(p.task, p.train)
    monkeypatch.setattr("upweight.runtime.memory.free_bytes", lambda device: 100)
    with pytest.raises(SpecError, match="the Jacobian of one example") as refused:
        fitted.loo_outputs()
    monkeypatch.undo()
    assert "removal(queries, groups=[[0]])" in str(refused.value)
    assert fitted.removal(p.queries, groups=[[0]]).values.isfinite().all()
