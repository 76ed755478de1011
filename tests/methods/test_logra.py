"""LoGra: the empirical Fisher of a layer within some directions, against matrices written out."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, names, problem
from upweight.errors import NotOffered, NotPositiveDefinite, SpecError
from upweight.gradients.planning import plan
from upweight.gradients.source import Direct
from upweight.methods.projected import Held
from upweight.task.data import as_data

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def rows(task, theta, given, function=None):
    data = as_data(given)
    return Direct(task, theta, function).rows(task.to_device(data.batch(0, len(data))), len(data))


def by_hand(fitted, queries, damping):
    """−(1/n) Σₗ (P∇m)ᵀ (P(Ĝ + ∇²R)Pᵀ + λ)⁻¹ P g, with Ĝ of all of θ, a layer at a time."""
    task, projection = fitted.task, fitted.scorer.projection
    p = task.layout.size
    P = projection.of_vectors(torch.eye(p, dtype=torch.float64)).T
    g, m = rows(task, fitted.theta, fitted.train), rows(task, fitted.theta, queries)
    n = len(g)
    curvature = task.penalty.curvature(fitted.theta, task.layout)
    H = g.T @ g / n + (0 if curvature is None else curvature.mv(torch.eye(p).double()))
    total = torch.zeros(len(m), n, dtype=torch.float64)
    for part in projection.parts:
        Q = P[part]
        inner = Q @ H @ Q.T + damping * torch.eye(len(Q))
        total -= (m @ Q.T) @ torch.linalg.solve(inner, Q @ g.T) / n
    return total


@pytest.mark.parametrize("name", names("linear", without=("float32", "untrained")))
def test_is_influence_where_theta_is_one_layer(name):
    p = problem(name)
    if len(plan(p.task, p.task.theta(), as_data(p.train)).blocks) > 1:
        pytest.skip("several layers")
    exact = uw.Influence(uw.EmpiricalFisher(), uw.solvers.Cholesky(), damping=0.05)
    found, expected = (
        method.fit(p.task, p.train) for method in (uw.LoGra(rank=None, damping=0.05), exact)
    )
    values = found.attribute(p.queries).values
    torch.testing.assert_close(values, expected.attribute(p.queries).values, **TOLERANCE)
    torch.testing.assert_close(found.self_influence(), expected.self_influence(), **TOLERANCE)
    for of in (found, expected):
        assert of.spec.unit is uw.Unit.DERIVATIVE
    if p.n == 1:
        return  # nothing would be left
    for verb in (lambda f: f.removal(p.queries).values, lambda f: f.parameter_influence(0)):
        one, other = verb(found), verb(expected)
        if isinstance(one, dict):
            one, other = (p.task.layout.flatten(x) for x in (one, other))
            torch.testing.assert_close(one, other, **TOLERANCE)
        else:
            torch.testing.assert_close(one, -values, **TOLERANCE)  # to first order, as it says


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv", "tied", "layer_norm", "batch_norm"])
def test_is_what_its_formula_says(name, rank):
    p = problem(name)
    fitted = uw.LoGra(rank=rank, damping=0.1).fit(p.task, p.train)
    expected = by_hand(fitted, p.queries, 0.1)
    torch.testing.assert_close(fitted.attribute(p.queries).values, expected, **TOLERANCE)
    layers = fitted.attribute(p.queries, into=uw.PerLayer())
    total = torch.stack([scores.values for scores in layers.values()]).sum(dim=0)
    torch.testing.assert_close(total, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["bias", "bias by itself", "not diagonal"])
def test_penalties_of_a_part_of_a_layer(kind):
    """The bias is the last column of its layer's block, or a vector of its own."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3)).double()
    train = (draw(g, 13, 5), torch.arange(13) % 3)
    penalty = {
        "bias": uw.L2(0.3, exclude=("*bias",)),
        "bias by itself": uw.L2(0.3, exclude=("1.weight",)),
        "not diagonal": uw.L2(0.3) + uw.SumToZero("3.bias"),
    }[kind]
    fitted = uw.LoGra(rank=2, damping=0.0).fit(uw.Task(model, uw.CrossEntropy(), penalty), train)
    queries = train[0][:3], train[1][:3]
    found = fitted.attribute(queries).values
    torch.testing.assert_close(found, by_hand(fitted, queries, 0.0), **TOLERANCE)


def test_directions_of_kfac_are_its_leading_eigenvectors():
    p = problem("mlp_tanh")
    kfac = uw.KFAC(uw.labels.Expected())
    fitted = uw.LoGra(rank=2, damping=0.1, basis=kfac).fit(p.task, p.train)
    torch.testing.assert_close(
        fitted.attribute(p.queries).values, by_hand(fitted, p.queries, 0.1), **TOLERANCE
    )
    made = kfac.fit_blocks(p.task, as_data(p.train), p.task.theta())
    sides = fitted.scorer.projection.maps[0]
    block = made.blocks[0]
    for axis, (found, basis) in enumerate(
        zip((sides.left, sides.right), block.eigen.bases, strict=True)
    ):
        best = block.eigen.values.sum(dim=1 - axis).argsort(descending=True)[: found.shape[1]]
        torch.testing.assert_close(found @ found.T, basis[:, best] @ basis[:, best].T)


def test_memory_and_a_folder_change_nothing(tmp_path, monkeypatch):
    p = problem("mlp_tanh")
    spec = uw.LoGra(rank=2, damping=0.1)
    expected = spec.fit(p.task, p.train).attribute(p.queries).values
    for resources in (uw.Resources(memory_bytes=2000), uw.Resources(folder=tmp_path)):
        fitted = spec.fit(p.task, p.train, resources=resources)
        torch.testing.assert_close(fitted.attribute(p.queries).values, expected, **TOLERANCE)
        assert not isinstance(fitted.scorer.members[0].gradients, Held)
    # From the folder: no gradient of a training example is taken again, and the bits are the same.
    first = fitted.attribute(p.queries).values
    monkeypatch.setattr("upweight.gradients.places.Projected.rows", None)
    again = spec.fit(p.task, p.train, resources=uw.Resources(folder=tmp_path))
    monkeypatch.undo()
    assert torch.equal(again.attribute(p.queries).values, first)
    # Another damping reads the same gradients; another rank has none there.
    uw.LoGra(rank=2, damping=0.2).fit(p.task, p.train, resources=uw.Resources(folder=tmp_path))
    with pytest.raises(uw.errors.StaleStore):
        uw.LoGra(rank=1).fit(p.task, p.train, resources=uw.Resources(folder=tmp_path))


def test_what_it_cannot_do_is_an_error():
    p = problem("mlp_tanh")
    for wrong in ({"rank": 0}, {"rank": 0.1}, {"rank": True}, {"basis": uw.Diagonal()}):
        with pytest.raises(SpecError):
            uw.LoGra(**wrong)
    free = uw.Task(p.task.model, p.task.loss)
    with pytest.raises(NotPositiveDefinite, match="weight"):  # n = 12 examples, more directions
        uw.LoGra(rank=None, damping=0.0).fit(free, p.train)
    with pytest.raises(NotOffered):
        uw.LoGra(rank=1).fit(p.task, p.train).removal(p.queries)
    assert uw.LoGra(rank=1).unit is uw.Unit.RANK


@pytest.mark.filterwarnings("ignore:parameters are bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    p = problem("mlp_tanh")
    X, y = p.train
    expected = uw.LoGra(rank=2, damping=0.1).fit(p.task, p.train).attribute(p.queries).values
    model = nn.Sequential(*(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear)
                            else type(m)() for m in p.task.model))  # fmt: skip
    model.load_state_dict(p.task.model.state_dict())
    task = uw.Task(model.to(dtype).eval(), p.task.loss, p.task.penalty)
    y = y.to(dtype) if y.is_floating_point() else y
    queries = tuple(x.to(dtype) if x.is_floating_point() else x for x in p.queries)
    found = uw.LoGra(rank=2, damping=0.1).fit(task, (X.to(dtype), y)).attribute(queries).values
    slack = 1e-4 if dtype is torch.float32 else 0.1
    assert float((found.double() - expected).norm() / expected.norm()) < slack


def test_layers_that_nothing_reaches_have_no_share():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # never fires: only the last bias has a gradient
    train = (draw(g, 9, 3), torch.arange(9) % 2)
    fitted = uw.LoGra(rank=None).fit(uw.Task(model, uw.CrossEntropy()), train)
    assert any("gradients are 0" in note for note in fitted.notes)
    layers = fitted.attribute((train[0][:2], train[1][:2]), into=uw.PerLayer())
    silent, heard = (scores.values for scores in layers.values())
    assert not bool(silent.any()) and bool(heard.any())
