"""Retraining: what is kept, what is found again, and what is never mixed up."""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import upweight as uw
from tests.killing import kill_once_kept
from tests.market import problem
from upweight.errors import (
    NonFinite,
    NotConverged,
    ShapeError,
    SpecError,
    StaleStore,
)
from upweight.task.recipe import Trained
from upweight.training import removal_weights, retrain
from upweight.training.newton import Newton

STEPS = []


@dataclass(frozen=True)
class Descent:
    """Gradient descent, one model at a time; noted in `STEPS`, and made to fail where asked."""

    rate: float = 0.5
    steps: int = 5
    fail_at: int | None = None
    diverge_without: int | None = None

    def prepare(self, task, train):
        return Descending(self, task, train)


@dataclass(frozen=True)
class Descending:
    spec: Descent
    task: object
    train: object
    at_once: int = 1

    def __call__(self, weights):
        STEPS.append(tuple((weights == 0).nonzero()[:, 1].tolist()))
        if self.spec.fail_at == len(STEPS):
            raise OSError("the lights went out")
        batch = self.train.batch(0, len(self.train))
        gradient = torch.func.grad(self.task.objective)
        thetas, norms, failures = [], [], {}
        for row, w in enumerate(weights):
            theta = torch.zeros_like(self.task.theta())
            for _ in range(self.spec.steps):
                theta = theta - self.spec.rate * gradient(theta, batch, w)
            if self.spec.diverge_without is not None and w[self.spec.diverge_without] == 0:
                theta = theta * torch.inf if row % 2 == 0 else theta
            thetas.append(theta)
            norms.append(gradient(theta, batch, w).norm())
        return Trained(torch.stack(thetas), torch.stack(norms), failures)


@dataclass(frozen=True)
class Quitting(Descent):
    """Two at a time; the model without `diverge_without` reports that it failed."""

    def prepare(self, task, train):
        return QuittingTrainer(self, task, train, at_once=2)


class QuittingTrainer(Descending):
    def __call__(self, weights):
        trained = Descending(Descent(), self.task, self.train)(weights)
        gone = [row for row, w in enumerate(weights) if w[self.spec.diverge_without] == 0]
        return Trained(trained.theta, trained.gradient_norms, dict.fromkeys(gone, "gave up"))


@pytest.fixture(autouse=True)
def _no_steps():
    STEPS.clear()


@pytest.fixture
def setup():
    p = problem("ridge")
    return p, removal_weights(p.n, range(6))


LOSS = uw.Loss()


def run(p, weights, recipe=Descent(), train=None, measure=LOSS, cache=None, jobs=None):
    using = uw.Resources(jobs=jobs, folder=cache)
    train = p.train if train is None else train
    return retrain(recipe, p.task, train, weights, p.queries, measure, resources=using)


def same(a, b):
    return torch.equal(a.values, b.values) and torch.equal(a.baseline, b.baseline)


def test_values_are_measurements_of_the_trained_models(setup):
    p, weights = setup
    result = run(p, weights)
    trainer = Descent().prepare(p.task, uw.as_data(p.train))
    for row, w in zip(result.values, weights, strict=True):
        theta = trainer(w[None]).theta[0]
        torch.testing.assert_close(row, p.task.losses(theta, p.queries), rtol=0, atol=0)
    theta = trainer(torch.ones(1, p.n, dtype=torch.float64)).theta[0]
    assert torch.equal(result.baseline, p.task.losses(theta, p.queries))
    assert torch.equal(result.given, p.task.losses(p.task.theta(), p.queries))
    assert torch.equal(result.change, result.values - result.baseline)
    assert torch.equal(result.drift, result.baseline - result.given)


def test_equal_rows_are_trained_once(setup):
    p, weights = setup
    ones = torch.ones(1, p.n, dtype=torch.float64)
    result = run(p, torch.cat([weights[:2], weights[:1], ones]))
    assert len(STEPS) == 3
    assert torch.equal(result.values[0], result.values[2])
    assert torch.equal(result.values[3], result.baseline)


def test_finished_models_are_found_again(setup, tmp_path):
    p, weights = setup
    plain = run(p, weights)
    STEPS.clear()
    first = run(p, weights[:4], cache=tmp_path)
    assert (len(STEPS), first.reused) == (5, 0)
    second = run(p, weights, cache=tmp_path)
    assert (len(STEPS), second.reused) == (7, 5)
    third = run(p, weights.flip(0), cache=tmp_path)
    assert (len(STEPS), third.reused) == (7, 7)
    assert same(second, plain)
    assert torch.equal(third.values, plain.values.flip(0))
    assert torch.equal(third.gradient_norms, plain.gradient_norms.flip(0))


def test_an_interrupted_run_resumes_with_the_same_numbers(setup, tmp_path):
    p, weights = setup
    plain = run(p, weights)
    STEPS.clear()
    broken = Descent(fail_at=4)
    with pytest.raises(OSError, match="lights went out") as caught:
        run(p, weights, broken, cache=tmp_path)
    assert caught.value.__notes__ == ["while retraining without examples [2]"]
    STEPS[:] = [()] * 10  # past the point of failure
    resumed = run(p, weights, broken, cache=tmp_path)
    assert resumed.reused == 3
    assert same(resumed, plain)


def test_batched_models_resume_with_the_same_numbers(tmp_path, monkeypatch):
    """Chunks are cut from the whole plan: the last digits do not depend on the interruption."""
    p = problem("logistic")
    weights = removal_weights(p.n, range(9))
    monkeypatch.setattr(
        "upweight.training.objective.LinearObjective.at_once", property(lambda self: 4)
    )
    plain = run(p, weights, Newton())
    run(p, weights[:3], Newton(), cache=tmp_path)  # the baseline and three: one chunk
    resumed = run(p, weights, Newton(), cache=tmp_path)
    assert resumed.reused == 4
    assert same(resumed, plain)


def scaled(outputs, targets):
    return 2.0 * outputs[:, 0]


def test_another_recipe_model_data_set_or_question_never_reuses_rows(setup, tmp_path):
    p, weights = setup
    run(p, weights, cache=tmp_path)
    X, y = p.train
    moved = X.clone()
    moved[7, 1] += 1e-12
    changed = uw.Task(p.task.model, p.task.loss, uw.L2(0.1000001))
    others = [
        lambda: run(p, weights, Descent(steps=6), cache=tmp_path),
        lambda: run(p, weights, train=(moved, y), cache=tmp_path),
        lambda: run(p, weights, measure=uw.Logit(), cache=tmp_path),
        lambda: run(p, weights, measure=scaled, cache=tmp_path),
        lambda: run(p, weights, measure=lambda f, y: 3.0 * f[:, 0], cache=tmp_path),
        lambda: run(p, weights, measure=lambda f, y: 4.0 * f[:, 0], cache=tmp_path),
        lambda: retrain(
            Descent(), changed, p.train, weights, p.queries, resources=uw.Resources(folder=tmp_path)
        ),
        lambda: retrain(
            Descent(), p.task, p.train, weights, p.train, resources=uw.Resources(folder=tmp_path)
        ),
    ]
    for other in others:
        assert other().reused == 0
        assert other().reused == 7
    assert run(p, weights, cache=tmp_path).reused == 7


def test_the_cache_says_what_it_holds_and_holds_no_pickle(setup, tmp_path):
    p, weights = setup
    run(p, weights, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    manifest = (folder / "manifest.json").read_text()
    assert "Descent(rate=" in manifest
    assert "11 examples" in manifest
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds == {".json", ".safetensors"}


def test_a_damaged_cache_is_an_error(setup, tmp_path):
    p, weights = setup
    run(p, weights, cache=tmp_path)
    path = next(tmp_path.glob("*/*.safetensors"))
    contents = path.read_bytes()
    path.write_bytes(contents[:-4])
    with pytest.raises(StaleStore, match=r"delete the file") as caught:
        run(p, weights, cache=tmp_path)
    assert str(path) in str(caught.value)
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(StaleStore, match="altered numbers"):
        run(p, weights, cache=tmp_path)
    path.unlink()
    assert run(p, weights, cache=tmp_path).reused == 6


def test_a_full_disk_is_an_error_and_keeps_what_was_there(setup, tmp_path, monkeypatch):
    p, weights = setup
    run(p, weights[:2], cache=tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(p, weights, cache=tmp_path)
    assert any("held before is whole" in note for note in caught.value.__notes__)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*/*.part"))
    assert run(p, weights, cache=tmp_path).reused == 3


KILLED = """
import time, torch
from tests.training import test_retrain as t
from tests.market import problem

class Slow(t.Descending):
    def __call__(self, weights):
        time.sleep(0.15)
        return super().__call__(weights)

t.Descent.prepare = lambda self, task, train: Slow(self, task, train)
p = problem("ridge")
p.task.model.weight.data.copy_(torch.tensor({theta!r}, dtype=torch.float64))
t.run(p, t.removal_weights(p.n, range(6)), cache={cache!r})
"""


def test_a_killed_run_loses_only_the_model_in_flight(setup, tmp_path):
    p, weights = setup
    theta = p.task.theta().tolist()
    script = KILLED.format(cache=str(tmp_path), theta=theta)
    kill_once_kept(script, tmp_path, 3)
    plain = run(p, weights)
    resumed = run(p, weights, cache=tmp_path)
    assert 3 <= resumed.reused < 7
    assert same(resumed, plain)


def test_processes_give_the_same_numbers(setup, tmp_path):
    p, weights = setup
    plain = run(p, weights, recipe := Newton(tol=1e-9))
    spread = run(p, weights, recipe, jobs=2, cache=tmp_path)
    torch.testing.assert_close(spread.values, plain.values, rtol=0, atol=1e-9)
    assert run(p, weights, recipe, cache=tmp_path).reused == 7


def test_a_failed_model_is_named_and_the_others_stay(setup, tmp_path):
    p, weights = setup
    with pytest.raises(NotConverged, match=r"1 of 7 models .*without examples \[4\]: gave up") as e:
        run(p, weights, Quitting(diverge_without=4), cache=tmp_path)
    partial = e.value.solution
    assert partial.values.isnan().any(dim=1).tolist() == [False] * 4 + [True, False]
    STEPS.clear()
    with pytest.raises(NotConverged):
        run(p, weights, Quitting(diverge_without=4), cache=tmp_path)
    assert STEPS == [(4,)]


def test_a_diverged_model_is_named(setup):
    p, weights = setup
    with pytest.raises(
        NotConverged, match=r"without examples \[2\]: 4 measurements are not finite"
    ):
        run(p, weights, Descent(diverge_without=2))


def test_weights_must_fit_and_be_numbers(setup):
    p, weights = setup
    with pytest.raises(ShapeError, match=r"\[s, 11\].*\n.*shape \(6, 10\)"):
        run(p, weights[:, 1:])
    weights[2, 5] = torch.nan
    with pytest.raises(NonFinite, match="nan for model 2, example 5"):
        run(p, weights)


def test_a_trainer_that_ignores_its_rows_is_refused(setup):
    p, weights = setup

    class One(Descent):
        def prepare(self, task, train):
            trainer = Descending(self, task, train)
            return type("Fixed", (), {"at_once": 3, "__call__": lambda _, w: trainer(w[:1])})()

    with pytest.raises(ShapeError, match=r"theta \[3, 3\].*\n.*theta \(1, 3\)"):
        run(p, weights, One())


def test_a_cache_needs_a_recipe_that_says_what_it_is(setup, tmp_path):
    p, weights = setup

    class Anonymous:
        def prepare(self, task, train):
            return Descending(Descent(), task, train)

    with pytest.raises(SpecError, match="frozen dataclass"):
        run(p, weights, Anonymous(), cache=tmp_path)
    assert run(p, weights, Anonymous()).reused == 0


def test_zero_jobs_are_refused(setup):
    p, weights = setup
    with pytest.raises(SpecError, match="jobs=None"):
        run(p, weights, jobs=0)


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()


def trains(freezes):
    """A loop with batch normalization, whose running statistics it trains besides."""
    X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(12) % 3

    def fit(weights):
        torch.manual_seed(1)
        model = normed().train()
        if freezes:
            model[1].eval()
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        for _ in range(8):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(X), y, reduction="none")
            (weights * losses).mean().backward()
            optimizer.step()
        return model.eval()

    return fit, (X, y)


@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_a_retrained_model_is_measured_with_its_own_running_statistics(tmp_path, freezes, state):
    """They had been those of the model that was scored: another function of the inputs."""
    fit, train = trains(freezes)
    queries = (train[0][:4] + 0.1, train[1][:4])
    task = uw.Task(fit(torch.ones(12).double()), uw.CrossEntropy())
    weights = removal_weights(12, [[0, 1], [5], [2, 3, 8]])
    recipe = uw.training.FromFunction((lambda w: fit(w).state_dict()) if state else fit)
    found = retrain(recipe, task, train, weights, queries)
    for values, w in zip(found.values, weights, strict=True):
        own = nn.functional.cross_entropy(fit(w)(queries[0]), queries[1], reduction="none")
        torch.testing.assert_close(values, own.detach(), rtol=1e-10, atol=1e-12)
    assert float(found.drift.abs().max()) < 1e-12
