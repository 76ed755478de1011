"""What scores assume and their own numbers deny is a note of the provenance, and a warning."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.market import names, problem
from upweight import (
    EKFAC,
    GGN,
    L2,
    Bernoulli,
    CrossEntropy,
    GradientDot,
    GroupSums,
    Hessian,
    Influence,
    PerLayer,
    Poisson,
    Scores,
    Shards,
    SquaredError,
    Task,
    Top,
    next_token,
)
from upweight.errors import AssumptionWarning, UpweightError
from upweight.labels import Observed
from upweight.methods.health import constant_baseline
from upweight.task.data import Data, as_data
from upweight.task.probe import evenly_spaced
from upweight.task.task import call_model
from upweight.training import Newton

N, Q = 60, 6
WHOLE = Influence(Hessian())
BY_LAYER = Influence(EKFAC(), damping=1e-3)
BOTH = pytest.mark.parametrize("method", [WHOLE, BY_LAYER], ids=["whole", "by layer"])


def data(n: int) -> tuple[Tensor, Tensor]:
    X = torch.randn(n, 4)
    return X, (X[:, 0] + torch.randn(n) > 0).long()


def trained(train: Any, l2: float) -> nn.Module:
    task = Task(nn.Linear(4, 2), CrossEntropy(), L2(l2))
    return task.moved_to(Newton().prepare(task, as_data(train)).center).model


def told(method: Influence, net: nn.Module, l2: float, train: Any, queries: Any) -> list[str]:
    """What a call warns of; it must be in the provenance, once each."""
    fitted = method.fit(Task(net, CrossEntropy(), L2(l2)), train)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = fitted.attribute(queries)
    words = [str(w.message) for w in seen]
    assert all(w.category is AssumptionWarning and w.filename == __file__ for w in seen)
    assert all(scores.provenance.notes.count(word) == 1 for word in words)
    return words


@BOTH
def test_a_model_at_the_minimum_of_what_it_was_told_is_left_in_peace(method: Influence) -> None:
    train = data(N)
    assert told(method, trained(train, 0.01), 0.01, train, data(Q)) == []


@BOTH
def test_a_penalty_told_wrongly_is_noted(method: Influence) -> None:
    train = data(N)
    (note,) = told(method, trained(train, 1.0), 0.001, train, data(Q))
    assert note.startswith("θ̂ is not at a minimum") and "a penalty, loss or data other than" in note


@BOTH
def test_an_untrained_model_is_noted(method: Influence) -> None:
    (note,) = told(method, nn.Linear(4, 2), 0.001, data(N), data(Q))
    assert note.startswith("θ̂ is not at a minimum") and "has not begun" in note


def test_the_note_has_the_numbers_of_the_provenance() -> None:
    train, queries = data(N), data(Q)
    fitted = WHOLE.fit(Task(nn.Linear(4, 2), CrossEntropy(), L2(0.01)), train)
    with pytest.warns(AssumptionWarning) as seen:
        scores = fitted.attribute(queries)
    health, note = scores.provenance.health, str(seen[0].message)
    penalty = L2(0.01).gradient(fitted.theta, fitted.task.layout)
    gradients = torch.stack(
        [fitted.scorer.source.rows(b, 1).sum(0) for _, _, b in as_data(queries).batches(1)]
    )
    expected = gradients @ fitted.scorer.solver.solve(fitted.scorer.state, penalty).value
    overall = (scores.values.sum(1) - expected).norm() / scores.values.abs().sum(1).norm()
    assert health["row_sum_excess_overall"] == pytest.approx(float(overall), rel=1e-9)
    assert f"{float(overall):.1%}" in note and f"lower J by {health['decrement']:.2g}" in note


def network(train: Any, steps: int) -> nn.Sequential:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train[0]), train[1]).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("curvature", [EKFAC(), GGN()], ids=repr)
def test_networks_are_warned_of_before_they_are_trained_and_not_after(curvature: Any) -> None:
    """Stopped early and damped, a network is far from a minimum; its scores say something yet."""
    torch.manual_seed(5)
    train, queries, method = data(200), data(Q), Influence(curvature, damping=0.01)
    (note,) = told(method, network(train, 0), 0.0, train, queries)
    assert note.startswith("θ̂ is not at a minimum") and "has not begun" in note
    assert told(method, network(train, 150), 0.0, train, queries) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        net = network(train, 1500)
        net[2].bias.data += torch.tensor([1.4, -1.4])  # a last step, too long
        task = Task(net, CrossEntropy())
        provenance = method.fit(task, train).attribute(queries).provenance
    assert provenance.health["row_sum_excess_overall"] > 1 / 3
    (note,) = [n for n in provenance.notes if "not at a minimum" in n]
    assert "noisy SGD" in note and "begun" not in note


@pytest.mark.parametrize("curvature", [EKFAC(), GGN()], ids=repr)
def test_untrained_networks_of_a_small_excess_are_noted(curvature: Any) -> None:
    """Of labels that hold nothing to learn, examples pull in all directions."""
    torch.manual_seed(2)
    train, queries = (torch.randn(400, 4), torch.arange(400) % 2), data(Q)
    fitted = Influence(curvature, damping=0.01).fit(Task(network(train, 0), CrossEntropy()), train)
    scores = fitted.attribute(queries)
    assert 0.01 < scores.provenance.health["row_sum_excess_overall"] < 1 / 3
    (note,) = [n for n in scores.provenance.notes if "not at a minimum" in n]
    assert "has not begun" in note
    trained = Influence(curvature, damping=0.01).fit(
        Task(network(train, 300), CrossEntropy()), train
    )
    assert not any("begun" in n for n in trained.attribute(queries).provenance.notes)


def test_removals_from_an_untrained_network_are_noted() -> None:
    """They have no row sums: the step that would still lower J tells."""
    torch.manual_seed(5)
    train = data(200)
    fitted = Influence(GGN(), damping=0.1).fit(Task(network(train, 0), CrossEntropy()), train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumptionWarning)  # of steps that are too long
        notes = fitted.removal(data(Q), groups=[[0]]).provenance.notes
    assert any("has not begun" in note for note in notes)


@pytest.mark.parametrize("name", names(without=("untrained", "float32")))
def test_no_trained_model_of_the_market_is_noted(name: str) -> None:
    """Their penalties are strong: some are no better than a constant output."""
    p = problem(name)
    for curvature in (GGN(), EKFAC(Observed())):
        scores = Influence(curvature, damping=0.1).fit(p.task, p.train).attribute(p.queries)
        assert not any("minimum" in note for note in scores.provenance.notes)


def baseline(task: Task, data: Data) -> Any:
    theta = task.theta()
    with torch.no_grad():
        losses = [task.losses(theta, batch) for _, _, batch in data.batches(64)]
    return constant_baseline(task, theta, data, torch.cat(losses))


def constant(loss: Any, net: nn.Module, targets: Tensor, shape: tuple[int, ...]) -> Any:
    return baseline(Task(net, loss), as_data((torch.randn(len(targets), *shape), targets)))


def test_the_loss_of_the_best_constant_is_entropy_or_half_the_variance() -> None:
    y, p = torch.arange(200) % 3 % 2, 67 / 200
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert constant(CrossEntropy(), nn.Linear(4, 2), y, (4,))[1] == pytest.approx(entropy)
    soft = nn.functional.one_hot(y, 2).double()
    net = nn.Linear(4, 2).double()
    X = torch.randn(200, 4, dtype=torch.float64)
    found = baseline(Task(net, CrossEntropy()), as_data((X, soft)))
    assert found is not None and found[1] == pytest.approx(entropy)
    expected = nn.functional.cross_entropy(net(X), soft)
    assert found[0] == pytest.approx(expected.item())
    ignored = torch.stack([y, torch.full_like(y, -100)], dim=1)
    assert constant(CrossEntropy(), nn.Linear(4, 2), ignored, (2, 4))[1] == pytest.approx(entropy)
    image = CrossEntropy(axis=1)
    assert constant(image, nn.Conv1d(4, 2, 1), y[:, None], (4, 1))[1] == pytest.approx(entropy)
    yes = y.float()[:, None]
    assert constant(Bernoulli(), nn.Linear(4, 1), yes, (4,))[1] == pytest.approx(entropy, rel=1e-5)
    values = torch.randn(200, 3)
    half = float(values.var(dim=0, correction=0).sum() / 2)
    assert constant(SquaredError(), nn.Linear(4, 3), values, (4,))[1] == pytest.approx(half, 1e-5)


class Words(nn.Module):
    """Logits of the next of five words, at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class ForCausalLM(Words):
    """Of this name, its labels are shifted."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many examples the model is asked, each time."""
    sizes, call = [], Task.call

    def counted(self: Task, params: Any, batch: Any) -> Any:
        found = call(self, params, batch)
        sizes.append(len(found[0]))
        return found

    monkeypatch.setattr(Task, "call", counted)
    return sizes


def sequences(n: int) -> list[tuple[Tensor, Tensor]]:
    lengths = (torch.arange(n) * 7 % 5 + 2).tolist()
    return [(torch.randint(0, 5, (t,)), torch.randint(0, 5, (t,))) for t in lengths]


def padded(items: Any) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*items, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad([*xs], batch_first=True), pad([*ys], batch_first=True, padding_value=-100)


def trainings(n: int) -> dict[str, tuple[nn.Module, Any, Any]]:
    """By name: a model, its loss and its data."""
    X, image = torch.randn(n, 4), torch.randn(n, 4, 3)
    y, pixels = torch.randint(0, 3, (n,)), torch.randint(0, 3, (n, 3))
    some = torch.where(torch.rand(n, 3) < 0.3, -1, pixels)
    soft = torch.randn(n, 3).softmax(1)
    weighted = CrossEntropy(weight=(1.0, 0.5, 2.0), label_smoothing=0.1)
    ids = torch.randint(0, 5, (n, 6))
    return {
        "classes": (nn.Linear(4, 3), CrossEntropy(), (X, y)),
        "weighted classes": (nn.Linear(4, 3), weighted, (X, y)),
        "shares of classes": (nn.Linear(4, 3), CrossEntropy(), (X, soft)),
        "classes on axis 1": (nn.Conv1d(4, 3, 1), CrossEntropy(axis=1), (image, pixels)),
        "shares on axis 1": (
            nn.Conv1d(4, 3, 1),
            CrossEntropy(axis=1),
            (image, torch.randn(n, 3, 3).softmax(1)),
        ),
        "classes last": (
            nn.Linear(4, 3),
            CrossEntropy(axis=-1, ignore_index=-1),
            (image.mT, some),
        ),
        "yes or no": (nn.Linear(4, 2), Bernoulli(), (X, torch.rand(n, 2).round())),
        "one answer": (
            nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
            Bernoulli(),
            (X, torch.rand(n).round()),
        ),
        "numbers": (nn.Linear(4, 2), SquaredError(), (X, torch.randn(n, 2))),
        "images": (nn.Conv1d(4, 2, 1), SquaredError(), (image, torch.randn(n, 2, 3))),
        "texts": (
            Words(),
            CrossEntropy(),
            DataLoader(sequences(n), batch_size=8, collate_fn=padded),  # type: ignore[arg-type]
        ),
        "next words": (ForCausalLM(), CrossEntropy(), {"input_ids": ids, "labels": ids}),
    }


@pytest.mark.parametrize("name", trainings(1))
def test_the_model_is_not_run_again_to_know_the_loss_of_a_constant(
    name: str, ran: list[int]
) -> None:
    """Where targets are read from the batch; a function of the user's own is run, to the same."""
    torch.manual_seed(3)
    model, loss, given = trainings(300)[name]
    data = as_data(given)
    read, run = Task(model, loss), Task(model, loss, forward=lambda m, b: call_model(m, b))
    expected = baseline(run, data)
    ran.clear()
    assert baseline(read, data) == pytest.approx(expected, rel=1e-12)
    assert sum(ran) == 300 + 1  # those of the losses, and one for the outputs' shape
    at = evenly_spaced(300, 256)
    assert len(set(at)) == 256
    with torch.no_grad():
        own = [read.losses(read.theta(), data.batch(i, i + 1)) for i in at]
    assert expected[0] == pytest.approx(float(torch.cat(own).double().mean()), rel=1e-6)


def test_next_token_is_read_from_the_batch_too(ran: list[int]) -> None:
    ids = torch.randint(0, 5, (100, 6))
    found = baseline(Task(Words(), CrossEntropy(), forward=next_token), as_data((ids, ids)))
    assert sum(ran) == 101
    p = torch.bincount(ids[:, 1:].flatten()) / 500
    assert found[1] == pytest.approx(float(-5 * (p * p.log()).sum()), rel=1e-5)


def test_a_loss_whose_targets_have_another_shape_asks_the_model(ran: list[int]) -> None:
    class OfColumns(SquaredError):
        """Whose targets lack the last axis of the outputs."""

        def check(self, outputs: Tensor, targets: Tensor) -> None:
            assert outputs.shape == (*targets.shape, 1)

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().__call__(outputs, targets.reshape(outputs.shape))

    net, (X, y) = nn.Linear(4, 1), (torch.randn(100, 4), torch.randn(100))
    found = baseline(Task(net, OfColumns()), as_data((X, y)))
    assert sum(ran) == 201
    mean, half = 0.5 * (net(X)[:, 0] - y).square().mean().detach(), 0.5 * y.var(correction=0)
    assert found == pytest.approx((float(mean), float(half)), rel=1e-5)


def test_no_constant_is_claimed_of_few_targets_or_another_loss() -> None:
    y = torch.arange(12)
    assert constant(CrossEntropy(), nn.Linear(4, 12), y, (4,)) is None
    assert constant(CrossEntropy(), nn.Linear(4, 2), torch.full((9,), -100), (4,)) is None
    assert constant(Poisson(), nn.Linear(4, 1), y.float()[:, None], (4,)) is None


def test_every_way_to_stream_scores_has_the_note(tmp_path: Any) -> None:
    fitted = BY_LAYER.fit(Task(nn.Linear(4, 2), CrossEntropy(), L2(0.001)), data(N))
    queries = data(Q)
    with pytest.warns(AssumptionWarning, match="not at a minimum"):
        whole = fitted.attribute(queries)
    with pytest.warns(AssumptionWarning, match="not at a minimum"):
        top = fitted.attribute(queries, into=Top(2))
    with pytest.warns(AssumptionWarning, match="not at a minimum"):
        groups = fitted.attribute(queries, into=GroupSums(["a", "b"] * (N // 2)))
    with pytest.warns(AssumptionWarning, match="not at a minimum"):
        fitted.attribute(queries, into=Shards(tmp_path))
    written = Scores.load(tmp_path)
    for other in (top, groups, written):
        for key in ("row_sum_excess", "row_sum_excess_overall"):
            expected = pytest.approx(whole.provenance.health[key], rel=1e-9)
            assert other.provenance.health[key] == expected
        assert any("not at a minimum" in note for note in other.provenance.notes)


def test_an_answer_of_several_parts_warns_once() -> None:
    task = Task(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), CrossEntropy(), L2(0.001))
    fitted = BY_LAYER.fit(task, data(N))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = fitted.attribute(data(Q), into=PerLayer())
    said = [str(w.message) for w in caught if w.category is AssumptionWarning]
    assert len(parts) == 2 and len(said) == len(set(said)) > 0


@BOTH
def test_training_labels_that_are_all_ignored_are_noted(method: Influence) -> None:
    train = data(N)
    net = trained(train, 0.01)
    ignored = train[0], torch.full((N,), -100)
    words = told(method, net, 0.01, ignored, data(Q))
    assert any("the loss of every training example is 0" in w for w in words)


@BOTH
def test_a_query_and_an_example_without_labels_are_noted(method: Influence) -> None:
    train, (Xq, yq) = data(N), data(Q)
    net = trained(train, 0.01)
    yq[2] = -100
    (note,) = told(method, net, 0.01, train, (Xq, yq))
    assert "query 2 (1 of 6)" in note
    X, y = train
    y = y.clone()
    y[[5, 7]] = -100
    task = Task(trained((X, y), 0.01), CrossEntropy(), L2(0.01))
    # It is right that such an example has no effect: a note, and no warning.
    notes = method.fit(task, (X, y)).attribute(data(Q)).provenance.notes
    assert any("training example 5, 7 (2 of 60)" in note for note in notes)


def test_gradients_too_small_for_the_dtype_are_noted() -> None:
    net = nn.Linear(4, 1, bias=False).float()
    nn.init.zeros_(net.weight)
    X, y = torch.randn(N, 4).float(), 1e-30 * torch.randn(N, 1).float()
    task = Task(net, lambda f, y: 0.5 * (f - y).square().sum(1), L2(1.0))
    with pytest.warns(AssumptionWarning, match="too small for the dtype"):
        scores = Influence(Hessian()).fit(task, (X, y)).attribute((X[:2], y[:2]))
    assert not scores.values.any()


def test_what_is_judged_of_tiny_numbers_in_float32_is_a_number() -> None:
    """Whose squares, 1e-44, float32 has no digits for."""
    model = nn.Linear(3, 1).float()
    nn.init.constant_(model.weight, 1e-23), nn.init.zeros_(model.bias)
    train = torch.arange(24.0).reshape(8, 3).sin().float(), torch.full((8, 1), 1e-22).float()
    task = Task(model, SquaredError(), L2(0.1))
    with pytest.warns(AssumptionWarning) as caught:
        scores = Influence(GGN()).fit(task, train).attribute(train)
    health = scores.provenance.health
    assert 0 < health["row_sum_excess_overall"] <= 1 and health["gradient_norm"] > 0
    assert not any("nan" in str(each.message) for each in caught)


def test_a_question_that_a_method_does_not_answer_names_one_that_does(tmp_path: Any) -> None:
    train, queries = data(N), data(Q)
    task = Task(trained(train, 0.01), CrossEntropy(), L2(0.01))
    fitted = GradientDot().fit(task, train)
    for ask in (
        lambda: fitted.removal(queries),
        lambda: fitted.loo_outputs(),
        lambda: fitted.stationarity,
        lambda: fitted.parameter_influence(0),
        lambda: fitted.attribute(queries).removal(),
    ):
        with pytest.raises(UpweightError, match=r"Way out: (.|\n)*Influence"):
            ask()


def test_what_there_is_instead_works(tmp_path: Any) -> None:
    train, queries = data(N), data(Q)
    task = Task(trained(train, 0.01), CrossEntropy(), L2(0.01))
    by_layer = BY_LAYER.fit(task, train).attribute(queries)
    assert by_layer.removal().values.shape == (Q, N)
    assert Influence(GGN(), damping=0.1).fit(task, train).removal(queries).values.shape == (Q, N)
    scores = WHOLE.fit(task, train).attribute(queries)
    assert scores.top(2, 0).raises[0] == int(scores.values[0].argmax())
    assert scores.group(["a"] * N).values.shape == (Q, 1)
    scores.save(tmp_path)
