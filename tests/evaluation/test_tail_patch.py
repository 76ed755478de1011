"""Tail-patch: by PyTorch's own optimizers on a copy of the model, and in the limit of no step."""

import copy

import pytest
import torch

import upweight as uw
from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.evaluation import tail_patch

N, Q, VOCABULARY = 12, 5, 7


def problem(seed=0):
    """Next tokens of short sequences, by a model of two layers."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, 4), torch.nn.Linear(4, 6), torch.nn.Tanh(),
        torch.nn.Linear(6, VOCABULARY),
    ).double().eval()  # fmt: skip
    tokens = torch.randint(VOCABULARY, (N + Q, 6))
    X, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[::3, -2:] = -100  # what is not predicted
    return uw.Task(model, uw.CrossEntropy()), (X[:N], y[:N]), (X[N:], y[N:])


def loss(model, data, i):
    return torch.nn.functional.cross_entropy(
        model(data[0][i]), data[1][i], ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (uw.SGD(0.05), lambda p: torch.optim.SGD(p, 0.05)),
        (uw.AdamW(0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
    ],
)
def test_it_is_a_step_of_pytorchs_optimizer_on_one_example_at_a_time(optimizer, theirs):
    task, train, queries = problem()
    before = copy.deepcopy(task.model.state_dict())
    ranked = torch.stack([torch.randperm(N)[:4] for _ in range(Q)])
    found = tail_patch(task, train, queries, ranked, optimizer, 3, control=2, seed=5)
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:2]
    for q in range(Q):
        for row, chosen in ((found.change[q], ranked[q, :3]), (found.control[q], drawn)):
            for value, i in zip(row, chosen, strict=True):
                model = copy.deepcopy(task.model)
                step = theirs(model.parameters())
                loss(model, train, i).backward()
                step.step()
                expected = loss(model, queries, q) - loss(task.model, queries, q)
                assert abs(value - expected) < 1e-12
    assert all(bool((task.model.state_dict()[k] == v).all()) for k, v in before.items())
    assert all(p.grad is None for p in task.model.parameters())


def test_a_small_step_of_sgd_is_the_gradient_dot_product_of_whatever_is_ranked():
    task, train, queries = problem()
    eta = 1e-7
    for measure, sign in ((uw.Loss(), 1), (uw.LogProb(), -1)):
        scores = uw.GradientDot().fit(task, train).attribute(queries, measure)
        kept = uw.GradientDot().fit(task, train).attribute(queries, measure, into=uw.Top(3))
        found = tail_patch(task, train, queries, scores, uw.SGD(eta), 3, measure)
        # Δ/η → −⟨∇m, ∇ℓᵢ⟩, and S = −⟨∇m, ∇ℓᵢ⟩/n
        expected = N * scores.values.gather(1, found.chosen)
        assert torch.allclose(found.change / eta, expected, rtol=1e-4, atol=1e-6)
        assert (sign * expected[:, 0] < 0).all() and found.wanted.value > 0.9
        assert sign * found.advantage.high < 0 or sign * found.advantage.low < 0
        again = tail_patch(task, train, queries, kept, uw.SGD(eta), 3, measure)
        assert torch.equal(again.chosen, found.chosen) and torch.equal(again.change, found.change)


def test_check_takes_an_optimizer_where_nobody_retrains():
    task, train, queries = problem()
    fitted = uw.GradientDot().fit(task, train)
    found = fitted.check(uw.SGD(1e-3), queries=queries)
    scores = fitted.attribute(queries)
    expected = tail_patch(task, train, queries, scores, uw.SGD(1e-3), 10)
    assert torch.equal(found.change, expected.change) and torch.equal(
        found.control, expected.control
    )
    assert found.change.shape == (Q, 10) and "lower m, over 5 queries" in str(found)
    assert found.summary()["advantage"] < 0
    with pytest.raises(SpecError, match="nothing to retrain"):
        fitted.check(uw.SGD(1e-3), "1 min", queries=queries)


def test_what_cannot_be_asked_is_refused_with_a_way_out():
    task, train, queries = problem()
    fitted = uw.GradientDot().fit(task, train)
    top = fitted.attribute(queries, into=uw.Top(2))
    with pytest.raises(ShapeError, match=r"into=Top\(3\)"):
        tail_patch(task, train, queries, top, uw.SGD(1e-3), 3)
    top = fitted.attribute(queries, into=uw.Top(3))
    assert tail_patch(task, train, queries, top, uw.SGD(1e-3), 3).change.shape == (Q, 3)
    for wrong in (top.lowers.double(), top.lowers[:2], top.lowers + N, top.lowers - N):
        with pytest.raises(ShapeError):
            tail_patch(task, train, queries, wrong, uw.SGD(1e-3), 3)
    with pytest.raises(SpecError, match=f"1 to {N}"):
        tail_patch(task, train, queries, top, uw.SGD(1e-3), 0)
    with pytest.raises(SpecError, match="lowers"):
        tail_patch(task, train, queries, top, uw.SGD(1e-3), 3, end="best")
    with pytest.raises(NonFinite, match="smaller lr"):
        tail_patch(task, train, queries, top, uw.SGD(1e308), 3)
