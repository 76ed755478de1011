"""The sampled Fisher: unbiased for the exact one, and the same labels for every product."""

import pytest
import torch

import upweight as uw
from tests.market import draw, labels, names, problem
from tests.reference import dense
from upweight.curvature.gauss_newton import Way
from upweight.errors import UnsupportedModel
from upweight.task.data import as_data

SEEDS = 150


def enumerated_fisher(task, train, answers, probability):
    """(1/n) Σᵢ Σ_y p(y | fᵢ) g(y) g(y)ᵀ + ∇²R, over all answers of one example."""
    data = as_data(train)
    total = dense.penalty_hessian(task)
    for y in answers:
        relabeled = (*data.arrays[:-1], y.expand(len(data), *y.shape))
        g = dense.gradients(task, relabeled)
        with torch.no_grad():
            f, _ = task.outputs(task.theta(), data.batch(0, len(data)))
            p = probability(f, y)
        total = total + (g.T * p) @ g / len(data)
    return total


@pytest.mark.parametrize("name", ["softmax", "mlp_tanh"])
def test_the_ggn_of_a_softmax_is_the_fisher(name):
    p = problem(name)
    exact = enumerated_fisher(p.task, p.train, torch.arange(3), lambda f, y: f.softmax(dim=1)[:, y])
    found = uw.GGN().fit(p.task, as_data(p.train), p.task.theta()).dense()
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_the_ggn_of_a_logistic_model_is_the_fisher():
    p = problem("logistic")
    answers = torch.tensor([[0.0], [1.0]]).double()
    exact = enumerated_fisher(
        p.task, p.train, answers, lambda f, y: (f * (2 * y - 1)).sigmoid()[:, 0]
    )
    found = uw.GGN().fit(p.task, as_data(p.train), p.task.theta()).dense()
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.fixture
def compared_once(monkeypatch):
    """Ways to take derivatives are not compared anew for each seed; other tests compare them."""
    monkeypatch.setattr("upweight.curvature.fisher.way", lambda *_: Way())


@pytest.mark.usefixtures("compared_once")
@pytest.mark.parametrize(
    "name",
    ["ridge_two_outputs", "logistic", "softmax", "poisson", "mlp_gelu", "padded_sequences"],
)
def test_unbiased(name):
    """Mean over seeds within 4 standard errors of the exact Fisher, along fixed directions."""
    p = problem(name)
    exact = dense.ggn(p.task, p.train)
    directions = draw(torch.Generator().manual_seed(1), 3, len(exact))
    expected = ((directions @ exact) * directions).sum(dim=1)
    draws = []
    for seed in range(SEEDS):
        A = uw.Fisher(samples=1, seed=seed).fit(p.task, as_data(p.train), p.task.theta())
        draws.append((A.mv(directions) * directions).sum(dim=1))
    values = torch.stack(draws)
    error = values.std(dim=0) / SEEDS**0.5
    assert bool((error > 0).all())
    assert bool(((values.mean(dim=0) - expected).abs() <= 4 * error).all())


@pytest.mark.usefixtures("compared_once")
def test_more_samples_are_the_mean_of_independent_ones():
    """The variance falls as 1/samples."""
    p = problem("softmax")
    v = draw(torch.Generator().manual_seed(1), p.task.layout.size)

    def variance(samples):
        values = [
            v @ uw.Fisher(samples, seed).fit(p.task, as_data(p.train), p.task.theta()).mv(v)
            for seed in range(100)
        ]
        return float(torch.stack(values).var())

    # A ratio of two sample variances of 100 draws each: its standard deviation is about 20 %.
    assert 8 * 0.45 < variance(1) / variance(8) < 8 * 2.2


def test_a_seed_names_one_operator():
    p = problem("mlp_tanh")
    v = draw(torch.Generator().manual_seed(1), p.task.layout.size)
    A = uw.Fisher(seed=1).fit(p.task, as_data(p.train), p.task.theta())
    assert torch.equal(A.mv(v), A.mv(v))
    assert torch.equal(
        A.mv(v), uw.Fisher(seed=1).fit(p.task, as_data(p.train), p.task.theta()).mv(v)
    )
    assert not torch.equal(
        A.mv(v), uw.Fisher(seed=2).fit(p.task, as_data(p.train), p.task.theta()).mv(v)
    )


def test_the_same_labels_as_sampled_ones():
    """One dense block by layer is the same matrix, batch for batch."""
    p = problem("bias_only")
    dense_block = uw.EKFAC(uw.labels.Sampled(3, 5)).fit(p.task, as_data(p.train), p.task.theta())
    found = uw.Fisher(3, 5).fit(p.task, as_data(p.train), p.task.theta())
    torch.testing.assert_close(found.dense(), dense_block.dense(), rtol=1e-10, atol=1e-10)


def test_batches_draw_different_labels(monkeypatch):
    """The same example twice, in two batches: two draws, not one repeated."""
    g = torch.Generator().manual_seed(0)
    x, y = draw(g, 1, 2).expand(40, 2), labels(g, 1, 2).expand(40)
    task = uw.Task(torch.nn.Linear(2, 2).double(), uw.CrossEntropy())
    monkeypatch.setattr("upweight.task.data.WORKING_BYTES", 1)
    A = uw.Fisher().fit(task, as_data((x, y)), task.theta())
    matrices = [term.dense() for term in A.terms]
    assert len(matrices) == 40
    assert any(not torch.equal(matrices[0], other) for other in matrices)


@pytest.mark.parametrize("name", names(without=("sampled",)))
def test_a_loss_that_cannot_be_sampled_is_refused(name):
    p = problem(name)
    if p.task.loss == uw.CrossEntropy():
        return  # soft targets: the Fisher draws hard ones, and the mass of the target is lost
    with pytest.raises(UnsupportedModel, match=r"GGN\(\)"):
        uw.Fisher().fit(p.task, as_data(p.train), p.task.theta())


@pytest.mark.parametrize(
    "curvature",
    [
        uw.Fisher(samples=2),
        uw.EmpiricalFisher(),
        uw.GGN(),
        uw.Diagonal(uw.labels.Sampled()),
    ],
    ids=repr,
)
def test_the_curvature_of_all_examples_is_that_of_two_parts(curvature):
    """H = H₋U + (1/n) Σ_U Hᵢ: what a removal leaves keeps its labels, in a part of a part too."""
    p = problem("mlp_tanh")
    data, theta = as_data(p.train), p.task.theta()
    n, gone = len(data), [1, 2, 5]
    kept = [i for i in range(n) if i not in gone]
    parts = [data.subset(kept), data.subset([5, *range(4)]).subset([2, 3, 0])]
    whole, *halves = (curvature.fit(p.task, some, theta, n=n).dense() for some in (data, *parts))
    penalty = dense.penalty_hessian(p.task)
    torch.testing.assert_close(sum(halves) - penalty, whole, rtol=1e-10, atol=1e-12)


def test_a_removal_leaves_the_labels_of_the_others():
    p = problem("mlp_tanh")
    data, n, theta = as_data(p.train), p.n, p.task.theta()
    curvature = uw.Fisher()
    fitted = uw.Influence(curvature, damping=0.1).fit(p.task, data)
    found = p.task.layout.flatten(dict(fitted.removal_step([2])))
    gone = curvature.fit(p.task, data.subset([2]), theta, n=n).dense()
    left = fitted.scorer.operator.dense() - (gone - dense.penalty_hessian(p.task))
    gradient = dense.gradients(p.task, p.train)[2]
    torch.testing.assert_close(left @ found, gradient / n, rtol=1e-8, atol=1e-10)
