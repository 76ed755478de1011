"""Layout: names and slices of one flat vector."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upweight as uw
from tests.market import Tied, draw
from upweight.errors import DtypeError, ShapeError, UnsupportedModel
from upweight.task.params import Layout, matches

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=5).map(
    tuple
)
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def layout(shapes):
    names = tuple(f"p{j}" for j in range(len(shapes)))
    return Layout(names, shapes, torch.float64, torch.device("cpu"))


@SETTINGS
@given(shapes=SHAPES, lead=st.lists(st.integers(0, 3), max_size=2).map(tuple))
def test_unflatten_undoes_flatten(shapes, lead):
    g = torch.Generator().manual_seed(0)
    L = layout(shapes)
    params = {name: draw(g, *lead, *shape) for name, shape in zip(L.names, shapes, strict=True)}
    back = L.unflatten(L.flatten(params))
    assert list(back) == list(L.names)
    for name, value in params.items():
        assert torch.equal(back[name], value)


@SETTINGS
@given(shapes=SHAPES, lead=st.lists(st.integers(0, 3), max_size=2).map(tuple))
def test_flatten_undoes_unflatten(shapes, lead):
    L = layout(shapes)
    vector = draw(torch.Generator().manual_seed(1), *lead, L.size)
    assert torch.equal(L.flatten(L.unflatten(vector)), vector)


@SETTINGS
@given(shapes=SHAPES)
def test_slices_are_a_partition(shapes):
    L = layout(shapes)
    covered = [j for where in L.slices.values() for j in range(where.start, where.stop)]
    assert covered == list(range(L.size))
    assert L.size == sum(torch.Size(shape).numel() for shape in shapes)


def test_the_order_is_the_models():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    L = Layout.of(model, ("*",))
    assert L.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(uw.Task(model, uw.SquaredError()).theta(), expected)


def test_globs_choose():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    assert Layout.of(model, ("*.bias",)).names == ("0.bias", "1.bias", "2.bias")
    assert Layout.of(model, ("2.*", "0.weight")).names == ("0.weight", "2.weight", "2.bias")
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in Layout.of(model, ("*",)).names
    assert matches("a.b", ("*.b", "c")) and not matches("a.B", ("*.b",))


def test_a_tied_parameter_counts_once_under_any_of_its_names():
    model = Tied()
    assert Layout.of(model, ("*",)).names == ("embedding.weight", "mix.weight", "mix.bias")
    assert Layout.of(model, ("head.*",)).names == ("embedding.weight",)


def test_mask_marks_the_entries_of_matching_names():
    L = Layout.of(nn.Linear(2, 3), ("*",))
    assert L.mask(("bias",)).tolist() == [False] * 6 + [True] * 3
    assert L.mask(("*",)).all() and not L.mask(()).any()


def test_theta_is_a_copy():
    task = uw.Task(nn.Linear(2, 1), uw.SquaredError())
    before = task.model.weight.clone()
    task.theta().zero_()
    assert torch.equal(task.model.weight, before)


def test_nothing_chosen_lists_what_there_is():
    model = nn.Linear(2, 1)
    with pytest.raises(UnsupportedModel, match=r"weight, bias"):
        uw.Task(model, uw.SquaredError(), params="head.*")
    model.requires_grad_(False)
    with pytest.raises(UnsupportedModel, match="requires_grad=False"):
        uw.Task(model, uw.SquaredError())


def test_mixed_dtypes_are_refused():
    model = nn.Sequential(nn.Linear(2, 2).float(), nn.Linear(2, 1).double())
    with pytest.raises(DtypeError, match=r"1\.bias: torch\.float64"):
        uw.Task(model, uw.SquaredError())
    assert uw.Task(model, uw.SquaredError(), params="1.*").layout.dtype == torch.float64


def test_a_vector_of_another_length_is_refused():
    L = Layout.of(nn.Linear(2, 1), ("*",))
    with pytest.raises(ShapeError, match=r"3 entries.*\n.*\(2, 4\)"):
        L.unflatten(torch.zeros(2, 4))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Sliced(nn.Module):
    """Two maps in one tensor, used in parts."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return torch.tanh(x @ self.both[:, :3]) @ self.both[:, 3:]


def by_data():
    model = Pair()
    model.b.weight.data = model.a.weight.data
    return model


def by_overlap():
    model, memory = Pair(), torch.randn(15)
    model.a.weight.data, model.b.weight.data = memory[:9].view(3, 3), memory[6:].view(3, 3)
    return model


def by_interleaving():
    model, memory = Pair(), torch.randn(3, 5)
    model.a.weight.data, model.b.weight.data = memory[:, :3], memory[:, 2:]
    return model


def by_expansion():
    model = Pair()
    model.b.weight.data = torch.randn(3).expand(3, 3)
    return model


def by_buffer():
    model = Pair()
    model.register_buffer("copy", model.a.weight.data)
    return model


def by_frozen():
    model = by_data()
    model.b.weight.requires_grad_(False)
    return model


SHARED = [by_data, by_overlap, by_interleaving, by_expansion, by_buffer, by_frozen]


@pytest.mark.parametrize("build", SHARED)
def test_two_parameters_in_one_memory_are_refused(build):
    with pytest.raises(UnsupportedModel, match=r"shared memory: (.|\n)*b\.weight = a\.weight"):
        uw.Task(build(), uw.SquaredError())


@pytest.mark.parametrize("build", SHARED)
def test_what_is_refused_has_its_ways_out(build):
    model = build()
    for x in (*model.parameters(), *model.buffers()):
        x.data = x.data.clone()
    assert uw.Task(model, uw.SquaredError()).layout.size == (9 if build is by_frozen else 18)
    model = build()
    model.b.weight = model.a.weight
    if build is not by_buffer:
        assert uw.Task(model, uw.SquaredError()).layout.size == 9
    assert uw.Task(Sliced(), uw.SquaredError()).layout.size == 18


def test_parts_of_one_memory_that_do_not_overlap_are_two_parameters():
    """As recurrent layers keep theirs on a GPU, and columns of one matrix."""
    for parts in (torch.randn(2, 3, 3).unbind(0), torch.randn(3, 6).split(3, dim=1)):
        model = Pair()
        model.a.weight.data, model.b.weight.data = parts
        assert uw.Task(model, uw.SquaredError()).layout.size == 18


def test_a_tied_parameter_counts_once_and_has_the_derivative_of_both_uses():
    """Against the Hessian of the one matrix, by autograd on its own formula."""
    g = torch.Generator().manual_seed(0)
    model = Pair().double()
    model.b.weight = model.a.weight
    X, y = draw(g, 8, 3), draw(g, 8, 3)
    task = uw.Task(model, uw.SquaredError())

    def objective(w):
        w = w.reshape(3, 3)
        return 0.5 * ((torch.tanh(X @ w.T) @ w.T - y) ** 2).sum() / 8

    expected = torch.autograd.functional.hessian(objective, task.theta())
    found = uw.Hessian().fit(task, uw.as_data((X, y)), task.theta()).dense()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
