"""Task: how the model is called, and what is refused before any number is computed."""

import copy

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, problem
from upweight.errors import (
    DataError,
    DtypeError,
    NonDeterministic,
    NonFinite,
    NotDifferentiable,
    ScalarLoss,
    ShapeError,
    UnsupportedModel,
)
from upweight.task.task import call_model


def g():
    return torch.Generator().manual_seed(0)


X, Y = draw(g(), 8, 3), torch.arange(8) % 2


def fit(model, loss=None, train=(X, Y), **options):
    task = uw.Task(model.double(), loss or uw.CrossEntropy(), uw.L2(1.0), **options)
    return uw.Influence().fit(task, train)


# -- how the model is called ----------------------------------------------------------------------


class Sum(nn.Module):
    """Any number of inputs, by place or by name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, a, b=0.0, c=0.0):
        return self.weight * (a + 10 * b + 100 * c)


def test_tuples_are_inputs_and_targets():
    a, b, c, y = (torch.full((2,), float(value)) for value in (1, 2, 3, 4))
    outputs, targets = call_model(Sum(), (a, b, c, y))
    assert outputs.tolist() == [321.0, 321.0] and targets.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_dicts_are_inputs_by_name(key):
    a, c, y = (torch.full((2,), float(value)) for value in (1, 3, 4))
    outputs, targets = call_model(Sum(), {"c": c, key: y, "a": a})
    assert outputs.tolist() == [301.0, 301.0] and targets is y


def test_an_output_with_logits_stands_for_them():
    class Output:
        logits = torch.ones(2, 3)

    class Model(nn.Module):
        def forward(self, x):
            return Output()

    outputs, _ = call_model(Model(), (X, Y))
    assert outputs is Output.logits


@pytest.mark.parametrize("batch", [(X,), X, {"a": X}, {"a": X, "y": Y, "labels": Y}])
def test_batches_without_targets_are_refused(batch):
    with pytest.raises(DataError, match=r"Task\(forward="):
        call_model(Sum(), batch)


def test_the_objective_is_the_weighted_mean_plus_the_penalty():
    p = problem("softmax")
    w = torch.linspace(0, 2, p.n).double()
    theta = p.task.theta()
    expected = (
        w * nn.functional.cross_entropy(p.task.model(p.train[0]), p.train[1], reduction="none")
    ).sum() / p.n
    W, b = p.task.model.weight, p.task.model.bias
    expected = expected + 0.015 * W.square().sum() + b.sum() ** 2 / 6
    found = p.task.objective(theta, p.train, w)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


def test_parameters_may_be_given_by_name_or_flat():
    p = problem("mlp_tanh")
    theta = 1.1 * p.task.theta()
    flat, _ = p.task.outputs(theta, p.train)
    named, _ = p.task.outputs(p.task.layout.unflatten(theta), p.train)
    assert torch.equal(flat, named)
    assert not torch.equal(flat, p.task.model(p.train[0]))


def test_unchosen_parameters_are_constants():
    p = problem("last_layer")
    theta = p.task.theta().requires_grad_(True)
    outputs, _ = p.task.outputs(theta, p.train)
    outputs.sum().backward()
    assert theta.grad is not None
    assert all(parameter.grad is None for parameter in p.task.model.parameters())


def test_a_buffer_updated_in_forward_is_not_the_users():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    model = Counts()
    fit(model).attribute((X, Y))
    assert float(model.calls) == 0


# -- what is refused ------------------------------------------------------------------------------


class Then(nn.Module):
    """A linear map, then any function."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 2), function

    def forward(self, x):
        return self.function(self.linear(x))


def test_dropout_in_training_mode():
    with pytest.raises(NonDeterministic, match=r"0 \(Dropout\)|1 \(Dropout\)"):
        fit(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)))
    fit(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)))
    fit(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).eval())


def test_batch_norm_in_training_mode():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonDeterministic, match="eval"):
        fit(model)
    after = model.state_dict()
    assert all(torch.equal(before[k].double(), after[k].double()) for k in before)


def test_randomness_inside_forward():
    state = torch.get_rng_state()
    with pytest.raises(NonDeterministic, match="between two calls"):
        fit(Then(lambda f: f + torch.rand_like(f)))
    torch.set_rng_state(state)


def test_examples_that_see_each_other():
    with pytest.raises(NonDeterministic, match="passed alone"):
        fit(Then(lambda f: f - f.mean(dim=0)))


def test_a_gradient_that_is_cut():
    with pytest.raises(NotDifferentiable, match=r"linear\.weight"):
        fit(Then(lambda f: f.detach()))
    with pytest.raises(NotDifferentiable, match="exactly 0"):
        fit(Then(lambda f: f.round()))


def test_a_parameter_that_forward_does_not_use():
    """Its gradient is zero, which is said; scores are those of the others."""
    model = Then(lambda f: f)
    model.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"no gradient reaches unused\.weight"):
        fitted = fit(model)
    expected = fit(model, params="linear.*").attribute((X, Y)).values
    torch.testing.assert_close(fitted.attribute((X, Y)).values, expected, rtol=1e-10, atol=1e-14)


def test_a_reduced_loss():
    with pytest.raises(ScalarLoss, match=r"shape \(\)"):
        fit(nn.Linear(3, 2), lambda f, y: nn.functional.cross_entropy(f, y))
    with pytest.raises(ScalarLoss, match=r"shape \(8, 2\)"):
        fit(nn.Linear(3, 2), lambda f, y: f)


def test_nan_in_parameters_or_data():
    model = nn.Linear(3, 2)
    model.bias.data[0] = torch.nan
    with pytest.raises(NonFinite, match="bias"):
        fit(model)
    bad = X.clone()
    bad[5, 1] = torch.nan
    with pytest.raises(NonFinite, match=r"example 5.*inputs or targets hold NaN"):
        fit(nn.Linear(3, 2), train=(bad, Y))
    with pytest.raises(NonFinite, match="example 0"):
        fit(nn.Linear(3, 2), lambda f, y: (f[:, 0] * 0 - 1).log())


def test_shapes_and_dtypes_that_do_not_fit_the_model():
    with pytest.raises(ShapeError, match=r"\(8, 2\)"):
        fit(nn.Linear(3, 2), train=(X[:, :2], Y))
    with pytest.raises(DtypeError, match=r"torch\.float32"):
        fit(nn.Linear(3, 2), train=(X.float(), Y))
    with pytest.raises(ShapeError, match="one tensor"):
        fit(Then(lambda f: (f, f)))
    with pytest.raises(ShapeError, match="one output per example"):
        fit(Then(lambda f: f[:4]), lambda f, y: f.sum(dim=1))


def test_queries_are_checked_like_training_data():
    p = problem("softmax")
    fitted = uw.Influence().fit(p.task, p.train)
    with pytest.raises(DataError, match="in 0…2"):
        fitted.attribute((p.queries[0], p.queries[1] + 5))
    with pytest.raises(ShapeError, match="queries"):
        fitted.attribute((p.queries[0][:, :2], p.queries[1]))


def test_every_message_has_four_parts():
    with pytest.raises(NonDeterministic) as caught:
        fit(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)))
    text = str(caught.value)
    assert all(part in text for part in ("Given:", "Usual cause:", "Way out:"))


def test_a_task_is_frozen():
    task = uw.Task(nn.Linear(3, 2), uw.CrossEntropy())
    with pytest.raises(AttributeError):
        task.loss = uw.Bernoulli()


def test_gradients_that_cancel_at_a_minimum_are_not_taken_for_missing():
    """Without a penalty Σ gᵢ = 0 at the minimum, here exactly: that is no cut gradient."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    ones, targets = torch.ones(4, 1).double(), torch.tensor([[0.0], [2.0], [0.0], [2.0]]).double()
    task = uw.Task(model, uw.SquaredError())
    values = uw.Influence().fit(task, (ones, targets)).attribute((ones, targets), uw.Logit()).values
    torch.testing.assert_close(values[0], torch.tensor([-0.25, 0.25, -0.25, 0.25]).double())


class _Alias(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.again(self.first(x).tanh()))


def test_a_module_under_two_names_keeps_its_parameters():
    model = _Alias()
    task = uw.Task(model, uw.CrossEntropy())
    before = dict(model.named_parameters())
    task.losses(task.theta(), (torch.randn(5, 3), torch.zeros(5, dtype=torch.long)))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


class _Force(nn.Module):
    """−∂energy/∂x, as it is trained: the model takes a derivative of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_takes_derivatives_itself():
    """Its last bias cannot matter and counts as zero; the rest is (n λ)⁻¹ g gᵀ for a large λ."""
    model = _Force().double()
    X, y = draw(g(), 20, 3), draw(g(), 20, 3)
    lam = 1e8

    def gradients():
        rows = []
        for x, t in zip(X, y, strict=True):
            loss = 0.5 * (model(x[None])[0] - t).square().sum()
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            rows.append(torch.cat([f.flatten() for f in found if f is not None]))
        return torch.stack(rows)

    G = gradients()
    for curvature in (uw.Hessian(), uw.GGN(), uw.EKFAC()):
        with pytest.warns(UserWarning, match=r"no gradient reaches energy\.2\.bias"):
            fitted = uw.Influence(curvature, damping=lam, tolerance=0).fit(
                uw.Task(model, uw.SquaredError()), (X, y)
            )
        found = fitted.attribute((X[:3], y[:3])).values
        torch.testing.assert_close(lam * found, -G[:3] @ G.T / 20, rtol=1e-5, atol=1e-8)


def test_a_checkpoint_is_no_model():
    weights = nn.Linear(2, 3).state_dict()
    for given, said in ((weights, "a dict of bias, weight"), ("best.pt", "the path 'best.pt'")):
        with pytest.raises(UnsupportedModel, match=said) as caught:
            uw.attribute(given, (torch.ones(4, 2), torch.arange(4)), None, nn.CrossEntropyLoss())
        assert "model.load_state_dict(torch.load('best.pt'" in str(caught.value)
