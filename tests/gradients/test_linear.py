"""f = W z + b is recognized where it is so, and nowhere else; the model is only looked at."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import upweight as uw
from tests.market import BUILDERS, draw, initialized, names, problem
from tests.reference import dense
from upweight.gradients.functional import value_gradients
from upweight.gradients.linear import linear_form
from upweight.gradients.source import Direct, gradient_source
from upweight.task.data import as_data
from upweight.training.objective import LinearObjective, weighted_objective


def form(task, train):
    return linear_form(task, task.theta(), as_data(train).batch(0, 4))


@pytest.mark.parametrize("name", BUILDERS)
def test_recognized_exactly_where_it_is_linear(name):
    p = problem(name)
    assert (form(p.task, p.train) is not None) == (name in names("linear"))


@pytest.mark.parametrize("name", names("linear"))
def test_the_form_reproduces_the_outputs(name):
    p = problem(name)
    data = as_data(p.train)
    found, batch = form(p.task, p.train), data.batch(0, len(data))
    z = found.features(p.task, batch)
    f, _ = p.task.outputs(p.task.theta(), batch)
    moved, _ = p.task.outputs(2 * p.task.theta(), batch)
    # f may have a part that is not in θ (a frozen W beside a bias): the change is linear in θ.
    change = z @ found.matrix(p.task.theta()).T
    torch.testing.assert_close(change, (moved - f).reshape(len(f), -1), **p.tolerance)


@pytest.mark.parametrize("name", names("linear"))
def test_matrix_and_flatten_are_inverses(name):
    p = problem(name)
    found = form(p.task, p.train)
    vectors = draw(torch.Generator().manual_seed(0), 2, 3, p.task.layout.size)
    matrix = found.matrix(vectors)
    assert matrix.shape == (2, 3, found.outputs, found.width)
    assert torch.equal(found.flatten(matrix), vectors)


# -- models that look linear and are not -------------------------------------------------------


class Head(nn.Module):
    """A linear head used in a way that a subclass spoils."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(x)


class ReLUAfter(Head):
    def forward(self, x):
        return self.head(x).relu()


class Skip(Head):
    def forward(self, x):
        return self.head(x) + x


class UsedTwice(Head):
    def forward(self, x):
        return self.head(self.head(x))


class WeightUsedElsewhere(Head):
    def forward(self, x):
        return self.head(x @ self.head.weight)


class Scaled(Head):
    def forward(self, x):
        return 2.0 * self.head(x)


class SoftmaxOutput(Head):
    def forward(self, x):
        return self.head(x).log_softmax(dim=-1)


class Clamped(Head):
    def forward(self, x):
        return self.head(x).clamp(-1.0, 1.0)


class SoftCapped(Head):
    def forward(self, x):
        return 30.0 * torch.tanh(self.head(x) / 30.0)


class Shifted(Head):
    def forward(self, x):
        return self.head(x) + 1.0


class Flipped(Head):
    def forward(self, x):
        return self.head(x).flip(-1)


class OneOutputLess(Head):
    def forward(self, x):
        return self.head(x)[:, :2]


class DetachedScale(Head):
    """The scale is detached, so the input does not require grad but the output still is scaled."""

    def forward(self, x):
        return self.head(x) * self.head.weight.detach().norm()


class Ordered(Head):
    """Sorted outputs: equal as a set, not in their places."""

    def forward(self, x):
        return self.head(x).sort(dim=-1).values


class TwoLinears(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.Linear(3, 3))


class OneFrozenOfTwo(nn.Module):
    """The frozen map comes after: f = F (W x), linear in W but not of the form."""

    def __init__(self):
        super().__init__()
        self.head, self.after = nn.Linear(3, 3), nn.Linear(3, 3)
        self.after.requires_grad_(False)

    def forward(self, x):
        return self.after(self.head(x))


class TiedToFeatures(nn.Module):
    """The chosen weight is also a feature map's: z depends on θ."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.features.weight = self.head.weight

    def forward(self, x):
        return self.head(torch.tanh(self.features(x)))


class PerPosition(Head):
    """Runs over positions and averages them: the module's input is not [b, i]."""

    def forward(self, x):
        return self.head(torch.stack([x, x.flip(0)], dim=1)).mean(dim=1)


class Subclassed(nn.Module):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    def __init__(self):
        super().__init__()
        self.head = self.Twice(3, 3)

    def forward(self, x):
        return self.head(x)


class Hooked(Head):
    """A hook of the user's own changes the output of the map."""

    def __init__(self):
        super().__init__()
        self.head.register_forward_hook(lambda module, inputs, output: 2.0 * output)


class SpectrallyNormalized(Head):
    """W = V/σ(V) is computed by a hook from a parameter that is not `weight`."""

    def __init__(self):
        super().__init__()
        self.head = nn.utils.spectral_norm(self.head)


class Parametrized(Head):
    def __init__(self):
        super().__init__()
        self.head = parametrizations.weight_norm(self.head)


class BiasFirst(Head):
    """W registered after b: the flat vector has b first."""

    def __init__(self):
        super().__init__()
        weight = self.head.weight
        del self.head.weight
        self.head.weight = weight


class Doubled(Head):
    """The output in another dtype than the parameters."""

    def forward(self, x):
        return self.head(x).float()


class TargetsFromParameters(Head):
    """Targets that depend on θ: the loss is not a function of f and the data alone."""

    @staticmethod
    def run(model, batch):
        x, y = batch
        return model(x), y + model.head.weight.square().sum()


class ShiftedByItsWeight(Head):
    """What is added follows θ, though no gradient says so."""

    def forward(self, x):
        return self.head(x) + self.head.weight.detach().sum()


WITH_AN_ADDEND = [Skip, Shifted]

IMPOSTORS = [
    ReLUAfter,
    ShiftedByItsWeight,
    UsedTwice,
    WeightUsedElsewhere,
    Scaled,
    SoftmaxOutput,
    Clamped,
    SoftCapped,
    Flipped,
    OneOutputLess,
    DetachedScale,
    Ordered,
    TwoLinears,
    OneFrozenOfTwo,
    TiedToFeatures,
    PerPosition,
    Subclassed,
    Hooked,
    SpectrallyNormalized,
    Parametrized,
    BiasFirst,
    Doubled,
    TargetsFromParameters,
]


def impostor(kind):
    g = torch.Generator().manual_seed(4)
    model = initialized(kind(), g).eval()
    for module in model.modules():
        if hasattr(module, "weight_u"):  # spectral norm: the buffer of its power iteration
            module.weight_u.copy_(nn.functional.normalize(draw(g, 3), dim=0))
            module.weight_v.copy_(nn.functional.normalize(draw(g, 3), dim=0))
    outputs = 2 if kind is OneOutputLess else 3
    dtype = torch.float32 if kind is Doubled else torch.float64
    train = (draw(g, 6, 3), draw(g, 6, outputs).to(dtype))
    params = "head.*" if kind is TiedToFeatures else "*"
    forward = getattr(kind, "run", None)
    return uw.Task(model, uw.SquaredError(), uw.L2(0.1), params, forward), train


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_impostors_are_not_taken_for_linear(kind):
    task, train = impostor(kind)
    # First: the old spectral norm keeps its last computed weight as an attribute of the module.
    expected = dense.gradients(task, train)
    assert form(task, train) is None
    source = gradient_source(task, task.theta(), as_data(train))
    assert type(source) is Direct
    torch.testing.assert_close(source.rows(train, len(train[0])), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", WITH_AN_ADDEND)
def test_an_addend_without_parameters_leaves_a_model_linear(kind):
    task, train = impostor(kind)
    assert form(task, train) is not None
    rows = gradient_source(task, task.theta(), as_data(train)).rows(train, len(train[0]))
    torch.testing.assert_close(rows, dense.gradients(task, train), rtol=1e-10, atol=1e-10)
    found = uw.Hessian().fit(task, as_data(train), task.theta()).dense()
    torch.testing.assert_close(found, dense.hessian(task, train), rtol=1e-10, atol=1e-10)
    theta = task.theta()
    objective = weighted_objective(task, as_data(train))
    assert isinstance(objective, LinearObjective)
    for at in (theta, theta + 0.1):
        whole = task.objective(at, train, torch.ones(6))
        torch.testing.assert_close(objective(at[None], torch.ones(1, 6))[0][0], whole)


@pytest.mark.parametrize("kind", [BiasFirst])
def test_curvature_of_unusual_layouts(kind):
    task, train = impostor(kind)
    found = uw.Hessian().fit(task, as_data(train), task.theta()).dense()
    torch.testing.assert_close(found, dense.hessian(task, train), rtol=1e-10, atol=1e-10)


# -- the model comes back as it was lent -----------------------------------------------------------


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [
            sum(len(value) for key, value in vars(m).items() if key.endswith("hooks"))
            for m in model.modules()
        ],
        "identities": [id(p) for p in model.parameters()],
    }


@pytest.mark.parametrize("name", BUILDERS)
def test_the_model_is_left_as_it_was(name):
    p = problem(name)
    before = snapshot(p.task.model)
    random = torch.get_rng_state()
    form(p.task, p.train)
    batch = as_data(p.train).batch(0, p.n)
    value_gradients(p.task.losses, p.task.theta(), batch, p.n)
    fitted = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=3.0).fit(p.task, p.train)
    fitted.attribute(p.queries)
    fitted.self_influence()
    fitted.removal(p.queries, groups=[[0]])
    after = snapshot(p.task.model)
    lent, returned = before.pop("state"), after.pop("state")
    assert lent.keys() == returned.keys()
    assert all(torch.equal(lent[key], returned[key]) for key in lent)
    assert before == after
    assert torch.equal(random, torch.get_rng_state())


def test_the_hook_is_gone_even_if_the_model_raises():
    class Raises(Head):
        def forward(self, x):
            self.head(x)
            raise RuntimeError("no")

    model = Raises().double()
    task = uw.Task(model, uw.SquaredError())
    with pytest.raises(RuntimeError, match="no"):
        form(task, (torch.zeros(4, 3).double(), torch.zeros(4, 3).double()))
    assert not model.head._forward_hooks
