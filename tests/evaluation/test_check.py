"""A budget of retraining, and what it says: on digits, where influence is known to be right."""

import json
import math
import time
from dataclasses import dataclass, replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import train_in_place
from upweight.data import mnist_subset
from upweight.errors import SpecError
from upweight.evaluation.check import Check, check, seconds_of
from upweight.evaluation.lds import LDS
from upweight.task.recipe import Trained
from upweight.training.optimizers import SGD
from upweight.training.training import Training
from upweight.verdict import Verdict


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A quarter of the subsets that a check takes at most, however fast the machine is."""
    # By its name in `sys.modules`: in the package it is the name of the function.
    monkeypatch.setattr(import_module("upweight.evaluation.check"), "MOST", 64)


@pytest.fixture(scope="module")
def digits():
    """Softmax regression on 12 pixel averages of 300 digits, at its minimum."""
    read = mnist_subset()

    def features(images):
        x = torch.tensor(images).double()[:, None] / 255
        return nn.functional.adaptive_avg_pool2d(x, (3, 4)).flatten(1)

    train = (features(read.X[:300]), torch.tensor(read.y[:300]))
    queries = (features(read.X_test[:12]), torch.tensor(read.y_test[:12]))
    task = uw.Task(nn.Linear(12, 10).double(), uw.CrossEntropy(), uw.L2(0.02))
    train_in_place(task, train)
    return task, train, queries


@pytest.fixture(scope="module")
def fitted(digits):
    task, train, _ = digits
    return uw.Influence().fit(task, train)


def test_exact_influence_of_a_convex_model_passes(digits, fitted, tmp_path):
    _, _, queries = digits
    found = fitted.check(
        uw.training.Newton(), "20 s", queries=queries, resources=uw.Resources(folder=tmp_path)
    )
    assert found.lds.spearman.low > 0.9
    assert found.lds.ceiling is None, "nothing is random"
    assert found.slope.low > 0
    assert found.verdict == "Order and size"
    assert "rank correlation with retraining 1.00 ± 0.00; sizes are right" in found.reason
    assert found.notes == (), "the recipe makes this very model"
    assert found.seconds <= 2 * found.budget
    again = fitted.check(
        uw.training.Newton(), "20 s", queries=queries, resources=uw.Resources(folder=tmp_path)
    )
    assert len(again.lds.predicted) >= len(found.lds.predicted), "it goes on from what is there"


@dataclass(frozen=True)
class Noisy:
    """Newton's minimum and as much noise again, from a seed."""

    seed: int = 0
    noise: float = 0.0

    def prepare(self, task, train):
        trainer = uw.training.Newton(tol=1e-6).prepare(task, train)

        class Trainer:
            at_once = 8

            def __call__(_, weights):
                made = trainer(weights)
                g = torch.Generator().manual_seed(self.seed)
                shift = self.noise * torch.randn(
                    made.theta.shape, generator=g, dtype=made.theta.dtype
                )
                return Trained(made.theta + shift, made.gradient_norms, made.failures)

        return Trainer()


def test_two_seeds_show_the_noise(digits, fitted):
    _, _, queries = digits
    quiet, loud = (fitted.check(Noisy(noise=noise), 8, queries=queries) for noise in (1e-6, 0.3))
    assert len(quiet.lds.values) == 2
    assert quiet.lds.ceiling.value > 0.999
    assert loud.lds.ceiling.value < 0.95
    assert loud.lds.spearman.value < quiet.lds.spearman.value
    assert f"retraining again gets {loud.lds.ceiling.value:.2f}" in loud.reason


def test_without_queries_it_asks_about_training_examples(fitted):
    found = fitted.check(uw.training.Newton(), 8)
    assert found.lds.predicted.shape[1] == 32
    assert found.lds.spearman.low > 0.9


def test_a_network_is_checked_by_its_own_training(digits):
    _, train, queries = digits
    recipe = Training(
        lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)),
        SGD(0.5, momentum=0.9), 20, 50,
    )  # fmt: skip
    model = recipe.init().double().eval()
    task = uw.Task(model, uw.CrossEntropy())
    ones = torch.ones(1, 300)
    theta = recipe.prepare(task, uw.as_data(train))(ones).theta[0]
    named = dict(model.named_parameters())
    for name, value in task.layout.unflatten(theta).items():
        named[name].data.copy_(value)
    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
    found = method.check(recipe, subsets=24, queries=queries)
    assert 0.1 < found.lds.spearman.value < found.lds.ceiling.value
    text = str(found)
    assert text.startswith(f"{found.verdict}: rank correlation with retraining")
    assert found.verdict in ("Order only", "Order and size")
    assert found.notes == (), "the first seed is the model's own"
    assert "2 seeds each" in text


def estimates(slope, seed=0):
    g = torch.Generator().manual_seed(seed)
    predicted = torch.randn(60, 5, generator=g, dtype=torch.float64)
    noise = 0.1 * torch.randn(60, 5, generator=g, dtype=torch.float64)
    values = slope * predicted + noise + torch.arange(5)
    return Check(LDS(predicted, values[None]), 0.5, 61, 1.0, 2.0)


@pytest.mark.parametrize(
    "slope, verdict, words",
    [
        (1.5, "Order and size", "sizes are too small by 1.5 ×"),
        (1.0, "Order and size", "sizes are right"),
        (3.0, "Order only", "sizes are too small by 3.0 ×"),
        (0.25, "Order only", "sizes are too large by 4.0 ×"),
        (0.0, "Do not believe these", "sizes are inconclusive"),
        (-1.0, "Do not believe these", "the order is reversed"),
    ],
)
def test_the_verdict_goes_by_the_interval_and_the_slope(slope, verdict, words):
    found = estimates(slope)
    assert found.verdict == found.summary()["verdict"] == verdict
    assert words in found.reason
    assert found.slope.value == pytest.approx(slope, abs=0.05)
    assert found.summary()["slope"][0] == found.slope.value
    assert str(found).startswith(f"{verdict}: ")


@dataclass(frozen=True)
class Elsewhere:
    """Newton's minima of another model: each moved by the same parameters."""

    by: float

    def prepare(self, task, train):
        trainer = uw.training.Newton(tol=1e-6).prepare(task, train)

        class Trainer:
            at_once = 8

            def __call__(_, weights):
                made = trainer(weights)
                shift = self.by * torch.sin(torch.arange(made.theta.shape[1]).double())
                return Trained(made.theta + shift, made.gradient_norms, made.failures)

        return Trainer()


def test_a_recipe_that_makes_another_model_is_the_verdict(digits, fitted):
    found = fitted.check(Elsewhere(1.0), 8, queries=digits[2])
    assert found.lds.spearman.low > 0.5, "by the correlation alone it would be believed"
    assert found.verdict == "Do not believe these"
    assert "the recipe makes another model" in found.reason
    assert found.notes == tuple(found.summary()["notes"]) and found.notes[0] in found.reason
    assert str(found).splitlines()[0].count("the recipe makes another model") == 1


def test_another_seed_of_the_recipe_is_no_other_recipe(digits, fitted):
    """The model is Newton's own minimum, and the recipe's models that plus noise from a seed."""
    found = fitted.check(Noisy(noise=0.1), 8, queries=digits[2])
    assert 0.1 * found.reproduction.moves < found.reproduction.apart < found.reproduction.noise
    assert found.verdict != "Do not believe these"
    assert found.notes[0].startswith("the model is as another seed of the recipe")
    assert found.notes[0] in str(found)


def network(optimizer=SGD(0.5, momentum=0.9), epochs=20, seed=0):  # noqa: B008  a frozen spec
    return Training(
        lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)),
        optimizer, epochs, 50, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(digits):
    """A network by a loop whose random numbers are nobody's seed of a `Training`."""
    _, train, queries = digits
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = network().init().double()
        optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        for _ in range(20):
            for rows in torch.randperm(300).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
                optimizer.step()
    task = uw.Task(model.eval(), uw.CrossEntropy())
    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
    return method.attribute(queries)


def test_a_model_of_a_loop_with_the_recipes_settings_is_as_another_seed(trained):
    found = check(trained, network(), subsets=24)
    assert found.reproduction.is_another_seed
    assert found.verdict in ("Order only", "Order and size"), found


@pytest.mark.parametrize("settings", [{"epochs": 1}, {"optimizer": SGD(0.01)}])
def test_a_recipe_of_too_little_training_makes_another_model(trained, settings):
    found = check(trained, network(**settings), subsets=12)
    assert found.reproduction.apart > 2 * found.reproduction.noise
    assert found.verdict == "Do not believe these"
    assert "the recipe makes another model" in found.reason


def test_a_wide_interval_is_no_agreement():
    found = estimates(1.0)
    g = torch.Generator().manual_seed(1)
    noise = 10 * torch.randn(60, 5, generator=g, dtype=torch.float64)
    found = replace(found, lds=LDS(found.lds.predicted, found.lds.values + noise))
    assert found.slope.low < 1 < found.slope.high
    assert found.verdict == "Do not believe these"
    assert "sizes are right" not in found.reason


def test_queries_without_a_ranking_are_left_out_and_named(digits, fitted):
    """One of which nothing is predicted, and one whose loss no model changes."""

    @dataclass(frozen=True)
    class Sure:
        """A query of which every model is sure to the last digit."""

        def __call__(self, task, params, batch):
            losses = uw.Loss()(task, params, batch)
            return losses.where(batch[1] != 4, 0.0 * losses)

    sure = (digits[2][1] == 4).nonzero()[:, 0].tolist()
    scores = fitted.attribute(digits[2])
    values = scores.values.clone()
    values[3] = 0.0
    found = check(replace(scores, values=values), uw.training.Newton(), subsets=16)
    assert found.left_out == (3,)
    assert found.queries == [q for q in range(12) if q != 3]
    assert found.drift.shape == (11,)
    assert any(note.startswith("1 of 12 queries left out (3)") for note in found.notes)
    whole = check(scores, uw.training.Newton(), subsets=16)
    assert torch.equal(found.lds.predicted, whole.lds.predicted[:, found.queries])
    assert torch.equal(found.lds.values, whole.lds.values[..., found.queries])
    assert sure
    also = check(replace(scores, context=replace(scores.context, measure=Sure())),
                 uw.training.Newton(), subsets=16)  # fmt: skip
    assert also.left_out == tuple(sure)
    kept = json.loads(json.dumps(also.summary()))
    assert kept["left_out"] == sure


def test_what_cannot_be_compared_is_refused_before_any_training(digits, fitted):
    """Scores that are all 0 have no ranking."""

    @dataclass(frozen=True)
    class Never:
        def prepare(self, task, train):
            raise AssertionError("trained")

    scores = fitted.attribute(digits[2])
    with pytest.raises(uw.errors.DataError, match="12 of 12 queries"):
        check(replace(scores, values=0 * scores.values), Never(), "1 h")


def test_a_query_far_from_the_others_does_not_make_the_slope():
    """Each query about its own mean: offsets between queries say nothing of removals."""
    found = estimates(0.5)
    moved = replace(found, lds=LDS(found.lds.predicted, found.lds.values + 100 * torch.arange(5)))
    assert moved.slope.value == pytest.approx(found.slope.value)


@pytest.mark.parametrize(
    "text, seconds",
    [("90 s", 90), ("2 min", 120), ("1.5 minutes", 90), ("1h", 3600), ("2 hours", 7200), (5, 5)],
)
def test_budgets_are_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "two minutes", "5 days", "0 s", 0, -1.0, float("nan")])
def test_what_is_no_time_is_refused(text, digits, fitted):
    scores = fitted.attribute(digits[2])
    with pytest.raises(SpecError, match="A budget is a time"):
        check(scores, uw.training.Newton(), text)


@pytest.mark.parametrize(("slower", "budget"), [(1.0, 40.0), (3.0, 40.0), (3.0, 5.0)])
def test_a_budget_is_kept_where_the_machine_becomes_slower(
    digits, fitted, monkeypatch, slower, budget
):
    """Each model takes a second, and after half of the budget several.

    A budget for fewer than eight subsets is used all the same, and says what would be enough.
    """
    module = import_module("upweight.evaluation.check")
    clock = SimpleNamespace(now=0.0)
    retrain = module._retrained

    def timed(*arguments):
        rows = arguments[2]
        clock.now += len(rows) * (1.0 if clock.now < budget / 2 else slower)
        return retrain(*arguments)

    monkeypatch.setattr(module, "_retrained", timed)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    scores = fitted.attribute(digits[2])
    found = check(scores, uw.training.Newton(), budget)
    assert 0.8 * budget <= found.seconds < (1.3 if budget > 9 else 2.0) * budget
    halves = len(found.lds.predicted)
    if budget > 9:
        assert halves >= 8
        return
    assert 3 <= halves < 8 and found.verdict is Verdict.DOUBT
    left = found.each * (8 - halves)
    assert f"about {left:.0f} s more would make it 8 subsets" in str(found)
    assert found.summary()["more"] == found.more


def test_a_budget_for_fewer_than_eight_subsets_is_refused_early(digits, fitted):
    class Slow:
        at_once = 1

        def __call__(self, weights):
            time.sleep(0.2 * len(weights))
            theta = digits[0].theta().expand(len(weights), -1)
            return Trained(theta, torch.zeros(len(weights)))

    @dataclass(frozen=True)
    class Recipe:
        def prepare(self, task, train):
            return Slow()

    begun = time.perf_counter()
    with pytest.raises(SpecError, match=r"8 subsets would take about \d s") as caught:
        fitted.check(Recipe(), 1.0, queries=digits[2])
    assert time.perf_counter() - begun < 2
    assert "subsets=8 or --lds 8" in str(caught.value)
    # Its way out without any training.
    assert "check(scores, upweight.SGD(1e-3))" in str(caught.value)
    assert uw.check(fitted.attribute(digits[2]), uw.SGD(1e-3)).mean.value < 0


def test_a_function_of_data_weights_is_a_recipe(digits, fitted):
    task, train, queries = digits
    trained = uw.training.Newton().prepare(task, uw.as_data(train))

    def fit(weights):
        return trained(weights[None]).theta[0]

    found = fitted.check(fit, subsets=8, queries=queries)
    again = fitted.check(uw.training.FromFunction(fit), subsets=8, queries=queries)
    assert found.summary() | {"seconds": 0} == again.summary() | {"seconds": 0}


def test_a_number_of_subsets_in_place_of_a_time(digits, fitted):
    queries = digits[2]
    short = fitted.check(uw.training.Newton(), subsets=9, queries=queries)
    whole = uw.check(fitted.attribute(queries), uw.training.Newton(), subsets=9)
    assert len(short.lds.predicted) == 9 and not math.isfinite(short.budget)
    assert torch.equal(short.lds.values, whole.lds.values)
    assert torch.equal(short.lds.predicted, whole.lds.predicted)


def test_a_time_and_a_number_of_subsets_exclude_each_other(fitted, digits):
    with pytest.raises(SpecError, match=r"budget='1 h' and subsets=9") as refused:
        fitted.check(uw.training.Newton(), "1 h", subsets=9, queries=digits[2])
    assert "check(scores, recipe, subsets=9)" in str(refused.value)
