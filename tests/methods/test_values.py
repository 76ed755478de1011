"""Shapley values, of neighbours and of retraining, against their definition; and the baselines."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.errors import DataError, NotConverged, SpecError, UpweightError
from upweight.methods.neighbours import ordered
from upweight.testing import check_method


def data(n=7, d=3, classes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    return X, torch.randint(classes, (n,), generator=g)


def task(d=3, classes=2, penalty=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, classes)).double()
    return uw.Task(model, uw.CrossEntropy(), uw.L2(penalty))


def softmax(train, penalty=0.1):
    linear = nn.Linear(3, 2).double()
    given = uw.Task(linear, uw.CrossEntropy(), uw.L2(penalty))
    trainer = uw.training.Newton().prepare(given, uw.as_data(train))
    theta = trainer(torch.ones(1, len(train[0]), dtype=torch.float64)).theta[0]
    return given.moved_to(theta)


def by_definition(n, value, omega=None):
    """Σ over coalitions, with weights of their sizes."""
    found = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            weight = (omega(size + 1) if omega else 1.0) / (n * math.comb(n - 1, size))
            for C in itertools.combinations(others, size):
                found[i] += weight * (value((*C, i)) - value(C))
    return found


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("bandwidth", [None, 0.8])
@pytest.mark.parametrize("target", ["class", "number"])
def test_values_of_neighbours_are_shapley_values(k, bandwidth, target):
    (X, y), (Xq, yq) = data(), data(3, seed=1)
    given = task()
    if target == "number":
        given = uw.Task(nn.Linear(3, 1).double(), uw.SquaredError())
        y, yq = (2 * X[:, :1] + 1), Xq[:, 1:2]

    def utility(q):
        squares = (X - Xq[q]).square().sum(dim=1)
        vote = [1.0] * 7 if bandwidth is None else (-squares / (2 * bandwidth**2)).exp().tolist()

        def value(C):
            nearest = sorted(C, key=squares.tolist().__getitem__)[:k]
            if target == "class":
                return sum(vote[j] * int(y[j] == yq[q]) for j in nearest) / k
            return -((sum(vote[j] * float(y[j]) for j in nearest) / k - float(yq[q])) ** 2)

        return value

    method = uw.KNNShapley(k, target=target, bandwidth=bandwidth)
    found = method.fit(given, (X, y)).attribute((Xq, yq))
    for q in range(3):
        expected = -by_definition(7, utility(q))
        torch.testing.assert_close(found.values[q], expected, rtol=0, atol=1e-12)
        total = torch.tensor(utility(q)(()) - utility(q)(range(7)), dtype=torch.float64)
        torch.testing.assert_close(found.values[q].sum(), total, rtol=0, atol=1e-12)
    told = found.provenance.health["row_sum_expected"]
    assert told == pytest.approx(float(found.values.sum(dim=1).mean()), abs=1e-12)
    assert found.unit is uw.Unit.VALUE


def test_places_are_ordered_as_a_stable_sort_orders_them():
    g = torch.Generator().manual_seed(0)
    some = torch.randn(5, 400, generator=g)
    some[0] = some[0].round()  # many ties
    some[1, ::3], some[1, 1::3] = 0.0, -0.0
    some[2] *= 1e30
    some[3] *= 1e-42  # subnormal
    for values in (some, some.double()):
        assert torch.equal(ordered(values), values.argsort(dim=1, stable=True))


def test_neighbours_may_be_sought_in_a_layer():
    (X, y), queries, given = data(), data(3, seed=1), task()
    found = uw.KNNShapley(3, "1").fit(given, (X, y)).attribute(queries).values
    hidden = given.model[:2]
    with torch.no_grad():
        moved = (hidden(X), y), (hidden(queries[0]), queries[1])
    other = uw.KNNShapley(3).fit(task(4), moved[0]).attribute(moved[1]).values
    torch.testing.assert_close(found, other, rtol=0, atol=1e-12)
    assert not given.model[1]._forward_hooks
    cosine = uw.FeatureSimilarity("1").fit(given, (X, y)).attribute(queries).values
    a, b = (torch.nn.functional.normalize(part[0]) for part in (moved[1], moved[0]))
    torch.testing.assert_close(cosine, -a @ b.T, rtol=0, atol=1e-12)


def test_queries_are_valued_alone_and_the_reducers_agree():
    train, queries = data(11), data(5, seed=1)
    fitted = uw.KNNShapley(2).fit(task(), train)
    whole = fitted.attribute(queries).values
    alone = [
        fitted.attribute((queries[0][q : q + 1], queries[1][q : q + 1])).values for q in range(5)
    ]
    assert torch.equal(whole, torch.cat(alone))
    top = fitted.attribute(queries, into=uw.Top(2))
    assert torch.equal(top.lowers_by, whole.sort(dim=1).values[:, :2])
    small = uw.KNNShapley(2).fit(task(), train, resources=uw.Resources(memory_bytes=400))
    assert torch.equal(small.attribute(queries).values, whole)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (4.0, 1.0), (1.0, 3.0)])
def test_data_shapley_over_all_orders_is_its_definition(alpha, beta):
    train, queries = data(4), data(2, seed=1)
    given, recipe = softmax(train), uw.training.Newton()
    method = uw.DataShapley(None, alpha, beta)
    answer = method.fit(given, train, history=recipe).attribute(queries)
    found = answer.values
    trainer = recipe.prepare(given, uw.as_data(train))

    @functools.cache
    def value(C):
        w = torch.zeros(1, 4, dtype=torch.float64)
        w[0, list(C)] = 1.0
        return given.losses(trainer(w).theta[0], queries)

    def omega(j):
        beta_of = lambda a, b: math.gamma(a) * math.gamma(b) / math.gamma(a + b)  # noqa: E731
        return 4 * math.comb(3, j - 1) * beta_of(j + beta - 1, 4 - j + alpha) / beta_of(alpha, beta)

    for q in range(2):
        expected = by_definition(4, lambda C: float(value(tuple(sorted(C)))[q]), omega)  # noqa: B023
        torch.testing.assert_close(found[q], expected, rtol=0, atol=1e-7)
    assert ("row_sum_expected" in answer.provenance.health) == (alpha == beta)
    if alpha == beta:
        total = value((0, 1, 2, 3)) - value(())
        torch.testing.assert_close(found.sum(dim=1), total, rtol=0, atol=1e-7)


def test_some_orders_keep_the_total_and_come_near():
    train, queries = data(6), data(2, seed=1)
    given, recipe = softmax(train), uw.training.Newton()
    exact = uw.DataShapley(None).fit(given, train, history=recipe).attribute(queries).values
    fitted = uw.DataShapley(40, seed=1).fit(given, train, history=recipe)
    found = fitted.attribute(queries).values
    torch.testing.assert_close(found.sum(dim=1), exact.sum(dim=1), rtol=0, atol=1e-6)
    rounds = torch.stack(
        [
            uw.DataShapley(1, seed=k).fit(given, train, history=recipe).attribute(queries).values
            for k in range(2, 22)
        ]
    )
    error = rounds.std(dim=0) / 40**0.5
    assert bool(((found - exact).abs() <= 4 * error).all())


def test_shapley_values_that_cannot_be_had_say_why():
    train = data(9)
    for method, history, said in (
        (uw.DataShapley(), None, "recipe=recipe"),
        (uw.DataShapley(None), uw.training.Newton(), "n ≤ 8"),
    ):
        with pytest.raises(SpecError, match=said):
            method.fit(softmax(train), train, history=history)
    with pytest.raises(SpecError, match="fewer permutations"):
        uw.DataShapley(2).fit(
            softmax(train), train, history=uw.training.Newton(),
            resources=uw.Resources(memory_bytes=64),
        )  # fmt: skip
    unbounded = softmax(train)
    loose = uw.Task(unbounded.model, uw.CrossEntropy())
    with pytest.raises((NotConverged, UpweightError)):
        uw.DataShapley(1).fit(loose, train, history=uw.training.Newton())
    with pytest.raises(SpecError, match="k ≥ 1"):
        uw.KNNShapley(0)
    with pytest.raises(SpecError, match="layer='7'"):
        uw.KNNShapley(3, "7").fit(task(), train)
    with pytest.raises(SpecError, match="leave the measure out"):
        uw.KNNShapley().fit(task(), train).attribute(train, uw.Margin())
    numbers = uw.Task(nn.Linear(3, 1).double(), uw.SquaredError())
    pairs = train[0], torch.randn(9, 1).double()
    with pytest.raises(DataError, match="one class an example"):
        uw.KNNShapley().fit(numbers, pairs)
    uw.KNNShapley(target="number").fit(numbers, pairs).attribute(pairs)
    two = uw.Task(nn.Linear(3, 2).double(), uw.SquaredError())
    with pytest.raises(DataError, match="one finite number"):
        uw.KNNShapley(target="number").fit(two, (train[0], torch.randn(9, 2).double()))
    for wrong in ({"target": "probability"}, {"bandwidth": 0.0}):
        with pytest.raises(SpecError):
            uw.KNNShapley(**wrong)


def test_one_example_has_the_whole_value():
    X, y = data(1)
    found = uw.KNNShapley(5).fit(task(), (X, y)).attribute((X, y)).values
    assert found.tolist() == [[-0.2]]


NOT_LAWS = {
    "Random": ("self-influence", "symmetric", "columns follow", "an example without a gradient"),
    "TrainingLoss": ("symmetric",),
    "FeatureSimilarity": ("an example without a gradient",),
}
"""What a ranking without gradients need not obey."""


@pytest.mark.parametrize("method", [uw.Random(3), uw.TrainingLoss(), uw.FeatureSimilarity()])
def test_baselines_obey_the_laws(method):
    for name, check in check_method(method):
        if not name.startswith(NOT_LAWS[type(method).__name__]):
            check()


def test_the_loss_ranks_whatever_is_asked():
    train, given = data(), task()
    found = uw.TrainingLoss().fit(given, train).attribute(data(3, seed=1)).values
    assert torch.equal(found, given.losses(given.theta(), train).detach().expand(3, -1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(dim=1))


def test_bm25_is_its_formula():
    g = torch.Generator().manual_seed(0)
    train = torch.randint(9, (6, 5), generator=g), torch.randint(2, (6,), generator=g)
    queries = torch.randint(9, (3, 4), generator=g), torch.randint(2, (3,), generator=g)
    given = uw.Task(Words(), uw.CrossEntropy())
    found = uw.BM25(ignore=(0,)).fit(given, train).attribute(queries).values
    documents = [[t for t in row if t != 0] for row in train[0].tolist()]
    mean = sum(map(len, documents)) / 6
    for q, query in enumerate(queries[0].tolist()):
        for i, document in enumerate(documents):
            total = 0.0
            for t in query:
                if t == 0:
                    continue
                holding = sum(t in other for other in documents)
                idf = math.log(1 + (6 - holding + 0.5) / (holding + 0.5))
                f = document.count(t)
                total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(document) / mean))
            assert float(found[q, i]) == pytest.approx(-total, rel=1e-6)
    with pytest.raises(DataError, match="counts tokens"):
        uw.BM25().fit(task(), data())
    with pytest.raises(SpecError, match="0 ≤ b ≤ 1"):
        uw.BM25(b=2.0)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (4.0, 1.0)])
def test_orders_have_a_standard_error(alpha, beta):
    """It is that of the mean over orders, holds the value over all of them, and falls as 1/√r."""
    train, queries = data(6), data(3, seed=1)
    given, recipe = softmax(train), uw.training.Newton()

    def asked(orders, seed=0):
        method = uw.DataShapley(orders, alpha, beta, seed=seed)
        return method.fit(given, train, history=recipe).attribute(queries)

    exact = asked(None)
    assert exact.error is None and asked(1).error is None
    some = [asked(60, seed=k) for k in range(6)]
    off = torch.stack([(x.values - exact.values) / x.error for x in some]).abs()
    assert float((off < 2.5).double().mean()) >= 0.95  # 108 of them
    assert 0.7 < float(off.square().mean().sqrt()) < 1.3
    ratio = asked(60).error / asked(240).error
    assert float(ratio.mean()) == pytest.approx(2.0, rel=0.15)
