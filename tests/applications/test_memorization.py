"""Memorization against its definition: the formula by hand, and refits by scikit-learn."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.testing import assert_close

import upweight as uw
import upweight.adapters.sklearn as sk
from tests.applications.outcomes import holds
from upweight.applications import cross_validation, memorization
from upweight.applications.right_answers import equal_examples
from upweight.errors import (
    NonFinite,
    NotConverged,
    NotOffered,
    ShapeError,
    SpecError,
    UnsupportedModel,
)
from upweight.task.data import Joined

PENALTY = 0.003
NEWTON = uw.training.Newton(tol=1e-9)


def iris(step=3):
    """Every third flower and the products of its sizes, with three labels wrong."""
    X, y = (torch.tensor(part) for part in load_iris(return_X_y=True))
    X, y = X[::step], y[::step].clone()
    X = (X - X.mean(dim=0)) / X.std(dim=0)
    i, j = torch.triu_indices(4, 4)
    X = torch.cat([X, X[:, i] * X[:, j]], dim=1)
    y[[3, 20, 40]] = (y[[3, 20, 40]] + 1) % 3
    return X, y


def softmax(X, y, penalty=PENALTY):
    model = nn.Linear(X.shape[1], int(y.max()) + 1, bias=False).double()
    task = uw.Task(model, uw.CrossEntropy(), penalty=uw.L2(penalty))
    ones = torch.ones(1, len(y), dtype=torch.float64)
    return task.moved_to(NEWTON.prepare(task, uw.as_data((X, y)))(ones).theta[0])


def fitted(X, y, method=None):
    return (method or uw.Influence(uw.Hessian())).fit(softmax(X, y), (X, y))


def by_sklearn(X, y, kept, asked, share_kept=False):
    """p(y) of rows, fitted to those kept by scikit-learn; the objective keeps its 1/n or not."""
    n = len(kept) if share_kept else len(y)
    model = LogisticRegression(C=1 / (n * PENALTY), fit_intercept=False, tol=1e-10, max_iter=5000)
    model.fit(X[kept].numpy(), y[kept].numpy())
    p = model.predict_proba(X[asked].numpy())
    return p[np.arange(len(asked)), y[asked].numpy()]


def test_yes_and_no_is_the_formula_by_hand():
    X, y = iris()
    X, y = X[y < 2], y[y < 2].double()
    model = nn.Sequential(nn.Linear(14, 1, bias=False), nn.Flatten(0)).double()
    task = uw.Task(model, uw.Bernoulli(), penalty=uw.L2(PENALTY))
    ones = torch.ones(1, len(y), dtype=torch.float64)
    task = task.moved_to(NEWTON.prepare(task, uw.as_data((X, y)))(ones).theta[0])
    method = uw.Influence(uw.Hessian()).fit(task, (X, y))
    found = holds(memorization.scores(method))
    f = X @ task.theta()
    p, n = f.sigmoid(), len(y)
    v = p * (1 - p)
    H = X.T @ (v[:, None] * X) / n + PENALTY * torch.eye(14, dtype=torch.float64)
    K = (X * torch.linalg.solve(H, X.T).T).sum(dim=1) / n
    without = f + K * (p - y) / (1 - v * K)
    signs = 2 * y - 1
    assert_close(found.values, (signs * f).sigmoid() - (signs * without).sigmoid())
    # Taken for the curvature of the other rows, H has no leverage of the row's own to take out.
    assert_close(method.loo_outputs("others"), f + K * (p - y))
    with pytest.raises(SpecError, match="'mine'"):
        method.loo_outputs("mine")


def test_refits_of_scikit_learn_say_the_same():
    X, y = iris()
    found = holds(memorization.scores(fitted(X, y), confirm=16, recipe=NEWTON))
    every = list(range(len(y)))
    there = by_sklearn(X, y, every, every)
    actual = [
        there[i] - by_sklearn(X, y, [k for k in every if k != i], [i])[0]
        for i in found.rows.tolist()
    ]
    assert_close(found.actual, torch.tensor(actual), atol=1e-5, rtol=0)
    assert found.is_confirmed and found.pearson.value > 0.99 and 0.9 < found.slope.value < 1.1
    assert found.rows[:2].tolist() == [39, 20]  # an outlier and a wrong label
    assert "agree: Pearson" in found.verdict


def test_an_estimator_is_asked_as_it_is_and_comes_back_so():
    X, y = iris()
    model = LogisticRegression(
        C=1 / (len(y) * PENALTY), fit_intercept=False, tol=1e-9, max_iter=5000
    )
    model.fit(X.numpy(), y.numpy())
    before = model.coef_.copy()
    found = memorization.scores(model, (X.numpy(), y.numpy()), confirm=8)
    ours = memorization.scores(fitted(X, y))
    assert_close(found.values, ours.values, atol=1e-3, rtol=0)
    assert found.is_confirmed and (model.coef_ == before).all()


def test_equal_rows_hide_each_other_unless_they_leave_together():
    X, y = iris()
    twice = torch.cat([X, X[39:40]]), torch.cat([y, y[39:40]])
    once = memorization.scores(fitted(X, y)).values[39]
    apart = holds(memorization.scores(fitted(*twice)))
    together = holds(memorization.scores(fitted(*twice), duplicates="together"))
    assert (39, 50) in apart.duplicates
    assert "hides the others" in apart.notes[0]
    assert "leave together" in together.notes[0]
    assert apart.values[39] < 0.7 * once < 0.7 * together.values[39]
    kept = [i for i in range(51) if i not in (39, 50)]
    every = list(range(51))
    actual = by_sklearn(*twice, every, [39]) - by_sklearn(*twice, kept, [39])
    assert_close(float(together.values[39]), float(actual[0]), atol=0.03, rtol=0)
    # Refits leave the copies out together, too, and ask one of them.
    again = memorization.scores(fitted(*twice), duplicates="together", confirm=8, recipe=NEWTON)
    assert {39, 50} & set(again.rows.tolist()) == {39}
    assert_close(float(again.actual[again.rows == 39]), float(actual[0]), atol=1e-5, rtol=0)


def test_equal_rows_are_told_of_any_data():
    X, y = iris()
    X[7] = X[30]
    y[7] = y[30]
    X[9] = X[31]  # another label: not the same example
    y[9] = y[31] + 1
    expected = [s for s in equal_examples(uw.as_data((X, y))) if 7 in s or 9 in s]
    assert expected == [[7, 30]]
    listed = [(X[i], int(y[i]), f"flower {i % 23}") for i in range(len(y))]
    assert [s for s in equal_examples(uw.as_data(listed)) if 7 in s] == [[7, 30]]


def test_two_data_sets_are_read_as_one():
    X, y = iris()
    both = Joined(uw.as_data((X[:7], y[:7])), uw.as_data((X[7:], y[7:])))
    assert len(both) == len(y)
    assert_close(both.take([2, 30, 6])[0], X[[2, 30, 6]])
    for begin in (0, 3, 7, 11):
        parts = list(both.batches(5, begin))
        assert_close(torch.cat([batch[0] for *_, batch in parts]), X[begin:])
        assert [start for start, *_ in parts] == [begin, *(stop for _, stop, _ in parts[:-1])]


@pytest.fixture(scope="module")
def samples():
    X, y = iris()
    test = X + 0.01, y
    return memorization.by_subsets(
        NEWTON, softmax(X, y), (X, y), test, models=100, measure="probability"
    )


def test_models_of_samples_are_refits_of_scikit_learn(samples):
    X, y = iris()
    assert samples.inside.sum(dim=1).tolist() == [35] * 100  # 70 % of 50
    for s in (0, 31):
        kept = samples.inside[s].nonzero()[:, 0].tolist()
        there = by_sklearn(X, y, kept, list(range(50)), share_kept=True)
        assert_close(samples.right[s], torch.tensor(there), atol=1e-5, rtol=0)


def test_samples_give_means_errors_and_influences_as_written(samples):
    holds(samples)
    for i in (0, 3, 44):
        inside = samples.inside[:, i]
        a, b = samples.right[inside, i].numpy(), samples.right[~inside, i].numpy()
        assert float(samples.actual[i]) == pytest.approx(a.mean() - b.mean())
        error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
        assert float(samples.standard_error[i]) == pytest.approx(error)
        q = samples.right_queries[:, 7].numpy()
        keep = inside.numpy()
        infl = q[keep].mean() - q[~keep].mean()
        assert float(samples.influence([i])[0, 7]) == pytest.approx(infl)
    assert {20, 39} <= set(samples.actual.argsort(descending=True)[:5].tolist())


def test_one_model_is_shown_beside_samples_and_their_ceiling(samples):
    X, y = iris()
    beside = holds(samples.beside(memorization.scores(fitted(X, y))))
    assert beside.agreement.value > 0.7
    assert "one model's prediction has" in beside.verdict
    # Two independent runs agree about as well as the halves of one say they would.
    other = memorization.by_subsets(
        NEWTON, softmax(X, y), (X, y), models=100, measure="probability", seed=9
    )
    rho = samples.beside(other).agreement.value
    assert abs(rho - samples.ceiling.value) < 0.1
    with pytest.raises(ShapeError, match="one value per training row"):
        samples.beside(torch.zeros(3))


def test_pairs_are_those_above_and_the_other_half_of_the_models_judges(samples):
    found = holds(memorization.pairs(samples, least=0.1, errors=3.0))
    infl = samples.influence()
    expected = {
        (i, j)
        for i in range(50)
        for j in range(50)
        if samples.actual[i] >= 0.25 and infl[i, j] >= max(0.1, 3 * float(_error(samples, i, j)))
    }
    assert expected
    assert set(zip(found.train.tolist(), found.query.tolist(), strict=True)) == expected
    # A test row that nearly repeats the training row is the one that it helps most.
    best = found.query[found.train == 39][0]
    assert int(best) == 39
    assert_close(found.standard_error[0], _error(samples, found.train[0], found.query[0]))
    noisy = memorization.pairs(samples, least=0.1, errors=0.0)
    assert len(noisy) > len(found)
    assert float(noisy.repeated.mean()) < float(noisy.predicted.mean())  # chosen for their noise
    none = holds(memorization.pairs(samples, least=0.99))
    assert len(none) == 0 and none.verdict.startswith("No pair")
    holds(memorization.pairs(samples, memorized=2.0))


def _error(samples, i, j):
    inside = samples.inside[:, i]
    a, b = samples.right_queries[inside, j], samples.right_queries[~inside, j]
    return (a.var() / len(a) + b.var() / len(b)).sqrt()


def test_right_answers_are_counted_and_copies_go_together():
    X, y = iris()
    X, y = torch.cat([X, X[20:21]]), torch.cat([y, y[20:21]])
    found = holds(
        memorization.by_subsets(
            NEWTON, softmax(X, y), (X, y), models=24, share=0.5, duplicates="together"
        )
    )
    assert set(found.right.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(found.inside[:, 20], found.inside[:, 50])
    assert found.actual[20] == found.actual[50]
    with pytest.raises(SpecError, match="without queries") as caught:
        memorization.pairs(found)
    assert str(caught.value).count("\n  ") == 3


def test_seeds_share_their_samples():
    X, y = iris()
    recipe = uw.Training(
        lambda: nn.Linear(14, 3, bias=False).double(), uw.SGD(0.5), epochs=3, batch=25
    )
    arguments = (recipe, softmax(X, y), (X, y))
    one, two = (
        memorization.by_subsets(
            *arguments, models=24, share=0.5, seeds=seeds, measure="probability"
        )
        for seeds in (1, 2)
    )
    assert torch.equal(one.inside, two.inside)
    assert not torch.equal(one.right, two.right)
    with pytest.raises(SpecError, match="Several seeds"):
        memorization.by_subsets(NEWTON, softmax(X, y), (X, y), seeds=2)


@dataclass(frozen=True)
class Fails:
    """Newton that fails for samples with a certain row."""

    row: int
    every: bool = False

    def prepare(self, task, train):
        trainer = NEWTON.prepare(task, train)

        class Some:
            at_once = 100

            def __call__(_, weights):
                done = trainer(weights)
                rows = [s for s in range(1, len(weights)) if s % 5 == self.row or self.every]
                return replace(done, failures=dict.fromkeys(rows, "it would not"))

        return Some()


def test_models_that_fail_are_left_out_and_told():
    X, y = iris()
    arguments = softmax(X, y), (X, y)
    found = holds(memorization.by_subsets(Fails(0), *arguments, models=40, share=0.5))
    assert len(found.inside) == 40 - 8
    assert "8 of 40 models did not train" in found.notes[0]
    with pytest.raises(NotConverged):
        memorization.by_subsets(Fails(0, every=True), *arguments, models=40, share=0.5)


def test_samples_go_on_where_they_were(tmp_path):
    X, y = iris()
    using = uw.Resources(folder=tmp_path)
    arguments = softmax(X, y), (X, y)
    first = memorization.by_subsets(NEWTON, *arguments, models=24, share=0.5, resources=using)
    before = sorted(tmp_path.rglob("*"))
    again = memorization.by_subsets(NEWTON, *arguments, models=24, share=0.5, resources=using)
    assert torch.equal(first.right, again.right)
    assert sorted(tmp_path.rglob("*")) == before


def lonely():
    """Two clusters, and six rows of a third kind that no other row replaces."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    X = torch.randn(80, 3, generator=draw).double() * 0.3
    X[:, 0] += 2.0 * y - 1
    X[:6, 0], X[:6, 2] = 3 * (1 - 2 * y[:6].double()), 6 * (2 * y[:6].double() - 1)
    return X, y


def test_removing_what_nothing_replaces_costs_and_random_rows_do_not():
    X, y = lonely()
    test = X[:6].repeat(10, 1), y[:6].repeat(10)
    order = torch.zeros(80)
    order[:6] = 1
    found = holds(
        memorization.removal_experiment(
            NEWTON, softmax(X, y), (X, y), test, order, share=6 / 80, draws=6
        )
    )
    assert found.rows.sort().values.tolist() == list(range(6))
    assert found.is_confirmed and found.cost.low > 0.5
    assert float(found.full.mean()) == 1.0 and float(found.actual.mean()) < 0.2
    assert "needed more" in found.verdict
    same = holds(
        memorization.removal_experiment(
            NEWTON, softmax(X, y), (X, y), (X[6:], y[6:]), -order, share=6 / 80, draws=3
        )
    )
    assert not same.is_confirmed and same.verdict.startswith("No difference")


def test_a_method_by_layer_is_asked_as_well():
    X, y = iris()
    by_layer = uw.Influence(uw.EKFAC(), damping=uw.Absolute(PENALTY))
    found = holds(memorization.scores(fitted(X, y, by_layer)))
    exact = memorization.scores(fitted(X, y))
    assert torch.corrcoef(torch.stack([found.values, exact.values]))[0, 1] > 0.6
    assert any("by layer" in note for note in found.notes)
    single = X.float(), y
    task = uw.Task(nn.Linear(14, 3).float(), uw.CrossEntropy(), penalty=uw.L2(0.1))
    low = holds(memorization.scores(uw.Influence(uw.GGN()).fit(task, single)))
    assert low.values.dtype == torch.float64


REFUSED = {
    "no movement": (
        lambda X, y: memorization.scores(uw.GradientDot().fit(softmax(X, y), (X, y))),
        NotOffered, "loo_outputs"),
    "a regression": (
        lambda X, y: memorization.scores(uw.Influence(uw.Hessian()).fit(
            uw.Task(nn.Linear(14, 1).double(), uw.SquaredError(), penalty=uw.L2(1.0)),
            (X, y[:, None].double()))),
        UnsupportedModel, "probability of a row's class"),
    "few refits": (
        lambda X, y: memorization.scores(fitted(X, y), confirm=2, recipe=NEWTON),
        SpecError, "confirm=2 of 50"),
    "no recipe": (
        lambda X, y: memorization.scores(fitted(X, y), confirm=8), SpecError, "no recipe"),
    "duplicates": (
        lambda X, y: memorization.scores(fitted(X, y), duplicates="drop"), SpecError, "'drop'"),
    "a measure": (
        lambda X, y: memorization.by_subsets(NEWTON, softmax(X, y), (X, y), measure="loss"),
        SpecError, "'loss'"),
    "few models": (
        lambda X, y: memorization.by_subsets(NEWTON, softmax(X, y), (X, y), models=4),
        SpecError, "4 models"),
    "pairs of one model": (
        lambda X, y: memorization.pairs(memorization.scores(fitted(X, y))),
        SpecError, "a Memorization"),
    "row numbers": (
        lambda X, y: memorization.removal_experiment(
            NEWTON, softmax(X, y), (X, y), (X, y), torch.tensor([1, 2])),
        ShapeError, r"shape \(2,\) for 50"),
    "NaN": (
        lambda X, y: memorization.removal_experiment(
            NEWTON, softmax(X, y), (X, y), (X, y), torch.full((50,), torch.nan)),
        NonFinite, "50 of 50"),
    "all rows": (
        lambda X, y: memorization.removal_experiment(
            NEWTON, softmax(X, y), (X, y), (X, y), torch.ones(50), share=10),
        SpecError, "share=10"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ask, error, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_answered_is_refused(ask, error, said):
    with pytest.raises(error, match=said) as caught:
        ask(*iris())
    assert str(caught.value).count("\n  ") == 3


def test_the_way_out_of_few_models_leads_out():
    X, y = iris()
    found = memorization.by_subsets(NEWTON, softmax(X, y), (X, y), models=200)
    assert bool(found.actual.isfinite().all())


def test_samples_of_a_scikit_learn_classifier_answer_about_its_own_test_rows():
    X, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    X, y = X[order], np.array(["a", "b", "c"])[y[order]]
    clf = LogisticRegression(tol=1e-10, max_iter=2000).fit(X[:60], y[:60])
    task, train = sk.task(clf, X[:60], y[:60])
    newton, options = uw.training.Newton(), {"models": 24, "measure": "probability"}
    raw = memorization.by_subsets(newton, task, train, (X[60:80], y[60:80]), **options)
    own = memorization.by_subsets(newton, task, train, sk.data(clf, X[60:80], y[60:80]), **options)
    assert_close(raw.values, own.values)
    holds(memorization.pairs(raw), figure=False)
    assert raw.influence([3]).shape == (1, 20)


def test_regressions_are_refused_with_what_can_be_asked():
    X = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Ridge(alpha=1.0).fit(X.numpy(), X[:, 0].numpy())
    with pytest.raises(UnsupportedModel, match="density is no probability") as caught:
        memorization.scores(model, (X.numpy(), X[:, 0].numpy()))
    assert "cross_validation.loo" in str(caught.value)
    assert cross_validation.loo(model, (X.numpy(), X[:, 0].numpy())).mean >= 0
