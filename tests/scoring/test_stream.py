"""How the examples of a sample are drawn, and when none is."""

import pytest
import torch

import upweight as uw
from upweight.scoring import stream


@pytest.mark.parametrize("most", [2**24, 0])
def test_examples_are_drawn_by_their_probabilities(most, monkeypatch):
    """By PyTorch's own draws, and as where there are too many examples for them."""
    monkeypatch.setattr(stream, "MOST_CATEGORIES", most)
    p, m = torch.tensor([0.0, 3.0, 0.0, 1.0, 6.0, 0.0]).double() / 10, 20_000
    drawn = stream._drawn(p, m, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=6).double() / m
    assert bool(((found - p).abs() <= 4 * (p * (1 - p) / m).sqrt()).all())
    assert drawn.shape == (m,)


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_exact_scores_take_no_sample(tolerance, monkeypatch):
    """Nothing is chosen where nothing may be approximated, so nothing is measured for a choice."""
    drawn = []
    taken = stream._sample
    monkeypatch.setattr(stream, "_sample", lambda *given: drawn.append(1) or taken(*given))
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 3, generator=generator), torch.arange(40) % 2
    torch.manual_seed(0)
    task = uw.Task(torch.nn.Linear(3, 2).double(), uw.CrossEntropy())
    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1), tolerance=tolerance)
    method.fit(task, (X.double(), y)).attribute((X[:4].double(), y[:4]))
    assert bool(drawn) == (tolerance > 0)
