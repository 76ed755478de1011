"""The Newton step for removals: exact for quadratic J, and one explicit step elsewhere.

    Δθ = (H + λI − (1/n) Σ_U Hᵢ)⁻¹ (1/n) Σ_U gᵢ

The fast paths (leverage 1/(1 − h), block Woodbury, the shared inverse) are compared with the matrix
written out, and with the path for models that are not recognized.
"""

import functools

import pytest
import torch

import upweight as uw
from tests.exactness.opaque import opaque
from tests.laws.subjects import assert_same, first_output
from tests.market import names, problem, train_in_place
from tests.reference import dense
from tests.reference.retrain import measured, minimize
from upweight.errors import NonFinite, NotPositiveDefinite, ShapeError

EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())
QUADRATIC = ["ridge", "ridge_two_outputs", "buffers"]
LINEAR = names("linear", without=("float32",))
GROUPS = [[0], [3, 1], [2, 5, 4, 6]]


def output_sum(outputs, targets):
    """A measurement that is linear in θ where f is."""
    return outputs.reshape(len(outputs), -1).sum(dim=1)


def one_output(outputs, targets):
    return outputs.reshape(len(outputs), -1)[:, 0]


@functools.cache
def whole(name):
    """∇²J and every gᵢ by loops over autograd: the same for every group."""
    p = problem(name)
    return dense.hessian(p.task, p.train), dense.gradients(p.task, p.train)


def explicit_step(p, group, damping=0.0):
    """Δθ with every example's Hessian by loops over autograd."""
    replica = dense.Replica(p.task, p.train)
    own = sum(replica.hessian(replica.loss(i)) for i in group) / p.n
    H, gradients = whole(p.name)
    identity = torch.eye(len(H), dtype=H.dtype)
    return torch.linalg.solve(H + damping * identity - own, gradients[group].sum(dim=0) / p.n)


def explicit_change(p, group, measure, damping=0.0):
    return dense.measure_gradients(p.task, measure, p.queries) @ explicit_step(p, group, damping)


@pytest.mark.parametrize("name", QUADRATIC)
@pytest.mark.parametrize("recognized", [True, False])
def test_exact_for_quadratic_objectives(name, recognized):
    p = problem(name)
    task = p.task if recognized else opaque(p.task, p.train)
    fitted = EXACT.fit(task, p.train)
    removed = fitted.removal(p.queries, output_sum, GROUPS)
    before = measured(task, task.theta(), output_sum, p.queries)
    for column, group in enumerate(GROUPS):
        weights = torch.ones(p.n, dtype=torch.float64)
        weights[group] = 0.0
        theta = minimize(task, p.train, weights, start=task.theta())
        assert_same(
            removed.values[:, column], measured(task, theta, output_sum, p.queries) - before, 1e-9
        )
        step = task.layout.flatten(fitted.removal_step(group))
        assert_same(step, theta - task.theta(), 1e-9)


@pytest.mark.parametrize("name", LINEAR)
def test_one_by_one_is_the_newton_step(name):
    """For logistic regression this is the leverage correction 1/(1 − h)."""
    p = problem(name)
    if name == "one_example":
        return  # its own test below
    removed = EXACT.fit(p.task, p.train).removal(p.queries)
    assert removed.groups == tuple((i,) for i in range(p.n))
    for i in (0, 2, p.n - 1):
        expected = explicit_change(p, [i], p.task.loss)
        torch.testing.assert_close(
            removed.values[:, i],
            expected,
            rtol=1e-9,
            atol=1e-10 * float(removed.values.abs().max()),
        )


@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("name", ["logistic", "softmax", "weighted", "custom_loss", "two_inputs"])
def test_groups_are_the_newton_step(name, damping):
    p = problem(name)
    method = uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), damping)
    removed = method.fit(p.task, p.train).removal(p.queries, first_output, GROUPS)
    assert removed.groups == tuple(map(tuple, GROUPS))
    for column, group in enumerate(GROUPS):
        expected = explicit_change(p, group, first_output, damping)
        assert_same(removed.values[:, column], expected, 1e-9)


WOODBURY = [
    *(
        (name, uw.Hessian())
        for name in ("logistic", "softmax", "weighted", "last_layer", "bias_only")
    ),
    ("softmax", uw.GGN()),
    *((name, uw.EmpiricalFisher()) for name in ("weighted", "bias_only")),
]


@pytest.mark.parametrize(("name", "curvature"), WOODBURY, ids=repr)
def test_woodbury_is_the_refactorized_step(name, curvature):
    """Recognized or not, the same change, and of any curvature without the examples' share."""
    p = problem(name)
    method = uw.Influence(curvature, uw.solvers.Cholesky())
    known, unknown = method.fit(p.task, p.train), method.fit(opaque(p.task, p.train), p.train)
    for groups in (GROUPS, [0, 4, 2]):
        expected = unknown.removal(p.queries, groups=groups).values
        assert_same(known.removal(p.queries, groups=groups).values, expected, 1e-9)
    for group in GROUPS:
        step = p.task.layout.flatten(known.removal_step(group))
        assert_same(step, p.task.layout.flatten(unknown.removal_step(group)), 1e-9)


@pytest.mark.parametrize("name", ["softmax", "weighted", "poisson"])
def test_iterative_solvers_take_the_same_step(name):
    """Without a factor the leverages come from solves, and not from the inverse."""
    p = problem(name)
    direct = EXACT.fit(p.task, p.train)
    iterative = uw.Influence(uw.Hessian(), uw.solvers.CG(rtol=1e-12)).fit(p.task, p.train)
    assert_same(iterative.removal(p.queries).values, direct.removal(p.queries).values, 1e-9)
    assert_same(iterative.self_influence(), direct.self_influence(), 1e-9)


def test_few_examples_by_solves_and_many_by_the_inverse():
    """p = 12, c = 3: up to one example is solved for, more take the inverse; the same numbers."""
    p = problem("softmax")
    fitted = EXACT.fit(p.task, p.train)
    every = fitted.removal(p.queries).values
    for i in (0, 7):
        assert_same(fitted.removal(p.queries, groups=[i]).values[:, 0], every[:, i], 1e-10)


@pytest.mark.parametrize("name", ["logistic", "softmax", "poisson", "two_inputs"])
def test_the_newton_step_beats_the_first_order(name):
    """Against refitting, each example in turn: the median error of an output is less than half."""
    p = problem(name)
    method = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())
    fitted = method.fit(p.task, p.train)
    first = fitted.attribute(p.queries, one_output).removal().values
    examples = [0, 1, 2, 3]
    newton = fitted.removal(p.queries, one_output, groups=examples).values
    before = measured(p.task, p.task.theta(), one_output, p.queries)
    errors = []
    for column, i in enumerate(examples):
        weights = torch.ones(p.n, dtype=torch.float64)
        weights[i] = 0.0
        theta = minimize(p.task, p.train, weights, start=p.task.theta())
        change = measured(p.task, theta, one_output, p.queries) - before
        errors.append(
            torch.stack([(first[:, i] - change).norm(), (newton[:, column] - change).norm()])
        )
    first_error, newton_error = torch.stack(errors).median(dim=0).values
    assert float(newton_error) < 0.5 * float(first_error)


def test_the_only_example_leaves_the_penalty_alone():
    """n = 1: without it J is R, whose minimum is 0; the step is exact for quadratic J."""
    p = problem("one_example")
    fitted = EXACT.fit(p.task, p.train)
    expected = explicit_change(p, [0], p.task.loss)
    assert_same(fitted.removal(p.queries).values[:, 0], expected, 1e-10)
    step = p.task.layout.flatten(fitted.removal_step([0]))
    assert_same(step, -p.task.theta(), 1e-10)


def test_everything_removed_at_once_leaves_the_penalty_alone():
    p = problem("ridge")
    step = EXACT.fit(p.task, p.train).removal_step(range(p.n))
    assert_same(p.task.layout.flatten(step), -p.task.theta(), 1e-9)


def test_a_removal_without_which_there_is_no_minimum_is_refused():
    """Nothing is damped silently: the Hessian of what is left may be indefinite."""
    p = problem("mlp_tanh")
    without = dense.hessian(p.task, p.train)
    replica = dense.Replica(p.task, p.train)
    without = without - replica.hessian(replica.loss(0)) / p.n
    assert float(torch.linalg.eigvalsh(without)[0]) < 0
    with pytest.raises(NotPositiveDefinite, match="smallest eigenvalue is -"):
        EXACT.fit(p.task, p.train).removal(p.queries, groups=[0])


def test_an_example_that_alone_determines_a_parameter_is_refused():
    """Leverage 1: the only example with some feature, and no penalty."""
    X = torch.eye(4).double()[[0, 1, 2, 3, 0, 1, 2]]
    y = torch.arange(7.0).double()[:, None]
    task = uw.Task(torch.nn.Linear(4, 1, bias=False).double(), uw.SquaredError())
    train_in_place(task, (X, y))
    fitted = EXACT.fit(task, (X, y))
    with pytest.raises(NonFinite, match=r"leverage 1 to rounding for removal \[3\]"):
        fitted.removal((X, y))
    with pytest.raises(NonFinite, match="leverage"):
        fitted.removal((X, y), groups=[[0, 4]])
    assert bool(fitted.removal((X, y), groups=[0, 1, 2]).values.isfinite().all())


@pytest.mark.parametrize("groups", [[[]], [[0, 0]], [99], [-1]])
def test_groups_that_are_none(groups):
    p = problem("softmax")
    with pytest.raises(ShapeError, match="indices in 0…16"):
        EXACT.fit(p.task, p.train).removal(p.queries, groups=groups)
