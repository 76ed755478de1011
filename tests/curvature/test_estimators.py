"""What one block learns: A, G, their eigenbases and Λ = E[(Q_Gᵀ g Q_A)²], against loops.

References come from `tests/reference/layerwise.py`: hooks of its own, one example and label at a
time. Blocks of more than a few entries are compared as they are used, Q Λ Qᵀ written out.
"""

import functools

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, initialized, labels, problem, tokens
from tests.reference import layerwise
from tests.reference.dense import gradients
from upweight.curvature import estimators
from upweight.errors import NonFinite, SpecError
from upweight.gradients.blocks import MatrixBlock
from upweight.runtime import memory
from upweight.task.data import as_data

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def unpenalized(task):
    return uw.Task(task.model, task.loss, params=task.params, forward=task.forward)


class PerPosition(nn.Module):
    """[b, t, i] to [b, t, o], each position by itself."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))

    def forward(self, x):
        return self.body(x)


class Shared(nn.Module):
    """One linear map used twice, its bias with it."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight, self.again.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.again(torch.tanh(self.first(x)))


def built(name):
    """A task and its data: from the market, or made here."""
    g = torch.Generator().manual_seed(7)
    if name == "sequence":
        task = uw.Task(initialized(PerPosition(), g), uw.SquaredError())
        return task, as_data((draw(g, 6, 3, 2), draw(g, 6, 3, 2)))
    if name == "shared":
        task = uw.Task(initialized(Shared(), g), uw.SquaredError())
        return task, as_data((draw(g, 7, 3), draw(g, 7, 3)))
    if name == "strided":
        layers = [nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2)), nn.Tanh()]
        layers += [nn.Flatten(), nn.Linear(18, 2)]
        task = uw.Task(initialized(nn.Sequential(*layers), g), uw.CrossEntropy())
        return task, as_data((draw(g, 5, 2, 4, 4), labels(g, 5, 2)))
    p = problem(name)
    return unpenalized(p.task), as_data(p.train)


# name: the problem, the weight, its bias and the layers that use it
WEIGHTS = {
    "linear": ("softmax", "weight", "bias", [""]),
    "linear, first of two": ("mlp_tanh", "0.weight", "0.bias", ["0"]),
    "linear, second of two": ("mlp_tanh", "2.weight", "2.bias", ["2"]),
    "convolution": ("conv", "0.weight", "0.bias", ["0"]),
    "convolution, strided": ("strided", "0.weight", "0.bias", ["0"]),
    "sequence": ("sequence", "body.0.weight", "body.0.bias", ["body.0"]),
    "sequence, without bias": ("sequence", "body.2.weight", None, ["body.2"]),
    "padded": ("padded_sequences", "2.weight", "2.bias", ["2"]),
    "embedding": ("padded_sequences", "0.weight", None, ["0"]),
    "tied": ("tied", "embedding.weight", None, ["embedding", "head"]),
    "used twice": ("shared", "first.weight", "first.bias", ["first", "again"]),
}
WHOSE = {
    "observed": (uw.labels.Observed(), layerwise.observed),
    "expected": (uw.labels.Expected(), layerwise.expected),
}
SHARING = {"expand": (uw.curvature.Expand(), False), "reduce": (uw.curvature.Reduce(), True)}
SEVERAL = [name for name in WEIGHTS if not name.startswith("linear")]


@functools.cache
def block(name, kind, whose="observed", sharing="expand"):
    """The reference's view of a weight, its data, and what the curvature made of it."""
    problem_name, weight, bias, layers = WEIGHTS[name]
    task, data = built(problem_name)
    which, how = WHOSE[whose][0], SHARING[sharing][0]
    spec = {"KFAC": uw.KFAC, "EKFAC": uw.EKFAC}[kind](labels=which, sharing=how)
    found = [b for b in spec.fit_blocks(task, data, task.theta()).blocks if b.weight == weight]
    assert len(found) == 1 and found[0].bias == bias
    return layerwise.Weight(task, weight, bias, layers), data, found[0]


def kronecker(fitted):
    """Q = Q_G ⊗ Q_A."""
    return torch.kron(fitted.left.contiguous(), fitted.right.contiguous())


CASES = [(name, "observed", "expand") for name in WEIGHTS]
CASES += [(name, "observed", "reduce") for name in SEVERAL]
CASES += [("linear", "expected", "expand"), ("linear, first of two", "expected", "expand")]
CASES += [("sequence", "expected", "expand"), ("sequence", "expected", "reduce")]


@pytest.mark.parametrize("name, whose, sharing", CASES)
def test_kfac_is_the_product_of_the_covariances(name, whose, sharing):
    weight, data, fitted = block(name, "KFAC", whose, sharing)
    A, G = layerwise.covariances(weight, data, WHOSE[whose][1], SHARING[sharing][1])
    torch.testing.assert_close(fitted.eigen.dense(), torch.kron(G, A), **EXACT)


@pytest.mark.parametrize("name, whose, sharing", CASES)
def test_ekfac_has_the_eigenbases_of_the_covariances(name, whose, sharing):
    """Q is orthogonal and diagonalizes A and G: what is off the diagonal is rounding."""
    weight, data, fitted = block(name, "EKFAC", whose, sharing)
    A, G = layerwise.covariances(weight, data, WHOSE[whose][1], SHARING[sharing][1])
    for Q, covariance in ((fitted.left, G), (fitted.right, A)):
        torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q)), **EXACT)
        inside = Q.T @ covariance @ Q
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), **EXACT)


@pytest.mark.parametrize("name, whose, sharing", CASES)
def test_corrected_eigenvalues_are_the_diagonal_in_the_basis(name, whose, sharing):
    """Λ = diag(Qᵀ F Q) with the block of F written out: the whole gradient, whatever the basis."""
    weight, data, fitted = block(name, "EKFAC", whose, sharing)
    F = {
        "observed": layerwise.empirical_block,
        "expected": layerwise.expected_block,
    }[whose](weight, data)
    Q = kronecker(fitted)
    torch.testing.assert_close(fitted.eigenvalues.flatten(), (Q.T @ F @ Q).diagonal(), **EXACT)


@pytest.mark.parametrize("name", SEVERAL)
def test_expand_and_reduce_differ_where_a_weight_has_several_uses(name):
    expand, reduce = (block(name, "KFAC", sharing=s)[2].eigen.dense() for s in SHARING)
    assert float((expand - reduce).norm() / expand.norm()) > 1e-2


def grouped():
    g = torch.Generator().manual_seed(3)
    layers = [nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)]
    task = uw.Task(initialized(nn.Sequential(*layers), g, 0.3), uw.CrossEntropy())
    return task, as_data((draw(g, 6, 4, 3, 3), labels(g, 6, 2)))


def test_every_group_of_a_convolution_is_a_block_of_its_own():
    """As two convolutions of half the channels would be."""
    task, data = grouped()
    found = uw.EKFAC(labels=uw.labels.Observed()).fit_blocks(task, data, task.theta()).blocks[:2]
    assert [b.name for b in found] == ["0.weight[0:3]", "0.weight[3:6]"]
    g = gradients(task, data)
    for fitted in found:
        rows = g[:, fitted.block.index(task.layout)]
        F = rows.T @ rows / len(rows)
        Q = kronecker(fitted)
        torch.testing.assert_close(fitted.eigenvalues.flatten(), (Q.T @ F @ Q).diagonal(), **EXACT)


@pytest.mark.parametrize("chunk", [1, 400, 10**9])
@pytest.mark.parametrize("name", ["convolution", "sequence", "tied", "used twice"])
def test_corrected_eigenvalues_do_not_depend_on_what_is_formed_at_once(name, chunk, monkeypatch):
    problem_name, weight, _, _ = WEIGHTS[name]
    expected = block(name, "EKFAC")[2]
    monkeypatch.setattr(estimators, "CHUNK_BYTES", chunk)
    task, data = built(problem_name)
    for spec in (uw.EKFAC(labels=uw.labels.Observed()), uw.Diagonal(labels=uw.labels.Observed())):
        found = next(
            b for b in spec.fit_blocks(task, data, task.theta()).blocks if b.weight == weight
        )
        if isinstance(spec, uw.EKFAC):
            torch.testing.assert_close(found.eigen.dense(), expected.eigen.dense(), **EXACT)
        else:
            rows = gradients(task, data)[:, found.block.index(task.layout)]
            torch.testing.assert_close(
                found.eigenvalues.flatten(), rows.square().mean(dim=0), **EXACT
            )


@pytest.mark.parametrize(
    "name", ["softmax", "conv", "tied", "padded_sequences", "layer_norm", "dict_batch", "attention"]
)
def test_diagonal_is_the_diagonal(name):
    p = problem(name)
    task, data = unpenalized(p.task), as_data(p.train)
    found = uw.Diagonal(labels=uw.labels.Observed()).fit(task, data, task.theta()).dense()
    expected = gradients(task, data).square().mean(dim=0)
    torch.testing.assert_close(found, torch.diag(expected), **EXACT)


@pytest.mark.parametrize("spec", [uw.KFAC, uw.EKFAC])
@pytest.mark.parametrize("name", ["layer_norm", "dict_batch", "bias_only", "batch_norm"])
def test_vectors_get_their_whole_second_moment(name, spec):
    """Gains, biases that go with no weight, and parameters without a rule."""
    p = problem(name)
    task, data = unpenalized(p.task), as_data(p.train)
    g, vectors = gradients(task, data), 0
    for fitted in spec(labels=uw.labels.Observed()).fit_blocks(task, data, task.theta()).blocks:
        if isinstance(fitted.block, MatrixBlock):
            continue
        vectors += 1
        rows = g[:, fitted.block.index(task.layout)]
        torch.testing.assert_close(fitted.eigen.dense(), rows.T @ rows / len(g), **EXACT)
        assert fitted.right is fitted.left and fitted.bias is None
    assert vectors > 0


def test_long_vectors_get_the_diagonal_alone(monkeypatch):
    monkeypatch.setattr("upweight.curvature.ekfac.DENSE_LIMIT", 3)
    p = problem("layer_norm")
    task, data = unpenalized(p.task), as_data(p.train)
    fitted = uw.EKFAC(labels=uw.labels.Observed()).fit_blocks(task, data, task.theta()).blocks[1]
    assert fitted.name == "1.weight + 1.bias" and fitted.left is None
    rows = gradients(task, data)[:, fitted.block.index(task.layout)]
    torch.testing.assert_close(fitted.eigenvalues, rows.square().mean(dim=0), **EXACT)


def test_positions_of_padding_are_left_out_of_the_covariances():
    """More padding changes nothing; A is a mean over the positions that count."""
    g = torch.Generator().manual_seed(0)
    layers = [nn.Embedding(5, 3), nn.Linear(3, 4)]
    task = uw.Task(initialized(nn.Sequential(*layers), g), uw.CrossEntropy())
    x, y = tokens(g, 6, vocabulary=5), tokens(g, 6)
    more_x = torch.cat([x, torch.zeros(6, 5, dtype=torch.long)], dim=1)
    more_y = torch.cat([y, torch.full((6, 5), -100)], dim=1)
    for spec in (uw.KFAC(labels=uw.labels.Observed()), uw.EKFAC(labels=uw.labels.Observed())):
        short, long = (
            spec.fit(task, as_data(d), task.theta()).dense() for d in ((x, y), (more_x, more_y))
        )
        torch.testing.assert_close(long, short, **EXACT)


@pytest.mark.parametrize("spec", [uw.KFAC(), uw.EKFAC(), uw.Diagonal()], ids=repr)
def test_a_gradient_that_overflows_is_named(spec):
    """Finite outputs and losses, but 1e30² is no float32 number."""
    model = nn.Linear(2, 1, bias=False).float()
    model.weight.data.fill_(0.0)
    data = as_data((torch.full((4, 2), 1e30).float(), torch.zeros(4, 1).float()))
    task = uw.Task(model, uw.SquaredError())
    with pytest.raises(NonFinite, match=r"NaN or infinity in the curvature of weight"):
        spec.fit_blocks(task, data, task.theta())


@pytest.mark.parametrize("spec", [uw.KFAC(), uw.EKFAC()], ids=repr)
def test_covariances_larger_than_memory_are_refused_and_the_ways_out_work(spec, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 60_000)
    task = uw.Task(nn.Sequential(nn.Linear(80, 3), nn.Linear(3, 2)), uw.CrossEntropy())
    data = as_data((torch.ones(4, 80), torch.zeros(4).long()))
    with pytest.raises(SpecError, match=r"81 × 81 numbers for the curvature of 0\.weight"):
        spec.fit_blocks(task, data, task.theta())
    uw.Diagonal().fit_blocks(task, data, task.theta())
    part = uw.Task(task.model, task.loss, params="1.*")
    spec.fit_blocks(part, data, part.theta())
