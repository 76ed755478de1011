"""Law 5: a group's first-order score is the sum; duplicating the data halves each copy's score."""

import pytest
import torch

from tests.laws.subjects import (
    DETERMINISTIC,
    EVERYONE,
    assert_same,
    attributed,
    scores,
    tolerance,
)
from tests.market import problem
from upweight.task.data import as_data

PROBLEMS = ["softmax", "mlp_gelu", "tied", "weighted"]


@pytest.mark.parametrize("method", EVERYONE)
def test_groups_add_up(method):
    p = problem("softmax")
    found = attributed(EVERYONE[method].fit(p.task, p.train), p.queries)
    labels = [i % 3 for i in range(p.n)]
    grouped = found.group(labels)
    assert grouped.columns == ("0", "1", "2")
    for label in range(3):
        members = [i for i in range(p.n) if labels[i] == label]
        assert_same(grouped.values[:, label], found.values[:, members].sum(dim=1), 1e-12)
        assert_same(found.predict(drop=members), -grouped.values[:, label], 1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_duplicated_data_halve_the_scores(method, name):
    p = problem(name)
    once = scores(DETERMINISTIC[method], p.task, p.train, p.queries)
    twice = as_data(p.train).subset([*range(p.n), *range(p.n)])
    found = scores(DETERMINISTIC[method], p.task, twice, p.queries)
    assert_same(found, torch.cat([once, once], dim=1) / 2, tolerance(method))
