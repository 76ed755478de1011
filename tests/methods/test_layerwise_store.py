"""Curvature and scores on disk: interrupted anywhere, they go on to the same numbers."""

import pytest
import torch

import upweight as uw
from tests.market import problem
from upweight.errors import SpecError, StaleStore
from upweight.runtime import checkpoint
from upweight.runtime.shards import ScoreShards

METHOD = uw.Influence(curvature=uw.EKFAC(), damping=uw.Relative(0.1))
NAMES = ("mlp_tanh", "conv", "tied", "layer_norm", "mlp_float32")


class _Killed(BaseException):
    pass


@pytest.fixture
def small_batches(monkeypatch):
    """A checkpoint after every batch, of two examples."""
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr("upweight.curvature.layerwise.MOST_EXAMPLES", 2)


def killed_after(writes, monkeypatch):
    """Let that many checkpoints be written, then die; returns what ends the spell."""
    original, count = checkpoint.Checkpoint.write, 0

    def write(self, tensors):
        nonlocal count
        original(self, tensors)
        count += 1
        if count == writes:
            raise _Killed

    monkeypatch.setattr(checkpoint.Checkpoint, "write", write)
    return lambda: monkeypatch.setattr(checkpoint.Checkpoint, "write", original)


@pytest.mark.parametrize("writes", [1, 3, 6, 8])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("small_batches")
def test_a_killed_fit_goes_on_bit_for_bit(name, writes, tmp_path, monkeypatch):
    task, train = problem(name).task, problem(name).train
    whole = METHOD.fit(task, train)
    end = killed_after(writes, monkeypatch)
    with pytest.raises(_Killed):
        METHOD.fit(task, train, store=tmp_path)
    end()
    resumed = METHOD.fit(task, train, store=tmp_path)
    for a, b in zip(resumed.curvature.blocks, whole.curvature.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
    torch.testing.assert_close(resumed.losses, whole.losses)


@pytest.mark.parametrize("curvature", [uw.EKFAC(), uw.KFAC(), uw.Diagonal()], ids=repr)
def test_a_finished_curvature_is_read_back(curvature, tmp_path):
    p = problem("attention")
    method = uw.Influence(curvature=curvature, damping=uw.Relative(0.1))
    first = method.fit(p.task, p.train, store=tmp_path).attribute(p.queries, tolerance=0.0)
    again = method.fit(p.task, p.train, store=tmp_path)
    assert set(first.provenance.seconds) >= {"fit", "fit: pass 1", "attribute"}
    assert set(again.seconds) == {"fit"}
    assert torch.equal(again.attribute(p.queries, tolerance=0.0).values, first.values)


@pytest.mark.parametrize("change", ["damping", "curvature", "data", "parameters"])
def test_a_store_of_something_else_is_refused(change, tmp_path):
    p = problem("mlp_gelu")
    METHOD.fit(p.task, p.train, store=tmp_path)
    method, task, (X, y) = METHOD, p.task, p.train
    if change == "damping":
        method = uw.Influence(curvature=uw.EKFAC(), damping=uw.Relative(0.2))
    if change == "curvature":
        method = uw.Influence(curvature=uw.KFAC(), damping=uw.Relative(0.1))
    if change == "data":
        X = X.clone()
        X[0, 0] += 1e-9
    if change == "parameters":
        task = uw.Task(p.task.model, uw.SquaredError(), uw.L2(0.01), params="2.*")
    with pytest.raises(StaleStore, match="other parameters, data or settings"):
        method.fit(task, (X, y), store=tmp_path)


def test_a_store_needs_a_layerwise_curvature(tmp_path):
    p = problem("softmax")
    with pytest.raises(SpecError, match=r"use curvature=EKFAC\(\)"):
        uw.Influence().fit(p.task, p.train, store=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_written_scores_are_those_of_attribute(name, tmp_path):
    p = problem(name)
    fitted = METHOD.fit(p.task, p.train)
    scores = fitted.attribute(p.queries, tolerance=0.0)
    shards = fitted.write(p.queries, tmp_path, tolerance=0.0)
    for query in range(len(scores)):
        assert torch.equal(shards.row(query), scores.values[query])


def test_interrupted_scores_go_on(tmp_path, monkeypatch):
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.methods.layerwise.SHARD_BYTES", 1)
    monkeypatch.setattr("upweight.contraction.stream.MOST_EXAMPLES", 4)
    monkeypatch.setattr("upweight.contraction.stream.TOGETHER", 1)
    whole = fitted.attribute(p.queries, tolerance=0.0)
    original, count = ScoreShards.append, 0

    def append(self, first, start, values):
        nonlocal count
        count += 1
        if count == 3:
            raise _Killed
        original(self, first, start, values)

    monkeypatch.setattr(ScoreShards, "append", append)
    with pytest.raises(_Killed):
        fitted.write(p.queries, tmp_path, tolerance=0.0)
    assert ScoreShards.load(tmp_path).done(0) == 8
    monkeypatch.setattr(ScoreShards, "append", original)
    shards = fitted.write(p.queries, tmp_path, tolerance=0.0)
    assert torch.equal(shards.row(1), whole.values[1])


def test_more_scores_than_memory_are_refused_before_any_work(monkeypatch):
    p = problem("mlp_tanh")
    fitted = METHOD.fit(p.task, p.train)
    monkeypatch.setattr("upweight.methods.layerwise.free_bytes", lambda _: 100)
    with pytest.raises(SpecError, match=r"write\(queries, folder\)"):
        fitted.attribute(p.queries)


def test_no_training_data_are_refused_in_our_own_words():
    p = problem("mlp_tanh")
    X, y = p.train
    with pytest.raises(uw.errors.DataError, match="must hold at least one example"):
        METHOD.fit(p.task, (X[:0], y[:0]))
