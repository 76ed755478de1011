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
