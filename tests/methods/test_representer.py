"""Representer points: outputs of the last layer as exact sums over the training examples."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import assert_same
from upweight.errors import AssumptionWarning, SpecError, UnsupportedModel
from upweight.testing import check_method

LAM = 0.05


def at_the_minimum(penalty, n=21):
    """A random body, and a softmax layer at the minimum of its penalized objective, by Newton."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    X, y = torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3
    last = uw.Task(model, uw.CrossEntropy(), penalty, params="2.*")

    def objective(theta):
        return last.objective(theta, (X, y), torch.ones(n, dtype=torch.float64))

    theta = torch.zeros(last.layout.size, dtype=torch.float64)
    for _ in range(12):
        slope = torch.func.grad(objective)(theta)
        H = torch.func.jacrev(torch.func.grad(objective))(theta)
        # Unpenalized biases may all move together: the shortest step leaves that alone.
        theta = theta - torch.linalg.lstsq(H, slope[:, None], driver="gelsd").solution[:, 0]
    with torch.no_grad():
        for name, value in last.layout.unflatten(theta).items():
            model.get_parameter(name).copy_(value)
    return uw.Task(model, uw.CrossEntropy(), penalty), (X, y)


@pytest.mark.parametrize("exclude", [(), ("*bias",)], ids=["all", "weights"])
def test_outputs_are_sums_of_shares(exclude):
    task, (X, y) = at_the_minimum(uw.L2(LAM, exclude))
    fitted = uw.RepresenterPoints().fit(task, (X, y))
    Xq = torch.randn(4, 4, dtype=torch.float64)
    with torch.no_grad():
        z, zq = (torch.tanh(task.model[0](x)) for x in (X, Xq))
        outputs, bias = task.model(Xq), task.model[2].bias
        delta = task.model(X).softmax(dim=1) - nn.functional.one_hot(y, 3)
    alpha = -delta / (len(X) * LAM)
    kernel = zq @ z.T + (0 if exclude else 1)
    for k in range(3):
        scores = fitted.attribute((Xq, torch.zeros(4).long()), uw.Logit(k))
        assert_same(scores.values, alpha[:, k] * kernel, 1e-10)
        expected = outputs[:, k] - (bias[k].detach() if exclude else 0)
        torch.testing.assert_close(scores.values.sum(dim=1), expected, rtol=1e-8, atol=1e-8)
        assert scores.unit is uw.Unit.VALUE
    assert scores.provenance.health["representation_error"] < 1e-8
    named = uw.RepresenterPoints("2").fit(task, (X, y)).attribute((Xq, torch.zeros(4).long()))
    assert_same(named.values, fitted.attribute((Xq, torch.zeros(4).long())).values, 1e-12)


@pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")
def test_laws():
    for _, check in check_method(uw.RepresenterPoints(), problems=[], damped=True):
        check()


def test_what_is_no_minimum_is_said():
    task, (X, y) = at_the_minimum(uw.L2(LAM))
    with torch.no_grad():
        task.model[2].weight.mul_(1.5)
    with pytest.warns(AssumptionWarning, match="not at a stationary point"):
        uw.RepresenterPoints().fit(task, (X, y))


def test_refusals():
    task, train = at_the_minimum(uw.L2(LAM))
    for penalty in (None, uw.L2(0.0), lambda params: params["2.weight"].abs().sum()):
        with pytest.raises(UnsupportedModel, match=r"L2\(weight_decay\)"):
            uw.RepresenterPoints().fit(uw.Task(task.model, task.loss, penalty), train)
    with pytest.raises(SpecError, match="'0', '2'"):
        uw.RepresenterPoints("head").fit(task, train)
    with pytest.raises(UnsupportedModel, match=r"not those of 0\.weight"):
        uw.RepresenterPoints("0").fit(task, train)
    scaled = uw.Task(nn.Sequential(task.model, nn.Softplus()).eval(), task.loss, uw.L2(LAM))
    with pytest.raises(UnsupportedModel, match="behind the layer"):
        uw.RepresenterPoints().fit(scaled, train)
