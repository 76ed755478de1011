"""Subsets: how many rows they keep, that they differ, and that they are uniform."""

import itertools
import math

import pytest
import torch

from upweight.errors import SpecError
from upweight.training import subset_weights


def test_every_row_keeps_its_share():
    weights = subset_weights(101, 30, fraction=0.3)
    assert weights.shape == (30, 101)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert weights.sum(dim=1).unique().tolist() == [30.0]


def test_renormalized_weights_average_one():
    plain, renormalized = (subset_weights(12, 5, 0.25, seed=3, renormalize=r) for r in (0, 1))
    torch.testing.assert_close(renormalized, 4 * plain)


def test_all_subsets_come_once_when_all_are_asked_for():
    kept = {tuple(row.nonzero()[:, 0].tolist()) for row in subset_weights(5, 10, 0.4)}
    assert kept == set(itertools.combinations(range(5), 2))


def test_rows_are_kept_equally_often():
    share = subset_weights(20, 2000).mean(dim=0)
    assert (share - 0.5).abs().max() < 4 * math.sqrt(0.25 / 2000)


def test_the_seed_decides():
    assert torch.equal(subset_weights(50, 4, seed=1), subset_weights(50, 4, seed=1))
    assert not torch.equal(subset_weights(50, 4, seed=1), subset_weights(50, 4, seed=2))


@pytest.mark.parametrize(
    "subsets, fraction, given",
    [
        (11, 0.4, "of which there are 10"),
        (3, 50, "fraction=50"),
        (3, 0.0, "3 subsets of 0 of 5"),
        (3, 1.0, "fraction=1.0"),
        (3, 0.99, "3 subsets of 5 of 5"),
        (3, math.nan, "fraction=nan"),
        (0, 0.4, "0 subsets"),
    ],
)
def test_impossible_subsets_are_refused(subsets, fraction, given):
    with pytest.raises(SpecError, match=given):
        subset_weights(5, subsets, fraction)


def test_a_large_data_set_is_refused_in_words_too():
    with pytest.raises(SpecError, match="0 subsets of 30000 of 60000"):
        subset_weights(60000, 0)
