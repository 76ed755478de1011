"""φ(θ̂(w), w): both parts of dφ/dw, by every curvature, reducer and removal, against refits.

A refit here is Newton's method with the weighted Hessian written out (`tests.reference.retrain`).
"""

import functools

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, problem, train_in_place
from tests.reference.retrain import minimize, weight_derivative
from upweight.errors import (
    AssumptionWarning,
    NonDeterministic,
    NonFinite,
    NotDifferentiable,
    NotOffered,
    ScalarLoss,
    SpecError,
)
from upweight.task.data import as_data

N = 24


@functools.cache
def data(kind):
    g = torch.Generator().manual_seed(4)
    X = torch.cat([torch.ones(N, 1, dtype=torch.float64), draw(g, N, 2)], dim=1)
    noise = draw(g, N, 1) * (0.3 + X[:, 1:2].abs())
    f = X @ torch.tensor([[0.3], [1.0], [-0.7]], dtype=torch.float64)
    return X, f + noise if kind == "ols" else (f + 2 * noise > 0).double()


@functools.cache
def task(kind):
    loss = {"ols": uw.SquaredError(), "logistic": uw.Bernoulli()}[kind]
    made = uw.Task(nn.Linear(3, 1, bias=False).double(), loss)
    train_in_place(made, data(kind))
    return made


def robust(kind, hc):
    """The standard errors of θ̂ by the sandwich (XᵀWΛX)⁻¹ (Σ wᵢ rᵢ² xᵢxᵢᵀ) (XᵀWΛX)⁻¹."""

    def errors(task, params, queries, weights):
        X, y = data(kind)
        f = X @ params["weight"].T
        mean = f if kind == "ols" else f.sigmoid()
        slope = torch.ones_like(f) if kind == "ols" else mean * (1 - mean)
        bread = torch.linalg.inv(X.T @ (weights[:, None] * slope * X))
        meat = X.T @ (weights[:, None] * (mean - y) ** 2 * X)
        scale = weights.sum() / (weights.sum() - 3) if hc == 1 else 1.0
        return (scale * (bread @ meat @ bread).diagonal()).sqrt()

    return uw.Functional(errors)


def on_queries(task, params, queries, weights):
    """A number of all queries together, and one of the weights too."""
    losses = task.losses(params, queries)
    return torch.stack([losses.logsumexp(dim=0), (weights.square().sum() * losses).prod().log()])


QUERIES = (draw(torch.Generator().manual_seed(9), 5, 3), torch.ones(5, 1, dtype=torch.float64))
ASKED = {
    "coefficient": (lambda kind: uw.Coefficient("weight[0, 1]"), None),
    "coefficients": (lambda kind: uw.Coefficient("weight"), None),
    "HC0": (lambda kind: robust(kind, 0), None),
    "HC1": (lambda kind: robust(kind, 1), None),
    "queries": (lambda kind: uw.Functional(on_queries), QUERIES),
}
EXACT = {
    "Hessian": uw.Influence(uw.Hessian(), uw.solvers.Cholesky()),
    "GGN": uw.Influence(uw.GGN(), uw.solvers.Cholesky()),
}
KINDS = ["ols", "logistic"]


def value(functional, kind, theta, weights, queries):
    made = task(kind)
    found = functional(made, made.named(theta), queries, weights)
    return found.detach().reshape(-1)


def refitted(functional, kind, weights, queries):
    """φ(θ̂(w), w)."""
    made = task(kind)
    theta = minimize(made, data(kind), weights, start=made.theta())
    return value(functional, kind, theta, weights, queries)


@functools.cache
def truth(name, kind):
    """dφ/dwᵢ by central differences of refits."""
    make, queries = ASKED[name]
    columns = [
        weight_derivative(lambda w: refitted(make(kind), kind, w, queries), N, i) for i in range(N)
    ]
    return torch.stack(columns, dim=1)


def close(found, expected, tolerance):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("method", EXACT)
def test_the_derivative_in_the_weights(method, name, kind):
    make, queries = ASKED[name]
    scores = EXACT[method].fit(task(kind), data(kind)).attribute(queries, make(kind))
    assert scores.values.shape == truth(name, kind).shape
    assert scores.unit is uw.Unit.DERIVATIVE and scores.provenance.measure == repr(make(kind))
    close(scores.values, truth(name, kind), 1e-7)


@pytest.mark.parametrize("name", ASKED)
def test_by_layer_where_that_is_exact(name):
    """One output and Λ = 1: H = XᵀX/n is the factor of the inputs itself."""
    make, queries = ASKED[name]
    method = uw.Influence(uw.EKFAC(uw.labels.Expected()), tolerance=0)
    scores = method.fit(task("ols"), data("ols")).attribute(queries, make("ols"))
    close(scores.values, truth(name, "ols"), 1e-7)


def test_the_part_of_the_weights_themselves_is_not_small():
    """The tests above can fail: without ∂φ/∂w a standard error is off by more than half."""
    functional = uw.Functional(lambda t, p, q, w: robust("ols", 0)(t, p, q, w.detach()))
    fitted = EXACT["GGN"].fit(task("ols"), data("ols"))
    expected = truth("HC0", "ols")
    found = fitted.attribute(None, functional).values
    assert float((found - expected).norm() / expected.norm()) > 0.5


# -- reducers -------------------------------------------------------------------------------------

FLOORS = {
    "dense": uw.Influence(uw.GGN(), uw.solvers.Cholesky()),
    "layered": uw.Influence(uw.EKFAC(uw.labels.Expected()), tolerance=0, damping=0.1),
}


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("name", ["coefficients", "HC1", "queries"])
def test_every_reducer(name, floor, tmp_path):
    make, queries = ASKED[name]
    functional = make("logistic")
    fitted = FLOORS[floor].fit(task("logistic"), data("logistic"))
    matrix = fitted.attribute(queries, functional).values

    top = fitted.attribute(queries, functional, into=uw.Top(3))
    torch.testing.assert_close(top.raises_by, matrix.topk(3, dim=1).values, rtol=1e-12, atol=0)
    assert torch.equal(top.lowers, matrix.topk(3, dim=1, largest=False).indices)
    labels = [i % 3 for i in range(N)]
    sums = fitted.attribute(queries, functional, into=uw.GroupSums(labels)).values
    by_hand = torch.stack([matrix[:, k::3].sum(dim=1) for k in range(3)], dim=1)
    close(sums, by_hand, 1e-12)
    shards = fitted.attribute(queries, functional, into=uw.Shards(tmp_path))
    assert torch.equal(uw.Scores.load(tmp_path).values, matrix)
    assert torch.equal(shards.row(1), matrix[1])
    parts = fitted.attribute(queries, functional, into=uw.PerLayer())
    close(sum(part.values for part in parts.values()), matrix, 1e-12)


def test_what_goes_through_no_layer_has_its_own_share():
    fitted = FLOORS["dense"].fit(task("ols"), data("ols"))
    parts = fitted.attribute(None, robust("ols", 0), into=uw.PerLayer())
    layers = set(fitted.attribute(None, uw.Coefficient(0), into=uw.PerLayer()))
    assert set(parts) == layers | {"∂φ/∂w"}
    through = uw.Functional(lambda t, p, q, w: robust("ols", 0)(t, p, q, w.detach()))
    expected = fitted.attribute(None, through).values
    (layer,) = layers
    torch.testing.assert_close(parts[layer].values, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "method", [uw.Influence(uw.GGN(), damping=0.1), uw.Influence(uw.EKFAC(), damping=0.1)]
)
def test_positions_and_the_weights_add_up(method):
    p = problem("tied")
    n = p.n

    def loss(task, params, queries, weights):
        tilt = torch.arange(n, dtype=weights.dtype)
        return task.losses(params, queries).mean() + (weights * tilt).sum() / 7

    fitted = method.fit(p.task, p.train)
    matrix = fitted.attribute(p.queries, uw.Functional(loss)).values
    found = fitted.attribute(p.queries, uw.Functional(loss), into=uw.PerToken([4, 0]))
    torch.testing.assert_close(
        found.shares.sum(2) + found.rest, matrix[:, [4, 0]], rtol=1e-2, atol=1e-4
    )


# -- removals -------------------------------------------------------------------------------------

GROUPS = [[0], [3, 1], [2, 5, 4, 6]]


def without(functional, kind, group, queries):
    """φ(θ̂(w), w) − φ(θ̂, 1) with w = 0 on the group."""
    weights = torch.ones(N, dtype=torch.float64)
    after = weights.clone()
    after[group] = 0.0
    before = value(functional, kind, task(kind).theta(), weights, queries)
    return refitted(functional, kind, after, queries) - before


@pytest.mark.parametrize("method", ["dense", "layered"])
@pytest.mark.parametrize("name", ["coefficients", "HC0"])
def test_removals_of_least_squares_are_exact(name, method):
    """J is quadratic: θ̂ + Δθ is the refit, and φ is measured there with the weights themselves."""
    make, queries = ASKED[name]
    fitted = FLOORS[method].fit(task("ols"), data("ols")) if method == "dense" else None
    if fitted is None:  # by layer to first order only: far nearer than no removal, and said so
        fitted = uw.Influence(uw.EKFAC(uw.labels.Expected())).fit(task("ols"), data("ols"))
    found = fitted.removal(queries, make("ols"), GROUPS, evaluate="plugin")
    expected = torch.stack([without(make("ols"), "ols", g, queries) for g in GROUPS], dim=1)
    assert found.how == "plug-in"
    if method == "dense":
        close(found.values, expected, 1e-10)
    else:
        assert any("to first order" in note for note in found.provenance.notes)
        error = (found.values - expected).norm(dim=0) / expected.norm(dim=0)
        assert float(error[0]) < 0.2 and float(error.max()) < 0.5


@pytest.mark.parametrize("name", ["HC0", "queries"])
def test_a_linear_removal_says_where_it_is_not_and_the_way_out_works(name):
    """An outlier takes its own residual out of the standard error: far from linear in Δθ and w."""
    make, queries = ASKED[name]
    fitted = EXACT["Hessian"].fit(task("ols"), data("ols"))
    with pytest.warns(AssumptionWarning, match='not linear over the step.*evaluate="plugin"'):
        found = fitted.removal(queries, make("ols")).values
    expected = torch.stack([without(make("ols"), "ols", [i], queries) for i in range(N)], dim=1)
    assert float((found - expected).norm() / expected.norm()) > 1
    close(fitted.removal(queries, make("ols"), evaluate="plugin").values, expected, 1e-9)


def test_linear_removals_hold_both_parts():
    """With weights ½ in place of 0 nothing is far: −Σ S is what a refit does to second order."""
    functional, kind = robust("ols", 0), "ols"
    scores = EXACT["GGN"].fit(task(kind), data(kind)).attribute(None, functional)
    for h in (0.1, 0.05):
        weights = torch.ones(N, dtype=torch.float64)
        weights[5] -= h
        before = value(functional, kind, task(kind).theta(), torch.ones_like(weights), None)
        change = refitted(functional, kind, weights, None) - before
        error = float((change + h * scores.values[:, 5]).norm() / change.norm())
        assert error < 0.8 * h


def test_linear_removal_of_a_coefficient_is_exact_for_least_squares():
    fitted = EXACT["GGN"].fit(task("ols"), data("ols"))
    found = fitted.removal(None, uw.Coefficient("weight"), GROUPS).values
    expected = torch.stack(
        [without(uw.Coefficient("weight"), "ols", g, None) for g in GROUPS], dim=1
    )
    close(found, expected, 1e-10)


# -- what is refused, and the way out -------------------------------------------------------------


def fitted_ols():
    return EXACT["GGN"].fit(task("ols"), data("ols"))


def squared(task, params):
    return params["weight"].reshape(-1).square()


REFUSED = {
    "a matrix": (
        lambda t, p, q, w: p["weight"],
        ScalarLoss,
        "shape [k]",
        lambda t, p, q, w: p["weight"].reshape(-1),
    ),
    "a number of Python's": (
        lambda t, p, q, w: squared(t, p).sum().item(),
        ScalarLoss,
        "by operations of PyTorch",
        lambda t, p, q, w: squared(t, p).sum(),
    ),
    "nothing": (
        lambda t, p, q, w: squared(t, p)[:0],
        ScalarLoss,
        "shape [k]",
        lambda t, p, q, w: squared(t, p),
    ),
    "a constant": (
        lambda t, p, q, w: torch.tensor(3.0),
        NotDifferentiable,
        "from `params`",
        lambda t, p, q, w: 3.0 * squared(t, p).sum(),
    ),
    "a count": (
        lambda t, p, q, w: (p["weight"] > 0).double().sum(),
        NotDifferentiable,
        "smooth values",
        lambda t, p, q, w: p["weight"].sigmoid().sum(),
    ),
    "parameters of the model": (
        lambda t, p, q, w: t.model.weight.sum(),
        NotDifferentiable,
        "from `params`",
        lambda t, p, q, w: p["weight"].sum(),
    ),
    "not a number": (
        lambda t, p, q, w: (-squared(t, p)).sqrt().sum(),
        NonFinite,
        "finite at these parameters",
        lambda t, p, q, w: squared(t, p).sqrt().sum(),
    ),
    "an infinite derivative": (
        lambda t, p, q, w: (squared(t, p) - squared(t, p).detach()).sum().sqrt(),
        NonFinite,
        "finite at these parameters",
        lambda t, p, q, w: squared(t, p).sum().sqrt(),
    ),
    "a random draw": (
        lambda t, p, q, w: (squared(t, p) * torch.rand(3)).sum(),
        NonDeterministic,
        "seeds itself",
        lambda t, p, q, w: (
            squared(t, p) * torch.rand(3, generator=torch.Generator().manual_seed(0))
        ).sum(),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_the_way_out(name):
    function, kind, way_out, instead = REFUSED[name]
    with pytest.raises(kind) as caught:
        fitted_ols().attribute(None, uw.Functional(function))
    assert way_out in str(caught.value).split("Way out: ")[1]
    assert bool(fitted_ols().attribute(None, uw.Functional(instead)).values.any())


def test_an_unknown_coefficient_names_those_there_are():
    assert uw.Coefficient(0) == uw.Coefficient(0) != uw.Coefficient(1)
    for which in ("slope", 3, "weight[0, 9]", "weight[x]"):
        with pytest.raises(SpecError, match=r"Coefficient\('weight\[0, 0\]'\)"):
            fitted_ols().attribute(None, uw.Coefficient(which))
    last = fitted_ols().attribute(None, uw.Coefficient(-1)).values
    torch.testing.assert_close(
        last, fitted_ols().attribute(None, uw.Coefficient("weight[0, 2]")).values
    )


def test_methods_that_only_rank_have_nothing_to_add_the_weights_to():
    fitted = uw.GradientDot().fit(task("ols"), data("ols"))
    ranks = fitted.attribute(None, uw.Coefficient("weight")).values
    X, y = data("ols")
    gradients = (X @ task("ols").theta()[:, None] - y) * X
    torch.testing.assert_close(ranks, -gradients.T / N, rtol=1e-12, atol=1e-14)
    with pytest.raises(NotOffered, match="Influence"):
        fitted.attribute(None, robust("ols", 0))


def test_changed_inputs_and_labels_ask_of_theta_alone():
    fitted, label = fitted_ols(), torch.zeros(1, dtype=torch.float64)
    for ask in (
        lambda phi: fitted.relabel_influence(0, label, None, phi),
        lambda phi: fitted.input_influence(0, None, phi),
    ):
        with pytest.raises(NotOffered, match=r"Coefficient\(0\)"):
            ask(robust("ols", 0))
        assert bool(ask(uw.Coefficient(0)).any())


def test_relabeling_moves_a_coefficient_as_a_refit_does():
    """Least squares is linear in its labels: to first order exact, up to the rest's own Δ."""
    X, y = data("ols")
    changed = y.clone()
    changed[3] = 5.0
    made = uw.Task(nn.Linear(3, 1, bias=False).double(), uw.SquaredError())
    train_in_place(made, (X, changed))
    found = fitted_ols().relabel_influence(
        3, torch.tensor([5.0], dtype=torch.float64), None, uw.Coefficient("weight")
    )
    close(found, made.theta() - task("ols").theta(), 1e-10)


def test_the_model_is_lent():
    p = problem("softmax")
    before = p.task.theta()
    uw.Influence(uw.GGN(), uw.solvers.Cholesky()).fit(p.task, as_data(p.train)).removal(
        None, uw.Coefficient(0), [[0]], evaluate="plugin"
    )
    assert torch.equal(p.task.theta(), before)


# -- measures that are functionals ----------------------------------------------------------------


@pytest.mark.parametrize(
    "measure",
    [
        lambda task, params, batch: params["weight"].reshape(-1)[:3],
        lambda task, params, batch: params["weight"].reshape(-1)[: len(batch[0])],
        lambda task, params, batch: params["weight"][0, 0].expand(len(batch[0])),
    ],
    ids=["as many as queries", "a slice by the batch", "repeated"],
)
def test_a_measure_that_ignores_its_batch_is_sent_to_functionals(measure):
    queries = tuple(x[:3] for x in QUERIES)
    with pytest.raises((ScalarLoss, NonDeterministic)) as caught:
        fitted_ols().attribute(queries, measure)
    if isinstance(caught.value, ScalarLoss):
        assert "Functional" in str(caught.value) and "Coefficient" in str(caught.value)
    found = fitted_ols().attribute(None, uw.Coefficient("weight")).values
    close(found, truth("coefficients", "ols"), 1e-7)


def test_one_value_for_all_queries_may_be_their_own():
    """A measure that is 0 or the same number for some queries at this θ is none of the model's."""
    x = draw(torch.Generator().manual_seed(2), 2, 3)
    queries = (torch.cat([x, -x]), torch.zeros(4, 1, dtype=torch.float64))
    found = fitted_ols().attribute(
        queries,
        lambda task, params, batch: (
            task.losses(params, batch) - task.losses(params, batch).detach()
        ),
    )
    assert bool(found.values.any(dim=1).all())
    same = (x[:1].expand(3, 3), torch.zeros(3, 1, dtype=torch.float64))
    rows = fitted_ols().attribute(same, lambda task, params, batch: task.losses(params, batch))
    assert torch.equal(rows.values[0], rows.values[1])
