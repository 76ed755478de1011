"""Targets and weights of another dtype than the model's mean what they mean converted."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import upweight as uw

torch.manual_seed(0)
X = torch.randn(24, 3)
Y = torch.randn(24, 1, dtype=torch.float64)
WEIGHTS = torch.rand(24, dtype=torch.float64) + 0.1
COUNTS = (Y.abs() * 2).round()
SHARES = torch.cat([Y.sigmoid(), 1 - Y.sigmoid()], dim=1)

CASES = {
    "squares": (uw.SquaredError(), Y, 1),
    "yes or no": (uw.Bernoulli(), (Y > 0).double(), 1),
    "counts": (uw.Poisson(), COUNTS, 1),
    "probabilities": (uw.CrossEntropy(), SHARES, 2),
    "weights": (uw.Weighted(uw.SquaredError()), (Y, WEIGHTS), 1),
    "weights of integers": (uw.Weighted(uw.Bernoulli()), ((Y > 0).long(), WEIGHTS), 1),
    "integers": (uw.Bernoulli(), (Y > 0).long(), 1),
    "uint8": (uw.Bernoulli(), (Y > 0).to(torch.uint8), 1),
    "bool": (uw.Bernoulli(), Y > 0, 1),
    "hinge uint8": (uw.SmoothHinge(0.5), torch.ones(24, 1, dtype=torch.uint8), 1),
    "counts of integers": (uw.Poisson(), COUNTS.long(), 1),
}
LINEAR = [uw.Hessian(), uw.GGN(), uw.Fisher(), uw.EmpiricalFisher()]
ASKED = [("linear", c) for c in LINEAR] + [("network", c) for c in (uw.GGN(), uw.EKFAC())]


def model(c, kind, dtype):
    torch.manual_seed(1)
    layers = (
        [nn.Linear(3, c)] if kind == "linear" else [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, c)]
    )
    return nn.Sequential(*layers).to(dtype).eval()


def converted(targets, dtype):
    return tree_map(lambda t: t.to(dtype), targets)


def answers(kind, loss, targets, c, curvature, dtype=torch.float32):
    """Everything that one fit is asked, in one vector."""
    task = uw.Task(model(c, kind, dtype), loss)
    fitted = uw.Influence(curvature, damping=3.0).fit(task, (X.to(dtype), targets))
    queries = (X[:4].to(dtype), tree_map(lambda t: t[:4], targets))
    parts = [fitted.attribute(queries).values, fitted.self_influence()]
    if isinstance(getattr(loss, "base", loss), uw.Bernoulli | uw.SmoothHinge):
        parts.append(fitted.attribute(queries, uw.Margin()).values)
    if isinstance(curvature, uw.Hessian):
        parts.append(fitted.removal(queries, groups=[[5]]).values)
        parts.append(fitted.removal(queries, groups=[[0, 1], [2]]).values)
        parts.append(fitted.input_influence(0, queries))
    assert all(part.dtype == dtype for part in parts)
    return torch.cat([part.flatten() for part in parts]).float()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind, curvature", ASKED, ids=str)
def test_targets_of_any_dtype_equal_converted_targets(kind, curvature, case):
    loss, targets, c = CASES[case]
    if isinstance(curvature, uw.Fisher | uw.EKFAC) and "hinge" in case:
        pytest.skip("the hinge is no likelihood")
    found = answers(kind, loss, targets, c, curvature)
    expected = answers(kind, loss, converted(targets, torch.float32), c, curvature)
    assert float(expected.norm()) > 0
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:parameters are")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["squares", "weights", "yes or no", "uint8"])
def test_linear_models_in_half_precision_take_targets_in_single(case, dtype):
    loss, targets, c = CASES[case]
    given = tree_map(lambda t: t.float() if t.is_floating_point() else t, targets)
    found = answers("linear", loss, given, c, uw.Hessian(), dtype)
    exact = answers("linear", loss, converted(targets, torch.float32), c, uw.Hessian())
    assert float((found - exact).norm()) < 0.05 * float(exact.norm())


def test_retraining_takes_them_too():
    for targets in (Y, Y.float()):
        task = uw.Task(model(1, "linear", torch.float32), uw.SquaredError(), uw.L2(0.1))
        retrained = uw.evaluation.leave_one_out(
            uw.training.Newton(tol=1e-5),
            task,
            (X.float(), targets),
            range(3),
            (X[:2].float(), targets[:2]),
        )
        if targets.dtype == torch.float64:
            expected = retrained.change
    assert_close(retrained.change, expected, rtol=1e-3, atol=1e-5)
