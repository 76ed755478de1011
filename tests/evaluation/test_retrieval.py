"""Retrieval: against loops and scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from upweight.errors import DataError, DtypeError, NonFinite, ShapeError
from upweight.evaluation import class_retrieval, poison_retrieval

VALUES = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
TRAIN, QUERIES = torch.arange(30) % 3, torch.arange(12) % 3
MASK = torch.arange(30) < 6


def test_class_retrieval_is_a_count():
    found = class_retrieval(VALUES, TRAIN, QUERIES, 4)
    shares = []
    for q in range(12):
        first = sorted(range(30), key=lambda i: -VALUES[q, i])[:4]
        shares.append(sum(TRAIN[i] == QUERIES[q] for i in first) / 4)
    assert found.value == pytest.approx(np.mean(shares), rel=1e-12)
    generator = np.random.default_rng(0)
    draws = [np.mean(np.array(shares)[generator.integers(12, size=12)]) for _ in range(4000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.3 * np.std(draws))
    assert found.high == pytest.approx(high, abs=0.3 * np.std(draws))


def test_a_score_that_is_the_class_is_perfect_and_one_without_a_choice_is_chance():
    same = (QUERIES[:, None] == TRAIN).double()
    assert class_retrieval(same, TRAIN, QUERIES, 10).value == 1.0
    assert class_retrieval(same, TRAIN, QUERIES, 20).value == pytest.approx(0.5)  # 10 of a class
    flat = torch.zeros(12, 30)
    assert class_retrieval(flat, TRAIN, QUERIES, 7).value == pytest.approx(1 / 3)


def test_subclasses_are_labels_like_any_other():
    """Classes 0, 1 merged from subclasses 0…3: a score that knows only classes gets half."""
    subclass = torch.arange(16) % 4
    values = (subclass[:4, None] // 2 == subclass // 2).double()
    assert class_retrieval(values, subclass // 2, subclass[:4] // 2, 8).value == 1.0
    assert class_retrieval(values, subclass, subclass[:4], 8).value == pytest.approx(0.5)


@pytest.mark.parametrize("each", [False, True])
def test_poison_retrieval_is_the_mean_of_scikit_learn(each):
    g = torch.Generator().manual_seed(1)
    masks = torch.rand(12, 30, generator=g) < 0.3 if each else MASK.expand(12, -1)
    values = (VALUES + masks).round()  # with ties
    found = poison_retrieval(values, masks if each else MASK, 30)
    areas = [roc_auc_score(m, v) for m, v in zip(masks, values, strict=True)]
    assert found.auroc.value == pytest.approx(np.mean(areas), rel=1e-12)
    assert found.recall.value == pytest.approx(1.0)


def test_recall_counts_the_poisoned_among_the_first():
    found = poison_retrieval(VALUES, MASK, 5)
    counts = [int(MASK[row.argsort(descending=True)[:5]].sum()) / 6 for row in VALUES]
    assert found.recall.value == pytest.approx(np.mean(counts), rel=1e-12)
    assert found.recall.low < found.recall.value < found.recall.high


def test_one_query_has_no_interval():
    one = class_retrieval(VALUES[:1], TRAIN, QUERIES[:1], 4)
    other = poison_retrieval(VALUES[:1], MASK, 4).auroc
    for found in (one, other):
        assert math.isfinite(found.value)
        assert math.isnan(found.low) and math.isnan(found.high)


def test_summary_and_text():
    found = poison_retrieval(VALUES, MASK, 5)
    summary = json.loads(json.dumps(found.summary()))
    assert (summary["k"], summary["queries"], summary["auroc"]) == (5, 12, found.auroc.value)
    assert f"recall in 5       {found.recall}" in str(found)


@pytest.mark.parametrize(
    "make, error, given",
    [
        (lambda: class_retrieval(VALUES, TRAIN, QUERIES, 31), ShapeError, "k=31"),
        (lambda: class_retrieval(VALUES, TRAIN, QUERIES, 0), ShapeError, "k=0"),
        (lambda: class_retrieval(VALUES[0], TRAIN, QUERIES, 3), ShapeError, r"\(30,\)"),
        (lambda: class_retrieval(VALUES, QUERIES, TRAIN, 3), ShapeError, r"train labels \(12,\)"),
        (lambda: class_retrieval(VALUES, TRAIN, QUERIES + 1, 3), DataError, r"4 of 12.*\[2, 5"),
        (lambda: class_retrieval(VALUES / 0, TRAIN, QUERIES, 3), NonFinite, "360 of 360"),
        (lambda: poison_retrieval(VALUES, MASK, 31), ShapeError, "k=31"),
        (lambda: poison_retrieval(VALUES, MASK[:9], 3), ShapeError, r"mask \(9,\)"),
        (lambda: poison_retrieval(VALUES, MASK | True, 3), DataError, "30 of 30 positive"),
        (lambda: poison_retrieval(VALUES, MASK & False, 3), DataError, "0 of 30 positive"),
        (lambda: poison_retrieval(VALUES, MASK.long(), 3), DtypeError, "int64"),
    ],
)
def test_what_cannot_be_retrieved_is_refused(make, error, given):
    with pytest.raises(error, match=given):
        make()
