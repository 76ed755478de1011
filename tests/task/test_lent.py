"""The model comes back with the parameters, attributes and hooks that it was lent with."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import upweight as uw
from tests.market import draw, initialized, labels
from upweight.task.lent import copied, lent

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Keeps(nn.Module):
    """Keeps what it computed: in a new attribute, an old one, a list, a dict, and a counter."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.features, self.calls = None, 0
        self.history, self.by_name = ["before"], {"kept": 1}

    def forward(self, x):
        self.features = self.latest = torch.tanh(self.body(x))
        self.calls += 1
        self.history.append(self.features)
        self.by_name["h"] = self.features
        return self.head(self.features)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x[:, None])[0][:, -1])


MODELS = {
    "keeps": Keeps,
    "recurrent": Recurrent,
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Tanh()),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 2)), nn.Tanh()),
}
SPECS = [uw.Hessian(), uw.GGN(), uw.EKFAC()]


def state(model):
    """All attributes of all modules by identity, with the entries of containers."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = list(value.values()) if isinstance(value, dict) else value
            parts = [id(x) for x in held] if isinstance(held, list | set) else []
            found[name, key] = (id(value), parts)
    return found


def task_of(name):
    g = torch.Generator().manual_seed(0)
    model = initialized(MODELS[name](), g).eval()
    x, y = draw(g, 9, 3), labels(g, 9, 2)
    with torch.no_grad():
        model(x)  # the weight that old-style norms keep is one of the present parameters
    return uw.Task(model, uw.CrossEntropy()), (x, y)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was(name, spec):
    task, train = task_of(name)
    before, values = state(task.model), copy.deepcopy(task.model.state_dict())
    fitted = uw.Influence(spec, damping=5.0).fit(task, train)
    fitted.attribute(train, uw.Margin())
    fitted.self_influence()
    assert state(task.model) == before
    for key, value in task.model.state_dict().items():
        assert torch.equal(value, values[key])
    task.model(train[0]).sum().backward()  # of use as before: nothing belongs to torch.func


def test_also_when_forward_raises():
    model = Keeps()
    before = state(model)

    def run():
        model(torch.zeros(1, 3))
        del model.by_name["kept"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), lent(model):
        run()
    assert state(model) == before
    assert model.history == ["before"]


def test_a_model_that_keeps_a_graph_can_be_copied_and_retrained():
    def net():
        torch.manual_seed(0)
        return MODELS["old weight norm"]().double().eval()

    model = net()
    assert not model[0].weight.is_leaf
    other = copied(model)
    x = draw(torch.Generator().manual_seed(1), 9, 3)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    with torch.no_grad():
        other[0].weight_v.zero_().add_(1.0)
    assert not torch.equal(other(x), model(x))
    train = (x, labels(torch.Generator().manual_seed(2), 9, 2))
    task = uw.Task(model, uw.CrossEntropy())
    scores = uw.Influence(uw.EKFAC(), damping=0.1).fit(task, train).attribute(train)
    found = uw.evaluation.loo(scores, uw.Training(init=net, epochs=2), examples=range(3))
    assert "3 removals" in str(found)
