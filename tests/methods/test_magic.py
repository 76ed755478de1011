"""MAGIC: against differences of training anew, dense recursions and the closed forms."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, initialized, labels, problem
from upweight.errors import DtypeError, NonFinite, NotOffered, SpecError, UnsupportedModel
from upweight.methods.method import Method
from upweight.testing import check_method
from upweight.training.adjoint import back_over
from upweight.training.optimizers import SGD, Adam, AdamW, OptimizerState
from upweight.training.schedules import Cosine
from upweight.training.steps import TrainingState
from upweight.training.training import Training

N, Q = 13, 5


def net(dropout=0.3, act=nn.Tanh):
    layers = [nn.Linear(4, 6), act(), nn.Dropout(dropout), nn.Linear(6, 3)]
    return initialized(nn.Sequential(*layers), torch.Generator().manual_seed(9))


def given(recipe, dropout=0.3, dtype=torch.float64, loss=None, act=nn.Tanh):
    """A task at the end of a recipe, with its data: 13 examples in batches of 5."""
    g = torch.Generator().manual_seed(0)
    train = draw(g, N, 4).to(dtype), labels(g, N, 3)
    queries = draw(g, Q, 4).to(dtype), labels(g, Q, 3)
    loss = loss or uw.CrossEntropy()
    start = uw.Task(net(dropout, act).to(dtype).eval(), loss, uw.L2(0.05))
    return uw.Task(recipe.trained(start, train), loss, uw.L2(0.05)), train, queries


def recipe(optimizer=SGD(0.2, momentum=0.9), dropout=0.3, epochs=4, **options):  # noqa: B008
    return Training(lambda: net(dropout), optimizer, epochs, 5, Cosine(), seed=1, **options)


def differences(how, task, train, measured, h=1e-3):
    """∂m/∂w of training anew, to fourth order in h: [q n]."""
    trainer, n = how.prepare(task, uw.as_data(train)), len(train[0])
    one, step = torch.ones(n), h * torch.eye(n)

    def m(w):
        return torch.stack([measured(theta) for theta in trainer(w).theta])

    near, far = m(one + step) - m(one - step), m(one + 2 * step) - m(one - 2 * step)
    return ((8 * near - far) / (12 * h)).T


def close(found, expected, rtol):
    assert float((found - expected).norm()) <= rtol * float(expected.norm())


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(0.2, momentum=0.9),
        SGD(0.2, momentum=0.8, nesterov=True, weight_decay=0.01),
        Adam(0.02, weight_decay=0.01),
        AdamW(0.02, weight_decay=0.1, amsgrad=True),
    ],
    ids=repr,
)
def test_it_is_the_derivative_of_training(optimizer):
    """Dropout, a schedule, a penalty, weight decay and a last batch of three are in it."""
    how = recipe(optimizer)
    task, train, queries = given(how)
    scores = uw.MAGIC().fit(task, train, history=how).attribute(queries)
    # Adam's step is nearly the sign of a gradient where that is small: curved on a small scale.
    h = 1e-3 if isinstance(optimizer, SGD) else 1e-4
    expected = differences(how, task, train, lambda theta: task.losses(theta, queries), h)
    close(scores.values, expected.detach(), 1e-6)
    assert scores.unit is uw.Unit.DERIVATIVE
    assert scores.provenance.health["steps"] == 12


def test_a_unit_that_never_fires_has_no_root_of_zero():
    """Its squares in Adam are 0, where the root has no derivative and the step has one."""
    how = Training(lambda: net(0.0, nn.ReLU), Adam(0.02), 3, 5, seed=1)
    g = torch.Generator().manual_seed(0)
    x, y = draw(g, N, 4), labels(g, N, 3)
    x[:, 2] = 0.0  # the weights of an input that is always 0 have no gradient at any step
    start = uw.Task(net(0.0, nn.ReLU).eval(), uw.CrossEntropy())
    task = uw.Task(how.trained(start, (x, y)), uw.CrossEntropy())
    scores = uw.MAGIC().fit(task, (x, y), history=how).attribute((x, y))
    expected = differences(how, task, (x, y), lambda theta: task.losses(theta, (x, y)), 1e-4)
    close(scores.values, expected.detach(), 1e-5)


@pytest.mark.parametrize("every", [1, 5, 100])
def test_any_trajectory_of_the_run_gives_the_same(every):
    how = recipe(Adam(0.02))
    task, train, queries = given(how)
    whole = uw.MAGIC().fit(task, train, history=how).attribute(queries).values
    run = how.trajectory(task, train, every=every)
    found = uw.MAGIC().fit(task, train, history=run).attribute(queries).values
    assert torch.equal(found, whole)


def test_with_the_ggn_it_is_exact_where_the_model_is_linear():
    """Softmax regression on inputs that are dropped out."""
    g = torch.Generator().manual_seed(0)
    train, queries = (draw(g, 11, 4), labels(g, 11, 3)), (draw(g, 4, 4), labels(g, 4, 3))

    def linear():
        layers = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3))
        return initialized(layers, torch.Generator().manual_seed(2))

    for optimizer in (SGD(0.3, momentum=0.8), Adam(0.05)):
        how = Training(linear, optimizer, 3, 4, seed=3)
        task = uw.Task(linear().eval(), uw.CrossEntropy(), uw.L2(0.1))
        task = uw.Task(how.trained(task, train), uw.CrossEntropy(), uw.L2(0.1))
        found = uw.MAGIC(uw.GGN()).fit(task, train, history=how).attribute(queries).values
        expected = differences(how, task, train, lambda theta: task.losses(theta, queries))  # noqa: B023
        close(found, expected.detach(), 1e-6)


def test_with_the_ggn_it_is_the_recursion_with_dense_matrices():
    """Forward, ∂θ_t/∂w by the GGN of each batch, of a network where it is not the Hessian."""
    how = recipe(SGD(0.2), dropout=0.0)
    task, train, queries = given(how, dropout=0.0)
    run, layout = how.trajectory(task, train, every=1), task.layout
    moved = torch.zeros(layout.size, N)
    for step, state in run.replay():
        theta = state.theta
        batch = train[0][step.indices], train[1][step.indices]

        def outputs(t, batch=batch):
            return task.outputs(t, batch)[0]

        j = torch.func.jacrev(outputs)(theta)
        p = outputs(theta).detach().softmax(1)
        lam = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        b = len(batch[1])
        ggn = torch.einsum("bcp,bcd,bdr->pr", j, lam, j) / b + 0.05 * torch.eye(layout.size)
        delta = p - nn.functional.one_hot(batch[1], 3)
        moved = moved - step.lr * ggn @ moved
        moved[:, step.indices] -= step.lr / b * torch.einsum("bcp,bc->pb", j, delta)
    gradients = torch.func.jacrev(lambda t: task.losses(t, queries))(run.theta)
    found = uw.MAGIC(uw.GGN()).fit(task, train, history=run).attribute(queries).values
    close(found, (gradients @ moved).detach(), 1e-12)
    exact = uw.MAGIC().fit(task, train, history=run).attribute(queries).values
    assert float((found - exact).norm()) > 1e-3 * float(exact.norm())


@dataclass(frozen=True)
class Onwards(Method):
    """MAGIC of training on from θ̂ with full batches, for laws that know `fit(task, train)` alone.

    Then examples have no order, and at a minimum long training answers as influence does.
    """

    curvature: object
    lr: float
    epochs: int
    unit = uw.Unit.DERIVATIVE

    def prepare(self, fitting):
        fitting.history = Training(None, SGD(self.lr), self.epochs, batch=1000)
        return uw.MAGIC(self.curvature).prepare(fitting)


LAWS = [
    pytest.param(check, id=name)
    for name, check in check_method(
        Onwards(uw.Hessian(), 0.5, 2), problems=[problem("mlp_tanh")], rtol=1e-9
    )
    # It has no self-influence, batches are the recipe's, and some ask it far from a minimum.
    if not name.startswith(("self-influence", "symmetric", "rows sum", "batches", "an example"))
]


@pytest.mark.parametrize("check", LAWS)
def test_law(check):
    check()


def test_long_training_at_a_minimum_is_influence():
    p = problem("logistic")
    expected = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(p.task, p.train)
    found = uw.MAGIC(uw.GGN()).fit(
        p.task, p.train, history=Training(None, SGD(3.0, momentum=0.8), 150, batch=1000)
    )
    close(found.attribute(p.queries).values, expected.attribute(p.queries).values, 1e-6)


def by_hand(run, direction):
    """∂⟨direction, θ_T⟩/∂w through the derivative of each step as autograd has it."""
    optimizer, n = run.recipe.optimizer, len(run.weights)
    adjoint = [direction] + [torch.zeros_like(direction) for _ in optimizer.memories]
    slope = torch.zeros(n).to(direction)
    for step, state in reversed(list(run.replay())):
        leaves = [x.clone().requires_grad_() for x in (step.weights, *state.tensors)]
        memory = dict(zip(optimizer.memories, leaves[2:], strict=True))
        start = TrainingState(leaves[1], OptimizerState(state.step, memory))
        after = run.advance(replace(step, weights=leaves[0]), start)
        of_w, *adjoint = torch.autograd.grad(after.tensors, leaves, adjoint, materialize_grads=True)
        slope.index_add_(0, step.indices, of_w)
    return slope


@pytest.mark.parametrize(
    "name",
    ["conv", "attention", "tied", "padded_sequences", "batch_norm",
     "frozen_first", "custom_penalty", "one_example"],
)  # fmt: skip
def test_other_models(name):
    """Batches of two, together as one after the other, and as autograd has each step."""
    p = problem(name)
    how = Training(None, Adam(0.01, amsgrad=True), 2, 2)
    run = how.trajectory(p.task, p.train, every=3)
    task = p.task.moved_to(run.theta)
    fitted = uw.MAGIC().fit(task, p.train, history=run)
    found = fitted.attribute(p.queries).values
    rows = torch.func.jacrev(lambda t: task.losses(t, uw.as_data(p.queries).batch(0, len(found))))
    expected = torch.stack([by_hand(run, row) for row in rows(run.theta).detach()])
    close(found, expected, 1e-9)
    step, state = next(run.replay(len(run) - 1))
    u = draw(torch.Generator().manual_seed(0), 3, task.layout.size)
    for curvature in (uw.Hessian(), uw.GGN()):
        both = []
        for together in (True, False):
            adjoint = [u.clone() for _ in state.tensors]
            slopes = back_over(run.trainer, step, state, adjoint, curvature, together)
            both.append(torch.cat([*adjoint, slopes], dim=1))
        close(both[0], both[1], 1e-12)


def test_float32_is_right_and_half_is_refused():
    how = recipe()
    task, train, queries = given(how)
    expected = uw.MAGIC().fit(task, train, history=how).attribute(queries).values

    def short():
        return net().float()

    x, y = train
    lower = replace(how, init=short)
    start = uw.Task(short().eval(), uw.CrossEntropy(), uw.L2(0.05))
    train, queries = (x.float(), y), (queries[0].float(), queries[1])
    task = uw.Task(lower.trained(start, train), uw.CrossEntropy(), uw.L2(0.05))
    found = uw.MAGIC().fit(task, train, history=lower).attribute(queries).values
    # Dropout draws other masks in float32.
    fd = differences(lower, task, train, lambda t: task.losses(t, queries).detach().double(), 0.05)
    close(found.double(), fd.double(), 1e-3)
    assert expected.dtype == torch.float64 and found.dtype == torch.float32
    half = uw.Task(task.model.bfloat16(), uw.CrossEntropy())
    with pytest.raises(DtypeError, match="half precision"):
        uw.MAGIC().fit(half, (x.bfloat16(), y), history=lower)


def test_queries_resume_job_by_job(tmp_path, monkeypatch):
    monkeypatch.setattr("upweight.methods.magic.TOGETHER", 2)
    how = recipe()
    task, train, queries = given(how)
    for history in (how, how.trajectory(task, train)):
        fitted = uw.MAGIC().fit(task, train, history=history)
        whole, calls = fitted.attribute(queries).values, []
        sound = back_over

        def counted(trainer, step, *rest, sound=sound, calls=calls):
            calls.append(step.number)
            if len(calls) == 30:
                raise KeyboardInterrupt
            return sound(trainer, step, *rest)

        folder = tmp_path / type(history).__name__
        monkeypatch.setattr("upweight.methods.magic.back_over", counted)
        with pytest.raises(KeyboardInterrupt):
            fitted.attribute(queries, into=uw.Shards(folder))
        fitted.attribute(queries, into=uw.Shards(folder))
        monkeypatch.setattr("upweight.methods.magic.back_over", sound)
        # Three jobs of 12 steps; the first two were kept.
        assert len(calls) == 30 + 12
        kept = uw.Scores.load(folder).values
        torch.testing.assert_close(kept, whole, rtol=0, atol=0)


def test_a_functional_groups_and_removals():
    how = recipe()
    task, train, queries = given(how)
    fitted = uw.MAGIC().fit(task, train, history=how)
    values = fitted.attribute(queries).values

    def mean(task, params, batch, weights):
        return task.losses(params, batch).mean() + weights[2]

    found = fitted.attribute(queries, uw.Functional(mean)).values[0]
    expected = values.mean(dim=0)
    expected[2] += 1.0
    close(found, expected, 1e-10)
    removed = fitted.removal(queries, groups=[[0, 3], [2]])
    close(removed.values[:, 0], -values[:, [0, 3]].sum(dim=1), 1e-12)
    assert removed.how == "first order"
    with pytest.raises(NotOffered, match="backwards for every training example"):
        fitted.self_influence()
    with pytest.raises(NotOffered):
        fitted.parameter_influence(0)
    work = fitted.scorer.work(100, None)
    assert work.batch == 5 and "4 states kept and 4 replayed" in work.passes


# -- what is refused -------------------------------------------------------------------------------


def test_an_explosion_is_named_by_its_step():
    """Steps far too long for the curvature, on a loss that stays finite."""

    def flat():
        return initialized(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
                           torch.Generator().manual_seed(1)).float()  # fmt: skip

    g = torch.Generator().manual_seed(0)
    train = draw(g, N, 4).float(), labels(g, N, 3)
    how = Training(flat, SGD(60.0), 80, 5)
    start = uw.Task(flat().eval(), uw.CrossEntropy(), uw.L2(0.01))
    task = uw.Task(how.trained(start, train), uw.CrossEntropy(), uw.L2(0.01))
    with pytest.raises(NonFinite, match=r"before step \d+ of 240"):
        uw.MAGIC().fit(task, train, history=how).attribute(train)


def test_what_is_no_history_of_the_model_is_refused():
    how = recipe()
    task, train, _ = given(how)
    x, y = train
    run = how.trajectory(task, train)
    refused = [
        (task, train, None, "no history"),
        (task, train, uw.training.Newton(), "history=Newton"),
        (task, train, "trajectory", "history=str"),
        (task, train, replace(how, seed=2), "must be the end of its history"),
        (task, train, replace(how, init=None), "init=None"),
        (task, (x[:-1], y[:-1]), run, "13 examples trained on and 12"),
        (task, (x.flip(0), y.flip(0)), run, "in another order"),
        (uw.Task(task.model, uw.CrossEntropy()), train, run, "penalty"),
        (task, train, how.trajectory(task, train, torch.ones(N).index_fill(0, torch.tensor(3), 0)),
         "at w = 1"),
    ]  # fmt: skip
    for about, on, history, said in refused:
        with pytest.raises(SpecError, match=said):
            uw.MAGIC().fit(about, on, history=history)
    for wrong in ("Hessian", uw.EKFAC(), uw.Hessian):
        with pytest.raises(SpecError, match=r"MAGIC\(GGN\(\)\)"):
            uw.MAGIC(wrong)


def test_ranks_that_close_are_noted():
    how = recipe(skip_absent=True)
    task, train, _ = given(how)
    scores = uw.MAGIC().fit(task, train, history=how).attribute(train)
    assert any("close ranks" in note for note in scores.provenance.notes)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return _Once.apply(self.linear(x))


def test_a_model_without_second_derivatives_is_refused():
    def init():
        return initialized(Once(), torch.Generator().manual_seed(0))

    how = Training(init, SGD(0.1), 1, 5)
    g = torch.Generator().manual_seed(0)
    train = draw(g, N, 4), labels(g, N, 3)
    start = uw.Task(init().eval(), uw.CrossEntropy())
    task = uw.Task(how.trained(start, train), uw.CrossEntropy())
    for curvature in (uw.Hessian(), uw.GGN()):
        with pytest.raises(UnsupportedModel, match="second derivatives"):
            uw.MAGIC(curvature).fit(task, train, history=how)
