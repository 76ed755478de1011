"""P gᵢ without P: against the matrix, unbiased over draws, and the same whatever the batch."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, problem
from upweight.gradients.factored import Formed, Lookups, Rows, Tokens
from upweight.gradients.places import Projected
from upweight.gradients.planning import plan
from upweight.gradients.projections import Sketch, TensorSketch, sketch, two_sided
from upweight.gradients.source import Direct
from upweight.task.data import as_data

NETWORKS = ["mlp_tanh", "conv", "tied", "layer_norm", "batch_norm"]


def made(name):
    p = problem(name)
    data = as_data(p.train)
    theta = p.task.theta()
    return p.task, data, theta, plan(p.task, theta, data)


def matrix(projection):
    """P [d, p], a column for each parameter."""
    p = projection.plan.task.layout.size
    return projection.of_vectors(torch.eye(p, dtype=projection.plan.dtype)).T


PROJECTIONS = {
    "two sides": lambda plan: two_sided(plan, 2, seed=3),
    "a sketch": lambda plan: sketch(plan, 13, seed=3),
    "all": lambda plan: two_sided(plan, None),
}


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_the_gradients_times_the_matrix(name, kind):
    task, data, theta, of = made(name)
    projection = PROJECTIONS[kind](of)
    n = len(data)
    gradients = Direct(task, theta).rows(task.to_device(data.batch(0, n)), n)
    expected = gradients @ matrix(projection).T
    source = Projected(data, theta, task.losses, projection, at_once=4)
    assert source.width == projection.width == expected.shape[1]
    torch.testing.assert_close(source.rows(0, n), expected, rtol=1e-10, atol=1e-11)
    for start, stop in ((0, 1), (3, 8), (n - 1, n)):
        torch.testing.assert_close(
            source.rows(start, stop), expected[start:stop], rtol=1e-10, atol=1e-11
        )


def test_as_many_numbers_as_the_model_has_are_all_of_them():
    task, _, _, of = made("mlp_tanh")
    p = task.layout.size
    assert isinstance(sketch(of, p - 1), Sketch)
    for whole in (sketch(of, p), sketch(of, None), two_sided(of, None), two_sided(of, 10**3)):
        P = matrix(whole)
        torch.testing.assert_close(P @ P.T, torch.eye(p).double(), rtol=0, atol=1e-12)
        a, b = draw(torch.Generator().manual_seed(0), 2, p)
        assert abs(float((P @ a) @ (P @ b) - a @ b)) < 1e-12


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_every_way_to_a_tensor_sketch_is_the_same(positions):
    """By Fourier transforms, from gᵢ in full, and by lookups, against the sum over all entries."""
    g = torch.Generator().manual_seed(0)
    o, i, d = 7, 9, 5
    model = nn.Linear(i, o, bias=False).double()
    task = uw.Task(model, uw.SquaredError())
    data = as_data((draw(g, 4, i), draw(g, 4, o)))
    found = sketch(plan(task, task.theta(), data), d, seed=1).maps[0]
    assert isinstance(found, TensorSketch)
    part = Tokens(draw(g, 3, positions, o), draw(g, 3, positions, i))
    full = part.matrices()
    expected = torch.zeros(3, d, dtype=torch.float64)
    for r in range(o):
        for c in range(i):
            place = (int(found.left.place[r]) + int(found.right.place[c])) % d
            sign = found.left.weight[r] * found.right.weight[c]
            expected[:, place] += sign * full[:, r, c]
    torch.testing.assert_close(found(part), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found(Formed(full)), expected, rtol=1e-12, atol=1e-12)
    lookups = Lookups(torch.randint(o, (3, positions), generator=g), o, part.right)
    torch.testing.assert_close(
        found(lookups), found(Formed(lookups.matrices())), rtol=1e-12, atol=1e-12
    )


def spread(values):
    return float(values.std() / len(values) ** 0.5)


@pytest.mark.parametrize("name", ["mlp_tanh", "layer_norm"])
def test_products_are_unbiased_over_the_draws(name):
    """E⟨Pa, Pb⟩ = ⟨a, b⟩; of two sides, times (k l)/(o i) in each layer."""
    task, _, _, of = made(name)
    a, b = draw(torch.Generator().manual_seed(5), 2, task.layout.size)
    b = b + a  # that do not cancel
    by_sketch, by_sides = [], []
    for seed in range(200):
        pa, pb = sketch(of, 11, seed).of_vectors(torch.stack([a, b]))
        by_sketch.append(pa @ pb)
        sides = two_sided(of, 2, seed)
        pa, pb = sides.of_vectors(torch.stack([a, b]))
        shares = [
            (pa[part] @ pb[part]) * len(block.index(task.layout)) / (part.stop - part.start)
            for block, part in zip(of.blocks, sides.parts, strict=True)
        ]
        by_sides.append(torch.stack(shares).sum())
    for found in (torch.stack(by_sketch), torch.stack(by_sides)):
        assert abs(float(found.mean() - a @ b)) < 4 * spread(found)
        assert spread(found) < 0.15 * float(a @ b)  # so that the line above can fail


def test_two_sides_have_orthonormal_rows_and_an_adjoint():
    for name in NETWORKS:
        of = made(name)[-1]
        sides = two_sided(of, 2, seed=1)
        P = matrix(sides)
        torch.testing.assert_close(P @ P.T, torch.eye(len(P)).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            sides.adjoint(torch.eye(len(P), dtype=torch.float64)), P, rtol=0, atol=1e-12
        )


def test_draws_are_those_of_the_name_and_the_seed():
    def body(*layers):
        model = nn.Sequential(*layers).double()
        task = uw.Task(model, uw.SquaredError())
        g = torch.Generator().manual_seed(0)
        data = as_data((draw(g, 4, 6), draw(g, 4, layers[-1].out_features)))
        return plan(task, task.theta(), data)

    small = body(nn.Linear(6, 5), nn.Linear(5, 4))
    large = body(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    for make in (sketch, two_sided):
        size = 8 if make is sketch else 2
        ones, more = make(small, size, 1).maps, make(large, size, 1).maps
        other = make(small, size, 2).maps
        for one, same, another in zip(ones, more[: len(ones)], other, strict=True):
            left, again, not_this = (
                m.left.weight if isinstance(m, TensorSketch) else m.left
                for m in (one, same, another)
            )
            assert torch.equal(left, again)
            assert not torch.equal(left, not_this) or left.numel() < 6
    of_lines = two_sided(body(nn.Linear(6, 6), nn.Linear(6, 6)), 2).maps
    assert not torch.equal(of_lines[0].left, of_lines[1].left)  # of two layers of one shape


def test_rows_of_vectors_are_those_of_factors():
    task, _, _, of = made("layer_norm")
    v = draw(torch.Generator().manual_seed(2), 3, task.layout.size)
    factors = [Rows(v[:, block.index(task.layout)]) for block in of.blocks]
    factors = [
        Formed(f.values.reshape(-1, *block.shape)) if len(block.shape) == 2 else f
        for f, block in zip(factors, of.blocks, strict=True)
    ]
    for make in PROJECTIONS.values():
        projection = make(of)
        torch.testing.assert_close(projection.of_vectors(v), projection(factors))
