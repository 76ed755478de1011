"""Curvature and scores on disk: interrupted anywhere, they go on to the same numbers."""

import contextlib
import copy
import dataclasses
import errno
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import upweight as uw
from tests.fitted import at
from tests.market import draw, initialized, problem
from tests.runtime.damage import DAMAGES
from upweight.errors import SpecError, StaleStore
from upweight.runtime import resources
from upweight.runtime.matrix import StoredMatrix

METHOD = uw.Influence(curvature=uw.EKFAC(), damping=uw.Relative(0.1))
NAMES = ("mlp_tanh", "conv", "tied", "layer_norm", "mlp_float32")


class _Killed(BaseException):
    pass


@contextlib.contextmanager
def stopped_at_shard(number):
    """A pass over scores that is stopped when it comes to write that many files."""
    original, count = StoredMatrix.append, 0

    def append(self, first, start, values):
        nonlocal count
        count += 1
        if count == number:
            raise _Killed
        original(self, first, start, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredMatrix, "append", append)
        with pytest.raises(_Killed):
            yield


@pytest.fixture
def small_batches(monkeypatch):
    """A checkpoint after every batch, of two examples."""
    monkeypatch.setattr(resources, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr("upweight.curvature.layerwise.MOST_EXAMPLES", 2)


def killed_after(writes, monkeypatch):
    """Let that many checkpoints be written, then die; returns what ends the spell."""
    original, count = resources.Checkpoint.write, 0

    def write(self, tensors):
        nonlocal count
        original(self, tensors)
        count += 1
        if count == writes:
            raise _Killed

    monkeypatch.setattr(resources.Checkpoint, "write", write)
    return lambda: monkeypatch.setattr(resources.Checkpoint, "write", original)


@pytest.mark.parametrize("writes", [1, 3, 6, 8])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("small_batches")
def test_a_killed_fit_goes_on_bit_for_bit(name, writes, tmp_path, monkeypatch):
    task, train = problem(name).task, problem(name).train
    whole = METHOD.fit(task, train)
    end = killed_after(writes, monkeypatch)
    with pytest.raises(_Killed):
        METHOD.fit(task, train, resources=uw.Resources(folder=tmp_path))
    end()
    resumed = METHOD.fit(task, train, resources=uw.Resources(folder=tmp_path))
    for a, b in zip(resumed.scorer.curvature.blocks, whole.scorer.curvature.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
    torch.testing.assert_close(resumed.losses, whole.losses)


@pytest.mark.parametrize("curvature", [uw.EKFAC(), uw.KFAC(), uw.Diagonal()], ids=repr)
def test_a_finished_curvature_is_read_back(curvature, tmp_path):
    p = problem("attention")
    method = uw.Influence(curvature=curvature, damping=uw.Relative(0.1))
    first = at(method.fit(p.task, p.train, resources=uw.Resources(folder=tmp_path)), 0.0).attribute(
        p.queries
    )
    again = method.fit(p.task, p.train, resources=uw.Resources(folder=tmp_path))
    assert set(first.provenance.seconds) >= {"fit", "fit: pass 1", "attribute"}
    assert set(again.seconds) == {"fit"}
    assert torch.equal(at(again, 0.0).attribute(p.queries).values, first.values)


def absolute(f, y):
    return (f - y).abs().sum(dim=1)


def rooted(f, y):
    return (1 + (f - y) ** 2).sqrt().sum(dim=1)


def scaled_inputs(model, batch):
    return model(2.0 * batch[0]), batch[1]


CHANGES = {
    "damping": lambda m, t: (dataclasses.replace(m, damping=uw.Relative(0.2)), t),
    "curvature": lambda m, t: (dataclasses.replace(m, curvature=uw.KFAC(uw.labels.Observed())), t),
    "penalty": lambda m, t: (m, uw.Task(t.model, t.loss, uw.L2(0.02))),
    "parameters": lambda m, t: (m, uw.Task(t.model, t.loss, t.penalty, params="2.*")),
    "forward": lambda m, t: (m, uw.Task(t.model, t.loss, t.penalty, forward=scaled_inputs)),
    "a loss of that name": lambda m, t: (m, uw.Task(t.model, named_as(rooted), t.penalty)),
    "activation": lambda m, t: (m, uw.Task(with_layer(t.model, 1, nn.Tanh()), t.loss, t.penalty)),
    "buffer": lambda m, t: (m, uw.Task(with_statistics(t.model), t.loss, t.penalty)),
}


def named_as(function):
    """The same module and name as `absolute`, as two lambdas have."""
    made = types.FunctionType(function.__code__, function.__globals__, "absolute")
    made.__qualname__ = "absolute"
    return made


def with_layer(model, k, layer):
    changed = copy.deepcopy(model)
    changed[k] = layer
    return changed


def with_statistics(model):
    changed = copy.deepcopy(model)
    changed[3].running_mean.add_(0.1)
    return changed


def stored():
    g = torch.Generator().manual_seed(0)
    layers = [nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)]
    task = uw.Task(initialized(nn.Sequential(*layers), g).eval(), absolute, uw.L2(0.01))
    method = uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=uw.Relative(0.1))
    return method, task, (draw(g, 9, 2), draw(g, 9, 2))


@pytest.mark.parametrize("change", [*CHANGES, "data"])
def test_a_folder_of_something_else_is_refused(change, tmp_path):
    """Both that of a fit and that of scores, also where θ is the same."""
    method, task, (X, y) = stored()
    fitted = method.fit(task, (X, y), resources=uw.Resources(folder=tmp_path / "fit"))
    fitted.attribute((X[:2], y[:2]), into=uw.Shards(tmp_path / "scores"))
    if change == "data":
        X = X.clone()
        X[0, 0] += 1e-9
    else:
        method, task = CHANGES[change](method, task)
    with pytest.raises(StaleStore, match="is of another"):
        method.fit(task, (X, y), resources=uw.Resources(folder=tmp_path / "fit"))
    with pytest.raises(StaleStore, match="is of another"):
        method.fit(task, (X, y)).attribute((X[:2], y[:2]), into=uw.Shards(tmp_path / "scores"))


def test_scores_of_another_question_are_refused(tmp_path):
    method, task, (X, y) = stored()
    fitted = method.fit(task, (X, y), resources=uw.Resources(folder=tmp_path / "fit"))
    fitted.attribute((X[:2], y[:2]), lambda f, y: f[:, 0], into=uw.Shards(tmp_path / "scores"))
    again = method.fit(copied(task), (X, y), resources=uw.Resources(folder=tmp_path / "fit"))
    assert set(again.seconds) == {"fit"}, "the same model in another place is the same"
    again.attribute((X[:2], y[:2]), lambda f, y: f[:, 0], into=uw.Shards(tmp_path / "scores"))
    for queries, measure in (
        ((X[:2], y[:2]), lambda f, y: f[:, 1]),
        ((X[1:3], y[1:3]), lambda f, y: f[:, 0]),
    ):
        with pytest.raises(StaleStore, match="is of another"):
            fitted.attribute(queries, measure, into=uw.Shards(tmp_path / "scores"))


def copied(task):
    return uw.Task(copy.deepcopy(task.model), task.loss, task.penalty)


def test_a_method_with_nothing_to_keep_leaves_the_folder_alone(tmp_path):
    p = problem("softmax")
    uw.Influence().fit(p.task, p.train, resources=uw.Resources(folder=tmp_path / "fit"))
    assert not (tmp_path / "fit").exists()


def test_exact_scores_on_disk_go_on(tmp_path, monkeypatch):
    """As those by layer do: every method writes through one sink."""
    p = problem("mlp_tanh")
    few = uw.Resources(memory_bytes=16 * p.task.layout.size)
    fitted = uw.Influence(uw.GGN(), damping=0.1).fit(p.task, p.train, resources=few)
    monkeypatch.setattr("upweight.shards.SHARD_BYTES", 1)
    whole = fitted.attribute(p.queries)
    with stopped_at_shard(3):
        fitted.attribute(p.queries, into=uw.Shards(tmp_path))
    shards = fitted.attribute(p.queries, into=uw.Shards(tmp_path))
    assert torch.equal(shards.values(), whole.values)


def test_finished_shards_are_not_read_to_be_returned(tmp_path, monkeypatch):
    p = problem("conv")
    fitted = at(METHOD.fit(p.task, p.train), 0.0)
    written = fitted.attribute(p.queries, into=uw.Shards(tmp_path)).values()
    with monkeypatch.context() as unread:
        unread.setattr(StoredMatrix, "blocks", lambda self: pytest.fail("the files were read"))
        again = fitted.attribute(p.queries, into=uw.Shards(tmp_path))
    assert torch.equal(again.values(), written)


@pytest.mark.parametrize("name", NAMES)
def test_written_scores_are_those_of_attribute(name, tmp_path):
    p = problem(name)
    fitted = METHOD.fit(p.task, p.train)
    scores = at(fitted, 0.0).attribute(p.queries)
    shards = at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    for query in range(len(scores)):
        assert torch.equal(shards.row(query), scores.values[query])


def test_written_scores_load_with_their_provenance(tmp_path):
    p = problem("conv")
    fitted = METHOD.fit(p.task, p.train)
    scores = at(fitted, 0.0).attribute(p.queries)
    at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    found = uw.Scores.load(tmp_path)
    assert torch.equal(found.values, scores.values)
    assert (found.unit, found.provenance.notes) == (scores.unit, scores.provenance.notes)
    for name in ("row_sum_excess", "row_sum_excess_relative"):
        expected = scores.provenance.health[name]
        assert found.provenance.health[name] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_interrupted_scores_go_on_where_less_memory_is_free(tmp_path, monkeypatch):
    p = problem("conv")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.shards.SHARD_BYTES", 1)
    monkeypatch.setattr("upweight.scoring.stream.MOST_EXAMPLES", 4)
    monkeypatch.setattr("upweight.scoring.stream.TOGETHER", (1, 1))
    whole = fitted.attribute(p.queries, into=uw.Shards(tmp_path / "whole")).values()
    with stopped_at_shard(3):
        fitted.attribute(p.queries, into=uw.Shards(tmp_path / "part"))
    # So little that queries would no longer share a pass, nor examples a batch.
    with monkeypatch.context() as scarce:
        scarce.setattr("upweight.runtime.memory.free_bytes", lambda _: 100)
        resumed = fitted.attribute(p.queries, into=uw.Shards(tmp_path / "part"))
    assert torch.equal(resumed.values(), whole)


def test_interrupted_scores_go_on(tmp_path, monkeypatch):
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.shards.SHARD_BYTES", 1)
    monkeypatch.setattr("upweight.scoring.stream.MOST_EXAMPLES", 4)
    monkeypatch.setattr("upweight.scoring.stream.TOGETHER", (1, 1))
    whole = at(fitted, 0.0).attribute(p.queries)
    with stopped_at_shard(3):
        at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    assert StoredMatrix.load(tmp_path).missing(0, len(p.queries[0])) == [(8, p.n)]
    shards = at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    assert torch.equal(shards.row(1), whole.values[1])


def full_after(files, monkeypatch):
    """A disk with room for that many files."""
    fsync, count = os.fsync, 0

    def limited(file):
        nonlocal count
        count += 1
        if count > files:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr("os.fsync", limited)
    return lambda: monkeypatch.setattr("os.fsync", fsync)


@pytest.mark.parametrize("files", [0, 1, 5])
@pytest.mark.usefixtures("small_batches")
def test_a_fit_on_a_full_disk_goes_on_bit_for_bit(files, tmp_path, monkeypatch):
    p = problem("mlp_tanh")
    whole = METHOD.fit(p.task, p.train)
    end = full_after(files, monkeypatch)
    with pytest.raises(OSError, match="No space left") as caught:
        METHOD.fit(p.task, p.train, resources=uw.Resources(folder=tmp_path))
    assert "what" in caught.value.__notes__[0] and "is whole" in caught.value.__notes__[0]
    names = ["manifest.json", "state.safetensors"][:files]
    assert sorted(f.name for f in tmp_path.iterdir()) == names
    end()
    resumed = METHOD.fit(p.task, p.train, resources=uw.Resources(folder=tmp_path))
    for a, b in zip(resumed.scorer.curvature.blocks, whole.scorer.curvature.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)


@pytest.mark.parametrize("files", [0, 1, 3])
def test_scores_on_a_full_disk_go_on_bit_for_bit(files, tmp_path, monkeypatch):
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.shards.SHARD_BYTES", 1)
    monkeypatch.setattr("upweight.scoring.stream.MOST_EXAMPLES", 4)
    monkeypatch.setattr("upweight.scoring.stream.TOGETHER", (1, 1))
    whole = at(fitted, 0.0).attribute(p.queries)
    end = full_after(files, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    end()
    shards = at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    for query in range(len(whole)):
        assert torch.equal(shards.row(query), whole.values[query])


def test_finished_scores_are_read_back_without_a_pass(tmp_path, monkeypatch):
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    first = at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path)).row(2)
    monkeypatch.setattr("upweight.methods.layered.contractions", None)
    assert torch.equal(at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path)).row(2), first)


def test_scores_go_on_with_another_memory(tmp_path, monkeypatch):
    """Killed with all queries in one group; the next run has room for one query at a time."""
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.shards.SHARD_BYTES", 1)
    monkeypatch.setattr("upweight.scoring.stream.MOST_EXAMPLES", 4)
    monkeypatch.setattr("upweight.scoring.stream.TOGETHER", (1, 1))
    end = full_after(3, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    end()
    small = dataclasses.replace(fitted, resources=uw.Resources(memory_bytes=1))
    shards = at(small, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    expected = at(fitted, 0.0).attribute(p.queries).values
    for query in range(4):
        torch.testing.assert_close(shards.row(query), expected[query], rtol=1e-10, atol=1e-13)


def test_two_processes_may_share_a_store(tmp_path):
    """Both at once; afterwards the folder holds a curvature that either would have made."""
    script = (
        "import sys, torch, upweight as uw\n"
        "from upweight.runtime import resources\n"
        "resources.EVERY_SECONDS = 0.0\n"
        "g = torch.Generator().manual_seed(0)\n"
        "X, y = torch.randn(3000, 4, generator=g), torch.randint(3, (3000,), generator=g)\n"
        "model = torch.nn.Linear(4, 3)\n"
        "for p in model.parameters(): p.data.fill_(0.1)\n"
        "method = uw.Influence(uw.EKFAC(), damping=0.1)\n"
        "task = uw.Task(model, uw.CrossEntropy())\n"
        "fitted = method.fit(task, (X, y), resources=uw.Resources(folder=sys.argv[1]))\n"
        "fitted.attribute((X[:2], y[:2]), into=uw.Shards(sys.argv[1] + '/scores'))\n"
        "print(fitted.scorer.curvature.blocks[0].eigenvalues.double().sum().item())\n"
    )
    run = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] != ""
    assert not list(tmp_path.rglob("*.part"))
    assert StoredMatrix.load(tmp_path / "scores").is_whole


def test_more_scores_than_memory_are_refused_before_any_work(monkeypatch):
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.runtime.memory.free_bytes", lambda _: 100)
    with pytest.raises(SpecError, match=r"into=Shards\(folder\)"):
        fitted.attribute(p.queries)


def test_no_training_data_are_refused_in_our_own_words():
    p = problem("mlp_tanh")
    X, y = p.train
    with pytest.raises(uw.errors.DataError, match="must hold at least one example"):
        METHOD.fit(p.task, (X[:0], y[:0]))


@pytest.mark.parametrize("k", [0, 1, -1])
def test_a_damaged_file_of_scores_is_named_and_only_it_is_computed_again(k, tmp_path, monkeypatch):
    """The first, one in the middle and the last; the others are not touched."""
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.shards.SHARD_BYTES", 1)
    monkeypatch.setattr("upweight.scoring.stream.MOST_EXAMPLES", 4)
    monkeypatch.setattr("upweight.scoring.stream.TOGETHER", (1, 1))
    whole = at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path)).values()
    files = sorted(tmp_path.glob("tile-*"))
    assert len(files) > 2
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    DAMAGES["doubled"](files[k])
    with pytest.raises(StaleStore, match=rf"(?s){files[k].name}.*delete the file and ask again"):
        at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path))
    files[k].unlink()
    assert torch.equal(
        at(fitted, 0.0).attribute(p.queries, into=uw.Shards(tmp_path)).values(), whole
    )
    assert torch.equal(uw.Scores.load(tmp_path).values, whole)
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    assert after[files[k]][0] == before.pop(files[k])[0]
    assert before.items() <= after.items()
