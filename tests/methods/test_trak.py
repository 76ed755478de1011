"""TRAK: least squares on gradients, against Influence where both are exact, and the paper."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, problem
from upweight.errors import SpecError, StaleStore, UnsupportedModel
from upweight.gradients.source import Direct
from upweight.task.data import as_data
from upweight.task.measures import as_measure

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def rows(task, theta, given, measure):
    """∇m of every example by `torch.func`, [n, p]."""
    data, measure = as_data(given), as_measure(measure)
    function = lambda params, batch: measure(task, params, batch)  # noqa: E731
    return Direct(task, theta, function).rows(task.to_device(data.batch(0, len(data))), len(data))


def classifier(seed, classes=3, width=4):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, classes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(g, *p.shape))
    return model


G = torch.Generator().manual_seed(7)
TRAIN = (draw(G, 13, 5), torch.arange(13) % 3)
QUERIES = (draw(G, 4, 5), torch.arange(4) % 3)


@pytest.mark.parametrize("dim", [None, 4, 1000])
def test_of_least_squares_it_is_influence(dim):
    """f is linear in θ and ∂²ℓ/∂f² = 1, so that ΦᵀΦ/n is H."""
    g = torch.Generator().manual_seed(0)
    X, Y = draw(g, 20, 3), draw(g, 20, 1)
    task = uw.Task(nn.Linear(3, 1).double(), uw.SquaredError())
    found = uw.TRAK(dim=dim, damping=0.02).fit(task, (X, Y))
    exact = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=0.02).fit(task, (X, Y))
    for measure in (uw.Loss(), uw.Logit(0), uw.Coefficient(1)):
        one, other = (f.attribute((X[:5], Y[:5]), measure).values for f in (found, exact))
        torch.testing.assert_close(one, other, **TOLERANCE)
    torch.testing.assert_close(found.self_influence(), exact.self_influence(), **TOLERANCE)


def test_of_a_logistic_regression_it_is_influence_times_the_curvature_of_the_loss():
    """At θ = 0, ∂²ℓ/∂f² = p (1 − p) = 1/4 for all examples: H = ΦᵀΦ/(4 n), S = 4 TRAK."""
    g = torch.Generator().manual_seed(0)
    X, y = draw(g, 20, 3), (torch.arange(20) % 2).double()[:, None]
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    task = uw.Task(model, uw.Bernoulli())
    found = uw.TRAK(dim=None, damping=0.0).fit(task, (X, y)).attribute((X, y)).values
    exact = uw.Influence(uw.GGN(), uw.solvers.Cholesky()).fit(task, (X, y)).attribute((X, y))
    torch.testing.assert_close(4 * found, exact.values, **TOLERANCE)


def test_of_a_fitted_logistic_regression_it_is_influence_with_the_ggn_of_the_output():
    """With ∂²ℓ/∂f² left out of H, wherever θ is: (1/n) Σ ∇f ∇fᵀ + λI by hand."""
    p = problem("logistic")
    theta, n = p.task.theta(), p.n
    phi = rows(p.task, theta, p.train, uw.Logit(0))
    g, m = (rows(p.task, theta, given, uw.Loss()) for given in (p.train, p.queries))
    G = phi.T @ phi / n + 0.03 * torch.eye(phi.shape[1])
    expected = -m @ torch.linalg.solve(G, g.T) / n
    found = uw.TRAK(dim=None, damping=0.03).fit(p.task, p.train).attribute(p.queries).values
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def by_hand(models, measure, damping=0.1, loss=None, train=TRAIN, queries=QUERIES, f=None):
    """Park et al. (2023), Eq. 17: the mean over members of φ (ΦᵀΦ)⁻¹ Φᵀ times the mean of 1 − p."""
    products, slopes, n = [], [], len(train[0])
    for model in models:
        task = uw.Task(model, loss or uw.CrossEntropy())
        theta = task.theta()
        phi = rows(task, theta, train, f or uw.Margin())
        m = rows(task, theta, queries, measure)
        G = phi.T @ phi / n + damping * torch.eye(phi.shape[1])
        products.append(m @ torch.linalg.solve(G, phi.T))
        p = task.losses(theta, train).neg().exp()  # of the right class
        slopes.append((1 - p).detach())
    return torch.stack(products).mean(dim=0) * torch.stack(slopes).mean(dim=0) / n


def test_the_paper_s_formula_for_classes():
    model = classifier(0)
    fitted = uw.TRAK(dim=None, damping=0.1).fit(uw.Task(model, uw.CrossEntropy()), TRAIN)
    for measure in (uw.Margin(), uw.Loss(), uw.Logit(1)):
        found = fitted.attribute(QUERIES, measure).values
        torch.testing.assert_close(found, by_hand([model], measure), **TOLERANCE)
    own = by_hand([model], uw.Loss(), queries=TRAIN).diagonal()
    torch.testing.assert_close(fitted.self_influence(), own, **TOLERANCE)
    assert "f is the margin log p/(1 − p)" in fitted.notes


def test_members_are_averaged_apart():
    models = [classifier(seed) for seed in (1, 2, 3)]
    task = uw.Task(classifier(0), uw.CrossEntropy())
    spec = uw.TRAK(dim=None, damping=0.1)
    histories = {
        "models": models,
        "states": [model.state_dict() for model in models],
        "θ": [uw.Task(model, uw.CrossEntropy()).theta() for model in models],
    }
    expected = by_hand(models, uw.Margin())
    for history in histories.values():
        fitted = spec.fit(task, TRAIN, history=history)
        found = fitted.attribute(QUERIES, uw.Margin()).values
        torch.testing.assert_close(found, expected, **TOLERANCE)
    # Not the mean of their scores.
    alone = torch.stack([by_hand([model], uw.Margin()) for model in models]).mean(dim=0)
    assert not torch.allclose(expected, alone, rtol=1e-2)
    diagonal = fitted.attribute(TRAIN).values.diagonal()
    torch.testing.assert_close(fitted.self_influence(), diagonal, **TOLERANCE)
    # θ̂ is a member where it is among them.
    own = spec.fit(task, TRAIN, history=[task.model]).attribute(QUERIES).values
    torch.testing.assert_close(own, spec.fit(task, TRAIN).attribute(QUERIES).values, **TOLERANCE)


def test_a_projection_is_near_the_whole():
    """The sketch leaves scores unbiased in no simple sense; it must come near as d grows."""
    task = uw.Task(classifier(0, width=12), uw.CrossEntropy())
    whole = uw.TRAK(dim=None).fit(task, TRAIN).attribute(QUERIES).values
    gaps = [
        sum(
            float((uw.TRAK(dim=dim, damping=lam, seed=s).fit(task, TRAIN).attribute(QUERIES).values
                   - whole).norm()) for s in range(3)
        )
        for lam in [uw.TRAK(dim=None).fit(task, TRAIN).scorer.health()["damping"]]
        for dim in (4, 100)
    ]  # fmt: skip
    assert gaps[1] < 0.5 * gaps[0]


def test_a_threshold_moves_scores_towards_zero():
    task = uw.Task(classifier(0), uw.CrossEntropy())
    whole = uw.TRAK(dim=None).fit(task, TRAIN).attribute(QUERIES).values
    t = float(whole.abs().median())
    found = uw.TRAK(dim=None, threshold=t).fit(task, TRAIN).attribute(QUERIES).values
    torch.testing.assert_close(found, whole.sign() * (whole.abs() - t).clamp_min(0), **TOLERANCE)
    assert 0 < int((found == 0).sum()) < found.numel()


def test_sequences_have_the_log_probability():
    p = problem("padded_sequences")
    fitted = uw.TRAK(dim=None, damping=0.1).fit(p.task, p.train)
    assert "f is log p" in fitted.notes
    theta, n = p.task.theta(), p.n
    phi = rows(p.task, theta, p.train, uw.LogProb())
    m = rows(p.task, theta, p.queries, uw.LogProb())
    G = phi.T @ phi / n + 0.1 * torch.eye(phi.shape[1])
    expected = m @ torch.linalg.solve(G, phi.T) / n
    found = fitted.attribute(p.queries, uw.LogProb()).values
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_weights_of_examples_are_in_the_slope():
    p = problem("weighted")
    _, (Y, v) = p.train
    theta, n = p.task.theta(), p.n
    phi = rows(p.task, theta, p.train, uw.Logit(0) if Y.shape[-1] == 1 else uw.Margin())
    g, m = (rows(p.task, theta, given, uw.Loss()) for given in (p.train, p.queries))
    G = phi.T @ phi / n + 0.1 * torch.eye(phi.shape[1])
    expected = -m @ torch.linalg.solve(G, g.T) / n
    found = uw.TRAK(dim=None, damping=0.1).fit(p.task, p.train).attribute(p.queries).values
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert bool((found[:, v == 0] == 0).all()) or bool((v > 0).all())


class Smoothed(uw.CrossEntropy):
    """Labels of which a tenth is spread over all classes: no function of the right one's margin."""

    def __call__(self, outputs, targets):
        return 0.9 * super().__call__(outputs, targets) - 0.1 * outputs.log_softmax(-1).mean(-1)


def test_refuses_a_loss_that_is_no_function_of_the_margin():
    with pytest.raises(UnsupportedModel, match="training example 0"):
        uw.TRAK().fit(uw.Task(classifier(0), Smoothed()), TRAIN)


def test_a_folder_keeps_gradients_of_every_member(tmp_path, monkeypatch):
    task = uw.Task(classifier(0), uw.CrossEntropy())
    models = [classifier(1), classifier(2)]
    spec = uw.TRAK(dim=9, damping=0.1)
    resources = uw.Resources(folder=tmp_path)
    expected = spec.fit(task, TRAIN, history=models).attribute(QUERIES).values
    first = spec.fit(task, TRAIN, history=models, resources=resources).attribute(QUERIES).values
    torch.testing.assert_close(first, expected, **TOLERANCE)
    assert len([*tmp_path.iterdir()]) == 2
    monkeypatch.setattr("upweight.gradients.places.Projected.rows", None)
    again = spec.fit(task, TRAIN, history=models, resources=resources)
    monkeypatch.undo()
    assert torch.equal(again.attribute(QUERIES).values, first)
    with pytest.raises(StaleStore):
        spec.fit(task, (TRAIN[0] + 1, TRAIN[1]), history=models, resources=resources)


def test_what_it_cannot_do_is_an_error():
    for wrong in ({"dim": 0}, {"dim": 1.5}, {"dim": True}, {"threshold": -1.0}):
        with pytest.raises(SpecError):
            uw.TRAK(**wrong)
    model = classifier(0)
    task = uw.Task(model, uw.CrossEntropy())
    other = classifier(0, width=3)
    frozen = classifier(1)
    histories = [model, [], "models", [other], [3], [{}], [torch.zeros(3)]]
    for history in histories:
        with pytest.raises(SpecError, match=r"several models|another θ"):
            uw.TRAK().fit(task, TRAIN, history=history)
    head = uw.Task(model, uw.CrossEntropy(), params="2.*")
    with pytest.raises(SpecError, match="no part of θ"):
        uw.TRAK().fit(head, TRAIN, history=[frozen])
    # Two outputs, each with a loss of its own: no number of the model says it all.
    two = uw.Task(nn.Linear(5, 2).double(), lambda f, y: (f - y).abs().sum(dim=1))
    with pytest.raises(UnsupportedModel):
        uw.TRAK().fit(two, (TRAIN[0], draw(torch.Generator().manual_seed(0), 13, 2)))
    nan = classifier(0)
    with torch.no_grad():
        nan[0].weight[0, 0] = torch.nan
    with pytest.raises(uw.errors.NonFinite):
        uw.TRAK().fit(uw.Task(nan, uw.CrossEntropy()), TRAIN)
    with pytest.raises(uw.errors.NonFinite):
        uw.TRAK().fit(task, TRAIN, history=[nan])


def test_examples_that_the_model_is_sure_of():
    """1 − p is 0 in float32 for a margin of 100; it is e⁻¹⁰⁰."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]]))
    X, y = torch.tensor([[100.0], [30.0], [1.0]]), torch.ones(3).long()
    values = uw.TRAK(dim=None).fit(uw.Task(model, uw.CrossEntropy()), (X, y)).attribute((X, y))
    assert bool(values.values.isfinite().all())
    one = uw.TRAK().fit(uw.Task(model, uw.CrossEntropy()), (X[:1] / 100, y[:1]))
    assert one.attribute((X, y)).values.shape == (3, 1)
