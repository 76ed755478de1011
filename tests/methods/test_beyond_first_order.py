"""How far sums of exact scores are from removals: `health["beyond_first_order"]`."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import train_in_place
from upweight.errors import AssumptionWarning
from upweight.methods import removal
from upweight.scores import Scores

F64 = torch.float64


def regression(n=40, d=5, lam=0.05, dtype=F64, seed=0, heavy=1.0):
    """Ridge at its minimum; the first row weighs `heavy` times as much in its inputs."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=made, dtype=F64)
    x[0] *= heavy
    y = x.sum(dim=1, keepdim=True) + torch.randn(n, 1, generator=made, dtype=F64)
    model, penalty = nn.Linear(d, 1).double(), uw.L2(lam) if lam else uw.NoPenalty()
    task = uw.Task(model, uw.SquaredError(), penalty)
    train_in_place(task, (x, y))
    queries = tuple(torch.randn(6, k, generator=made, dtype=F64) for k in (d, 1))
    if dtype is not F64:
        task = uw.Task(model.to(dtype), uw.SquaredError(), penalty)
        (x, y), queries = (x.to(dtype), y.to(dtype)), tuple(t.to(dtype) for t in queries)
    return uw.Influence(uw.Hessian()).fit(task, (x, y)), (x, y), queries


def output(outputs, targets):
    """m = f(x): linear in θ."""
    return outputs[:, 0]


def known(scores):
    return dict(map(tuple, scores.provenance.health["beyond_first_order"]))


def strongest(row, k):
    ends = [row.sort(descending=d).indices[:k] for d in (False, True)]
    return max(ends, key=lambda at: float(row[at].sum().abs())).tolist()


def test_of_a_linear_measure_and_one_example_it_is_the_leverage():
    """f₋ᵢ − f = −S/(1 − h), so that first order is off by h/(1 − h) of itself."""
    fitted, _, queries = regression()
    scores = fitted.attribute(queries, output)
    h = fitted.leverage()
    at = [strongest(scores.values[q], 1)[0] for q in (0, 1, 3, 4)]
    expected = (h[at] / (1 - h[at])).max()
    assert known(scores)[1] == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_of_the_loss_and_one_example_it_is_what_a_refit_says(lam):
    fitted, (x, y), queries = regression(lam=lam)
    scores = fitted.attribute(queries)
    rows = scores.values[[0, 1, 3, 4]]
    asked = tuple(t[[0, 1, 3, 4]] for t in queries)

    def losses(theta):
        return fitted.task.losses(fitted.task.named(theta), asked)

    found = []
    for q in range(4):
        (i,) = strongest(rows[q], 1)
        kept = torch.arange(len(x)) != i
        a = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], dim=1)
        # The objective keeps its 1/n; the penalty is on weight and bias.
        h = a[kept].T @ a[kept] / len(x) + lam * torch.eye(6, dtype=F64)
        theta = torch.linalg.solve(h, a[kept].T @ y[kept] / len(x))[:, 0]
        change, predicted = losses(theta) - losses(fitted.theta), -rows[:, i]
        found.append(float((change - predicted).norm() / predicted.norm()))
    assert known(scores)[1] == pytest.approx(max(found), rel=1e-6)


def test_of_several_the_step_is_the_minimum_along_the_first_order_one(monkeypatch):
    """Of a quadratic objective without them, which has no slope left in that direction."""
    fitted, (x, y), queries = regression(n=50, heavy=3.0)
    at = []
    measured = removal._measured

    def seen(place, asked, theta, gone):
        at.append((theta, gone))
        return measured(place, asked, theta, gone)

    monkeypatch.setattr(removal, "_measured", seen)
    fitted.attribute(queries)
    groups = [(theta, gone) for theta, gone in at if gone]
    assert sorted({len(gone) for _, gone in groups}) == [1, 5] and len(groups) == 8
    for theta, gone in groups:
        moved = theta.detach().requires_grad_()
        weights = torch.ones(len(x), dtype=F64)
        weights[gone] = 0.0
        task = fitted.task
        losses = task.losses(task.named(moved), (x, y))
        objective = (weights * losses).mean() + task.penalty(task.named(moved), task.layout)
        (slope,) = torch.autograd.grad(objective, moved)
        step = theta - fitted.theta
        assert abs(float(slope @ step)) < 1e-9 * float(slope.norm() * step.norm()) + 1e-15


def test_float32_says_the_same():
    """Differences of measurements that are only rounding say nothing: 4,000 rows in float32."""
    (double, _, q64), (single, _, q32) = (
        regression(4000, dtype=dtype) for dtype in (F64, torch.float32)
    )
    ours, expected = known(single.attribute(q32)), known(double.attribute(q64))
    assert list(ours) == list(expected) == [1, 40, 400]
    assert expected[1] < 0.01 and ours[1] < 0.02
    assert ours[400] == pytest.approx(expected[400], rel=0.05)


def test_an_example_that_alone_holds_a_parameter_leaves_no_minimum():
    made = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=made, dtype=F64)
    x[:, 2] = 0.0
    x[7, 2] = 1.0
    y = torch.randn(30, 1, generator=made, dtype=F64)
    task = uw.Task(nn.Linear(3, 1).double(), uw.SquaredError(), uw.L2(1e-12))
    train_in_place(task, (x, y))
    fitted = uw.Influence(uw.Hessian()).fit(task, (x, y))
    assert float(fitted.leverage()[7]) > 1 - 1e-9
    scores = torch.zeros(4, 30, dtype=F64)
    scores[:, 7] = 1.0  # its own are next to nothing, since its residual is
    asked = fitted._asked((x[:4], y[:4]), uw.Loss())
    found = dict(removal.beyond_first_order(fitted._place, asked, range(4), scores))
    assert found[1] is None


# -- what is said ----------------------------------------------------------------------------------


def test_a_prediction_warns_where_removal_is_more_than_first_order_and_the_way_out_is_right():
    fitted, (x, y), queries = regression(n=40, lam=0.0)
    scores = fitted.attribute(queries)
    assert known(scores)[1] > 0.2
    assert "first order is off by" in scores.against_sizes
    at = strongest(scores.values[0], 4)
    with pytest.warns(AssumptionWarning, match="4 examples.*leverage.*Fitted.removal"):
        scores.predict(drop=torch.tensor(at))
    better = fitted.removal(queries, groups=[at], evaluate="plugin").values[:, 0]
    kept = torch.ones(len(x), dtype=torch.bool)
    kept[at] = False
    a = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], dim=1)
    theta = torch.linalg.lstsq(a[kept], y[kept]).solution[:, 0]
    task = fitted.task
    change = task.losses(task.named(theta), queries)
    change -= task.losses(task.named(fitted.theta), queries)
    torch.testing.assert_close(better, change, rtol=1e-6, atol=1e-9)


def test_between_the_numbers_looked_at_the_larger_counts_and_past_them_it_grows():
    fitted, _, queries = regression(n=400)
    scores = fitted.attribute(queries)
    made = scores.provenance
    for numbers, gone, off in (
        ([(1, 0.1), (4, 0.15), (40, 0.3)], (0.0, 1.0, 2.0, 4.0), False),
        ([(1, 0.1), (4, 0.15), (40, 0.3)], (5.0, 40.0, 41.0, 300.0), True),
        ([(1, 0.01), (4, 0.02), (40, 0.05)], (41.0, 159.0), False),
        ([(1, 0.01), (4, 0.02), (40, 0.05)], (161.0, 400.0), True),
        ([(1, None), (4, 0.1), (40, 0.1)], (0.5, 1.0), True),
        ([(1, 0.3), (4, 0.1), (40, 0.1)], (1.0,), True),
    ):
        of = dataclasses.replace(made, health={**made.health, "beyond_first_order": numbers})
        for k in gone:
            assert bool(of.against_removal(k)) == off, (numbers, k)
    quiet = dataclasses.replace(scores, provenance=dataclasses.replace(
        made, health={**made.health, "beyond_first_order": [(1, 0.1), (4, 0.15), (40, 0.3)]}
    ))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        quiet.predict(drop=range(4))
        quiet.predict(weights=torch.cat([torch.zeros(4), torch.ones(396)]))
        quiet.predict(weights=torch.ones(400))
    for said in ({"drop": range(5)}, {"weights": torch.full((400,), 0.9)}):
        with pytest.warns(AssumptionWarning, match="40 examples"):
            quiet.predict(**said)
    grouped = quiet.group([i // 5 for i in range(400)])  # five in each
    with pytest.warns(AssumptionWarning, match="40 examples"):
        grouped.predict(drop=["3"])


def test_it_is_a_fact_that_is_about_removals_alone(tmp_path):
    fitted, _, queries = regression(n=40, lam=0.0)
    scores = fitted.attribute(queries)
    (fact,) = [each for each in scores.provenance.facts if "leverage" in each.name]
    assert fact.concern and not scores.provenance.against_sizes
    scores.save(tmp_path / "kept")
    kept = Scores.load(tmp_path / "kept")
    assert kept.against_sizes == scores.against_sizes
    assert known(kept) == known(scores)
    without = {k: v for k, v in scores.provenance.health.items() if k != "beyond_first_order"}
    older = dataclasses.replace(scores.provenance, health=without)
    assert "not recorded" in older.against_removal()


@pytest.mark.parametrize("into", [uw.Top(3), uw.GroupSums(["a", "b"] * 20), uw.PerLayer()])
def test_every_reducer_looks_at_the_same_removals(into):
    fitted, _, queries = regression()
    whole = known(fitted.attribute(queries))
    found = fitted.attribute(queries, into=into)
    found = next(iter(found.values())) if isinstance(found, dict) else found
    assert known(found) == pytest.approx(whole)


def test_of_a_resumed_run_the_rows_are_read(tmp_path, monkeypatch):
    fitted, _, queries = regression()
    whole = known(fitted.attribute(queries))
    for folder in (tmp_path / "a", tmp_path / "b"):
        fitted.attribute(queries, into=uw.Shards(folder))
        assert known(Scores.open(folder)) == pytest.approx(whole)
        monkeypatch.setattr(removal.SomeRows, "whole", None)


def test_what_a_measure_of_the_weights_does_by_itself_is_no_error_of_first_order():
    """φ = f(x) + 100 w₀: only f moves further than first order says, by h/(1 − h)."""
    fitted, _, queries = regression(heavy=4.0)

    def phi(task, params, batch, weights):
        outputs, _ = task.call(params, batch)
        return outputs[:1, 0] + 100.0 * weights[0]

    found = fitted.attribute(queries, uw.Functional(phi))
    total = float(found.values[0, 0])
    h, by_theta = float(fitted.leverage()[0]), total - 100.0
    assert strongest(found.values[0], 1) == [0] and abs(by_theta) > 1e-3
    assert known(found)[1] == pytest.approx(abs(by_theta * h / (1 - h) / total), rel=1e-6)


def test_only_exact_scores_of_linear_models_are_held_against_removals(monkeypatch):
    fitted, train, queries = regression()
    others = [
        uw.Influence(uw.Hessian(), damping=0.1),
        uw.Influence(uw.EKFAC()),
        uw.GradientDot(),
    ]
    for method in others:
        found = method.fit(fitted.task, train).attribute(queries)
        assert "beyond_first_order" not in found.provenance.health


def test_by_products_one_query_is_looked_at():
    fitted, train, queries = regression()
    iterative = uw.Influence(uw.Hessian(), solver=uw.solvers.CG(rtol=1e-10)).fit(fitted.task, train)
    ours = known(iterative.attribute(queries))
    one = known(fitted.attribute(tuple(t[:1] for t in queries)))
    assert ours == pytest.approx(one, rel=1e-6)
    assert list(ours) == [1, 4]


def test_a_page_of_removals_asks_what_is_shown(tmp_path):
    from upweight.report import evidence, trust

    fitted, _, queries = regression(n=40, lam=0.0)
    scores, none = fitted.attribute(queries), evidence.Evidence((), None)
    assert not trust.trust(scores, none).has_sizes
    assert trust.trust(scores, none, fitted.removal(queries, evaluate="plugin")).has_sizes
    assert not trust.trust(scores, none, scores.removal()).has_sizes
