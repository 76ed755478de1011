"""Trajectories: the same bits as training, from any state, and derivatives of the steps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, labels, problem
from tests.training.test_training import N, Net, data, task
from upweight.errors import NotConverged, ShapeError, SpecError, StaleStore
from upweight.training.optimizers import SGD, Adam, AdamW, OptimizerState
from upweight.training.schedules import Cosine
from upweight.training.steps import TrainingState
from upweight.training.training import Training

OPTIMIZERS = [
    SGD(0.3),
    SGD(0.2, momentum=0.8, nesterov=True, weight_decay=0.01),
    SGD(0.2, momentum=0.8, dampening=0.3),
    Adam(0.02),
    AdamW(0.02, weight_decay=0.1, amsgrad=True),
]


def recipe(optimizer=SGD(0.3, momentum=0.8), dropout=0.4, **options):  # noqa: B008
    return Training(lambda: Net(dropout=dropout), optimizer, 3, 5, Cosine(), seed=2, **options)


def given(dtype=torch.float64, dropout=0.4):
    x, y = data()
    model = task(dropout=dropout).model.to(dtype)
    return uw.Task(model, uw.CrossEntropy(), uw.L2(0.01)), (x.to(dtype), y)


def one_removed():
    w = torch.ones(N)
    w[[3, 11]], w[5] = 0.0, 1.7
    return w


def same(a, b):
    assert a.step == b.step
    assert tuple(a.optimizer.memories) == tuple(b.optimizer.memories)
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_the_end_is_what_training_makes_and_any_state_replays(optimizer, skip, dtype):
    """With dropout, data weights, a last batch that is not full and a schedule."""
    how, (about, train), w = recipe(optimizer, skip_absent=skip), given(dtype), one_removed()
    found = how.trajectory(about, train, w, every=1)
    total = len(found)
    assert total == 3 * -(-(N - 2 * skip) // 5)
    assert found.kept == tuple(range(total + 1))
    trained = how.prepare(about, uw.as_data(train))(w[None]).theta[0]
    assert torch.equal(found.theta, trained)
    ends = how.trajectory(about, train, w, every=total)
    assert ends.kept == (0, total)
    torch.manual_seed(0)  # whatever is drawn between the steps
    for step, state in ends.replay():
        torch.rand(3)
        same(state, found.states[step.number])
    for t in (1, total // 2, total - 1, total):
        same(ends.state(t), found.states[t])
    middle = total // 2 + 1
    for step, state in found.replay(middle):
        if step.number > middle:
            same(state, found.states[step.number])
    same(found.advance(step, state), found.states[total])


def test_without_weights_it_is_the_trained_model():
    how, (about, train) = recipe(), given()
    found = how.trajectory(about, train)
    model = how.trained(about, train)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert torch.equal(about.layout.flatten(parameters), found.theta)
    assert torch.equal(
        how.prepare(about, uw.as_data(train))(torch.ones(1, N)).theta[0], found.theta
    )


@pytest.mark.parametrize("name", ["conv", "attention", "tied", "padded_sequences"])
def test_other_layers_replay_too(name):
    p = problem(name)
    how = Training(None, Adam(0.01), 2, 3)
    found = how.trajectory(p.task, p.train, every=4)
    whole = how.trajectory(p.task, p.train, every=1)
    assert torch.equal(how.prepare(p.task, uw.as_data(p.train))(torch.ones(1, p.n)).theta[0],
                       found.theta)  # fmt: skip
    for step, state in found.replay():
        same(state, whole.states[step.number])


def test_steps_say_what_they_do_before_training():
    how, (about, train), w = recipe(), given(), one_removed()
    found = how.trajectory(about, train, w, every=5)
    steps = list(found.steps())
    assert [s.number for s in steps] == list(range(15))
    assert [s.lr for s in steps] == [0.3 * Cosine()(t, 15) for t in range(15)]
    for epoch in range(3):
        visited = torch.cat([s.indices for s in steps[5 * epoch : 5 * epoch + 5]])
        assert torch.equal(visited.sort().values, torch.arange(N))
    for s in steps:
        assert torch.equal(s.weights, w[s.indices])
        again = found.step(s.number)
        assert torch.equal(again.indices, s.indices) and (again.lr, again.seed) == (s.lr, s.seed)
    assert len({s.seed for s in steps}) == 15
    skipping = recipe(skip_absent=True).trajectory(about, train, w, every=5)
    visited = torch.cat([s.indices for s in skipping.steps(0, 5)])
    assert not set(visited.tolist()) & {3, 11} and len(visited) == N - 2


def test_dropout_belongs_to_the_step():
    """A step from a state gives other parameters under the seed of another step."""
    how, (about, train) = recipe(SGD(0.3)), given()
    found = how.trajectory(about, train)
    step, state = next(found.replay())
    other = replace(step, seed=found.step(1).seed)
    assert torch.equal(found.advance(step, state).theta, found.state(1).theta)
    assert not torch.allclose(found.advance(other, state).theta, found.state(1).theta)


def test_which_states_are_kept_and_what_they_take():
    how, (about, train) = recipe(Adam(0.01)), given()

    def kept(every):
        return how.trajectory(about, train, every=every).kept

    assert kept(None) == (0, 4, 8, 12, 15)
    assert kept(6) == (0, 6, 12, 15)
    assert kept([7, 2]) == (0, 2, 7, 15)
    assert kept([]) == kept(15) == kept(100) == (0, 15)
    found = how.trajectory(about, train, every=5)
    assert found.segments() == ((0, 5), (5, 10), (10, 15))
    assert found.nbytes == 4 * 3 * 8 * about.layout.size


def test_nothing_of_the_users_is_touched():
    how, (about, train) = recipe(), given()
    before = {name: x.clone() for name, x in about.model.state_dict().items()}
    random = torch.get_rng_state()
    found = how.trajectory(about, train)
    for _ in found.replay(3, 9):
        assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(torch.get_rng_state(), random)
    for name, x in about.model.state_dict().items():
        assert torch.equal(x, before[name])


# -- derivatives -----------------------------------------------------------------------------------


def smooth(optimizer):
    """A small network with dropout and smooth layers."""

    def init():
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Dropout(0.3), nn.Linear(2, 2)).double()

    g = torch.Generator().manual_seed(0)
    train = draw(g, 7, 3), labels(g, 7, 2)
    how = Training(init, optimizer, 2, 3, Cosine(), seed=1)
    return how, uw.Task(init().eval(), uw.CrossEntropy(), uw.L2(0.1)), train


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_step_is_differentiable_in_everything(optimizer):
    how, about, train = smooth(optimizer)
    found = how.trajectory(about, train)
    step, state = next(found.replay(3))

    def moved(weights, theta, *memories):
        memory = dict(zip(optimizer.memories, memories, strict=True))
        start = TrainingState(theta, OptimizerState(state.step, memory))
        return found.advance(replace(step, weights=weights), start).tensors

    # Squares away from 0, where a root is curved, and from each other.
    far = {"square": 0.5, "largest": 0.7}
    memories = [x + far.get(name, 0.0) for name, x in state.optimizer.memories.items()]
    state = TrainingState(
        state.theta, OptimizerState(3, dict(zip(optimizer.memories, memories, strict=True)))
    )
    leaves = [x.clone().requires_grad_() for x in (step.weights, *state.tensors)]
    assert torch.autograd.gradcheck(moved, leaves, atol=1e-6, rtol=1e-5)
    plain = found.advance(step, state)
    for x, y in zip(moved(*leaves), plain.tensors, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=1e-12, atol=1e-12)
        assert not y.requires_grad


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_going_backwards_gives_the_derivative_of_training(optimizer):
    """∂m(θ_T)/∂w by the recipe of the docstring, against central differences of training anew."""
    how, about, train = smooth(optimizer)
    n, w = 7, torch.ones(7)
    direction = draw(torch.Generator().manual_seed(3), about.layout.size)
    found = how.trajectory(about, train, w)
    adjoint = [direction] + [torch.zeros_like(direction) for _ in optimizer.memories]
    slope = torch.zeros(n)
    for begin, end in reversed(found.segments()):
        for step, state in reversed(list(found.replay(begin, end))):
            leaves = [x.clone().requires_grad_() for x in (step.weights, *state.tensors)]
            memory = dict(zip(optimizer.memories, leaves[2:], strict=True))
            start = TrainingState(leaves[1], OptimizerState(state.step, memory))
            after = found.advance(replace(step, weights=leaves[0]), start)
            of_w, *adjoint = torch.autograd.grad(
                after.tensors, leaves, adjoint, materialize_grads=True
            )
            slope.index_add_(0, step.indices, of_w)
    h = 1e-5
    shifts = torch.cat([w + h * torch.eye(n), w - h * torch.eye(n)])
    m = how.prepare(about, uw.as_data(train))(shifts).theta @ direction
    torch.testing.assert_close(slope, (m[:n] - m[n:]) / (2 * h), rtol=1e-6, atol=1e-8)


# -- on disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_read_as_it_was_saved(dtype, tmp_path):
    how, (about, train), w = recipe(Adam(0.02)), given(dtype), one_removed()
    found = how.trajectory(about, train, w, every=4)
    found.save(tmp_path)
    names = [f"state-{t:09d}.safetensors" for t in found.kept]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["finished.json", "manifest.json", "weights.safetensors", *names]
    )
    again = recipe(Adam(0.02)).read_trajectory(about, train, tmp_path)
    assert again.kept == found.kept and torch.equal(again.weights, found.weights)
    for t in found.kept:
        same(again.states[t], found.states[t])
    for (_, a), (_, b) in zip(again.replay(5, 11), found.replay(5, 11), strict=True):
        same(a, b)


def test_a_trajectory_of_something_else_is_refused(tmp_path):
    how, (about, train) = recipe(), given()
    how.trajectory(about, train).save(tmp_path)
    x, y = train
    others = [
        (replace(how, optimizer=SGD(0.1)), about, train, "recipe"),
        (replace(how, seed=9), about, train, "recipe"),
        (how, replace_penalty(about), train, "penalty"),
        (how, about, (x + 1e-9, y), "train"),
    ]
    for each, what, on, name in others:
        with pytest.raises(StaleStore, match=rf"is of another (model, )?{name}\."):
            each.read_trajectory(what, on, tmp_path)
    # A task that has moved on says the same about the run, which starts from init.
    moved = about.moved_to(how.trajectory(about, train).theta)
    how.read_trajectory(moved, train, tmp_path)
    with pytest.raises(FileNotFoundError):
        how.read_trajectory(about, train, tmp_path / "nowhere")


def test_a_folder_of_two_runs_is_refused(tmp_path):
    """The same recipe, task and data, but other data weights."""
    how, (about, train) = recipe(), given()
    for name, w in (("one", torch.ones(N)), ("other", one_removed())):
        how.trajectory(about, train, w).save(tmp_path / name)
    other = how.read_trajectory(about, train, tmp_path / "other")

    def mixed(name):
        (tmp_path / "other" / name).write_bytes((tmp_path / "one" / name).read_bytes())

    mixed("state-000000015.safetensors")
    with pytest.raises(StaleStore, match="something else"):
        other.theta  # noqa: B018
    mixed("weights.safetensors")
    with pytest.raises(StaleStore, match="something else"):
        how.read_trajectory(about, train, tmp_path / "other")


def replace_penalty(about):
    return uw.Task(about.model, about.loss, uw.L2(0.02))


def test_a_damaged_trajectory_is_refused(tmp_path):
    how, (about, train) = recipe(), given()
    found = how.trajectory(about, train, every=15)
    for name in (
        "manifest.json",
        "finished.json",
        "weights.safetensors",
        "state-000000015.safetensors",
    ):
        found.save(tmp_path)
        path = tmp_path / name
        raw = bytearray(path.read_bytes())
        raw[-20] ^= 1
        path.write_bytes(raw)
        with pytest.raises(StaleStore, match="Way out"):
            how.read_trajectory(about, train, tmp_path).theta  # noqa: B018
    found.save(tmp_path)
    (tmp_path / "state-000000000.safetensors").write_bytes(
        (tmp_path / "state-000000015.safetensors").read_bytes()
    )
    with pytest.raises(StaleStore, match="something else"):
        how.read_trajectory(about, train, tmp_path).state(0)


def test_another_version_of_torch_is_warned_of(tmp_path, monkeypatch):
    how, (about, train) = recipe(), given()
    how.trajectory(about, train).save(tmp_path)
    monkeypatch.setattr(
        "upweight.training.trajectory.library_versions", lambda: {"upweight": "1", "torch": "9.9"}
    )
    with pytest.warns(UserWarning, match=r"9\.9.*agrees to rounding"):
        how.read_trajectory(about, train, tmp_path)


# -- what cannot be meant --------------------------------------------------------------------------


def test_what_cannot_be_meant_is_refused():
    how, (about, train) = recipe(), given()
    for every in (0, -3, [16], [-1]):
        with pytest.raises(SpecError, match=r"every=.*"):
            how.trajectory(about, train, every=every)
    for w in (torch.ones(2, N), torch.ones(N - 1), torch.full((N,), torch.nan)):
        with pytest.raises(ShapeError, match="one finite weight per training example"):
            how.trajectory(about, train, w)
    found = how.trajectory(about, train, every=15)
    for begin, end in [(0, 16), (5, 4), (-1, 3)]:
        with pytest.raises(ShapeError, match="an epoch has 5"):
            list(found.replay(begin, end))
    with pytest.raises(ShapeError):
        found.state(16)
    with pytest.raises(SpecError, match="at least one example"):
        recipe(skip_absent=True).trajectory(about, train, torch.zeros(N))


def test_a_run_that_diverges_is_named():
    _, train = given()
    with pytest.raises(NotConverged, match="learning rate") as raised:
        Training(Net, SGD(1e200), 2, 5).trajectory(task(), train)
    assert raised.value.solution.kept[-1] == 10
