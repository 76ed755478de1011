"""The curvature of a linear map: its matrix is what its products say it is."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw
from upweight.curvature import linear
from upweight.curvature.linear import LinearTerm, linear_term
from upweight.errors import SpecError
from upweight.gradients.linear import linear_form
from upweight.task.data import as_data


def term(c, inputs, n=9, bias=True, params="*", loss=None):
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(inputs, c, bias=bias).double()
    loss = loss or uw.CrossEntropy()
    is_class = isinstance(loss, uw.CrossEntropy)
    targets = torch.arange(n) % c if is_class else draw(g, n, c).abs().round()
    task, data = uw.Task(model, loss, params=params), as_data((draw(g, n, inputs), targets))
    form = linear_form(task, task.theta(), data.batch(0, 4))
    assert form is not None
    return linear_term(task, task.theta(), form, data)


SHAPES = {
    "one output": dict(c=1, inputs=3, loss=uw.Poisson()),
    "softmax": dict(c=4, inputs=3),
    "softmax without bias": dict(c=4, inputs=3, bias=False),
    "bias alone": dict(c=4, inputs=3, params="bias"),
    "weight alone": dict(c=4, inputs=3, params="weight"),
    "outputs apart": dict(c=3, inputs=2, loss=uw.Poisson()),
}


@pytest.mark.parametrize("at_once", [1, 200, 10**6])
@pytest.mark.parametrize("panel", [2, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix_is_that_of_the_products(shape, panel, at_once, monkeypatch):
    monkeypatch.setattr(linear, "AT_ONCE", at_once)
    monkeypatch.setattr(linear, "PANEL", panel)
    found = term(**SHAPES[shape])
    p = found.shape[0]
    expected = found.mv(torch.eye(p).double())
    out = torch.ones(p, p).double()
    found.add_to(out, scale=0.5)
    torch.testing.assert_close(out, 1 + 0.5 * expected, rtol=1e-12, atol=1e-12)
    out = torch.zeros(p, p).double()
    found.add_to(out)
    torch.testing.assert_close(out, out.T, rtol=1e-13, atol=1e-13)


def test_many_classes_take_products_of_rows_of_blocks(monkeypatch):
    """255 classes are 32 385 blocks: a product for each took 12 s of calls."""
    calls = []
    grams = LinearTerm._grams
    monkeypatch.setattr(
        LinearTerm, "_grams", lambda self, w: calls.append(w.shape[1]) or grams(self, w)
    )
    found = term(c=255, inputs=4, n=40)
    out = torch.zeros(found.shape).double()
    found.add_to(out)
    assert len(calls) < 2 * 255 and sum(calls) == 255 * 254 // 2
    rows = found.mv(torch.eye(found.shape[0]).double()[::200])
    torch.testing.assert_close(out[::200], rows, rtol=1e-12, atol=1e-12)


def test_outputs_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("upweight.runtime.memory.free_bytes", lambda device: 9 * (4 + 16) * 8 - 1)
    with pytest.raises(SpecError, match=r"curvature of 9 examples in 4 outputs(.|\n)*EKFAC\(\)"):
        term(c=4, inputs=3)
