"""Stacked and Datamodels: exact where m is linear in w, and fitted to what judges nothing."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.errors import DataError, NotOffered, SpecError
from upweight.methods import layered
from upweight.methods.combination import _margins, combine, within
from upweight.methods.datamodels import _ridge
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, BlockScorer
from upweight.methods.stacked import _against_sizes
from upweight.training import subset_weights
from upweight.training.subset_models import subset_models

N = 24
DRAW = torch.Generator().manual_seed(0)
TRAIN = (
    torch.randn(N, 3, generator=DRAW, dtype=torch.float64),
    torch.randn(N, 1, generator=DRAW, dtype=torch.float64),
)
QUERIES = (torch.randn(5, 3, generator=DRAW, dtype=torch.float64), torch.zeros(5, 1).double())
RESPONSE = torch.randn(3, N, generator=DRAW, dtype=torch.float64)
"""∂θ/∂w of a training that answers the weights linearly."""
TASK = uw.Task(nn.Linear(3, 1, bias=False).double(), uw.SquaredError())
LINEAR = uw.training.FromFunction(lambda w: RESPONSE @ w.double(), twice=False)
TRUTH = QUERIES[0] @ RESPONSE
"""∂m/∂w of the output."""


def output(outputs, targets):
    return outputs[:, 0]


@dataclass(frozen=True)
class Stub(Method):
    """The truth times a factor, and noise."""

    factor: float
    noise: float = 0.0
    unit = uw.Unit.DERIVATIVE

    def prepare(self, fitting):
        rest = torch.randn(3, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def score(queries, measure, start, stop):
            X, _ = queries.batch(0, len(queries))
            return (X @ (RESPONSE * self.factor + self.noise * rest))[:, start:stop]

        return BlockScorer(score, at_once=7)


def test_one_method_is_given_its_size():
    stacked = uw.Stacked((Stub(1 / 7),), subsets=10, seeds=1, by_layer=False)
    scores = stacked.fit(TASK, TRAIN, history=LINEAR).attribute(QUERIES, output)
    torch.testing.assert_close(scores.values, TRUTH, rtol=1e-8, atol=1e-10)
    found = scores.provenance.health
    (c, low, high) = next(iter(found["coefficients"].values()))
    assert c == pytest.approx(7, rel=1e-8) and low <= c * (1 + 1e-9) and c <= high * (1 + 1e-9)
    assert found["explained"] == pytest.approx(1, abs=1e-8)
    assert found["trainings"] == 5.0 and found["fraction"] == 0.5
    assert scores.provenance.notes[0].startswith(
        "1 predictor combined as 10 models of 50 % of the data from 1 seed say (5 trainings): "
    )


def drawn(generator, subsets, queries=6):
    """Predictions [1, s, q], and outcomes whose slope on them is 1, but another in each model."""
    x = torch.randn(1, subsets, queries, generator=generator, dtype=torch.float64)
    own = 1 + 0.5 * torch.randn(subsets, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(subsets, queries, generator=generator, dtype=torch.float64)
    return x, x[0] * own + 0.5 * noise


@pytest.mark.parametrize("subsets, seeds", [(10, 1), (10, 5), (16, 1)])
def test_the_interval_of_the_size_holds_the_size(subsets, seeds):
    """In 95 % of draws. Of two halves of a seed one is the other's negative, and no evidence."""
    generator, held = torch.Generator().manual_seed(0), []
    for _ in range(80):
        found = combine(*drawn(generator, subsets), torch.arange(subsets) % seeds)
        (c,), (low, high) = found.coefficients.tolist(), found.size_interval
        ends = found.intervals[:, 0].tolist()
        held.append((low <= found.size / c <= high, ends[0] <= 1 <= ends[1]))
    assert (torch.tensor(held).double().mean(dim=0) >= 0.9).all()


@pytest.mark.parametrize("group", [[0] * 8, [0, 1, 2, 3] * 2, [0, 1, 1, 0, 2, 0, 1, 2]])
def test_margins_are_of_leaving_out_by_hand(group):
    """A seed's models together, or each model where there is one seed."""
    from scipy.stats import t

    group = torch.tensor(group)
    x, y = drawn(torch.Generator().manual_seed(1), 8)
    x, y = within(x[0], group), within(y, group)
    products, squares = (x * y).sum(dim=1), x.square().sum(dim=1)
    cluster = group if group.any() else torch.arange(8)

    def slope(rows):
        numbered = group[rows].unique(return_inverse=True)[1]
        a, b = within(x[rows], numbered), within(y[rows], numbered)
        return float((a * b).sum() / a.square().sum())

    of_all, each = slope(cluster >= 0), [slope(cluster != k) for k in range(int(cluster.max()) + 1)]
    v = sum((math.log(b) - math.log(of_all)) ** 2 for b in each) * (1 - 1 / len(each))
    w = sum((b**2 - of_all**2) ** 2 for b in each) * (1 - 1 / len(each))
    of_clusters = torch.stack([squares[cluster == k].sum() for k in range(len(each))])
    effective = float(squares.sum() ** 2 / of_clusters.square().sum())
    free = math.floor(effective * (1 if group.any() else 7 / 8) - 1)
    grams, rhs, whole = squares[:, None, None], products[:, None], torch.tensor([of_all]).double()
    factor, margins = _margins(products, squares, grams, rhs, group, whole, 0.0)
    quantile = t.ppf(0.975, max(1, free))
    assert factor == pytest.approx(math.exp(quantile * math.sqrt(v)), rel=1e-8)
    assert float(margins) == pytest.approx(quantile * math.sqrt(w), rel=1e-6)


def test_a_size_that_one_model_decides_is_not_supported():
    x, _ = drawn(torch.Generator().manual_seed(0), 8)
    x[0, :, 0] *= 100 * torch.tensor([5.0, *[1.0] * 7]).double()
    y = x[0].clone()
    y[1:, 0] *= -0.3  # the query of largest changes goes by one model, the fit by five others
    found = combine(x, y, torch.zeros(8, dtype=torch.long))
    assert found.size_interval == (0.0, math.inf)
    assert "from 0 to inf is the factor" in _against_sizes(found, apart=0.0)


def test_sizes_say_which_drops_they_were_fitted_to():
    stacked = uw.Stacked((Stub(1 / 7),), subsets=10, fraction=0.6, seeds=1, by_layer=False)
    scores = stacked.fit(TASK, TRAIN, history=LINEAR).attribute(QUERIES, output)
    assert not scores.against_sizes
    assert scores.provenance.health["share_dropped"] == pytest.approx(0.4)


def test_of_several_methods_the_right_one_counts():
    methods = (Stub(0.0, 1.0), Stub(1 / 7))
    stacked = uw.Stacked(methods, subsets=40, seeds=1)
    scores = stacked.fit(TASK, TRAIN, history=LINEAR).attribute(QUERIES, output)
    torch.testing.assert_close(scores.values, TRUTH, rtol=1e-3, atol=1e-3)
    wrong, right = (c for c, *_ in scores.provenance.health["coefficients"].values())
    assert right == pytest.approx(7, rel=1e-3) and wrong < 1e-3


def test_enough_subsets_give_datamodels_the_coefficients():
    fitted = uw.Datamodels(subsets=3 * N).fit(TASK, TRAIN, history=LINEAR)
    scores = fitted.attribute(QUERIES, output)
    # Subsets of one size say nothing of a constant in every weight.
    expected = TRUTH - TRUTH.mean(dim=1, keepdim=True)
    torch.testing.assert_close(scores.values, expected, rtol=1e-6, atol=1e-7)
    assert scores.provenance.health["regression_explained"] == pytest.approx(1, abs=1e-6)


def test_datamodels_do_not_correct_a_prior_that_is_exact():
    few = uw.Datamodels(subsets=6, prior=Stub(1.0)).fit(TASK, TRAIN, history=LINEAR)
    scores = few.attribute(QUERIES, output)
    torch.testing.assert_close(scores.values, TRUTH, rtol=1e-12, atol=1e-12)
    assert scores.provenance.health["regression_strength"] == 0.0
    near = uw.Datamodels(subsets=3 * N, prior=Stub(1.0, 0.3)).fit(TASK, TRAIN, history=LINEAR)
    error = near.attribute(QUERIES, output).values - TRUTH
    assert float((error - error.mean(dim=1, keepdim=True)).abs().max()) < 1e-6


def test_a_stacked_prior_shares_the_models():
    calls = []

    def counted(w):
        calls.append(1)
        return RESPONSE @ w.double()

    recipe = uw.training.FromFunction(counted, twice=False)
    prior = uw.Stacked((Stub(0.5),), subsets=10, seeds=1)
    method = uw.Datamodels(subsets=10, prior=prior)
    scores = method.fit(TASK, TRAIN, history=recipe).attribute(QUERIES, output)
    assert len(calls) == 10
    torch.testing.assert_close(scores.values, TRUTH, rtol=1e-7, atol=1e-8)


def test_the_left_out_error_of_the_ridge_is_that_of_leaving_out():
    draw = torch.Generator().manual_seed(2)
    W = torch.randn(12, 4, generator=draw, dtype=torch.float64)
    y = torch.randn(12, 3, generator=draw, dtype=torch.float64)
    group = torch.arange(12) % 2
    centered, rest = within(W, group), within(y, group)
    kernel = centered @ centered.T
    dual, told = _ridge(kernel, rest, rest.square().mean(dim=0), group)
    rho = told["regression_strength"] * float(kernel.diagonal().mean())
    scale = rest.square().mean(dim=0)

    def left_out(rho):
        total = torch.zeros(3, dtype=torch.float64)
        for s in range(12):
            kept = [k for k in range(12) if k != s]
            # A constant of each group beside the ridge: without it the group's mean is another.
            D = torch.nn.functional.one_hot(group).double()
            A = torch.cat([centered, D], dim=1)[kept]
            P = torch.diag(torch.tensor([rho] * 4 + [0.0] * 2, dtype=torch.float64))
            beta = torch.linalg.solve(A.T @ A + P, A.T @ rest[kept])
            total += (rest[s] - torch.cat([centered, D], dim=1)[s] @ beta).square()
        return float((total / scale).sum()) / 36

    alone = float(((rest / scale.sqrt()) / (1 - 1 / 6)).square().mean())
    assert 1 - left_out(rho) / alone == pytest.approx(told["regression_explained"], rel=1e-9)
    torch.testing.assert_close(
        dual, torch.linalg.solve(kernel + rho * torch.eye(12).double(), rest)
    )


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


torch.manual_seed(0)
RECIPE = uw.Training(net, uw.SGD(0.1), epochs=3, batch=8)
NETWORK = uw.Task(RECIPE.trained(uw.Task(net(), uw.SquaredError()), TRAIN), uw.SquaredError())
EKFAC = uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.1, tolerance=0)


@pytest.mark.parametrize("seeds", [2, 8])
def test_is_the_sum_that_it_says(seeds):
    """By layer, at θ̂, and over the subset models at the end and halfway."""
    methods = (
        EKFAC,
        uw.Ensemble(uw.GradientDot(), members=3, fraction=0.5),
        uw.Ensemble(uw.GradientDot(), members=2, fraction=0.5, at=0.5),
    )
    data = uw.as_data(TRAIN)
    models = subset_models(RECIPE, NETWORK, data, 8, 0.5, seeds, at=(0.5, 1.0))
    stacked = uw.Stacked(methods, subsets=8, seeds=seeds)
    fitted = stacked.fit(NETWORK, TRAIN, history=models)
    scores = fitted.attribute(QUERIES)

    def shares(method, theta):
        found = method.fit(NETWORK.moved_to(theta), TRAIN)
        return torch.stack(
            [s.values for s in found.attribute(QUERIES, into=uw.PerLayer()).values()]
        )

    change = models.weights - 1
    parts, predicted = [], []
    for theta, method, own in (
        ([NETWORK.theta()], EKFAC, False),
        (list(models.theta[1.0][:3]), uw.GradientDot(), True),
        (list(models.theta[0.5][:2]), uw.GradientDot(), True),
    ):
        each = torch.stack([shares(method, t) for t in theta])
        length = each.square().sum(dim=(1, 3)).sqrt()
        each = each * (length.mean(dim=0) / length)[:, None, :, None]
        parts.append(each.mean(dim=0))
        said = torch.einsum("sn,klqn->klsq", change, each)
        mean = said.mean(dim=0)
        for s in range(len(theta) if own else 0):
            mean[:, s] = torch.cat([said[:s, :, s], said[s + 1 :, :, s]]).mean(dim=0)
        predicted.append(mean)
    losses = torch.stack(
        [NETWORK.losses(NETWORK.named(t), QUERIES).detach() for t in models.theta[1.0]]
    )
    # About the mean of a seed, or of all where each subset has its own.
    group = torch.arange(8) % seeds if seeds == 2 else torch.zeros(8, dtype=torch.long)
    found = combine(torch.cat(predicted), losses, group)
    by_hand = torch.einsum("k,kqn->qn", found.coefficients, torch.cat(parts))
    torch.testing.assert_close(scores.values, by_hand, rtol=1e-8, atol=1e-12)
    layers = fitted.attribute(QUERIES, into=uw.PerLayer())
    total = torch.stack([part.values for part in layers.values()]).sum(dim=0)
    torch.testing.assert_close(total, scores.values, rtol=1e-10, atol=1e-14)
    top = fitted.attribute(QUERIES, into=uw.Top(2)).raises_by
    torch.testing.assert_close(top, scores.values.topk(2, dim=1).values)


@pytest.mark.parametrize(
    "method",
    [uw.SOURCE(2), uw.TRAK(16), uw.Averaged((uw.SOURCE(1), EKFAC))],
    ids=lambda method: type(method).__name__,
)
def test_sizes_of_methods_that_look_at_training_or_may_are_fitted(method):
    """One factor for the scores that the method has of the run that the recipe makes again."""
    stacked = uw.Stacked((method,), subsets=12, seeds=1, by_layer=False)
    scores = stacked.fit(NETWORK, TRAIN, history=RECIPE).attribute(QUERIES)
    run = RECIPE.trajectory(NETWORK, TRAIN) if method.takes_run else None
    own = method.fit(NETWORK, TRAIN, history=run).attribute(QUERIES).values
    factor = float((own * scores.values).sum() / own.square().sum())
    assert scores.unit is uw.Unit.DERIVATIVE and factor >= 0
    torch.testing.assert_close(scores.values, factor * own, rtol=1e-9, atol=1e-14)
    assert scores.provenance.health["trainings"] == 6 + method.takes_run


def test_the_run_of_the_model_is_that_of_a_recipe_that_makes_it():
    source = uw.Stacked((uw.SOURCE(1),), subsets=8, seeds=8)
    models = subset_models(RECIPE, NETWORK, uw.as_data(TRAIN), 8, 0.5, 8, runs=True)
    with pytest.raises(SpecError, match=r"from a Training recipe(?s:.)*Ensemble\(SOURCE"):
        source.fit(NETWORK, TRAIN, history=models)
    with pytest.raises(SpecError, match="must end at the parameters"):
        source.fit(NETWORK.moved_to(NETWORK.theta() + 1), TRAIN, history=RECIPE)
    ways = uw.Ensemble(uw.SOURCE(1), 3, 0.5)
    uw.Stacked((ways,), subsets=8, seeds=8).fit(NETWORK, TRAIN, history=models)


def test_a_solve_of_all_layers_is_one_predictor():
    """Of two blocks each share is a predictor. Shares are told either way, and are of the sum."""
    models = subset_models(RECIPE, NETWORK, uw.as_data(TRAIN), 8, 0.5, 8)
    coupled = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), 0.1, tolerance=0)

    def fitted(method, **options):
        stacked = uw.Stacked((method,), subsets=8, seeds=8, **options)
        return stacked.fit(NETWORK, TRAIN, history=models)

    def coefficients(fitted):
        return fitted.attribute(QUERIES, output).provenance.health["coefficients"]

    found = fitted(coupled)
    assert len(coefficients(found)) == 1 and len(coefficients(fitted(EKFAC))) == 2
    ((name, (c, *_)),) = coefficients(found).items()
    whole = fitted(coupled, by_layer=False).attribute(QUERIES, output).values
    torch.testing.assert_close(found.attribute(QUERIES, output).values, whole)
    assert name == f"{coupled!r} all" and c > 0
    shares = found.attribute(QUERIES, output, into=uw.PerLayer())
    given = coupled.fit(NETWORK, TRAIN).attribute(QUERIES, output, into=uw.PerLayer())
    assert list(shares) == list(given) and len(given) == 2
    for layer, share in shares.items():
        torch.testing.assert_close(share.values, c * given[layer].values)


def test_several_dampings_share_a_fit(monkeypatch):
    calls = []
    learned = layered.LayerwiseCurvature.fit_blocks
    monkeypatch.setattr(
        layered.LayerwiseCurvature,
        "fit_blocks",
        lambda self, *a, **k: calls.append(1) or learned(self, *a, **k),
    )
    other = uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.3, tolerance=0)
    methods = (EKFAC, other, uw.Ensemble(EKFAC, 2, 0.5), uw.Ensemble(other, 2, 0.5))
    uw.Stacked(methods, subsets=8, seeds=2).fit(NETWORK, TRAIN, history=RECIPE)
    assert len(calls) == 3  # θ̂ and two members


def test_segments_of_one_run_share_their_fits(monkeypatch):
    """The terms of SOURCE's sum learn each curvature once, and say what they say alone."""
    methods = tuple(uw.Ensemble(uw.SOURCE(3, states=1, segment=k), 2, 0.5) for k in range(3))
    alone = uw.Stacked(methods[:1], subsets=8, seeds=2).fit(NETWORK, TRAIN, history=RECIPE)
    calls, learned = [], layered.LayerwiseCurvature.fit_blocks
    monkeypatch.setattr(
        layered.LayerwiseCurvature,
        "fit_blocks",
        lambda self, *a, **k: calls.append(1) or learned(self, *a, **k),
    )
    together = uw.Stacked(methods, subsets=8, seeds=2).fit(NETWORK, TRAIN, history=RECIPE)
    assert len(calls) == 3 * 2  # segments, members
    asked = Asked(uw.as_data(QUERIES), uw.Loss())
    members = (fitted.scorer.sources[0].members for fitted in (alone, together))
    for scorers in zip(*members, strict=True):
        first, same = (next(scorer.jobs(asked)).block(0, N) for scorer in scorers)
        assert torch.equal(first, same)


def test_subsets_that_fit_are_not_those_that_judge():
    fitted = uw.Stacked((Stub(0.1),), subsets=8, seeds=1).fit(TASK, TRAIN, history=LINEAR)
    scores = fitted.attribute(QUERIES, output)
    check = uw.check(scores, LINEAR, subsets=8)
    ours = {tuple(row.tolist()) for row in fitted.scorer.models.weights}
    judges = {tuple(row.tolist()) for row in subset_weights(N, 256, renormalize=True)}
    assert check.lds.spearman.value == pytest.approx(1) and check.slope.value == pytest.approx(1)
    assert not ours & judges


def test_what_is_wrong_is_refused():
    with pytest.raises(SpecError, match="needs a method"):
        uw.Stacked(())
    with pytest.raises(SpecError, match="two of each seed"):
        uw.Stacked((EKFAC,), subsets=12, seeds=10)
    with pytest.raises(SpecError, match="look at one model"):
        uw.Stacked((uw.Datamodels(),))
    with pytest.raises(SpecError, match="fitted to models of random subsets"):
        uw.Stacked((EKFAC,)).fit(NETWORK, TRAIN)
    models = subset_models(RECIPE, NETWORK, uw.as_data(TRAIN), 4, 0.5, 2)
    with pytest.raises(SpecError, match="those that the method says"):
        uw.Stacked((EKFAC,), subsets=8, seeds=2).fit(NETWORK, TRAIN, history=models)
    with pytest.raises(SpecError, match="three subsets or more per seed"):
        uw.Datamodels(subsets=5, seeds=2)
    with pytest.raises(SpecError, match="whose scores are ∂m/∂w"):
        uw.Datamodels(prior=uw.GradientDot())
    fitted = uw.Stacked((Stub(-1.0),), subsets=10, seeds=1).fit(TASK, TRAIN, history=LINEAR)
    with pytest.raises(DataError, match="do not go with the outcomes"):
        fitted.attribute(QUERIES, output)
    with pytest.raises(NotOffered):
        fitted.self_influence()
    with pytest.raises(DataError, match="the same for every subset"):
        fitted.attribute(QUERIES, lambda outputs, targets: outputs[:, 0].detach() * 0 + 1.0)


def test_a_model_that_the_recipe_does_not_make_is_told_apart():
    """Subset models of another training agree with themselves: nothing else says it."""
    stacked = uw.Stacked((Stub(1 / 7),), subsets=40, seeds=1, by_layer=False)

    def notes(theta):
        fitted = stacked.fit(TASK.moved_to(theta), TRAIN, history=LINEAR)
        found = fitted.attribute(QUERIES, output).provenance
        return found.health["apart"], [n for n in found.notes if "other settings" in n]

    ones = torch.ones(N, dtype=torch.float64)
    apart, told = notes(RESPONSE @ ones)
    assert apart < 1.0 and told == []
    spread = RESPONSE @ (subset_weights(N, 40, renormalize=True) - 1).T
    apart, told = notes(RESPONSE @ ones + 8 * spread.std(dim=1))
    assert apart > 3.0 and len(told) == 1
