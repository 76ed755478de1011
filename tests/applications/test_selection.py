"""Subsets and weights: the defining equations, refits by scikit-learn, and what is refused."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from torch import nn

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import selection
from upweight.applications.held_out import Refits, mean_loss_scores, splits
from upweight.applications.reweighting import (
    Walk,
    divergence,
    effective_n,
    entropic_step,
    lookahead_step,
)
from upweight.applications.selection import Trial
from upweight.applications.subject import Subject
from upweight.errors import (
    DataError,
    MissingContext,
    NonFinite,
    NotConverged,
    NotOffered,
    SpecError,
    UpweightError,
)
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.task.recipe import Trained

# Steps over a third of the rows are far: that they warn is tested where removals are.
pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")
NEWTON, TIGHT = uw.training.Newton(tol=1e-7), uw.training.Newton(tol=1e-11)
FEW = Bootstrap(resamples=300)


def digits(classes=3, noise=0.0, seed=0):
    """Train 150, validation 120, test 150 digits on 12 random projections."""
    X, y = load_digits(n_class=classes, return_X_y=True)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(y))
    X, y = X[order] / 16 @ draw.normal(size=(64, 12)) / 4, y[order].copy()
    train = y[:150].copy()
    wrong = draw.random(150) < noise
    train[wrong] = (train[wrong] + draw.integers(1, classes, int(wrong.sum()))) % classes
    return (X[:150], train), (X[150:270], y[150:270]), (X[270:420], y[270:420]), wrong


def tensors(split, dtype=torch.float64):
    return torch.tensor(split[0], dtype=dtype), torch.tensor(split[1])


def softmax(train, classes=3, dtype=torch.float64, method=None):
    model = nn.Linear(train[0].shape[1], classes).to(dtype)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.01))
    recipe = NEWTON if dtype == torch.float64 else uw.training.Newton(tol=1e-4)
    theta = recipe.prepare(task, task.training(train)).center
    return (method or uw.Influence(uw.Hessian())).fit(task.moved_to(theta), train)


@pytest.fixture(scope="module")
def noisy():
    return digits(noise=0.35)


@pytest.fixture(scope="module")
def picked(noisy):
    """The library's own rule on noisy labels."""
    train, guide, test, _ = noisy
    train, guide, test = map(tensors, (train, guide, test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return selection.subset(
            softmax(train), 0.6, validation=guide, test=test, recipe=NEWTON, bootstrap=FEW
        )


# -- subsets --------------------------------------------------------------------------------------


def test_with_wrong_labels_rows_are_chosen_in_rounds_and_the_refit_gains(picked, noisy):
    found = holds(picked)
    assert found.rule == "iterated" and found.expects_gain and found.is_confirmed
    assert found.actual.high < 0
    assert found.predicted.value == pytest.approx(found.actual.value, rel=0.5)
    wrong = torch.tensor(noisy[3])
    assert wrong[found.rows].double().mean() < 0.3 * wrong.double().mean()
    assert found.kept.loss.value < found.random.loss.value
    assert "A gain was predicted" in found.verdict
    assert "of the validation loss (cross-entropy)" in found.verdict
    assert list(found.frame().index) == ["all rows", "kept rows", "random rows"]


def test_with_right_labels_no_gain_is_expected_and_little_is_lost():
    train, guide, test, _ = digits()
    model = LogisticRegression(tol=1e-10, max_iter=1000).fit(*train)
    found = holds(
        selection.subset(model, 0.7, train=train, validation=guide, test=test, bootstrap=FEW)
    )
    assert found.rule == "redundant" and not found.expects_gain
    assert found.verdict.startswith("No gain expected")
    assert abs(found.change_of_accuracy.value) <= 0.01
    assert found.kept.loss.value < found.random.loss.value
    assert found.predicted.value == pytest.approx(found.actual.value, abs=0.01)


def test_rows_that_the_others_explain_stay_where_that_would_cost_far_more():
    """Of a rare class the rows that are least explained are all that is kept of both."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(600, 12))
    y = (X[:, 0] + 2 * draw.logistic(size=600) > 3).astype(int)
    parts = [(X[a : a + 200], y[a : a + 200]) for a in (0, 200, 400)]
    train, guide, test = parts
    model = LogisticRegression(tol=1e-10).fit(*train)
    given = {"train": train, "validation": guide, "test": test, "bootstrap": FEW}
    found = holds(selection.subset(model, 0.3, **given), figure=False)
    other = selection.subset(model, 0.3, "redundant", **given)
    assert found.rule == "iterated" and not found.expects_gain
    assert found.predicted.high < other.predicted.low
    assert "'redundant' by" in found.why
    assert found.change_of_accuracy.value > other.change_of_accuracy.value + 0.1


def test_drop_keeps_the_smallest_scores_and_scikit_learn_refits_to_the_same_loss(noisy):
    train, guide, test, _ = noisy
    model = LogisticRegression(tol=1e-10, max_iter=1000).fit(*train)
    found = selection.subset(
        model, 0.6, "drop", train=train, validation=guide, test=test, bootstrap=FEW
    )
    holds(found, figure=False)
    scores = uw.attribute(model, train, guide).values.mean(dim=0)
    assert found.rows.tolist() == sorted(scores.argsort()[:90].tolist())
    rows = found.rows.numpy()
    # Its penalty is beside a sum over rows: deleting them is wᵢ = 0.
    again = LogisticRegression(tol=1e-12, solver="newton-cg", max_iter=10_000)
    again.fit(train[0][rows], train[1][rows])
    assert found.kept.loss.value == pytest.approx(
        log_loss(test[1], again.predict_proba(test[0])), rel=1e-5
    )
    assert found.kept.accuracy.value == pytest.approx(again.score(*test))
    change = found.kept.loss.value - found.everything.loss.value
    assert found.actual.value == pytest.approx(change)


def test_what_a_half_chose_is_predicted_on_the_other(noisy):
    train, guide, _, _ = noisy
    fitted = softmax(tensors(train))
    split = splits(fitted, tensors(guide), None, 0)
    trial = Trial(Refits(Subject(fitted, NEWTON), "A test"), 100, 0)
    a, b = split.halves
    phi = fitted.attribute(a).values.mean(dim=0)
    out = phi.argsort(stable=True)[100:].tolist()
    step = fitted.removal_step(out)
    moved = fitted.task.moved_to(fitted.theta + fitted.task.layout.flatten(step))
    X, y = b.batch(0, len(b))
    entropy = nn.functional.cross_entropy
    by_hand = entropy(moved.model(X), y) - entropy(fitted.task.model(X), y)
    assert float(trial.predicted("drop", a, b).mean()) == pytest.approx(by_hand.item(), rel=1e-9)
    together = trial.cross_fitted("drop", split)
    assert len(together) == len(split.validation)


def test_what_a_choice_promises_on_its_own_set_is_not_stated():
    train, guide, _, _ = digits()
    fitted = softmax(tensors(train))
    found = holds(selection.subset(fitted, 0.7, "drop", validation=tensors(guide), bootstrap=FEW))
    assert not found.expects_gain
    own = Trial(Refits(Subject(fitted, NEWTON), "A test"), 105, 0)
    data = fitted.task.queries(tensors(guide))
    assert float(own.predicted("drop", data, data).mean()) < found.predicted.value
    assert not found.is_confirmed and "no refit" in found.verdict


def test_iterated_leaves_out_in_rounds_by_refitted_scores(noisy):
    train, guide, _, _ = noisy
    fitted = softmax(tensors(train))
    data = fitted.task.queries(tensors(guide))
    trial = Trial(Refits(Subject(fitted, NEWTON), "A test"), 60, 0)
    rows = torch.arange(150)
    for k in range(1, 6):
        weights = torch.zeros(1, 150).double().index_fill_(1, rows, 1.0)
        theta = NEWTON.prepare(fitted.task, fitted.train)(weights).theta[0]
        # The same objective on the rows alone: 1/n is 1/m · m/n, so that the penalty is n/m times.
        task = fitted.task.moved_to(theta)
        task = uw.Task(task.model, task.loss, uw.L2(0.01 * 150 / len(rows)))
        here = uw.Influence(uw.Hessian()).fit(task, fitted.train.subset(rows.tolist()))
        order = mean_loss_scores(here, data).argsort(stable=True)
        rows = rows[order[: round(150 * 0.4 ** (k / 5))].sort().values]
    assert trial.chosen("iterated", data).rows.tolist() == rows.tolist()


def test_sigmoid_draws_by_its_chances():
    train, guide, _, _ = digits(noise=0.3)
    fitted = softmax(tensors(train))
    data = fitted.task.queries(tensors(guide))
    phi = mean_loss_scores(fitted, data)
    refits = Refits(Subject(fitted, NEWTON), "A test")
    # One row of n: then the chance is π over its sum.
    drawn = [int(Trial(refits, 1, seed)._drawn(phi)) for seed in range(2000)]
    chance = torch.sigmoid(-phi / phi.square().mean().sqrt())
    chance = chance / chance.sum()
    some = phi.argsort()[:50]
    share, expected = sum(d in set(some.tolist()) for d in drawn) / 2000, float(chance[some].sum())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
    assert len(set(Trial(refits, 90, 0)._drawn(phi).tolist())) == 90
    assert len(Trial(refits, 90, 0)._drawn(torch.zeros(150).double())) == 90


def test_scores_that_know_their_model_bring_their_validation_set(noisy):
    train, guide, _, _ = noisy
    fitted = softmax(tensors(train))
    scores = fitted.attribute(tensors(guide))
    one = selection.subset(scores, 0.7, "drop", bootstrap=FEW)
    other = selection.subset(fitted, 0.7, "drop", validation=tensors(guide), bootstrap=FEW)
    assert torch.equal(one.rows, other.rows) and one.predicted == other.predicted


def test_a_regression_has_no_accuracy():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(90, 4))
    y = X @ [1.0, -1, 0, 2] + draw.normal(size=90)
    model = Ridge(alpha=1.0).fit(X[:40], y[:40])
    found = selection.subset(
        model, 0.8, train=(X[:40], y[:40]), validation=(X[40:60], y[40:60]),
        test=(X[60:], y[60:]), bootstrap=FEW,
    )  # fmt: skip
    holds(found)
    assert found.change_of_accuracy is None and found.kept.accuracy is None


def test_by_layer_and_in_single_precision_the_model_stays_as_it_was(noisy):
    train, guide, test, _ = noisy
    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    train, guide, test = (tensors(part, torch.float32) for part in (train, guide, test))
    fitted = softmax(train, dtype=torch.float32, method=method)
    before = fitted.task.theta()
    recipe = uw.Training(None, uw.SGD(0.2), epochs=3, batch=32)
    found = selection.subset(
        fitted, 0.7, "iterated", validation=guide, test=test, recipe=recipe, bootstrap=FEW
    )
    holds(found, figure=False)
    weights = selection.reweight(
        fitted, recipe, guide, test=test, steps=2, rule="lookahead", bootstrap=FEW
    )
    holds(weights, figure=False)
    assert torch.equal(fitted.task.theta(), before)


def test_a_gain_that_the_refit_does_not_show_is_not_confirmed(picked):
    worse = replace(picked, actual=Estimate(0.03, 0.02, 0.04))
    assert not holds(worse).is_confirmed and "does not agree" in worse.verdict
    unsure = replace(picked, actual=Estimate(-0.01, -0.04, 0.02))
    assert not holds(unsure).is_confirmed and "does not tell" in unsure.verdict
    none = {"predicted": Estimate(0.0, -0.1, 0.1)}  # no gain expected: all of it says there is none
    for actual, said in ((unsure.actual, "does not tell"), (picked.actual, "does not agree")):
        other = replace(picked, actual=actual, **none)
        assert not other.is_confirmed and said in other.verdict
    assert replace(worse, **none).is_confirmed
    assert "no refit has tried it" in replace(picked, actual=None).verdict


class Failing:
    """Newton, but for the models of some calls."""

    def __init__(self, calls):
        self.calls, self.made = calls, 0

    def prepare(self, task, train):
        self.trainer = NEWTON.prepare(task, train)
        return self

    at_once = 1

    def __call__(self, weights):
        self.made += 1
        found = self.trainer(weights)
        if self.made in self.calls:
            return Trained(found.theta, found.gradient_norms, {0: "it diverged"})
        return found


def test_a_round_that_does_not_train_ends_in_the_scores_before_it(noisy):
    train, guide, test, _ = noisy
    train, guide, test = map(tensors, (train, guide, test))
    asked = {"validation": guide, "test": test, "bootstrap": FEW}
    fitted = softmax(train)
    found = selection.subset(fitted, 0.6, "iterated", recipe=Failing({2, 5}), **asked)
    holds(found, figure=False)
    assert len(found.rows) == 90 and found.is_confirmed
    assert any("round 2 of 5 did not train (it diverged)" in note for note in found.notes)
    lost = selection.subset(fitted, 0.6, "drop", recipe=Failing({2}), **asked)
    holds(lost)
    assert lost.actual is None and not lost.is_confirmed
    assert "the refit on the kept rows did not train" in lost.notes[-1]
    assert lost.everything is not None


# -- weights --------------------------------------------------------------------------------------


def unbalanced(seed=0):
    X, y = load_digits(return_X_y=True)
    draw = np.random.default_rng(seed)
    few, many = (draw.permutation(np.flatnonzero(y == c)) for c in (4, 9))
    X = X / 16 @ draw.normal(size=(64, 8)) / 4
    parts = (np.r_[many[:80], few[:6]], np.r_[many[80:110], few[6:36]], np.r_[many[110:], few[36:]])
    return [(X[part], y[part]) for part in parts]


def test_slopes_at_weights_are_derivatives_of_refitted_losses():
    train, guide, _ = unbalanced()
    train, guide = ((torch.tensor(X), torch.tensor(y == 4).long()) for X, y in (train, guide))
    fitted = softmax(train, 2)
    refits = Refits(Subject(fitted, TIGHT), "A test")
    draw = torch.Generator().manual_seed(3)
    w = 0.2 + torch.rand(86, generator=draw).double()
    w = w * 86 / w.sum()
    data = fitted.task.queries(guide)
    slope = Walk(refits, "exact", 0.1, 1).slope(data, w, refits.attempted(w))
    for i in (0, 40, 85):
        e = torch.zeros(86).double()
        e[i] = 1e-3
        up, down = (
            nn.functional.cross_entropy(fitted.task.moved_to(theta).model(guide[0]), guide[1])
            for theta in (refits.attempted(w + d).theta[0] for d in (e, -e))
        )
        assert float(slope[i]) == pytest.approx((up - down).item() / 2e-3, rel=1e-4)


def test_a_step_is_the_lowest_point_of_its_ball():
    draw = torch.Generator().manual_seed(0)
    w, slope = torch.rand(2, 12, generator=draw).double()
    w, slope = w / w.sum() * 12, slope - 0.5
    moved = entropic_step(w, slope, 0.05)
    assert float(moved.sum()) == pytest.approx(12)
    assert divergence(moved / 12, w / 12) == pytest.approx(0.05, rel=1e-9)
    from scipy.optimize import minimize

    p = (w / 12).numpy()
    best = minimize(
        lambda q: float(slope.numpy() @ q), p, bounds=[(1e-9, 1)] * 12, method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: 0.05 - (q * np.log(q / p)).sum()},
        ],
    )  # fmt: skip
    assert np.allclose(moved.numpy() / 12, best.x, atol=1e-4)
    assert entropic_step(w, torch.ones(12).double(), 0.05) is None
    # All weight on one row is as far as it goes.
    far = entropic_step(w, slope, 50.0)
    assert float(far.max()) == pytest.approx(12) and bool(far.isfinite().all())


def test_rows_that_lost_all_weight_stay_without_it(noisy):
    """A ball that holds a corner of the simplex: what is left is one row, and no NaN."""
    train, guide, _, _ = noisy
    train, guide = map(tensors, (train, guide))
    found = selection.reweight(
        softmax(train), NEWTON, guide, steps=np.int64(2), radius=1000.0, bootstrap=FEW
    )
    assert bool(found.w.isfinite().all()) and float(found.w.sum()) == pytest.approx(len(train[0]))
    assert [each.effective_n for each in found.path] == pytest.approx([len(train[0]), 1, 1])
    assert not any("NaN" in note for note in found.notes)


def test_the_look_ahead_follows_gradient_products_that_are_positive():
    train, guide, _ = unbalanced()
    (X, y), (V, u) = ((torch.tensor(X), torch.tensor(y == 4).long()) for X, y in (train, guide))
    fitted = softmax((X, y), 2)
    refits = Refits(Subject(fitted, NEWTON), "A test")
    w = torch.ones(86).double()
    data = fitted.task.queries((V, u))
    here = Trained(fitted.theta[None], torch.zeros(1).double())
    slope = Walk(refits, "lookahead", 0.1, 1).slope(data, w, here)

    def gradient(A, b):
        parts = torch.autograd.grad(
            nn.functional.cross_entropy(fitted.task.model(A), b), fitted.task.model.parameters()
        )
        return torch.cat([part.reshape(-1) for part in parts])

    clean = gradient(V, u)
    products = torch.stack([gradient(X[i : i + 1], y[i : i + 1]) @ clean for i in range(86)])
    target = products.clamp(min=0)  # Ren et al. (2018), Eq. 8
    moved = lookahead_step(w, slope, 100.0)
    assert torch.allclose(moved, 86 * target / target.sum(), atol=2e-4)
    near = lookahead_step(w, slope, 0.01)
    assert divergence(near / 86, w / 86) == pytest.approx(0.01, rel=1e-9)
    assert lookahead_step(w, slope.abs(), 0.01) is None


def test_effective_rows():
    assert effective_n(torch.ones(7)) == pytest.approx(7)
    assert effective_n(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_n(torch.tensor([2.0, 2, 1, 0])) == pytest.approx(25 / 9)


def test_class_weights_are_those_of_scikit_learn_and_are_returned_where_nothing_is_better():
    train, guide, test = unbalanced()
    model = LogisticRegression(tol=1e-10, max_iter=1000).fit(*train)
    asked = {"train": train, "validation": guide, "test": test, "bootstrap": FEW}
    found = holds(selection.reweight(model, steps=2, radius=2.0, **asked))
    assert found.start == "class weights" and found.steps == 0 and not found.expects_gain
    assert "No gain expected" in found.verdict and "class weights are returned" in found.verdict
    assert "the loss (log loss) changes" in found.verdict
    balanced = LogisticRegression(
        class_weight="balanced", tol=1e-12, solver="newton-cg", max_iter=10_000
    ).fit(*train)
    loss = log_loss(test[1], balanced.predict_proba(test[0]))
    assert found.models["these"].loss.value == pytest.approx(loss, rel=1e-5)
    assert found.actual.value == pytest.approx(
        loss - found.models["equal weights"].loss.value, rel=1e-4
    )
    assert found.actual_beyond.value == 0
    assert found.effective_n == pytest.approx(86**2 / (43**2 * (1 / 6 + 1 / 80)))
    assert found.comparison().shape == (3, 6)


def test_wrong_labels_lose_weight_and_the_refit_gains(noisy):
    train, guide, test, wrong = noisy
    train, guide, test = map(tensors, (train, guide, test))
    found = holds(
        selection.reweight(
            softmax(train), NEWTON, guide, test=test, steps=3, radius=0.15, bootstrap=FEW
        )
    )
    assert found.expects_gain and found.actual.high < 0 and found.actual_beyond.high < 0
    assert float(found.w.sum()) == pytest.approx(150) and float(found.w.min()) > 0
    wrong = torch.tensor(wrong)
    assert found.w[wrong].mean() < 0.6 * found.w[~wrong].mean()
    assert found.path[found.steps].effective_n == pytest.approx(found.effective_n)
    chosen = found.frame().query("chosen")
    assert list(chosen.index) == [found.steps]


def test_a_path_that_ends_early_keeps_what_it_has(noisy):
    train, guide, _, _ = noisy
    fitted = softmax(tensors(train))
    found = selection.reweight(
        fitted, Failing({4}), tensors(guide), steps=2, radius=0.1, bootstrap=FEW
    )
    holds(found, figure=False)
    assert len(found.path) < 3 and any("it diverged" in note for note in found.notes)
    assert not found.is_confirmed


# -- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_selected_is_refused_and_the_way_out_works(noisy):
    train, guide, test, _ = noisy
    train, guide, test = map(tensors, (train, guide, test))
    fitted = softmax(train)
    subset, reweight = selection.subset, selection.reweight
    ranking = uw.GradientDot().fit(fitted.task, train)
    few = (guide[0][:3], guide[1][:3])
    missing = (test[0].clone(), test[1])
    missing[0][2, 0] = torch.nan
    bad = [
        (lambda: subset(fitted, 0.7, "best", validation=guide), SpecError, "'best'"),
        (lambda: subset(fitted, 70, "drop", validation=guide), SpecError, "keep=70"),
        (lambda: subset(fitted, 0.7, "drop"), DataError, "no validation set"),
        (lambda: subset(fitted, 0.7, "drop", validation=few), DataError, "3 validation"),
        (lambda: subset(fitted, 0.7, "drop", validation=train), DataError, "as training and as"),
        (lambda: subset(fitted, validation=guide), SpecError, "no recipe"),
        (
            lambda: subset(fitted, 0.7, "drop", validation=guide, test=guide, recipe=NEWTON),
            DataError, "as validation and as test",
        ),
        (
            lambda: subset(fitted, 0.7, "drop", validation=guide, test=missing, recipe=NEWTON),
            NonFinite, "example 2, loss nan",
        ),
        (lambda: reweight(fitted, NEWTON, missing, test=guide), NonFinite, "validation data"),
        (lambda: subset(ranking, 0.7, "drop", validation=guide), NotOffered, "θ̂ moves to"),
        (lambda: reweight(fitted, None, guide), SpecError, "no recipe"),
        (lambda: reweight(fitted, NEWTON, guide, steps=0), SpecError, "steps=0"),
        (lambda: reweight(fitted, NEWTON, guide, radius="2"), SpecError, "radius='2'"),
        (lambda: reweight(fitted, NEWTON, guide, rule="drop"), SpecError, "'drop'"),
        (lambda: reweight(ranking, NEWTON, guide), NotOffered, "no derivatives"),
        (lambda: reweight(fitted, Failing({1}), guide), NotConverged, "it diverged"),
    ]  # fmt: skip
    for call, error, said in bad:
        with pytest.raises(error, match=said) as caught:
            call()
        assert isinstance(caught.value, UpweightError)
        assert str(caught.value).count("\n  ") == 3
    scores = fitted.attribute(guide)
    with pytest.raises(MissingContext, match="without it"):
        subset(replace(scores, context=None), 0.7, "drop")
    # The ways out, as said.
    subset(fitted, 0.7, "drop", validation=guide, bootstrap=FEW)
    reweight(ranking, NEWTON, guide, rule="lookahead", steps=1, bootstrap=FEW)
