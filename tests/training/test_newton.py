"""Newton reaches the minimum that slower ways reach, for every row of weights at once."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import problem
from tests.reference import closed_form
from upweight.errors import DtypeError, NotConverged, NotPositiveDefinite, SpecError
from upweight.task.data import as_data
from upweight.training.descent import descend
from upweight.training.newton import Newton
from upweight.training.objective import GeneralObjective, LinearObjective, weighted_objective


def weights_like(n, s=5, seed=0):
    """Rows of weights: all ones, removals, and any."""
    g = torch.Generator().manual_seed(seed)
    w = torch.ones(s, n, dtype=torch.float64)
    w[1, 0] = w[2, n - 1] = w[2, 1] = 0.0
    w[3:] = torch.rand(s - 3, n, generator=g, dtype=torch.float64) + 0.5
    return w


def untrained(task):
    """The same task with parameters far from any minimum."""
    model = nn.Linear(task.model.in_features, task.model.out_features, task.model.bias is not None)
    model.double()
    for parameter in model.parameters():
        parameter.data.fill_(1.5)
    return uw.Task(model, task.loss, task.penalty)


@pytest.fixture
def softmax():
    g = torch.Generator().manual_seed(1)
    X = torch.randn(30, 3, generator=g, dtype=torch.float64)
    y = torch.randint(3, (30,), generator=g)
    y[:3] = torch.arange(3)
    model = nn.Linear(3, 3, bias=False).double()
    model.weight.data.zero_()
    return uw.Task(model, uw.CrossEntropy(), uw.L2(0.03)), (X, y)


def test_ridge_is_the_closed_form():
    p = problem("ridge")
    X, y = p.train
    trained = Newton().prepare(untrained(p.task), as_data(p.train))(weights_like(len(X)))
    strength = p.task.penalty.strength
    torch.testing.assert_close(trained.theta[0][None], closed_form.ridge(X, y, strength))
    torch.testing.assert_close(trained.theta[1][None], closed_form.ridge_without(X, y, strength, 0))
    assert not trained.failures
    assert bool((trained.gradient_norms <= 1e-10).all())


def test_softmax_is_where_plain_newton_ends(softmax):
    task, (X, y) = softmax
    w = weights_like(30)
    trained = Newton(tol=1e-12).prepare(task, as_data((X, y)))(w)
    for row, theta in zip(w, trained.theta, strict=True):
        expected = closed_form.softmax(X, y, 0.03, weights=row)
        torch.testing.assert_close(theta, expected.reshape(-1), rtol=1e-10, atol=1e-10)


def test_softmax_is_where_torch_lbfgs_ends_from_a_cold_start(softmax):
    task, (X, y) = softmax
    w = weights_like(30)[3]
    theta = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = task.objective(theta, (X, y), w)
        value.backward()
        return value

    optimizer.step(closure)
    trained = Newton().prepare(task, as_data((X, y)))(w[None])
    torch.testing.assert_close(trained.theta[0], theta.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["ridge_two_outputs", "logistic"])
def test_a_stationary_model_stays_where_it_is(name):
    p = problem(name)
    trainer = Newton().prepare(p.task, as_data(p.train))
    assert torch.equal(trainer.center, p.task.theta())


@pytest.mark.parametrize("name", ["ridge", "ridge_two_outputs", "logistic"])
def test_linear_and_general_objectives_agree(name):
    p = problem(name)
    data = as_data(p.train)
    fast = weighted_objective(p.task, data)
    assert isinstance(fast, LinearObjective)
    slow = GeneralObjective(p.task, ((range(len(data)), data.batch(0, len(data))),), len(data))
    w = weights_like(len(data))
    g = torch.Generator().manual_seed(3)
    theta = torch.randn(len(w), p.task.layout.size, generator=g, dtype=torch.float64)
    for a, b in zip(fast(theta, w), slow(theta, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    by_hand = torch.stack(
        [
            p.task.objective(t, data.batch(0, len(data)), row)
            for t, row in zip(theta, w, strict=True)
        ]
    )
    torch.testing.assert_close(fast(theta, w)[0], by_hand, rtol=1e-12, atol=1e-12)


def test_a_frozen_bias_is_part_of_the_outputs():
    g = torch.Generator().manual_seed(4)
    X = torch.randn(12, 2, generator=g, dtype=torch.float64)
    y = torch.randint(2, (12,), generator=g)
    model = nn.Linear(2, 2).double()
    model.bias.data.copy_(torch.tensor([0.7, -0.4]))
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.1), params="weight")
    data = as_data((X, y))
    trained = Newton().prepare(task, data)(torch.ones(1, 12, dtype=torch.float64))
    gradient = torch.func.grad(task.objective)(
        trained.theta[0], data.batch(0, 12), torch.ones(12, dtype=torch.float64)
    )
    assert float(gradient.norm()) <= 1e-10


def test_a_model_of_another_form_trains_through_vmap():
    """f = (a·x)³ is not linear in θ by its look; convexity comes from a strong penalty."""

    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1, bias=False)

        def forward(self, x):
            f = self.linear(x)
            return f + 0.1 * f**3

    g = torch.Generator().manual_seed(5)
    X = torch.randn(9, 2, generator=g, dtype=torch.float64)
    y = torch.randn(9, 1, generator=g, dtype=torch.float64)
    model = Cubic().double()
    model.linear.weight.data.zero_()
    task = uw.Task(model, uw.SquaredError(), uw.L2(1.0))
    data = as_data((X, y))
    assert isinstance(weighted_objective(task, data), GeneralObjective)
    w = weights_like(9)
    trained = Newton().prepare(task, data)(w)
    assert not trained.failures
    for theta, row in zip(trained.theta, w, strict=True):
        gradient = torch.func.grad(task.objective)(theta, data.batch(0, 9), row)
        assert float(gradient.norm()) <= 1e-10


def test_models_do_not_depend_on_their_company(softmax):
    task, train = softmax
    w = weights_like(30)
    trainer = Newton().prepare(task, as_data(train))
    together = trainer(w).theta
    apart = torch.cat([trainer(row[None]).theta for row in w])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    assert torch.equal(together, trainer(w).theta)


def test_the_model_is_left_alone(softmax):
    task, train = softmax
    before = task.theta()
    Newton().prepare(task, as_data(train))
    assert torch.equal(task.theta(), before)


def test_descent_without_a_factor_arrives_too(softmax):
    task, (X, y) = softmax
    w = weights_like(30)
    objective = weighted_objective(task, as_data((X, y)))
    start = torch.full((len(w), 9), 2.0, dtype=torch.float64)
    minima = descend(objective, w, start, None, tol=1e-9, max_steps=300, memory=10)
    expected = Newton(tol=1e-12).prepare(task, as_data((X, y)))(w).theta
    assert not bool(minima.stuck.any())
    # Strong convexity 0.03: an error of at most 1e-9 / 0.03.
    torch.testing.assert_close(minima.theta, expected, rtol=0, atol=4e-8)


def test_a_model_out_of_reach_is_reported_and_the_others_stay(softmax):
    task, train = softmax
    w = weights_like(30)
    w[1] = -50.0  # concave in the data: no minimum nearby
    trained = Newton(max_steps=25).prepare(task, as_data(train))(w)
    assert set(trained.failures) == {1}
    assert "‖∇J‖" in trained.failures[1]
    good = trained.gradient_norms[[0, 2, 3, 4]]
    assert bool((good <= 1e-10).all())


def test_too_few_steps_say_so(softmax):
    task, train = softmax
    with pytest.raises(NotConverged, match=r"‖∇J‖ = .* > 1\.0e-10 after 1 steps"):
        Newton(max_steps=1).prepare(task, as_data(train))


def test_an_undetermined_minimum_is_refused():
    X = torch.ones(6, 2, dtype=torch.float64)  # two equal features and no penalty
    y = torch.arange(6, dtype=torch.float64)[:, None]
    task = uw.Task(nn.Linear(2, 1, bias=False).double(), uw.SquaredError())
    with pytest.raises(NotPositiveDefinite, match="add damping or a penalty"):
        Newton().prepare(task, as_data((X, y)))


def test_float32_parameters_need_a_float32_tolerance():
    p = problem("ridge")
    X, y = (a.float() for a in p.train)
    task = uw.Task(nn.Linear(3, 1, bias=False).float(), uw.SquaredError(), uw.L2(0.1))
    with pytest.raises(DtypeError, match=r"torch\.float32.*\n.*\n.*Newton\(tol="):
        Newton().prepare(task, as_data((X, y)))
    trained = Newton(tol=1e-5).prepare(task, as_data((X, y)))(weights_like(11).float())
    expected = Newton().prepare(untrained(p.task), as_data(p.train))(weights_like(11)).theta
    torch.testing.assert_close(trained.theta.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arguments", [{"tol": 0.0}, {"max_steps": 0}, {"memory": 0}])
def test_meaningless_hyperparameters_are_refused(arguments):
    with pytest.raises(SpecError, match="tol > 0"):
        Newton(**arguments)


def test_repr_is_the_spec():
    assert eval(repr(Newton(tol=1e-9))) == Newton(tol=1e-9)
