"""What a page shows of the data, kept without them: the same page, and no wrong card."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tests.report.conftest import provenance
from upweight.report import Display, html, kept
from upweight.report.answers import Answers
from upweight.report.examples import NOT_KEPT
from upweight.scores import Scores, Unit

N, Q = 50, 3
DRAW = np.random.default_rng(0)
LABELS = DRAW.integers(0, 3, N)
SCORES = torch.from_numpy(DRAW.normal(size=(Q, N)))
KINDS = {
    "large images": DRAW.uniform(-2, 3, (N, 3, 120, 150)),
    "gray bytes": DRAW.integers(0, 256, (N, 7, 5), dtype=np.uint8),
    "rows": DRAW.normal(size=(N, 60)),
    "nothing to show": DRAW.normal(size=(N, 2, 5, 4, 3)),
}
FACTS = {
    "values": DRAW.normal(size=Q).tolist(), "predictions": [0, np.int64(2), 1], "title": "<t>",
    "names": ["a", "b", "c"], "train_losses": DRAW.random(N), "self_influence": -DRAW.random(N),
    "metadata": {"x": DRAW.random(N), "y": [None, "b"] * (N // 2), "z": torch.arange(N) % 2 == 0},
}  # fmt: skip


def on_disk(found):
    facts, arrays = found
    return json.loads(json.dumps(facts)), arrays


@pytest.fixture
def scores():
    return Scores(SCORES, Unit.DERIVATIVE, provenance(n=N, q=Q))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["arrays", "a data set"])
def test_a_page_of_what_was_kept_is_the_page_of_the_data(scores, tmp_path, kind, form):
    X, y = torch.from_numpy(KINDS[kind]), torch.from_numpy(LABELS)
    train, queries = (X, y), (X[:Q], y[:Q])
    if form == "a data set":
        train, queries = TensorDataset(*train), TensorDataset(*queries)
    display = Display(train, queries, **FACTS)
    live = html(scores, tmp_path / "live.html", display)
    found = kept.reopened(*on_disk(kept.kept(scores, display)))
    again = html(scores, tmp_path / "again.html", found)
    assert again.read_text() == live.read_text()
    assert found.train.columns is None


@pytest.mark.parametrize("kind", ["gray bytes", "rows"])
def test_what_was_not_kept_is_said_and_never_shown_as_another(scores, monkeypatch, kind):
    display = Display((KINDS[kind], LABELS), (KINDS[kind][:Q], LABELS[:Q]), **FACTS)
    whole = Answers(scores, display)
    each = 35 if kind == "gray bytes" else 480
    monkeypatch.setattr(kept, "KEPT_BYTES", 10 * (each + 2))
    found = kept.reopened(*on_disk(kept.kept(scores, display)))
    columns = found.train.columns.tolist()
    assert 5 <= len(columns) <= 10
    answers = Answers(scores, found)
    told, expected = (a.examples(range(N)) for a in (answers, whole))
    for i, (one, other) in enumerate(zip(told, expected, strict=True)):
        assert one["label"] == other["label"]
        if i in columns:
            assert one == other
        else:
            assert one == {"id": i, "label": one["label"], "text": NOT_KEPT, "bare": True}
    assert answers.training == whole.training
    for q in range(Q):
        page, other = (a.query(q)["lowered"] for a in (answers, whole))
        assert page["scores"] == other["scores"]
        if kind == "rows":
            there = [i in columns for i in page["ids"]]
            assert [bool(differs) for differs in page["differs"]] == there
