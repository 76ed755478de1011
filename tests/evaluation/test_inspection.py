"""What a resample finds is what the drawn rows give as a sample of their own."""

import pytest
import torch

from upweight.evaluation import inspection

RANKING = torch.tensor([4.0, 3.0, 3.0, 2.0, 1.0, 0.0])
POSITIVE = torch.tensor([True, False, True, False, True, False])


@pytest.mark.parametrize(
    "statistic",
    [
        inspection.area,
        inspection.precision,
        lambda f: inspection.hits(f, 2),
        lambda f: inspection.hits(f, 3),
        lambda f: inspection.hits(f, 6),
    ],
)
def test_counts_are_repeated_rows(statistic):
    """Also where levels are empty, at the top, below it, and where k rows are just exhausted."""
    every = torch.tensor([[0, 0, 2, 1, 2, 1], [2, 0, 0, 0, 1, 3], [1, 1, 1, 1, 1, 1.0]])
    found = statistic(inspection.levels(RANKING, POSITIVE, every))
    for value, counts in zip(found, every, strict=True):
        rows = torch.arange(6).repeat_interleave(counts.long())
        alone = inspection.levels(RANKING[rows], POSITIVE[rows], torch.ones(1, 6))
        torch.testing.assert_close(value, statistic(alone)[0])


def test_a_resample_without_positives_or_negatives_has_no_answer():
    counts = torch.tensor([[0, 3, 0, 2, 0, 1], [3, 0, 2, 0, 1, 0.0]])
    found = inspection.levels(RANKING, POSITIVE, counts)
    assert inspection.area(found).isnan().tolist() == [True, True]
    assert inspection.precision(found).isnan().tolist() == [True, False]
    assert (inspection.hits(found, 2) / found.positives).isnan().tolist() == [True, False]
