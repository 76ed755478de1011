"""Law 4: permuting training examples permutes columns; a subset of queries is a subset of rows."""

import pytest
import torch

from tests.laws.subjects import DETERMINISTIC, EVERYONE, assert_same, scores, tolerance
from tests.market import problem
from upweight.task.data import as_data

PROBLEMS = ["softmax", "mlp_tanh", "padded_sequences", "dict_batch"]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_columns_follow_the_examples(method, name):
    p = problem(name)
    order = torch.randperm(p.n, generator=torch.Generator().manual_seed(2))
    shuffled = as_data(p.train).subset(order.tolist())
    expected = scores(DETERMINISTIC[method], p.task, p.train, p.queries)
    found = scores(DETERMINISTIC[method], p.task, shuffled, p.queries)
    assert_same(found, expected[:, order], tolerance(method))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", EVERYONE)
def test_rows_follow_the_queries(method, name):
    p = problem(name)
    expected = scores(EVERYONE[method], p.task, p.train, p.queries)
    subset = as_data(p.queries).subset([2, 0])
    found = scores(EVERYONE[method], p.task, p.train, subset)
    assert_same(found, expected[[2, 0]], tolerance(method))
