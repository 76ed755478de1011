"""How the examples of a sample are drawn."""

import pytest
import torch

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
