"""The problem market: tiny tasks, each with a name and one thing that can go wrong.

Every problem but those that say otherwise is trained here, once per session, in float64: to a
gradient norm of 1e-12 or less at a strict local minimum. `traits` say what a test may ask of it:

    linear    f(θ, x) = W z(x) + b, which the package should recognize
    sampled   the loss is a likelihood that can be sampled
    float32   compare to 1e-4, not 1e-10; not trained
    untrained not at a minimum
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

import upweight as uw
from tests.reference.retrain import minimize
from upweight.task.data import as_data


@dataclass(frozen=True, eq=False)
class Problem:
    """A trained task with its training data and queries, as a user would pass them."""

    name: str
    task: uw.Task
    train: object
    queries: object
    traits: frozenset[str]

    @property
    def n(self):
        return len(as_data(self.train))

    @property
    def tolerance(self):
        """rtol and atol for algebra in the problem's dtype, for numbers of order one."""
        value = 1e-4 if "float32" in self.traits else 1e-10
        return {"rtol": value, "atol": value}


BUILDERS = {}


def problem_named(*traits):
    def register(build):
        BUILDERS[build.__name__] = (build, frozenset(traits))
        return build

    return register


@functools.cache
def problem(name):
    """The trained problem of that name."""
    build, traits = BUILDERS[name]
    task, train, queries = build(torch.Generator().manual_seed(len(name) + ord(name[0])))
    task.model.eval()
    if not traits & {"float32", "untrained"}:
        train_in_place(task, train)
    return Problem(name, task, train, queries, traits)


def train_in_place(task, train, weights=None):
    """Write argmin J into the task's model."""
    theta = minimize(task, train, weights)
    named = dict(task.model.named_parameters())
    for name, value in task.layout.unflatten(theta).items():
        named[name].data.copy_(value)


def names(*traits, without=()):
    """The problems that have all these traits and none of those."""
    return [
        name for name, (_, has) in BUILDERS.items() if set(traits) <= has and not set(without) & has
    ]


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(generator, n, classes):
    return torch.randint(classes, (n,), generator=generator)


def initialized(model, generator, scale=0.7):
    """The model in float64 with parameters from our generator, not the global one."""
    model.double()
    for parameter in model.parameters():
        parameter.data.copy_(scale * draw(generator, *parameter.shape))
    return model


# -- one linear map -----------------------------------------------------------------------------


@problem_named("linear", "sampled")
def ridge(g):
    X = draw(g, 11, 3)
    y = X @ draw(g, 3, 1) + 0.5 * draw(g, 11, 1)
    task = uw.Task(nn.Linear(3, 1, bias=False).double(), uw.SquaredError(), uw.L2(0.1))
    return task, (X, y), (draw(g, 4, 3), draw(g, 4, 1))


@problem_named("linear", "sampled")
def ridge_two_outputs(g):
    X = draw(g, 10, 3)
    Y = X @ draw(g, 3, 2) + 0.5 * draw(g, 10, 2)
    task = uw.Task(nn.Linear(3, 2).double(), uw.SquaredError(), uw.L2(0.05))
    return task, (X, Y), (draw(g, 4, 3), draw(g, 4, 2))


@problem_named("linear", "sampled")
def logistic(g):
    """Outputs and targets [b, 1]; the bias is not penalized."""
    X, y = draw(g, 14, 3), labels(g, 14, 2).double()[:, None]
    task = uw.Task(nn.Linear(3, 1).double(), uw.Bernoulli(), uw.L2(0.03, exclude=("*bias",)))
    return task, (X, y), (draw(g, 4, 3), labels(g, 4, 2).double()[:, None])


class Squeezed(nn.Module):
    """Outputs [b], the last axis squeezed away after the linear map."""

    def __init__(self, inputs):
        super().__init__()
        self.linear = nn.Linear(inputs, 1, bias=False)

    def forward(self, x):
        return self.linear(x).squeeze(-1)


@problem_named("linear", "sampled")
def logistic_without_bias(g):
    X, y = draw(g, 13, 3), labels(g, 13, 2).double()
    task = uw.Task(Squeezed(3).double(), uw.Bernoulli(), uw.L2(0.05))
    return task, (X, y), (draw(g, 4, 3), labels(g, 4, 2).double())


@problem_named("linear", "sampled")
def softmax(g):
    """Biases free of the ridge, their common shift pinned."""
    X, y = draw(g, 17, 3), labels(g, 17, 3)
    penalty = uw.L2(0.03, exclude=("bias",)) + uw.SumToZero("bias")
    task = uw.Task(nn.Linear(3, 3).double(), uw.CrossEntropy(), penalty)
    return task, (X, y), (draw(g, 5, 3), labels(g, 5, 3))


@problem_named("linear", "sampled")
def softmax_penalized_bias(g):
    X, y = draw(g, 13, 2), labels(g, 13, 4)
    task = uw.Task(nn.Linear(2, 4).double(), uw.CrossEntropy(), uw.L2(0.1))
    return task, (X, y), (draw(g, 4, 2), labels(g, 4, 4))


@problem_named("linear", "sampled")
def bias_only(g):
    """The weight is frozen: θ is the bias alone."""
    model = initialized(nn.Linear(2, 3), g)
    model.weight.requires_grad_(False)
    X, y = draw(g, 9, 2), labels(g, 9, 3)
    return uw.Task(model, uw.CrossEntropy(), uw.L2(0.1)), (X, y), (draw(g, 3, 2), labels(g, 3, 3))


@problem_named("linear", "sampled")
def poisson(g):
    X = draw(g, 12, 2)
    y = torch.poisson((0.5 * X[:, :1]).exp(), generator=g)
    task = uw.Task(nn.Linear(2, 1).double(), uw.Poisson(), uw.L2(0.05))
    return task, (X, y), (draw(g, 3, 2), torch.tensor([[0.0], [1.0], [4.0]]).double())


@problem_named("linear")
def smooth_hinge(g):
    X = draw(g, 12, 2)
    y = 2.0 * labels(g, 12, 2).double()[:, None] - 1.0
    task = uw.Task(nn.Linear(2, 1).double(), uw.SmoothHinge(0.5), uw.L2(0.1))
    return task, (X, y), (draw(g, 3, 2), torch.tensor([[1.0], [-1.0], [1.0]]).double())


@problem_named("linear", "sampled")
def weighted(g):
    """Example 2 has weight 0: its gradient is zero at every θ."""
    v = draw(g, 12).abs()
    v[2] = 0.0
    train = (draw(g, 12, 2), (labels(g, 12, 3), v))
    queries = (draw(g, 3, 2), (labels(g, 3, 3), torch.ones(3).double()))
    task = uw.Task(nn.Linear(2, 3).double(), uw.Weighted(uw.CrossEntropy()), uw.L2(0.05))
    return task, train, queries


@problem_named("linear")
def soft_targets(g):
    """Probabilities for targets, some of them not summing to one."""
    Y = draw(g, 12, 3).softmax(dim=1) * torch.linspace(0.5, 1.0, 12).double()[:, None]
    task = uw.Task(nn.Linear(2, 3).double(), uw.CrossEntropy(), uw.L2(0.05))
    return task, (draw(g, 12, 2), Y), (draw(g, 3, 2), draw(g, 3, 3).softmax(dim=1))


def pseudo_huber(f, y):
    """√(1 + (f − y)²) − 1, summed over outputs."""
    return ((1 + (f - y) ** 2).sqrt() - 1).sum(dim=1)


@problem_named("linear")
def custom_loss(g):
    task = uw.Task(nn.Linear(2, 2).double(), pseudo_huber, uw.L2(0.1))
    return task, (draw(g, 11, 2), draw(g, 11, 2)), (draw(g, 3, 2), draw(g, 3, 2))


def log_cosh(params):
    return 0.2 * sum(torch.cosh(p).log().sum() for p in params.values())


@problem_named("linear", "sampled")
def custom_penalty(g):
    X, y = draw(g, 12, 2), labels(g, 12, 3)
    task = uw.Task(nn.Linear(2, 3).double(), uw.CrossEntropy(), log_cosh)
    return task, (X, y), (draw(g, 3, 2), labels(g, 3, 3))


@problem_named("linear", "sampled")
def frozen_first(g):
    """A frozen network under a trained last layer."""
    model = initialized(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), g)
    model[0].requires_grad_(False)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.1))
    return task, (draw(g, 12, 2), labels(g, 12, 2)), (draw(g, 3, 2), labels(g, 3, 2))


@problem_named("linear", "sampled")
def last_layer(g):
    """Only `head.*` is θ, although the body is trainable too."""
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    model.add_module("head", nn.Linear(3, 3))
    task = uw.Task(initialized(model, g), uw.CrossEntropy(), uw.L2(0.05), params="head.*")
    return task, (draw(g, 13, 3), labels(g, 13, 3)), (draw(g, 4, 3), labels(g, 4, 3))


class Fourier(nn.Module):
    """Fixed random features in a buffer, then one linear map."""

    def __init__(self, g):
        super().__init__()
        self.register_buffer("frequencies", draw(g, 2, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.cos(x @ self.frequencies))


@problem_named("linear", "sampled")
def buffers(g):
    task = uw.Task(Fourier(g).double(), uw.SquaredError(), uw.L2(0.02))
    return task, (draw(g, 12, 2), draw(g, 12, 1)), (draw(g, 3, 2), draw(g, 3, 1))


@problem_named("linear", "sampled")
def one_example(g):
    task = uw.Task(nn.Linear(2, 3).double(), uw.CrossEntropy(), uw.L2(0.2))
    return task, (draw(g, 1, 2), labels(g, 1, 3)), (draw(g, 2, 2), labels(g, 2, 3))


@problem_named("linear", "sampled", "float32")
def softmax_float32(g):
    task = uw.Task(initialized(nn.Linear(3, 3), g).float(), uw.CrossEntropy(), uw.L2(0.1))
    train = (draw(g, 12, 3).float(), labels(g, 12, 3))
    return task, train, (draw(g, 3, 3).float(), labels(g, 3, 3))


# -- not linear in θ ------------------------------------------------------------------------------


@problem_named("sampled")
def mlp_tanh(g):
    model = initialized(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), g)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.005))
    return task, (draw(g, 18, 2), labels(g, 18, 3)), (draw(g, 4, 2), labels(g, 4, 3))


@problem_named("sampled")
def mlp_gelu(g):
    model = initialized(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2)), g)
    task = uw.Task(model, uw.SquaredError(), uw.L2(0.01))
    return task, (draw(g, 13, 2), draw(g, 13, 2)), (draw(g, 3, 2), draw(g, 3, 2))


@problem_named("sampled")
def conv(g):
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2)]
    task = uw.Task(initialized(nn.Sequential(*layers), g), uw.CrossEntropy(), uw.L2(0.01))
    train = (draw(g, 12, 1, 4, 4), labels(g, 12, 2))
    return task, train, (draw(g, 3, 1, 4, 4), labels(g, 3, 2))


class Tied(nn.Module):
    """Tokens [b, t] to next-token logits [b, t, c], the head sharing the embedding's weight."""

    def __init__(self, vocabulary=4, width=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        past = x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.head(torch.tanh(self.mix(past)))


class Attention(nn.Module):
    """One encoder layer over [b, t, i], averaged over positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            2, 1, 2, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.layer(x).mean(dim=1))


@problem_named("sampled", "untrained")
def attention(g):
    """Fused kernels have no second derivatives. Queries and keys can rotate: no strict minimum."""
    task = uw.Task(initialized(Attention(), g), uw.CrossEntropy(), uw.L2(0.05))
    return task, (draw(g, 9, 3, 2), labels(g, 9, 2)), (draw(g, 3, 3, 2), labels(g, 3, 2))


def tokens(g, n, t=4, vocabulary=4):
    return torch.randint(vocabulary, (n, t), generator=g)


@problem_named("sampled")
def tied(g):
    task = uw.Task(initialized(Tied(), g), uw.CrossEntropy(axis=-1), uw.L2(0.02))
    return task, (tokens(g, 9), tokens(g, 9)), (tokens(g, 3), tokens(g, 3))


@problem_named("sampled")
def padded_sequences(g):
    """Targets padded with ignore_index; example 4 is nothing but padding."""
    # Tanh also after the embedding: two linear maps in a row could rotate against each other, and a
    # minimum with such a symmetry is not strict.
    layers = [nn.Embedding(4, 2), nn.Tanh(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)]
    task = uw.Task(initialized(nn.Sequential(*layers), g), uw.CrossEntropy(axis=-1), uw.L2(0.01))
    x, y = tokens(g, 9), tokens(g, 9)
    for i, length in enumerate([4, 2, 3, 1, 0, 4, 2, 3, 4]):
        y[i, length:] = -100
    return task, (x, y), (tokens(g, 3), tokens(g, 3))


@problem_named("sampled")
def weighted_positions(g):
    """Each position of a sequence has a weight of its own, 0 where it is padding."""
    layers = [nn.Embedding(4, 2), nn.Tanh(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)]
    model = initialized(nn.Sequential(*layers), g)
    task = uw.Task(model, uw.Weighted(uw.CrossEntropy(axis=-1)), uw.L2(0.01))

    def some(n):
        v = draw(g, n, 4).abs() + 0.1
        v[1, 2:] = 0.0
        return tokens(g, n), (tokens(g, n), v)

    return task, some(9), some(3)


@problem_named("sampled")
def layer_norm(g):
    layers = [nn.Linear(2, 4), nn.LayerNorm(4, eps=0.1), nn.Tanh(), nn.Linear(4, 2)]
    task = uw.Task(initialized(nn.Sequential(*layers), g), uw.CrossEntropy(), uw.L2(0.01))
    return task, (draw(g, 12, 2), labels(g, 12, 2)), (draw(g, 3, 2), labels(g, 3, 2))


class Gated(nn.Module):
    """Two inputs by name: a linear map of one gates that of the other, at a scalar temperature."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.value, self.gate = nn.Linear(2, 2), nn.Linear(1, 2)

    def forward(self, x, z):
        return self.value(x) * torch.sigmoid(self.temperature * self.gate(z))


@problem_named("sampled")
def dict_batch(g):
    task = uw.Task(initialized(Gated(), g), uw.CrossEntropy(), uw.L2(0.05))
    train = {"x": draw(g, 11, 2), "z": draw(g, 11, 1), "labels": labels(g, 11, 2)}
    return task, train, {"x": draw(g, 3, 2), "z": draw(g, 3, 1), "labels": labels(g, 3, 2)}


@problem_named("sampled")
def two_inputs(g):
    task = uw.Task(initialized(Gated(), g), uw.SquaredError(), uw.L2(0.05))
    train = (draw(g, 11, 2), draw(g, 11, 1), draw(g, 11, 2))
    return task, train, (draw(g, 3, 2), draw(g, 3, 1), draw(g, 3, 2))


@problem_named("sampled")
def batch_norm(g):
    """BatchNorm in eval mode, with running statistics that are not the identity."""
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(2, 3), norm, nn.Tanh(), nn.Linear(3, 2))
    initialized(model, g)
    norm.running_mean.copy_(draw(g, 3))
    norm.running_var.copy_(draw(g, 3).abs() + 0.5)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.01))
    return task, (draw(g, 12, 2), labels(g, 12, 2)), (draw(g, 3, 2), labels(g, 3, 2))


@problem_named("sampled")
def custom_forward(g):
    """The batch says more than the model takes: targets are formed from two columns."""
    model = initialized(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), g)

    def forward(model, batch):
        x, low, high = batch
        return model(x), 0.5 * (low + high)

    task = uw.Task(model, uw.SquaredError(), uw.L2(0.05), forward=forward)
    train = (draw(g, 11, 2), draw(g, 11, 1), draw(g, 11, 1))
    return task, train, (draw(g, 3, 2), draw(g, 3, 1), draw(g, 3, 1))


@problem_named("sampled", "float32")
def mlp_float32(g):
    model = initialized(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), g).float()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.1))
    return task, (draw(g, 9, 2).float(), labels(g, 9, 2)), (draw(g, 3, 2).float(), labels(g, 3, 2))
