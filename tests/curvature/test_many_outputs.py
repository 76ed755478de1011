"""The Gauss–Newton matrix where outputs are too many for Λ: its products, and its parts."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import assert_same
from upweight.curvature import ggn


class Bytes(nn.Module):
    """f [b, 5, 3]: every position its own classes."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.tokens(x)))


def made(loss):
    torch.manual_seed(0)
    model = Bytes().double().eval()
    X = torch.randint(6, (7, 5))
    y = torch.randint(3, (7, 5)) if loss is uw.CrossEntropy else torch.randn(7, 5, 3).double()
    return uw.Task(model, loss()), uw.as_data((X, y))


@pytest.mark.parametrize("loss", [uw.CrossEntropy, uw.SquaredError, uw.Poisson])
def test_products_without_the_matrix(loss, monkeypatch):
    task, data = made(loss)
    if loss is uw.Poisson:
        data = uw.as_data((data.batch(0, 7)[0], data.batch(0, 7)[1].abs().round()))
    theta = task.theta()
    formed = uw.GGN().fit(task, data, theta)
    expected = formed.dense()
    monkeypatch.setattr(ggn, "FORMED", 0)
    # Batches of Jacobians of two examples: seven do not divide.
    monkeypatch.setattr("upweight.task.data.WORKING_BYTES", 2 * 15 * (theta.numel() + 15) * 8)
    found = uw.GGN().fit(task, data, theta)
    v = torch.randn(19, theta.numel(), dtype=torch.float64)
    assert_same(found.mv(v), v @ expected, 1e-12)
    assert_same(found.dense(), expected, 1e-12)
    assert_same(found.diagonal(), expected.diagonal(), 1e-12)
