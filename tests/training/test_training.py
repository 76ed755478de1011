"""Training as a function of the weights: against a plain loop, alone and together."""

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

import upweight as uw
from tests.killing import kill_once_kept
from tests.market import draw, initialized, labels, problem
from upweight.errors import DataError, ShapeError, SpecError, UnsupportedModel
from upweight.task.data import as_data
from upweight.training.function import FromFunction
from upweight.training.optimizers import SGD, AdamW
from upweight.training.schedules import Cosine
from upweight.training.training import Training

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Net(nn.Module):
    """Two hidden layers, the second with dropout. One has 64 weights, which fused steps take."""

    def __init__(self, dropout=0.0, width=16):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 5), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(5, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.body(x)


N = 23


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    return draw(g, N, 4), labels(g, N, 3)


def task(penalty=None, **options):
    model = initialized(Net(**options), torch.Generator().manual_seed(9)).eval()
    return uw.Task(model, uw.CrossEntropy(), penalty)


def weights(rows=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    w = draw(g, rows, N).abs()
    w[0] = 1.0
    w[1, ::3] = 0.0
    w[2, 1::3] = 0.0
    w[2, 0] = 0.0
    w[1, 1] = 0.0
    return w


def by_hand(recipe, given, train, w, skip):
    """A training loop as users write it, with PyTorch's optimizer and schedule."""
    x, y = train
    torch.manual_seed(recipe.seed)
    model = recipe.init().double()
    o = recipe.optimizer
    if isinstance(o, SGD):
        optimizer = torch.optim.SGD(model.parameters(), o.lr, o.momentum, nesterov=o.nesterov)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=o.weight_decay)
    kept = (w != 0).nonzero()[:, 0] if skip else torch.arange(N)
    steps = recipe.epochs * -(-len(kept) // recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(recipe.epochs):
        g = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(N, generator=g)
        order = order[torch.isin(order, kept)]
        for index in order.split(recipe.batch):
            losses = nn.functional.cross_entropy(model(x[index]), y[index], reduction="none")
            loss = len(kept) / N * (w[index] * losses).mean()
            loss = loss + 0.05 * sum(p.square().sum() for p in model.parameters()) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return given.layout.flatten({k: p.detach() for k, p in model.named_parameters()})


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [SGD(0.3), SGD(0.2, momentum=0.8, nesterov=True), AdamW(0.02, weight_decay=0.1)],
    ids=lambda o: type(o).__name__ + str(getattr(o, "nesterov", "")),
)
def test_training_is_what_a_plain_loop_does(optimizer, skip):
    """With a last batch that is not full."""
    given, train, w = task(uw.L2(0.05)), data(), weights()
    recipe = Training(Net, optimizer, 3, 5, Cosine(), seed=4, skip_absent=skip)
    found = recipe.prepare(given, as_data(train))(w)
    for theta, row in zip(found.theta, w, strict=True):
        expected = by_hand(recipe, given, train, row, skip)
        torch.testing.assert_close(theta, expected, **CLOSE)
    assert not found.failures


def test_an_absent_example_does_not_matter():
    """Neither what it is nor, where the absent are skipped, whether it is there."""
    x, y = data()
    w = weights()[1:2]
    for skip in (False, True):
        recipe = Training(Net, SGD(0.3), 2, 4, skip_absent=skip)
        first = recipe.prepare(task(), as_data((x, y)))(w).theta
        other = x.clone()
        other[w[0] == 0] = 100.0
        second = recipe.prepare(task(), as_data((other, y)))(w).theta
        assert torch.equal(first, second)


MODELS = ("mlp_gelu", "conv", "attention", "layer_norm", "tied", "padded_sequences", "softmax")


@pytest.mark.parametrize("name", MODELS)
def test_many_at_once_are_what_each_is_alone(name):
    p = problem(name)
    train = as_data(p.train)
    g = torch.Generator().manual_seed(3)
    w = draw(g, 4, p.n).abs()
    w[1, 0] = 0.0
    for skip in (False, True):
        recipe = Training(None, SGD(0.05, momentum=0.5), 2, 3, skip_absent=skip)
        trainer = recipe.prepare(p.task, train)
        assert trainer.at_once > 1, trainer.alone_because
        together = trainer(w).theta
        alone = replace(trainer, at_once=1)(w).theta
        torch.testing.assert_close(together, alone, **CLOSE)


def test_dropout_follows_the_seed_alone_or_together():
    train, w = as_data(data()), weights()
    recipe = Training(lambda: Net(dropout=0.5), SGD(0.3), 2, 5, seed=2)
    trainer = recipe.prepare(task(dropout=0.5), train)
    together = trainer(w).theta
    torch.testing.assert_close(replace(trainer, at_once=1)(w).theta, together, **CLOSE)
    without = replace(recipe, init=Net).prepare(task(), train)(w).theta
    assert not torch.allclose(together, without)
    assert torch.equal(recipe.prepare(task(dropout=0.5), train)(w).theta, together)
    other = replace(recipe, seed=3).prepare(task(dropout=0.5), train)(w).theta
    assert not torch.allclose(together, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_weights_give_the_same_bits_and_nearly_so_beside_others(dtype):
    x, y = data()
    train, w = as_data((x.to(dtype), y)), weights(20)
    given = task()
    given.model.to(dtype)
    given = uw.Task(given.model, uw.CrossEntropy())
    trainer = Training(Net, SGD(0.3, momentum=0.9), 3, 5).prepare(given, train)
    once = trainer(w).theta
    assert torch.equal(trainer(w).theta, once)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trainer(w[order]).theta, once[order], rtol=1e-4, atol=1e-5)


def test_nothing_of_the_users_is_touched():
    given, train = task(), as_data(data())
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    state, mode = torch.get_rng_state(), given.model.training
    Training(lambda: Net(dropout=0.5), SGD(0.3), 1, 5).prepare(given, train)(weights())
    assert torch.equal(torch.get_rng_state(), state)
    assert given.model.training == mode
    for name, value in given.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in given.model.parameters())


def test_a_warm_start_begins_at_the_given_parameters():
    given, train = task(), as_data(data())
    trainer = Training(None, SGD(1e-12), 1, N).prepare(given, train)
    torch.testing.assert_close(trainer(weights()).theta, given.theta().expand(5, -1), **CLOSE)


def test_proximity_holds_a_model_near_where_it_started():
    """Full-batch steps on a quadratic: the minimizer is known, (A + λI)⁻¹(b + λ θ̂)."""
    g = torch.Generator().manual_seed(0)
    x, y = draw(g, 9, 3), draw(g, 9, 1)
    model = initialized(nn.Linear(3, 1, bias=False), g)
    given = uw.Task(model, uw.SquaredError())
    recipe = Training(None, SGD(0.3), 400, 9, proximity=0.7)
    w = torch.stack([torch.ones(9), draw(g, 9).abs()]).double()
    found = recipe.prepare(given, as_data((x, y)))(w).theta
    f = uw.SquaredError()(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
    scale = 2 * float(f)  # ℓ = (scale/2) (f − y)²
    for row, theta in zip(w, found, strict=True):
        a = scale * x.T @ (row[:, None] * x) / 9 + 0.7 * torch.eye(3)
        b = scale * x.T @ (row * y[:, 0]) / 9 + 0.7 * given.theta()
        torch.testing.assert_close(theta, torch.linalg.solve(a, b), **CLOSE)


class Frozen(nn.Module):
    """Features that are not trained, and a buffer."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("shift", torch.randn(4))
        self.features.requires_grad_(False)

    def forward(self, x):
        return self.head(self.features(x) + self.shift)


def test_what_is_not_trained_is_the_tasks():
    model = initialized(Frozen(), torch.Generator().manual_seed(0)).eval()
    given = uw.Task(model, uw.CrossEntropy())
    trainer = Training(Frozen, SGD(0.1), 1, 5).prepare(given, as_data(data()))
    assert torch.equal(trainer.task.model.features.weight, model.features.weight)
    assert torch.equal(trainer.task.model.shift, model.shift)
    assert not torch.equal(trainer.task.model.head.weight, model.head.weight)


def test_a_model_that_vmap_cannot_run_trains_alone():
    class Branching(Net):
        def forward(self, x):
            return self.body(x) if x.sum() > -1e9 else x

    given = uw.Task(
        initialized(Branching(), torch.Generator().manual_seed(0)).eval(), uw.CrossEntropy()
    )

    class BranchingOnWeights(Branching):
        def forward(self, x):
            return super().forward(x) if self.body[0].bias.sum() > -1e9 else x

    model = initialized(BranchingOnWeights(), torch.Generator().manual_seed(0)).eval()
    on_weights = uw.Task(model, uw.CrossEntropy())
    train, w = as_data(data()), weights()
    alone = Training(None, SGD(0.1), 1, 5).prepare(on_weights, train)
    assert alone.at_once == 1
    assert "vmap" in alone.alone_because
    # A branch on the inputs is one for all models, unless each has a batch of its own.
    assert Training(None, SGD(0.1), 1, 5, skip_absent=True).prepare(given, train).at_once == 1
    many = Training(None, SGD(0.1), 1, 5).prepare(given, train)
    assert many.at_once > 1
    torch.testing.assert_close(alone(w).theta, many(w).theta, **CLOSE)


def test_batch_normalization_is_refused_while_it_learns():
    def made():
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()

    given = uw.Task(made().eval(), uw.CrossEntropy())
    train = as_data(data())
    with pytest.raises(UnsupportedModel, match=r"(?s)1 \(BatchNorm1d\) in training mode.*eval"):
        Training(made).prepare(given, train)
    Training(lambda: made().eval(), epochs=1).prepare(given, train)(weights())


def test_another_model_is_refused_with_the_difference():
    with pytest.raises(SpecError, match=r"body\.0\.weight \[7, 4\] where the task has .*\[16, 4\]"):
        Training(lambda: Net(width=7)).prepare(task(), as_data(data()))


def test_a_parameter_that_is_not_used_stays_where_it_is():
    class Spare(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    given = uw.Task(initialized(Spare(), torch.Generator()).eval(), uw.CrossEntropy())
    trainer = Training(None, SGD(0.3), 1, 5).prepare(given, as_data(data()))
    assert trainer.at_once > 1, trainer.alone_because
    for some in (trainer, replace(trainer, at_once=1)):
        found = some(weights()).theta[:, given.layout.slices["spare.weight"]]
        assert torch.equal(found, given.model.spare.weight.flatten().detach().expand(5, -1))


def test_a_model_that_diverges_is_named_and_the_others_are_kept():
    train, w = as_data(data()), weights()
    w[3] = 1e200
    found = Training(Net, SGD(0.3), 2, 5).prepare(task(), train)(w)
    assert list(found.failures) == [3]
    assert "epoch" in found.failures[3]
    assert bool(found.theta[[0, 1, 2, 4]].isfinite().all())


def test_a_model_without_any_example_is_named():
    w = weights()
    w[2] = 0.0
    found = Training(Net, SGD(0.3), 1, 5, skip_absent=True).prepare(task(), as_data(data()))(w)
    assert found.failures == {2: "every example has weight 0"}


def test_one_example_is_enough():
    x, y = data()
    train, w = as_data((x[:1], y[:1])), torch.ones(3, 1)
    found = Training(Net, SGD(0.3), 2, 5).prepare(task(), train)(w).theta
    assert torch.equal(found[0], found[1]) and bool(found.isfinite().all())


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"proximity": -1.0}])
def test_numbers_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(SpecError, match="at least one epoch"):
        Training(Net, **wrong)


def test_through_retrain_an_interrupted_run_goes_on(tmp_path):
    given, train, w = task(), data(), weights()
    recipe = Training(Net, SGD(0.3), 1, 5)
    first = uw.training.retrain(
        recipe, given, train, w[:3], data(1), resources=uw.Resources(folder=tmp_path)
    )
    again = uw.training.retrain(
        recipe, given, train, w, data(1), resources=uw.Resources(folder=tmp_path)
    )
    assert again.reused == 4  # the baseline and three rows
    torch.testing.assert_close(again.values[:3], first.values)
    fresh = uw.training.retrain(recipe, given, train, w, data(1))
    torch.testing.assert_close(again.values, fresh.values, **CLOSE)


def test_a_cache_sees_that_init_makes_another_model(tmp_path):
    given, w = task(), weights()

    def made():
        net = Net()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(float(os.environ["UPWEIGHT_TEST_SCALE"]))
        return net

    def reused(scale):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UPWEIGHT_TEST_SCALE", scale)
            recipe = Training(made, SGD(0.3), 1, 5)
            return uw.training.retrain(
                recipe, given, data(), w, data(1), resources=uw.Resources(folder=tmp_path)
            ).reused

    assert (reused("1.0"), reused("1.0"), reused("0.5")) == (0, 6, 0)


KILLED = """
import time, torch
torch.set_default_dtype(torch.float64)
from upweight.training.trainer import TrainingTrainer
from tests.training import test_training as t

train = TrainingTrainer._trained

def slow(self, weights):
    time.sleep(0.2)
    return train(self, weights)

TrainingTrainer._trained = slow
t.retrained_in_pairs({cache!r})
"""


def retrained_in_pairs(cache=None):
    recipe, given = Training(Net, SGD(0.3, momentum=0.9), 2, 5), task()

    def in_pairs(self, task, train):
        return replace(prepare(self, task, train), at_once=2)

    prepare = Training.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "prepare", in_pairs)
        return uw.training.retrain(
            recipe, given, data(), weights(9), data(1), resources=uw.Resources(folder=cache)
        )


def test_a_killed_run_ends_with_the_same_numbers(tmp_path):
    script = KILLED.format(cache=str(tmp_path))
    kill_once_kept(script, tmp_path, 2)
    resumed = retrained_in_pairs(tmp_path)
    assert 4 <= resumed.reused < 10  # two pairs, and what else was finished
    plain = retrained_in_pairs()
    assert torch.equal(resumed.values, plain.values)
    assert torch.equal(resumed.baseline, plain.baseline)


# -- a loop of the user's own ------------------------------------------------------------------


def loop(w):
    x, y = data()
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(5):
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        (w * losses).mean().backward()
        optimizer.step()
    return model


def test_a_users_loop_is_a_recipe():
    w, train = weights(), data()
    expected = Training(Net, SGD(0.3), 5, N).prepare(task(), as_data(train))(w).theta
    for function in (loop, lambda row: loop(row).state_dict()):
        with torch.random.fork_rng():
            found = FromFunction(function).prepare(task(), as_data(train))(w)
        torch.testing.assert_close(found.theta, expected, **CLOSE)


def test_a_loop_that_differs_from_run_to_run_is_refused():
    calls = []

    def noisy(w):
        model = loop(w)
        calls.append(w)
        model.body[0].bias.data[0] += 1e-9 * len(calls)
        return model

    with pytest.raises(SpecError, match=r"differ by up to 1\.00e-09"):
        FromFunction(noisy).prepare(task(), as_data(data()))(weights())
    FromFunction(noisy, twice=False).prepare(task(), as_data(data()))(weights())


@pytest.mark.parametrize("made", [None, torch.ones(3), {"other": torch.ones(3)}, Net(width=7)])
def test_what_is_not_the_model_is_refused(made):
    trainer = FromFunction(lambda w: made, twice=False).prepare(task(), as_data(data()))
    with pytest.raises(SpecError, match="A training function returns the task's model"):
        trainer(weights())


@pytest.mark.parametrize(
    ("loss", "outputs", "y", "words"),
    [
        (uw.SquaredError(), 1, torch.zeros(N).double(), r"same shape(.|\n)*\(16, 1\), targets"),
        (uw.CrossEntropy(), 2, torch.arange(N) % 3, "targets in 0…1"),
    ],
)
def test_targets_that_do_not_fit_are_refused_before_anything_is_trained(loss, outputs, y, words):
    """[b, 1] beside [b] would be broadcast: every output was trained towards every target."""
    made = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, outputs)).double()
    spec, given = uw.Task(made, loss), (data()[0], y)
    before = torch.get_rng_state()
    for ask in (Training(lambda: made, SGD(0.1), epochs=1).trained, uw.training.Newton().prepare):
        with pytest.raises((ShapeError, DataError), match=words):
            ask(spec, given if ask.__name__ == "trained" else as_data(given))
    assert torch.equal(torch.get_rng_state(), before)
    fitting = y[:, None] if outputs == 1 else y.clamp(max=1)
    Training(lambda: made, SGD(0.1), epochs=1).trained(spec, (given[0], fitting))


@pytest.mark.parametrize("skip_absent", [False, True])
def test_empty_data_are_refused_as_empty(skip_absent):
    X, y = data()
    recipe = Training(None, SGD(0.1), epochs=1, skip_absent=skip_absent)
    with pytest.raises(DataError, match="training data must hold at least one example"):
        recipe.trained(task(), (X[:0], y[:0]))
    with pytest.raises(DataError, match="training data must hold at least one example"):
        uw.training.Newton().prepare(task(), as_data((X[:0], y[:0])))
