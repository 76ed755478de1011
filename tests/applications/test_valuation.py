"""Worth against sums by hand, refits by scikit-learn, and the laws of a payout."""

from decimal import Decimal

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

import upweight as uw
import upweight.adapters.sklearn as sk
from tests.applications.outcomes import holds
from upweight.applications import payout, valuation
from upweight.errors import (
    DataError,
    MissingContext,
    NotOffered,
    ShapeError,
    SpecError,
    UpweightError,
)
from upweight.evaluation import Bootstrap
from upweight.scores import Scores, Unit

FEW = Bootstrap(resamples=200)


def cancer(n=160, q=60, d=6):
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    X, y = torch.tensor(X[:, :d]), torch.tensor(y)
    return (X[:n], y[:n]), (X[n : n + q], y[n : n + q])


def task(train, penalty=0.01, d=6):
    given = uw.Task(nn.Linear(d, 2).double(), uw.CrossEntropy(), uw.L2(penalty))
    trainer = uw.training.Newton().prepare(given, uw.as_data(train))
    return given.moved_to(trainer(torch.ones(1, len(train[0])).double()).theta[0])


@pytest.fixture(scope="module")
def neighbours():
    train, queries = cancer()
    return uw.KNNShapley(5).fit(task(train), train).attribute(queries)


@pytest.fixture(scope="module")
def influence():
    train, queries = cancer()
    fitted = uw.Influence(uw.Hessian()).fit(task(train), train)
    return fitted, fitted.attribute(queries)


GIVERS = np.array([f"giver {i % 7}" for i in range(160)])


# -- values ---------------------------------------------------------------------------------------


def test_values_are_means_with_their_error_and_their_sum(neighbours):
    found = holds(valuation.values(neighbours))
    by_hand = -neighbours.values.numpy()
    np.testing.assert_allclose(found.predicted, by_hand.mean(0), atol=1e-15)
    error = by_hand.std(0, ddof=1) / 60**0.5
    np.testing.assert_allclose(found.standard_errors, error, atol=1e-15)
    drawn = np.random.default_rng(0).integers(60, size=(4000, 60))
    resampled = by_hand[:, :20][drawn].mean(1).std(0)
    np.testing.assert_allclose(found.standard_errors[:20], resampled, rtol=0.1)
    assert found.owed == pytest.approx(found.total.value, abs=1e-12)
    (X, y), (Xq, yq) = cancer()
    nearest = torch.cdist(Xq, X).argsort(dim=1)[:, :5]
    share = float((y[nearest] == yq[:, None]).double().mean())
    assert found.owed == pytest.approx(share, abs=1e-12)
    table = found.frame()
    assert list(table["value"]) == sorted(table["value"], reverse=True)
    assert "0.9" in found.verdict
    by_giver = holds(valuation.values(neighbours, contributors=GIVERS))
    assert by_giver.total.value == pytest.approx(found.total.value, abs=1e-12)
    for k, name in enumerate(by_giver.names):
        assert float(by_giver.predicted[k]) == pytest.approx(
            float(found.predicted[GIVERS == name].sum()), abs=1e-12
        )


def test_a_measure_of_success_has_the_other_sign(influence):
    fitted, losses = influence
    _, queries = cancer()
    success = valuation.values(fitted.attribute(queries, uw.LogProb()))
    torch.testing.assert_close(success.predicted, valuation.values(losses).predicted)
    own = fitted.attribute(queries, lambda outputs, targets: outputs[:, 0])
    with pytest.raises(SpecError, match="better="):
        valuation.values(own)
    lower, higher = (valuation.values(own, better=way).predicted for way in ("lower", "higher"))
    torch.testing.assert_close(lower, -higher)
    assert valuation.values(losses).owed == pytest.approx(
        valuation.values(losses).total.value, abs=1e-9
    )


def test_what_has_no_value_is_refused(neighbours, influence, tmp_path):
    fitted, _ = influence
    train, queries = cancer()
    ranks = uw.GradientDot().fit(fitted.task, train).attribute(queries)
    with pytest.raises(SpecError, match="only rank"):
        valuation.values(ranks)
    with pytest.raises(ShapeError, match="one label per column"):
        valuation.values(neighbours, contributors=GIVERS[1:])
    valuation.values(neighbours, contributors=GIVERS)  # the way out
    with pytest.raises(SpecError, match="lower"):
        valuation.values(neighbours, better="more")
    one = uw.KNNShapley().fit(fitted.task, train).attribute((queries[0][:1], queries[1][:1]))
    assert "no interval" in holds(valuation.values(one)).verdict


# -- batches --------------------------------------------------------------------------------------


def test_dropping_is_what_scikit_learn_refits():
    (X, y), (Xq, yq) = (tuple(a.numpy() for a in part) for part in cancer())
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(X, y)
    batches = {"first": range(15), "odd": range(31, 160, 10), "one": [7]}
    found = holds(
        valuation.worth(model, batches, (Xq, yq), train=(X, y), bootstrap=FEW), figure=False
    )
    for k, rows in enumerate(batches.values()):
        kept = [i for i in range(160) if i not in rows]
        other = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(X[kept], y[kept])
        by_hand = log_loss(yq, other.predict_proba(Xq)) - log_loss(yq, model.predict_proba(Xq))
        assert found.actual_means[k].value == pytest.approx(by_hand, abs=1e-5)
        assert found.predicted_means[k].value == pytest.approx(by_hand, rel=0.3)
    assert found.agreement.value > 0.99
    right = valuation.worth(
        model, batches, (Xq, yq), valuation.Correct(), train=(X, y), bootstrap=FEW
    )
    accuracy = (model.predict(Xq) == yq).mean()
    assert float(right.before.mean()) == pytest.approx(accuracy)
    assert "accuracy" in right.verdict


def test_buying_is_predicted_and_refitted(influence):
    fitted, _ = influence
    _, queries = cancer()
    X, y = cancer(n=400)[0]
    pool = X[220:], y[220:]
    wrong = X[220:], 1 - y[220:]
    recipe = uw.training.Newton()
    found = holds(
        valuation.worth(
            fitted, [range(6), range(6, 9)], queries, pool=pool, recipe=recipe, bootstrap=FEW
        )
    )
    (train_X, train_y), _ = cancer()
    for k, rows in enumerate(([*range(6)], [6, 7, 8])):
        both = torch.cat([train_X, pool[0][rows]]), torch.cat([train_y, pool[1][rows]])
        # The objective keeps its 1/n: the penalty on the mean of all is n/N of it.
        more = uw.Task(fitted.task.model, uw.CrossEntropy(), uw.L2(0.01 * 160 / len(both[0])))
        trainer = recipe.prepare(more, uw.as_data(both))
        theta = trainer(torch.ones(1, len(both[0])).double()).theta[0]
        by_hand = float(more.losses(theta, queries).mean() - found.before.mean())
        assert found.actual_means[k].value == pytest.approx(by_hand, abs=1e-9)
        assert found.predicted_means[k].value == pytest.approx(by_hand, rel=0.4, abs=2e-4)
    bad = valuation.worth(fitted, range(60), queries, pool=wrong, recipe=recipe, bootstrap=FEW)
    assert bad.actual_means[0].value > 0
    assert bad.predicted_means[0].value > 0
    assert bad.is_confirmed
    alone = holds(valuation.worth(fitted, range(6), queries, pool=wrong, bootstrap=FEW))
    assert not alone.is_confirmed
    assert "no refit" in alone.verdict


def test_batches_that_mean_nothing_are_refused(influence):
    fitted, _ = influence
    train, queries = cancer()
    for batches, error in (([], ShapeError), ([[0, 0]], ShapeError), (range(160), ShapeError)):
        with pytest.raises(error):
            valuation.worth(fitted, batches, queries)
    with pytest.raises(ShapeError, match="must accept the pool"):
        valuation.worth(
            fitted, [0], queries, pool=(train[0][:, :2], train[1]), recipe=uw.training.Newton()
        )
    values_only = uw.KNNShapley().fit(fitted.task, train)
    for more in ({}, {"pool": train}):
        with pytest.raises(NotOffered):
            valuation.worth(values_only, [0], queries, **more)


def test_a_method_by_layer_answers_too():
    train, queries = cancer()
    by_layer = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task(train), train)
    found = valuation.worth(
        by_layer, [range(20), range(20, 50), [3]], queries, recipe=uw.training.Newton(),
        bootstrap=FEW,
    )  # fmt: skip
    assert found.agreement.value > 0.8


def test_valuations_compare(neighbours, influence):
    fitted, losses = influence
    _, queries = cancer()
    both = {"neighbours": valuation.values(neighbours), "influence": valuation.values(losses)}
    alone = holds(valuation.compare(both, bootstrap=FEW))
    assert alone.orders["neighbours", "influence"].value == pytest.approx(
        float(
            np.corrcoef(*[v.predicted.argsort().argsort().double() for v in both.values()])[0, 1]
        ),
        abs=0.02,
    )  # ties aside
    dropped = valuation.worth(
        fitted, [np.flatnonzero(GIVERS == g) for g in np.unique(GIVERS)], queries,
        recipe=uw.training.Newton(), bootstrap=FEW,
    )  # fmt: skip
    found = holds(valuation.compare(both, dropped, bootstrap=FEW))
    assert found.agreement["influence"].value > 0.9
    assert found.is_confirmed
    assert "influence" in found.verdict
    with pytest.raises(SpecError):
        valuation.compare({"one": both["influence"]})
    by_giver = valuation.values(losses, contributors=GIVERS)
    with pytest.raises(ShapeError):
        valuation.compare({"a": by_giver, "b": by_giver})


# -- payouts --------------------------------------------------------------------------------------


def test_a_statement_adds_up_to_the_cent_and_splits_change_nothing(neighbours, influence):
    for scores, floor in ((neighbours, None), (neighbours, 0), (influence[1], 0)):
        found = holds(payout.statement(scores, GIVERS, "1000.01", floor, bootstrap=FEW))
        assert sum(found.payouts.values()) == Decimal("1000.01")
    whole = payout.statement(neighbours, GIVERS, 1000, None, bootstrap=FEW)
    split = np.array([f"{g} {i % 5}" if g == "giver 3" else g for i, g in enumerate(GIVERS)])
    parts = payout.statement(neighbours, split, 1000, None, bootstrap=FEW)
    paid = {name: float(p) for name, p in zip(whole.contributors, _exact(whole), strict=True)}
    again = {name: float(p) for name, p in zip(parts.contributors, _exact(parts), strict=True)}
    together = sum(p for name, p in again.items() if name.startswith("giver 3 "))
    assert together == pytest.approx(paid["giver 3"], abs=1e-9)
    for name in paid:
        if name != "giver 3":
            assert again[name] == pytest.approx(paid[name], abs=1e-9)


def _exact(statement):
    return statement._paid(statement.predicted[None])[0] / 100


def test_rounding_goes_to_the_largest_remainders():
    assert payout.rounded(torch.tensor([33.5, 33.25, 33.25]).double(), 100) == (34, 33, 33)
    assert payout.rounded(torch.tensor([0.5, 0.5, -1.0]).double(), 0) == (1, 0, -1)
    third = torch.full((3,), 100 / 3, dtype=torch.float64)
    assert payout.rounded(third, 100) == (34, 33, 33)


def test_a_floor_is_kept_and_the_others_share_the_rest():
    worth = torch.tensor([[6.0, 3.0, 1.0, -5.0], [1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -2.0, -3.0]])
    paid = payout.divided(worth.double(), 1000, 0)
    assert paid[0].tolist() == pytest.approx([600, 300, 100, 0])
    assert bool(paid[2].isnan().all())
    least = payout.divided(worth.double(), 1000, 150)
    # 700 among 6 and 3 once the two others are lifted to 150
    assert least[0].tolist() == pytest.approx([700 * 6 / 9, 700 * 3 / 9, 150, 150])
    assert payout.divided(worth.double()[:1], 100, None)[0].tolist() == pytest.approx(
        [120, 60, 20, -100]
    )


def test_a_statement_says_what_it_hangs_on(neighbours):
    found = payout.statement(neighbours, GIVERS, 1000, bootstrap=FEW)
    by_point = -neighbours.group(GIVERS).values
    full = by_point.mean(0) / by_point.mean(0).sum() * 1000
    for j in (0, 17):
        rest = torch.cat([by_point[:j], by_point[j + 1 :]]).mean(0)
        moved = (rest / rest.sum() * 1000 - full).abs().sum() / 2000
        assert float(found.moved_by_point[j]) == pytest.approx(float(moved), abs=1e-12)
    assert any(f"validation point {int(found.moved_by_point.argmax())} " in n for n in found.notes)
    low, high = found.intervals[0].low, found.intervals[0].high
    assert low < float(full[0]) < high
    assert found.shared == (0,) * 7
    X, y = cancer()[0]
    twice = torch.cat([X, X[:3]]), torch.cat([y, y[:3]])
    more = uw.KNNShapley(5).fit(task(twice), twice).attribute(cancer()[1])
    copies = payout.statement(more, [*GIVERS, *["thief"] * 3], 1000, bootstrap=FEW)
    assert dict(zip(copies.contributors, copies.shared, strict=True)) == {
        f"giver {k}": int(k < 3) for k in range(7)
    } | {"thief": 3}
    assert any("copy is paid" in note for note in copies.notes)


def test_nobody_is_paid_for_rows_without_a_contributor(neighbours):
    givers = [None, *GIVERS[1:]]
    for ask in (
        lambda: payout.statement(neighbours, givers, 1000, bootstrap=FEW),
        lambda: payout.if_copied(neighbours, givers, 1000, who=GIVERS[1]),
    ):
        with pytest.raises(DataError, match=r"no label at places \[0\]"):
            ask()
    named = [giver or "unknown" for giver in givers]  # the way out
    assert "unknown" in payout.statement(neighbours, named, 1000, bootstrap=FEW).payouts


def test_refits_confirm_a_statement(influence):
    fitted, scores = influence
    (X, y), (Xq, yq) = cancer()
    found = holds(
        payout.statement(scores, GIVERS, 1000, recipe=uw.training.Newton(), bootstrap=FEW)
    )
    kept = torch.tensor(GIVERS != "giver 2")
    weight = uw.L2(0.01 * 160 / int(kept.sum()))
    less = uw.Task(fitted.task.model, uw.CrossEntropy(), weight)
    trainer = uw.training.Newton().prepare(less, uw.as_data((X[kept], y[kept])))
    theta = trainer(torch.ones(1, int(kept.sum())).double()).theta[0]
    losses = less.losses(theta, (Xq, yq)) - fitted.task.losses(fitted.theta, (Xq, yq))
    torch.testing.assert_close(found.actual[:, 2], losses.detach(), rtol=0, atol=1e-8)
    assert found.agreement.value > 0.95
    assert found.is_confirmed
    assert found.negative


def test_copies_are_rewarded_by_neighbours_and_it_is_said(neighbours, influence):
    found = holds(payout.if_copied(neighbours, GIVERS, 1000, "giver 1"))
    X, y = cancer()[0]
    rows = torch.tensor(GIVERS == "giver 1").nonzero()[:, 0]
    both = torch.cat([X, X[rows]]), torch.cat([y, y[rows]])
    again = uw.KNNShapley(5).fit(task(both), both).attribute(cancer()[1])
    other = payout.statement(again, [*GIVERS, *["copy of giver 1"] * len(rows)], 1000)
    assert found.actual == other.payouts
    assert found.actual["copy of giver 1"] > 0
    with pytest.raises(SpecError, match="recipe"):
        payout.if_copied(influence[1], GIVERS, 1000, "giver 1")
    refitted = payout.if_copied(influence[1], GIVERS, 1000, "giver 1", recipe=uw.training.Newton())
    assert sum(refitted.actual.values()) == 1000
    with pytest.raises(SpecError, match="nobody"):
        payout.if_copied(neighbours, GIVERS, 1000, "nobody")


def test_what_cannot_be_paid_is_refused(neighbours, influence, tmp_path):
    nan = float("nan")
    for budget, floor in ((0, 0), (-5, 0), (nan, 0), (10.005, 0), (100, 20), (100, -1), ("x", 0)):
        with pytest.raises(SpecError):
            payout.statement(neighbours, GIVERS, budget, floor)
    with pytest.raises(ShapeError):
        payout.statement(neighbours, GIVERS[:-1], 100)
    negative = Scores(
        torch.ones(3, 160).double(), Unit.DERIVATIVE, neighbours.provenance, None, None
    )
    with pytest.raises(DataError, match="worth above 0"):
        payout.statement(negative, GIVERS, 100)
    payout.statement(negative, GIVERS, 100, better="higher")  # the way out
    with pytest.raises(UpweightError, match="finite"):
        Scores(torch.full((3, 160), nan), Unit.VALUE, neighbours.provenance)
    lost = Scores.load(neighbours.save(tmp_path / "scores"))
    assert any("not looked for" in note for note in payout.statement(lost, GIVERS, 100).notes)
    with pytest.raises(MissingContext):
        payout.statement(lost, GIVERS, 100, recipe=uw.training.Newton())
    with pytest.raises(ShapeError, match="one contributor"):
        payout.statement(neighbours, ["me"] * 160, 100, recipe=uw.training.Newton())
    alone = holds(payout.statement(neighbours, ["me"] * 160, 100))
    assert alone.payouts == {"me": Decimal("100.00")}


def test_float32_and_one_validation_point():
    (X, y), (Xq, yq) = cancer()
    small = uw.Task(nn.Linear(6, 2).float(), uw.CrossEntropy())
    scores = uw.KNNShapley(3).fit(small, (X.float(), y)).attribute((Xq[:1].float(), yq[:1]))
    found = holds(payout.statement(scores, GIVERS, 100))
    assert sum(found.cents) == 10_000
    yen = payout.statement(scores, GIVERS, 1001, digits=0)
    assert sum(yen.payouts.values()) == 1001


def test_data_of_a_scikit_learn_model_are_copied_and_bought():
    X, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    X, y = X[order], y[order]
    clf = LogisticRegression(tol=1e-10, max_iter=2000).fit(X[:60], y[:60])
    task, train = sk.task(clf, X[:60], y[:60])
    queries = sk.data(clf, X[60:90], y[60:90])
    neighbours = uw.KNNShapley(k=3).fit(task, train).attribute(queries)
    people = [f"person {i % 3}" for i in range(60)]
    found = holds(payout.if_copied(neighbours, people, 100, who="person 1"), figure=False)
    assert sum(found.after.payouts.values()) == 100
    fitted = uw.Influence(uw.Hessian()).fit(task, train)
    pool = sk.data(clf, X[90:], y[90:])
    bought = valuation.worth(fitted, [range(10)], queries, pool=pool, recipe=uw.training.Newton())
    more = LogisticRegression(tol=1e-10, max_iter=2000)
    more.fit(np.concatenate([X[:60], X[90:100]]), np.concatenate([y[:60], y[90:100]]))
    by_hand = log_loss(y[60:90], more.predict_proba(X[60:90])) - log_loss(
        y[60:90], clf.predict_proba(X[60:90])
    )
    assert float(bought.actual[0].mean()) == pytest.approx(by_hand, rel=1e-3)
