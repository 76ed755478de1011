"""Ranking a pool against its definition: relabelling, autograd by hand, and refits."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.testing import assert_close

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import acquisition
from upweight.applications.acquired import _balanced
from upweight.applications.pool_ranking import _greedy
from upweight.errors import (
    DataError,
    NonFinite,
    NotConverged,
    NotOffered,
    ShapeError,
    SpecError,
    UnsupportedModel,
)
from upweight.training.retrain import retrain

NEWTON = uw.training.Newton(tol=1e-9)
EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())


def iris():
    X, y = (torch.tensor(part) for part in load_iris(return_X_y=True))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    X, y = ((X - X.mean(dim=0)) / X.std(dim=0))[order], y[order]
    return (X[:21], y[:21]), (X[21:80], y[21:80]), (X[80:110], y[80:110]), (X[110:], y[110:])


def softmax(train, dtype=torch.float64):
    task = uw.Task(nn.Linear(4, 3).double(), uw.CrossEntropy(), uw.L2(0.02))
    found = task.moved_to(NEWTON.prepare(task, uw.as_data(train)).center)
    return uw.Task(found.model.to(dtype), uw.CrossEntropy(), uw.L2(0.02))


def fitted(train, method=EXACT):
    return method.fit(softmax(train), train)


def by_hand(task, train, pool, validation):
    """S_c(x) from the Hessian of the objective by autograd, a gradient at a time."""
    flat = task.theta()

    def loss(theta, X, y):
        return nn.functional.cross_entropy(X @ theta[:12].reshape(3, 4).T + theta[12:], y)

    def objective(theta):
        return loss(theta, *train) + 0.01 * (theta * theta).sum()

    H = torch.autograd.functional.hessian(objective, flat)
    gradient = torch.func.grad(loss)
    v = torch.linalg.solve(H, gradient(flat, *validation))
    rows = [[gradient(flat, x[None], torch.tensor([c])) @ v for c in range(3)] for x in pool]
    return -torch.tensor(rows) / len(train[0])


def test_the_expected_gain_is_its_formula_and_half_of_the_expected_size():
    train, pool, validation, _ = iris()
    model = fitted(train)
    S = by_hand(model.task, train, pool[0], validation)
    with torch.no_grad():
        p = model.task.model(pool[0]).softmax(dim=1)
    found = holds(acquisition.rank(model, pool[0], validation, batch=5))
    assert_close(found.probabilities, p)
    assert_close(-found.predicted, (p * (-S).clamp(min=0)).sum(dim=1))
    assert_close((p * S).sum(dim=1), torch.zeros(59).double(), atol=1e-12, rtol=0)
    assert_close(-found.predicted, (p * S.abs()).sum(dim=1) / 2)
    pseudo = holds(acquisition.rank(model, pool, validation, "pseudo", batch=5))
    assert_close(pseudo.predicted, S.gather(1, p.argmax(dim=1, keepdim=True))[:, 0])
    assert not found.is_confirmed and found.actual is None


@pytest.mark.parametrize("method", [EXACT, uw.Influence(uw.EKFAC(), damping=0.1, tolerance=0.0)])
def test_scores_of_new_examples_are_those_of_training_examples_relabelled(method):
    train, pool, validation, _ = iris()
    model = fitted(train, method)
    S = model.label_influence(train, range(3), validation)
    own = S.gather(2, train[1].expand(30, 21)[..., None])[..., 0]
    assert_close(own, model.attribute(validation).values)
    moved = model.relabel_influence(4, 2, validation)
    assert_close(S[:, 4, 2] - own[:, 4], moved)
    small = acquisition.rank(model, pool[0][:7], validation, batch=3)
    whole = acquisition.rank(model, pool[0], validation, batch=3)
    assert_close(small.predicted, whole.predicted[:7])


def test_a_score_is_the_slope_of_the_refitted_loss_in_the_weight_of_the_example():
    train, pool, validation, _ = iris()
    model = fitted(train)
    step = 1e-3
    both = (torch.cat([train[0], pool[0][:1]]), torch.cat([train[1], torch.tensor([2])]))
    weights = torch.ones(2, 22, dtype=torch.float64)
    weights[:, -1] = torch.tensor([step, -step])
    # The objective of 22 rows has 1/22 in place of 1/21.
    again = retrain(NEWTON, model.task, both, weights * 22 / 21, validation, uw.Loss())
    slope = (again.values[0] - again.values[1]).mean() / (2 * step)
    S = model.label_influence((pool[0][:1], pool[1][:1]), [0, 1, 2], validation).mean(dim=0)
    assert_close(S[0, 2], slope, rtol=1e-5, atol=0)


def test_the_diverse_batch_maximizes_each_determinant_in_turn():
    draw = torch.Generator().manual_seed(1)
    gain = torch.rand(9, generator=draw).double()
    u = torch.randn(9, 6, generator=draw).double()
    unit = u / u.norm(dim=1, keepdim=True)
    kernel = gain[:, None] * (unit @ unit.T) * gain
    expected = []
    for _ in range(4):
        dets = {
            i: float(torch.linalg.det(kernel[[*expected, i]][:, [*expected, i]]))
            for i in range(9)
            if i not in expected
        }
        expected.append(max(dets, key=dets.get))
    assert _greedy(gain, u, 4).tolist() == expected


def test_a_diverse_batch_takes_one_of_equal_examples_and_a_plain_one_takes_all():
    train, pool, validation, _ = iris()
    model = fitted(train)
    best = int(acquisition.rank(model, pool, validation, batch=1).chosen)
    X = torch.cat([pool[0], pool[0][[best] * 4]])
    copies = {best, *range(59, 63)}
    diverse = acquisition.rank(model, X, validation, batch=5, diverse=True)
    plain = holds(acquisition.rank(model, X, validation, batch=5), figure=False)
    assert len(copies & {*diverse.chosen.tolist()}) == 1
    assert copies == {*plain.chosen.tolist()}
    every = acquisition.rank(model, X, validation, batch=63, diverse=True)
    assert sorted(every.chosen.tolist()) == list(range(63))


def test_two_classes_by_one_logit_are_those_of_a_softmax_and_of_scikit_learn():
    train, pool, validation, _ = iris()
    two = [(X, (y == 2).long()) for X, y in (train, pool, validation)]
    (X, y), (P, _), (V, v) = two
    estimator = LogisticRegression(C=3.0, tol=1e-12).fit(X.numpy(), y.numpy())
    of_sklearn = acquisition.rank(
        estimator, P.numpy(), (V.numpy(), v.numpy()), batch=4, train=(X.numpy(), y.numpy())
    )
    assert_close(of_sklearn.probabilities, torch.tensor(estimator.predict_proba(P.numpy())))
    task = uw.Task(nn.Linear(4, 1).double(), uw.Bernoulli())
    with torch.no_grad():
        task.model.weight.copy_(torch.tensor(estimator.coef_))
        task.model.bias.copy_(torch.tensor(estimator.intercept_))
    data = [(A, b[:, None].double()) for A, b in ((X, y), (V, v))]
    # sklearn's penalty is on the weights: with it the Hessian is that of the estimator.
    weights = lambda params: (params["weight"] ** 2).sum() / (2 * 3.0 * 21)  # noqa: E731
    task = uw.Task(task.model, uw.Bernoulli(), weights)
    own = acquisition.rank(EXACT.fit(task, data[0]), P, data[1], batch=4)
    assert_close(of_sklearn.predicted, own.predicted)
    holds(of_sklearn, figure=False)
    assert bool((of_sklearn.predicted <= 0).all())


def test_a_method_that_knows_training_examples_only_says_so():
    train, pool, validation, _ = iris()
    with pytest.raises(NotOffered):
        acquisition.rank(fitted(train, uw.FeatureSimilarity()), pool, validation, batch=3)


def test_what_cannot_be_ranked_is_refused_with_a_way_out():
    train, pool, validation, _ = iris()
    model = fitted(train)
    with pytest.raises(SpecError, match="expected"):
        acquisition.rank(model, pool, validation, "true")
    with pytest.raises(SpecError, match="batch=25"):
        acquisition.rank(model, pool, validation, batch=60)
    assert len(acquisition.rank(model, pool, validation, batch=25).chosen) == 25
    with pytest.raises((DataError, ShapeError)):
        acquisition.rank(model, pool[0][:0], validation)
    bad = pool[0].clone()
    bad[3, 1] = torch.nan
    with pytest.raises(NonFinite, match="leave such examples out"):
        acquisition.rank(model, bad, validation)
    line = uw.Task(nn.Linear(4, 1).double(), uw.SquaredError(), uw.L2(0.1))
    train = (train[0], train[0][:, :1])
    line = line.moved_to(NEWTON.prepare(line, uw.as_data(train)).center)
    with pytest.raises(UnsupportedModel):
        acquisition.rank(EXACT.fit(line, train), pool[0], train)


def test_float32_ranks_as_float64_does():
    train, pool, validation, _ = iris()
    double = acquisition.rank(fitted(train), pool, validation, batch=5)
    cut = [(X.float(), y) for X, y in (train, pool, validation)]
    single = EXACT.fit(softmax(train, torch.float32), cut[0])
    found = acquisition.rank(single, cut[1], cut[2], batch=5)
    assert_close(found.predicted, double.predicted, rtol=1e-3, atol=1e-6)


def test_the_predicted_class_with_fewest_labels_is_drawn_first():
    predicted = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    draw = torch.Generator().manual_seed(0)
    chosen = _balanced(predicted, torch.tensor([5, 1, 3]), 4, draw)
    assert sorted(predicted[chosen].tolist()) == [0, 1, 1, 2]


def small(**changes):
    train, pool, validation, test = iris()
    given = {
        "labelled": train, "pool": pool[0], "oracle": pool[1], "validation": validation,
        "test": test, "batch": 4, "rounds": 2, "repeats": 2,
    } | changes  # fmt: skip
    task = uw.Task(nn.Linear(4, 3).double(), uw.CrossEntropy(), uw.L2(0.02))
    recipe = given.pop("recipe", uw.training.Newton(tol=1e-7))
    return acquisition.curve(recipe, given.pop("task", task), **given)


def test_the_curve_is_that_of_refits_by_scikit_learn():
    train, pool, validation, test = iris()
    found = holds(small(strategies=acquisition.STRATEGIES))
    X, y = torch.cat([train[0], pool[0]]), torch.cat([train[1], pool[1]])

    def right(rows, extra=False):
        A, b = X[rows], y[rows]
        if extra:
            A, b = torch.cat([A, validation[0]]), torch.cat([b, validation[1]])
        model = LogisticRegression(C=1 / (0.02 * len(A)), fit_intercept=False, tol=1e-9)
        ones = np.ones((len(A), 1))  # the penalty is on the intercept too
        model.fit(np.hstack([A.numpy(), ones]), b.numpy())
        return model.predict(np.hstack([test[0].numpy(), np.ones((40, 1))])) == test[1].numpy()

    for s in range(len(found.strategies)):
        bought = found.bought[s, 0].tolist()
        assert len({*bought}) == 8 and min(bought) >= 21
        for r in range(3):
            rows = [*range(21), *bought[: 4 * r]]
            assert found.right[s, 0, r].tolist() == right(rows).tolist()
        assert bool((found.right[s, :, 0] == found.right[0, :, 0]).all())
    guided = found.strategies.index("expected gain")
    rows = [*range(21), *found.bought[guided, 0].tolist()]
    assert found.right_with_validation[guided, 0, 2].tolist() == right(rows, True).tolist()
    first = acquisition.rank(fitted(train), pool, validation, batch=4)
    assert found.bought[guided, 0, :4].tolist() == (first.chosen + 21).tolist()
    assert math.isclose(
        float(found.predicted[guided, 0, 0]), float(first.predicted[first.chosen].sum()),
        rel_tol=1e-5,
    )  # fmt: skip
    gap = found.difference("expected gain", "random").value
    assert math.isclose(
        gap, found.accuracy("expected gain").value - found.accuracy("random").value, abs_tol=1e-12
    )
    assert found.labels_to("random", "random") <= 8


class Failing:
    """Newton that fails where the data hold the first labelled example, or always."""

    def __init__(self, always=False):
        self.always = always

    def __repr__(self):
        return f"Failing({self.always})"

    def prepare(self, task, train):
        first = iris()[0][0][0]
        if self.always or bool((train.take(range(len(train)))[0] == first).all(dim=1).any()):
            raise NotConverged("required", "given", "cause", "way out")
        return uw.training.Newton(tol=1e-7).prepare(task, train)


def test_a_start_with_a_failed_fit_is_left_out_and_noted():
    found = holds(small(recipe=Failing(), repeats=5, strategies=("random", "entropy")))
    assert found.right.shape[1] < 5
    assert any("left out" in note for note in found.notes)
    with pytest.raises(NotConverged):
        small(recipe=Failing(always=True), strategies=("random",))
    holds(small(strategies=("random",), repeats=1), figure=False)


def test_a_simulation_that_cannot_be_run_is_refused_with_a_way_out():
    with pytest.raises(SpecError, match="'random'"):
        small(strategies=("margin",))
    with pytest.raises(SpecError, match="rounds=14"):
        small(rounds=15)
    with pytest.raises(SpecError):
        small(strategies=("random",)).accuracy("entropy")
    with pytest.raises(ShapeError, match="one class"):
        small(oracle=iris()[1][1][:-1])
    import upweight.adapters.sklearn as sk

    train, *_ = iris()
    X, y = (part.numpy() for part in train)
    task, _ = sk.task(LogisticRegression(tol=1e-9).fit(X, y), X, y)
    with pytest.raises(UnsupportedModel, match=r"torch\.nn\.Linear"):
        small(task=task)
