"""A recorded loop holds what `torch.optim` did, and goes on after a kill."""

import dataclasses

import pytest
import torch
from torch import nn

import upweight as uw
from tests.training.loops import batches, data, loop, net, replayed, task
from upweight.errors import DataError, SpecError, StaleStore, UnsupportedModel
from upweight.front.facts import resolved
from upweight.training.history import History, resolved_damping
from upweight.training.optimizers import SGD, Adam, AdamW
from upweight.training.record import read_record
from upweight.training.schedules import LinearDecay

N = 14
OPTIMIZERS = {
    "plain": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.99), weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
}


def started(folder, optimizer="momentum", every=3, **options):
    model = net()
    rule = OPTIMIZERS[optimizer](model.parameters())
    return model, rule, uw.record(model, rule, folder, every=every, **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_recorded_loop_is_the_trajectory_of_the_same_recipe(tmp_path, optimizer):
    """The same batches, rates, states and memories; and so the same scores."""
    model, rule, run = started(tmp_path, optimizer)
    total = 9
    kind = {"adam": Adam, "adamw": AdamW}.get(optimizer, SGD)
    settings = {
        "plain": {},
        "momentum": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        "dampening": {"momentum": 0.8, "dampening": 0.3},
        "adam": {"betas": (0.8, 0.99), "weight_decay": 0.01},
        "adamw": {"amsgrad": True},
    }[optimizer]
    lr = rule.param_groups[0]["lr"]
    recipe = uw.Training(net, kind(lr, **settings), 3, 5, LinearDecay(), seed=0)
    about, train = task(net()), data(N)
    known = recipe.trajectory(about, train, every=3)
    steps = [s.indices for s in known.steps()]
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda t: LinearDecay()(t, total))
    with run:
        loop(model, rule, train, steps, run, scheduler)
    found = run.history(task(model))
    assert isinstance(found, History) and isinstance(known, History)
    assert (len(found), found.kept) == (9, (0, 3, 6, 9)) == (len(known), known.kept)
    assert {**vars(found.optimizer), "lr": lr} == vars(known.optimizer)
    for one, other in zip(found.steps(), known.steps(), strict=True):
        assert one.number == other.number and torch.equal(one.indices, other.indices)
        assert one.lr == pytest.approx(other.lr, rel=1e-12)
    assert [s.number for s in found.steps(2, 7)] == [2, 3, 4, 5, 6]
    for t in found.kept:
        a, b = found.state(t), known.state(t)
        assert a.step == t
        pairs = zip(a.tensors, b.tensors, strict=True)
        assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in pairs)
    queries = data(3, seed=5)
    for method in (uw.TracIn(2), uw.SOURCE(1, uw.EKFAC(uw.labels.Expected()), 1)):
        one = method.fit(task(model), train, history=found).attribute(queries).values
        other = method.fit(about.moved_to(known.theta), train, history=known)
        assert torch.allclose(one, other.attribute(queries).values, rtol=1e-6, atol=1e-10)
    spec = uw.Influence(uw.EKFAC(), damping=uw.FromTraining())
    if kind is SGD:
        spec.fit(task(model), train, history=found)
    else:  # the rates are those of the steps: no lr of a recorded optimizer is named
        with pytest.raises(SpecError, match=f"Given: training by {kind.__name__}, which has one"):
            spec.fit(task(model), train, history=found)
    if optimizer == "momentum":
        with pytest.raises(SpecError, match="Given: training by SGD with momentum"):
            uw.SOURCE(1, discrete=True).fit(task(model), train, history=found)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("stop", [2, 7])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, optimizer, stop):
    train, steps = data(N), batches(N, 5, 3)
    model, rule, run = started(tmp_path / "whole", optimizer)
    with run:
        loop(model, rule, train, steps, run)
    expected = run.history(task(model))
    killed, rule, run = started(tmp_path / "killed", optimizer)
    with pytest.raises(KeyboardInterrupt), run:
        loop(killed, rule, train, steps, run, stop=stop)
    with pytest.raises(StaleStore, match="of its own"):
        started(tmp_path / "killed", optimizer)
    again, rule, run = started(tmp_path / "killed", optimizer, resume=True)
    assert run.taken == (stop - 1) // 3 * 3  # before step 3 its state is not yet there
    with run:
        loop(again, rule, train, steps, run)
    found = run.history(task(again))
    assert found.kept == expected.kept and found.digest == expected.digest
    for t in found.kept:
        pairs = zip(found.state(t).tensors, expected.state(t).tensors, strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_half_a_run_is_a_history_too(tmp_path):
    train, steps = data(N), batches(N, 5, 3)
    model, rule, run = started(tmp_path)
    with pytest.raises(KeyboardInterrupt), run:
        loop(model, rule, train, steps, run, stop=8)
    assert not rule._optimizer_step_pre_hooks
    found = read_record(task(model), tmp_path)
    assert found.kept == (0, 3, 6)
    with pytest.raises(SpecError, match="end at the parameters"):
        uw.TracIn().fit(task(model), train, history=found)
    moved = task(model).moved_to(found.theta)
    uw.TracIn().fit(moved, train, history=found)
    with pytest.raises(SpecError, match="that were kept"):
        found.state(4)


def test_accumulated_gradients_are_one_step(tmp_path):
    train, steps = data(N), batches(N, 6, 2)
    model, rule, run = started(tmp_path, "plain", 1)
    with run:
        loop(model, rule, train, steps, run, parts=3)
    found = [s.indices for s in run.history(task(model)).steps()]
    assert all(torch.equal(a, b) for a, b in zip(found, steps, strict=True))


def test_steps_and_indices_come_in_pairs(tmp_path):
    train, steps = data(N), batches(N, 5, 1)
    model, rule, run = started(tmp_path / "a")
    with pytest.raises(DataError, match="without a step"), run:
        run.step([0, 1])
    model, rule, run = started(tmp_path / "b")
    with pytest.raises(DataError, match="two steps"), run:
        loop(model, rule, train, steps)
    model, rule, run = started(tmp_path / "c")
    with pytest.raises(DataError, match="at the end"), run:
        loop(model, rule, train, steps[:1])
    for k, wrong in enumerate(([], [-1], [0.5], [True, False])):
        model, rule, run = started(tmp_path / str(k))
        run.__enter__()
        loop(model, rule, train, steps[:1])
        with pytest.raises(DataError, match="places of its examples"):
            run.step(wrong)


def test_what_cannot_be_understood(tmp_path):
    model = net()
    first, last = model[0].parameters(), model[2].parameters()
    groups = [{"params": [*first]}, {"params": [*last], "lr": 0.01}]
    cases = [
        (torch.optim.RMSprop(model.parameters()), SpecError, "steps are known"),
        (torch.optim.SGD(groups, 0.1), SpecError, "differ in lr"),
        (torch.optim.SGD(model[0].parameters(), 0.1), UnsupportedModel, "the optimizer has not"),
        (torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], 0.1),
         UnsupportedModel, "not the model's"),
        (torch.optim.Adam(model.parameters(), maximize=True), SpecError, "goes down"),
    ]  # fmt: skip
    for optimizer, error, words in cases:
        with pytest.raises(error, match=words):
            uw.record(model, optimizer, tmp_path / "run")
    rule = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(SpecError, match="k-th"):
        uw.record(model, rule, tmp_path / "run", every=0)
    assert not (tmp_path / "run").exists()
    run = uw.record(model, rule, tmp_path / "run")
    rule.param_groups[0]["momentum"] = 0.5
    with pytest.raises(SpecError, match="cycle_momentum"), run:
        loop(model, rule, data(N), batches(N, 5, 1), run)
    same = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}]
    uw.record(model, torch.optim.SGD(same, 0.1), tmp_path / "groups")


def test_files_that_are_not_the_runs(tmp_path):
    train, steps = data(N), batches(N, 5, 2)
    model, rule, run = started(tmp_path)
    with run:
        loop(model, rule, train, steps, run)
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(StaleStore, match="parameters of the task"):
        read_record(task(other), tmp_path)
    with pytest.raises(StaleStore, match="goes on with the model"):
        uw.record(other, OPTIMIZERS["momentum"](other.parameters()), tmp_path, resume=True)
    with pytest.raises(FileNotFoundError):
        read_record(task(model), tmp_path / "nothing")
    found = read_record(task(model), tmp_path)
    file = tmp_path / "state-000000003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StaleStore):
        found.state(3)
    file.unlink()
    with pytest.raises(StaleStore, match="step at least"):
        read_record(task(model), tmp_path)
    started(tmp_path / "empty")
    with pytest.raises(StaleStore, match="step at least"):
        read_record(task(model), tmp_path / "empty")


def test_frozen_layers_and_a_part_of_theta(tmp_path):
    model = net()
    model[0].requires_grad_(False)
    chosen = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.SGD(chosen, 0.1)
    with uw.record(model, rule, tmp_path, every=1) as run:
        loop(model, rule, data(N), batches(N, 5, 1), run)
    about = uw.Task(model, uw.CrossEntropy(), params=["2.bias"])
    history = run.history(about)
    assert len(history.theta) == 3 and torch.equal(history.theta, model[2].bias.detach())
    uw.TracIn().fit(about, data(N), history=history)


@pytest.mark.parametrize("how", ["unfrozen", "frozen", "group"])
def test_layers_that_change_in_a_run_are_refused_and_each_part_is_a_run(tmp_path, how):
    model, every = net(), batches(N, 5, 1)
    model[0].requires_grad_(how == "frozen")
    chosen = [p for p in model.parameters() if p.requires_grad] if how == "group" else None
    rule = torch.optim.SGD(chosen or model.parameters(), 0.1)
    with uw.record(model, rule, tmp_path / "one", every=1) as run:
        loop(model, rule, data(N), every, run)
        model[0].requires_grad_(how != "frozen")
        if how == "group":
            rule.add_param_group({"params": list(model[0].parameters())})
        with pytest.raises(SpecError, match="frozen or unfrozen"):
            loop(model, rule, data(N), 2 * every, run)
    with uw.record(model, rule, tmp_path / "two", every=1) as run:
        loop(model, rule, data(N), every, run)
    task = uw.Task(model, uw.CrossEntropy())
    uw.TracIn().fit(task, data(N), history=run.history(task))
    if how != "frozen":
        with pytest.raises(StaleStore, match="were frozen"):
            uw.training.read_record(task, tmp_path / "one")


@pytest.mark.parametrize("method", [uw.TracIn(), uw.SOURCE(2), uw.TracIn(batches=True)])
def test_examples_that_no_step_used_are_named(tmp_path, method):
    model = net()
    rule = torch.optim.SGD(model.parameters(), 0.1)
    with uw.record(model, rule, tmp_path, every=1) as run:
        loop(model, rule, data(N), [torch.arange(3)] * 4, run)
    task = uw.Task(model, uw.CrossEntropy())
    scores = method.fit(task, data(N), history=run.history(task)).attribute(data(2))
    said = [note for note in scores.provenance.notes if "no step" in note]
    if method == uw.TracIn(batches=True):
        assert not said and not scores.values[:, 3:].any()
    else:
        assert len(said) == 1 and said[0].startswith(f"{N - 3} of {N} examples")


def test_nothing_of_the_users_is_touched(tmp_path):
    train, steps = data(N), batches(N, 5, 2)
    plain = net()
    loop(plain, OPTIMIZERS["momentum"](plain.parameters()), train, steps)
    model, rule, run = started(tmp_path)
    state = torch.get_rng_state()
    with run:
        loop(model, rule, train, steps, run)
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not rule._optimizer_step_pre_hooks


class _Scaled:
    """A history with other factors of its steps and another optimizer."""

    def __init__(self, history, optimizer, factor):
        self.optimizer, self.kept, self.state = optimizer, history.kept, history.state
        self._steps = [
            dataclasses.replace(s, factors=torch.full((len(s.indices),), factor).double())
            for s in history.steps()
        ]

    def __len__(self):
        return len(self._steps)

    def steps(self, begin=0, end=None):
        return iter(self._steps[begin:end])


def test_factors_and_decays_are_read_by_the_methods(tmp_path):
    """η(s H + λ) is ηs(H + λ/s); a decay for each entry, all the same, is the number."""
    train, steps = data(N), batches(N, 5, 2)
    model, rule, run = started(tmp_path, "plain")
    with run:
        loop(model, rule, train, steps, run)
    about, history, queries = task(model), run.history(task(model)), data(3, seed=5)
    p = about.layout.size

    def values(method, of):
        return method.fit(about, train, history=of).attribute(queries).values

    shrunk = _Scaled(history, SGD(1.0, weight_decay=0.02), 0.25)
    slower = _Scaled(history, SGD(1.0, weight_decay=0.08), 1.0)
    slower._steps = [dataclasses.replace(s, lr=s.lr / 4, factors=None) for s in slower._steps]
    each = _Scaled(history, SGD(1.0, weight_decay=torch.full((p,), 0.02).double()), 0.25)
    source = [uw.SOURCE(1, c, 1) for c in (uw.GGN(), uw.EKFAC(uw.labels.Expected()))]
    for method in (uw.TracIn(batches=True), *source):
        expected = values(method, slower)
        assert torch.allclose(values(method, shrunk), expected, rtol=1e-9)
        assert torch.allclose(values(method, each), expected, rtol=1e-9)
    spec = uw.Influence(uw.EKFAC(), damping=uw.FromTraining())
    assert torch.allclose(values(spec, shrunk), values(spec, slower), rtol=1e-6)
    with pytest.raises(SpecError, match="one weight decay"):
        spec.fit(about, train, history=each)
    with pytest.raises(SpecError, match="one weight decay"):
        uw.Training(net, each.optimizer, 1, 5).trained(about, train)
    uneven = SGD(1.0, weight_decay=torch.linspace(0, 0.5, p).double())
    moved = values(source[0], _Scaled(history, uneven, 0.25))
    assert not torch.allclose(moved, values(source[0], shrunk), rtol=1e-3)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_groups_may_differ_in_weight_decay(tmp_path, kind):
    train, steps = data(N), batches(N, 5, 2)
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    rule = getattr(torch.optim, kind)(groups, 0.05)
    with uw.record(model, rule, tmp_path, every=2) as run:
        loop(model, rule, train, steps, run)
    assert replayed(task(model), train, run.history(task(model))) < 1e-12
    frozen = uw.Task(model, uw.CrossEntropy(), params=["0.bias", "2.bias"])
    assert not bool(run.history(frozen).optimizer.weight_decay.any())
    rule.param_groups[1]["weight_decay"] = 0.1
    again = uw.record(model, rule, tmp_path / "b")
    rule.param_groups[1]["weight_decay"] = 0.0
    with pytest.raises(SpecError, match="stay as they are"), again:
        loop(model, rule, train, steps, again)
    again = uw.record(model, rule, tmp_path / "c")
    again.__enter__()
    loop(model, rule, train, steps[:1])
    for wrong in (float("nan"), [1.0, 2.0]):
        with pytest.raises(DataError, match="one finite factor"):
            again.step(steps[0], factors=torch.tensor(wrong))


@pytest.mark.parametrize("clipped", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_a_penalty_that_is_the_weight_decay_counts_once(tmp_path, kind, clipped):
    """`penalty=L2(λ)` for `weight_decay=λ`, as the docs say, beside the loop that has it."""
    train, steps, queries = data(N), batches(N, 5, 4), data(3, seed=5)
    model = net()
    rule = getattr(torch.optim, kind)(model.parameters(), 0.05, weight_decay=0.3)
    with uw.record(model, rule, tmp_path, every=2) as run:
        for rows in steps:
            loop(model, rule, train, [rows])
            run.step(rows, factors=clipped)
    ce = uw.CrossEntropy()
    plain, same, other = (uw.Task(model, ce, p) for p in (None, uw.L2(0.3), uw.L2(0.1)))
    history = run.history(plain)

    def asked(method, of):
        fitted = method.fit(of, train, history=history)
        return fitted.attribute(queries).values, " ".join(fitted.scorer.notes)

    methods = [uw.SOURCE(2, c, 1) for c in (uw.GGN(), uw.EKFAC(uw.labels.Expected()))]
    if kind == "SGD":
        methods.append(uw.Influence(uw.GGN(), damping=uw.FromTraining()))
        lam = resolved_damping(history, plain, uw.as_data(train))
        assert resolved(history, plain, N) == lam
        assert resolved(history, same, N) == pytest.approx(lam - 0.3)
    for method in methods:
        (expected, note), (once, told), (more, warned) = (
            asked(method, of) for of in (plain, same, other)
        )
        assert torch.allclose(once, expected, rtol=1e-8) == (kind != "AdamW")
        assert not torch.allclose(more, expected, rtol=1e-3)
        if isinstance(method, uw.SOURCE):
            assert "weight decay" not in note and "leave penalty= out" in warned
            assert ("counted once" in told) == (kind != "AdamW")


W = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "loss, factor",
    [
        (nn.CrossEntropyLoss(weight=W), lambda y: len(y) / W[y].sum()),
        (nn.CrossEntropyLoss(reduction="sum"), lambda y: len(y)),
    ],
    ids=["class weights", "sum"],
)
def test_a_loss_that_is_no_mean_is_recorded_with_its_factor(tmp_path, loss, factor):
    """One step, which is linear in the weights, and outputs that are linear in θ: exact."""
    (X, y), (Z, z) = data(N), data(3, seed=5)
    model = nn.Linear(X.shape[1], 3).double()
    weight, bias = (x.detach().clone().requires_grad_() for x in model.parameters())
    rule = torch.optim.SGD(model.parameters(), 0.1)
    with uw.record(model, rule, tmp_path, every=1) as run:
        loss(model(X), y).backward()
        rule.step()
        run.step(torch.arange(N), factors=factor(y))

    def outputs(w):
        each = nn.functional.cross_entropy(X @ weight.T + bias, y, loss.weight, reduction="none")
        whole = (w * each).sum() / (1.0 if loss.reduction == "sum" else W[y].sum())
        of = torch.autograd.grad(whole, (weight, bias), create_graph=True)
        return (Z @ (weight - 0.1 * of[0]).T + bias - 0.1 * of[1])[:, 0]

    about = uw.Task(model, loss)
    fitted = uw.TracIn(batches=True).fit(about, (X, y), history=run.history(about))
    found = fitted.attribute((Z, z), lambda f, targets: f[:, 0]).values
    expected = torch.autograd.functional.jacobian(outputs, torch.ones(N, dtype=torch.float64))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
