"""Models of random subsets, trained for what is fitted to them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.errors import NotConverged, SpecError
from upweight.training import seeds
from upweight.training.function import as_recipe
from upweight.training.subset_models import APART, fitting_weights

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :1] - 0.5 * X[:, 1:2]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


TASK = uw.Task(net(), uw.SquaredError())
RECIPE = uw.Training(net, uw.SGD(0.1), epochs=2, batch=4, seed=5)


def models(*given, **named):
    return uw.training.subset_models(RECIPE, TASK, uw.as_data((X, Y)), *given, **named)


@pytest.mark.parametrize("n", [9, 12, 30])
def test_no_subset_that_judges_is_fitted_to(n):
    judges = {tuple(row.nonzero()[:, 0].tolist()) for row in subsets_of(n)}
    size = 20 if n > 10 else 5
    if n == 9:  # 126 halves, all of them drawn by `check` already
        with pytest.raises(SpecError, match="other ones than those that judge"):
            fitting_weights(n, size, 0.5)
        return
    drawn = fitting_weights(n, size, 0.5)
    assert len(torch.unique(drawn, dim=0)) == size
    assert not judges & {tuple(row.nonzero()[:, 0].tolist()) for row in drawn}
    torch.testing.assert_close(drawn.mean(dim=1), torch.ones(size, dtype=torch.float64))


def subsets_of(n):
    """Those that `check` draws."""
    most = min(256, 126 if n == 9 else 256)
    return uw.training.subset_weights(n, most, 0.5, renormalize=True)


def test_each_is_what_the_recipe_makes_from_its_seed():
    found = models(5, seeds=2, at=(0.5, 1.0))
    assert found.group.tolist() == [0, 1, 0, 1, 0] and found.seeds == 2 and found.trainings == 2.5
    for s in range(5):
        recipe = replace(RECIPE, seed=RECIPE.seed + APART + int(found.group[s]))
        run = recipe.trajectory(TASK, (X, Y), found.weights[s], every=1)
        torch.testing.assert_close(found.theta[1.0][s], run.theta, rtol=1e-10, atol=1e-12)
        half = run.state(len(run) // 2).theta
        torch.testing.assert_close(found.theta[0.5][s], half, rtol=1e-10, atol=1e-12)


def test_a_function_with_a_seed_is_trained_from_others():
    """What a recipe of steps does, in a function: to the last bits the same models."""
    calls = []

    def fit(weights, *, seed=5):
        calls.append(seed)
        return replace(RECIPE, seed=seed).prepare(TASK, data)(weights[None]).theta[0]

    data, recipe = uw.as_data((X, Y)), as_recipe(fit)
    assert recipe == uw.training.FromFunction(fit, seed=5)
    found, expected = uw.training.subset_models(recipe, TASK, data, 5, seeds=2), models(5, seeds=2)
    assert torch.equal(found.weights, expected.weights) and found.seeds == 2
    torch.testing.assert_close(found.theta[1.0], expected.theta[1.0], rtol=1e-12, atol=1e-14)
    assert calls == [1005, 1005, 1005, 1005, 1006, 1006]  # the first of all models twice
    whole = uw.training.subset_models(as_recipe(fit), TASK, data, 2, 1.0)
    torch.testing.assert_close(whole.theta[1.0], models(2, 1.0).theta[1.0], rtol=1e-12, atol=1e-14)
    assert as_recipe(lambda w, seed: None).seed == 0 and as_recipe(lambda w: None).seed is None


def test_models_of_all_of_the_data_differ_by_their_seed():
    found = models(2, 1.0)
    assert bool((found.weights == 1).all()) and found.trainings == 2
    assert not torch.equal(found.theta[1.0][0], found.theta[1.0][1])


def test_what_cannot_be_meant_is_refused():
    newton = uw.training.Newton()
    data = uw.as_data((X, Y))
    with pytest.raises(SpecError, match="differ by the seed"):
        uw.training.subset_models(newton, TASK, data, 2, 1.0)
    loop = uw.training.FromFunction(lambda w: TASK.theta(), twice=False)
    with pytest.raises(SpecError, match="on their way"):
        uw.training.subset_models(loop, TASK, data, 2, at=(0.5, 1.0))
    diverging = replace(RECIPE, optimizer=uw.SGD(1e200))
    with pytest.raises(NotConverged):
        uw.training.subset_models(diverging, TASK, data, 2)


class Noisy(nn.Module):
    """A layer, its outputs times 1 with noise that is drawn, where there is any."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.linear, self.noise = nn.Linear(3, 1).double(), noise

    def forward(self, x):
        out = self.linear(x)
        return out * (1 + self.noise * torch.randn_like(out)) if self.noise else out


class Own(nn.Module):
    """A layer behind a map that each model draws for itself, and that is no parameter."""

    def __init__(self):
        super().__init__()
        self.linear, self.map = nn.Linear(3, 1).double(), torch.randn(3, 3).double()

    def forward(self, x):
        return self.linear(x @ self.map)


@pytest.mark.parametrize("skip_absent", [False, True])
@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "init"),
    [
        (uw.SGD(0.1, momentum=0.9), net),
        (uw.Adam(0.01), net),
        (uw.SGD(0.1), lambda: Noisy(0.1)),
        (uw.SGD(0.1), Own),
    ],
)
def test_models_of_several_seeds_are_those_that_train_alone(
    optimizer, init, runs, skip_absent, monkeypatch
):
    """Together where neither draws nor a model's own constants tell seeds apart."""
    torch.manual_seed(0)
    task = uw.Task(init(), uw.SquaredError())
    recipe = uw.Training(init, optimizer, epochs=2, batch=3, seed=5, skip_absent=skip_absent)
    made = []
    made_of = seeds.SeveralSeeds.of
    monkeypatch.setattr(seeds.SeveralSeeds, "of", lambda each: made.append(1) or made_of(each))
    data = uw.as_data((X[:13], Y[:13]))
    found = uw.training.subset_models(recipe, task, data, 5, seeds=5, at=(0.5, 1.0), runs=runs)
    assert bool(made) == (init is net)
    for s in range(5):
        own = replace(recipe, seed=recipe.seed + APART + s)
        if init is Own:  # what is no parameter is not taken from the model that is asked about
            continue
        run = own.trajectory(task, (X[:13], Y[:13]), found.weights[s], every=1)
        torch.testing.assert_close(found.theta[1.0][s], run.theta, rtol=1e-9, atol=1e-12)
        half = run.state(len(run) // 2)
        torch.testing.assert_close(found.theta[0.5][s], half.theta, rtol=1e-9, atol=1e-12)
        if runs:
            mine = found.runs[s]
            assert len(mine) == len(run) and mine.recipe == own
            state = mine.state(len(run) // 2)
            for one, other in zip(state.tensors, half.tensors, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
            (step, before), (same, there) = (next(x.replay(3, 4)) for x in (mine, run))
            assert torch.equal(step.indices, same.indices) and step.seed == same.seed
            torch.testing.assert_close(before.theta, there.theta, rtol=1e-9, atol=1e-12)


def test_runs_that_trained_together_are_found_again(tmp_path):
    """To the last bit, by the folder; a call for other rows trains its own."""
    resources, data = uw.Resources(folder=tmp_path), uw.as_data((X, Y))
    named = {"seeds": 4, "runs": True, "resources": resources}
    first = uw.training.subset_models(RECIPE, TASK, data, 4, **named)
    (file,) = tmp_path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    again = uw.training.subset_models(RECIPE, TASK, data, 4, **named)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first.theta[1.0], again.theta[1.0])
    for one, other in zip(first.runs, again.runs, strict=True):
        assert one.kept == other.kept
        for t in one.kept:
            pairs = zip(one.states[t].tensors, other.states[t].tensors, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_that_diverges_is_refused_before_it_is_kept(tmp_path):
    diverging, data = replace(RECIPE, optimizer=uw.SGD(1e200)), uw.as_data((X, Y))
    with pytest.raises(NotConverged, match="NaN or infinite"):
        uw.training.subset_models(
            diverging, TASK, data, 4, seeds=4, at=(0.5,), runs=True,
            resources=uw.Resources(folder=tmp_path),
        )  # fmt: skip
    assert not list(tmp_path.glob("*.safetensors"))


def test_models_that_draw_are_recorded_alone():
    """Dropout of one seed: with the same masks for all it could not be replayed on a GPU."""
    recipe = uw.Training(lambda: Noisy(0.1), uw.SGD(0.1), epochs=2, batch=4)
    task, data = uw.Task(Noisy(0.1), uw.SquaredError()), uw.as_data((X, Y))
    own = [replace(recipe, seed=k) for k in range(2)]
    group = torch.arange(6) % 2
    for replayed, most in ((False, 3), (True, 1)):
        chunks = list(seeds.rows_together(own, task, data, group, replayed=replayed))
        assert max(len(rows) for _, rows in chunks) == most
        assert not any(isinstance(trainer, seeds.SeveralSeeds) for trainer, _ in chunks)


def test_as_many_train_at_once_as_have_their_batches_in_the_cache(monkeypatch):
    """Each of several seeds has its own; of one seed they share theirs."""
    task, data = TASK, uw.as_data((X, Y))
    own, group = [replace(RECIPE, seed=k) for k in range(6)], torch.arange(6)
    held = 4 * (3 + 1) * 8  # a batch in float64
    monkeypatch.setattr(seeds, "CACHE_BYTES", 3 * held + 1)
    monkeypatch.setattr(seeds, "_is_small", lambda trainer: True)
    chunks = [rows.tolist() for _, rows in seeds.rows_together(own, task, data, group)]
    assert chunks == [[0, 1, 2], [3, 4, 5]]
    ((_, rows),) = seeds.rows_together(own[:1], task, data, torch.zeros(6).long())
    assert len(rows) == 6
    monkeypatch.undo()
    monkeypatch.setattr(seeds, "CACHE_BYTES", 31 * 8 - 1)  # of the model's 21 numbers and more
    assert seeds._is_small(own[0].prepare(task, data))
    monkeypatch.setattr(seeds, "CACHE_BYTES", 21 * 8 - 1)
    assert not seeds._is_small(own[0].prepare(task, data))
