"""The formulas of removal, on numbers; exactness/test_removal.py has what they mean for models."""

import pytest
import torch

import upweight as uw
from tests.market import draw, problem
from upweight.errors import NonFinite, ShapeError
from upweight.methods.leverage import (
    corrected_output_gradients,
    group_output_gradients,
    solve_removal,
)


def blocks(g, *shape):
    """Symmetric positive semi-definite blocks, well below 1."""
    root = draw(g, *shape)
    return 0.02 * root @ root.mT


def test_one_output_is_the_leverage_correction():
    """u = δ / (1 − h), h = Λ K."""
    g = torch.Generator().manual_seed(0)
    delta, curvature, k = draw(g, 6, 1), draw(g, 6, 1).abs(), 0.3 * draw(g, 6, 1).abs().sigmoid()
    found = corrected_output_gradients(delta, curvature[..., None], k[..., None])
    torch.testing.assert_close(found, delta / (1 - curvature * k), rtol=1e-12, atol=1e-12)


def test_several_outputs_solve_a_block():
    g = torch.Generator().manual_seed(1)
    delta, lambdas, leverage = draw(g, 4, 3), blocks(g, 4, 3, 3), blocks(g, 4, 3, 3)
    u = corrected_output_gradients(delta, lambdas, leverage)
    back = u - (lambdas @ leverage @ u[..., None])[..., 0]
    torch.testing.assert_close(back, delta, rtol=1e-12, atol=1e-12)


def test_a_group_of_one_is_a_single_removal():
    g = torch.Generator().manual_seed(2)
    delta, lambdas, leverage = draw(g, 1, 3), blocks(g, 1, 3, 3), blocks(g, 1, 3, 3)
    one = corrected_output_gradients(delta, lambdas, leverage)
    group = group_output_gradients(delta, lambdas, leverage[:, :, None, :])
    torch.testing.assert_close(group, one, rtol=1e-12, atol=1e-12)


def test_a_group_of_strangers_is_single_removals():
    """Examples whose Jacobians do not overlap in H⁻¹ do not see each other."""
    g = torch.Generator().manual_seed(3)
    delta, lambdas, own = draw(g, 4, 2), blocks(g, 4, 2, 2), blocks(g, 4, 2, 2)
    leverage = torch.zeros(4, 2, 4, 2).double()
    for i in range(4):
        leverage[i, :, i] = own[i]
    found = group_output_gradients(delta, lambdas, leverage)
    expected = corrected_output_gradients(delta, lambdas, own)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_two_copies_removed_together():
    """h each, 2h together: u = δ / (1 − 2h)."""
    delta, one = torch.tensor([[0.7], [0.7]], dtype=torch.float64), torch.ones(2, 1, 1).double()
    leverage = torch.full((2, 1, 2, 1), 0.2, dtype=torch.float64)
    found = group_output_gradients(delta, one, leverage)
    torch.testing.assert_close(found, delta / (1 - 0.4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("h", [1.0, 1.0 - 1e-15, 1.0 + 1e-15])
def test_leverage_one_is_refused(h):
    hat = torch.tensor([[[0.3]], [[h]]], dtype=torch.float64)
    with pytest.raises(NonFinite, match=r"removal \[1\]"):
        solve_removal(hat, torch.ones(2, 1).double())


def test_leverage_close_to_one_is_not():
    hat = torch.tensor([[[1 - 1e-9]]], dtype=torch.float64)
    found = solve_removal(hat, torch.ones(1, 1).double())
    torch.testing.assert_close(found, torch.tensor([[1e9]]).double(), rtol=1e-6, atol=0)


def test_effects_hold_their_groups():
    p = problem("softmax")
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(p.task, p.train)
    removed = fitted.removal(p.queries, uw.Margin(), groups=[[0, 2], 5])
    assert removed.groups == ((0, 2), (5,))
    assert removed.how == "Newton step" and removed.linear is None
    assert removed.provenance.measure == repr(uw.Margin())
    assert "row_sum_excess" not in removed.provenance.health
    assert torch.equal(removed.of([5]).values, removed.values[:, 1:])
    one = fitted.removal(p.queries, uw.Margin()).values[:, 5]
    torch.testing.assert_close(removed.values[:, 1], one, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "curvature, how", [(uw.Hessian(), "Newton step"), (uw.EKFAC(), "first order")]
)
def test_effects_say_how_they_were_predicted(curvature, how):
    p = problem("softmax")
    fitted = uw.Influence(curvature, damping=0.1).fit(p.task, p.train)
    linear = fitted.removal(p.queries, groups=[[0, 2], 5])
    plugin = fitted.removal(p.queries, groups=[[0, 2], 5], evaluate="plugin")
    assert (linear.how, plugin.how) == (how, "plug-in")
    assert torch.equal(plugin.linear, linear.values)
    assert plugin.groups == linear.groups and not torch.equal(plugin.values, linear.values)


def test_small_steps_agree_with_the_first_order():
    """The same example among 40 copies of the others: the correction is of order 1/n."""
    p = problem("logistic")
    many = uw.as_data(p.train).subset(list(range(p.n)) * 40)
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(p.task, many)
    first = fitted.attribute(p.queries).removal().values
    newton = fitted.removal(p.queries).values
    ratio = newton / first
    h = ratio - 1
    assert bool((h > 0).all()), "leverages are positive"
    assert float(h.max()) < 0.05 and float(h.max()) > 1e-4


@pytest.mark.parametrize("groups", [[], [[]], [[0.5]], [-1], [[True, False]]], ids=str)
def test_removals_that_name_nothing(groups):
    p = problem("softmax")
    fitted = uw.Influence().fit(p.task, p.train)
    with pytest.raises(ShapeError):
        fitted.removal(p.queries, groups=groups)


def test_a_group_may_be_a_mask():
    p = problem("softmax")
    fitted = uw.Influence().fit(p.task, p.train)
    mask = torch.zeros(p.n, dtype=torch.bool)
    mask[[0, 2]] = True
    found, expected = (fitted.removal(p.queries, groups=g) for g in ([mask], [[0, 2]]))
    assert torch.equal(found.values, expected.values) and found.groups == expected.groups


def test_a_newton_step_contains_the_second_order_of_groups():
    """Basu, You & Feizi (2020): H⁻¹g + H⁻¹ H_U H⁻¹g are the first two terms of its series.

    What they leave out is (H⁻¹ H_U)² of the step itself; on a quadratic J the step is the truth.
    """
    p = problem("ridge")
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(p.task, p.train)
    group, n = [0, 2, 5], p.n
    data, theta = uw.as_data(p.train), p.task.theta()
    some = data.subset(group)
    whole = uw.Hessian().fit(p.task, data, theta).dense()
    bare = uw.Task(p.task.model, p.task.loss)
    of_group = uw.Hessian().fit(bare, some, theta, n=n).dense()
    total = torch.func.grad(lambda t: p.task.losses(t, some.batch(0, 3)).sum())(theta) / n
    first = torch.linalg.solve(whole, total)
    second = first + torch.linalg.solve(whole, of_group @ first)
    step = p.task.layout.flatten(fitted.removal_step(group))
    m = torch.linalg.solve(whole, of_group)
    torch.testing.assert_close(step - second, m @ m @ step, rtol=1e-9, atol=1e-13)
    weights = torch.ones(1, n, dtype=torch.float64)
    weights[0, group] = 0.0
    recipe = uw.training.Newton(tol=1e-12)
    truth = recipe.prepare(p.task, data)(weights).theta[0] - theta
    gaps = [float((x - truth).norm() / truth.norm()) for x in (first, second, step)]
    assert gaps[0] > gaps[1] > 1e-3 and gaps[2] < 1e-8
