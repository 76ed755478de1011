"""Brittleness: by a loop over queries and sizes."""

import json
import math

import numpy as np
import pytest
import torch

from tests.evaluation.models import additive, retrained, scored
from upweight.errors import DataError
from upweight.evaluation import (
    Brittleness,
    brittleness,
    ranked_removal_weights,
    removal_order,
)

SIZES = (1, 2, 4, 7)


def looped(margins, baseline, sizes):
    """The smallest size that flips each query that is right before, one query at a time."""
    smallest = {}
    for q in range(margins.shape[2]):
        if baseline[:, q].mean() >= 0:
            flips = [k for j, k in enumerate(sizes) if margins[:, j, q].mean() < 0]
            smallest[q] = min(flips) if flips else None
    return smallest


def test_where_effects_add_up_it_is_where_the_running_sum_exceeds_the_margin():
    S = torch.rand(30, 9)
    margin = 8 * torch.rand(30) - 1
    weights = ranked_removal_weights(removal_order(scored(S)), SIZES)
    found = brittleness(additive(S, weights, margin), SIZES)
    removed = S.sort(dim=1, descending=True).values.cumsum(dim=1)
    expected = {
        q: next((k for k in SIZES if removed[q, k - 1] > margin[q]), None)
        for q in range(30)
        if margin[q] >= 0
    }
    assert found.smallest == expected
    assert None in expected.values() and len(set(expected.values())) > 2 and len(expected) < 30
    for k, estimate in zip(SIZES, found.flipped, strict=True):
        share = np.mean([s is not None and s <= k for s in expected.values()])
        assert estimate.value == pytest.approx(share, rel=1e-12)


def test_seeds_are_averaged_and_queries_resampled():
    g = torch.Generator().manual_seed(3)
    margins = torch.randn(4, 3, 60, generator=g) + 0.3
    baseline = torch.randn(4, 60, generator=g) + 0.5
    found = Brittleness((1, 2, 3), margins, baseline)
    assert found.smallest == looped(margins, baseline, (1, 2, 3))
    right = list(found.smallest)
    assert 20 < len(right) < 60
    generator, draws = np.random.default_rng(0), []
    for _ in range(400):
        q = generator.choice(right, size=len(right))
        sizes = [found.smallest[k] for k in q]  # each query's is its own
        draws.append(np.mean([s is not None and s <= 2 for s in sizes]))
    low, high = np.quantile(draws, [0.025, 0.975])
    # Shares come in steps of 0.02; a bound may fall on the next one.
    assert found.flipped[1].low == pytest.approx(low, abs=0.021)
    assert found.flipped[1].high == pytest.approx(high, abs=0.021)


def test_the_share_never_falls_and_a_flip_back_still_counts():
    margins = torch.tensor([[[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]]])
    found = Brittleness((1, 2, 3), margins, torch.ones(1, 2))
    assert found.smallest == {0: 2, 1: None}
    assert [e.value for e in found.flipped] == [0.0, 0.5, 0.5]


def test_predictions_wrong_before_do_not_count_but_are_said():
    truth = retrained(torch.tensor([[-1.0, -1.0, 2.0]]), [-0.5, 0.5, 0.0])
    found = brittleness(truth, [3])
    assert found.smallest == {1: 3, 2: None}
    assert found.flipped[0].value == 0.5
    assert "share of 2 predictions" in str(found) and "1 more were wrong" in str(found)
    with pytest.raises(DataError, match=r"2 queries, the largest mean margin -0\.5"):
        brittleness(retrained(torch.zeros(1, 2), [-0.5, -2.0]), [1])


def test_one_query_and_one_seed_have_no_interval():
    found = brittleness(retrained(torch.tensor([[-1.0]]), [1.0]), [2]).flipped[0]
    assert found.value == 1.0
    assert math.isnan(found.low) and math.isnan(found.high)


def test_summary_and_text():
    found = Brittleness((1, 20), torch.randn(2, 2, 5), torch.ones(2, 5))
    summary = json.loads(json.dumps(found.summary()))
    assert (summary["queries"], summary["wrong_before"], summary["seeds"]) == (5, 0, 2)
    assert summary["intervals"][1] == [found.flipped[1].low, found.flipped[1].high]
    assert f"remove     20 or fewer  {found.flipped[1]}" in str(found)
