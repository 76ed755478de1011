"""What explanations tell, against attacks counted by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import privacy
from upweight.applications.privacy import Redaction, audit, own_rows, redacted
from upweight.errors import DataError, ShapeError, SpecError
from upweight.report.answers import Answers
from upweight.report.display import Display
from upweight.report.words import words_of
from upweight.task.data import as_data
from upweight.training.newton import Newton


@pytest.fixture(scope="module")
def fitted():
    X, y = examples(60, 0)
    blank = uw.Task(nn.Linear(5, 3).double(), uw.CrossEntropy(), uw.L2(1e-3))
    made = Newton().prepare(blank, as_data((X, y)))(torch.ones(1, 60).double())
    return uw.Influence(uw.Hessian()).fit(blank.moved_to(made.theta[0]), (X, y))


def examples(n, seed):
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=draw)
    return torch.randn(n, 5, generator=draw).double() + torch.eye(3, 5).double()[y], y


def test_attacks_are_those_counted_by_hand(fitted):
    outside = examples(50, 1)
    found = holds(audit(fitted, range(40), outside, k=5))
    S = torch.cat(
        [fitted.attribute(fitted.train.subset(range(40))).values, fitted.attribute(outside).values]
    ).abs()
    member = np.arange(90) < 40
    order = S.argsort(descending=True)
    place = [
        order[q, :5].tolist().index(q) if q < 40 and q in order[q, :5] else 5 for q in range(90)
    ]
    top = S.sort(descending=True).values
    by_hand = {
        "own row": -np.array(place),
        "largest": top[:, 0].numpy(),
        "ratio": (top[:, 0] / top[:, 1]).numpy(),
    }
    for name, statistic in by_hand.items():
        auc = roc_auc_score(member, statistic)
        assert found.predicted["records and values", name] == pytest.approx(auc)
    shown = np.mean([place[q] < 5 for q in range(40)])
    assert found.shown["records and values"] == (pytest.approx(shown), 0.0)
    assert found.revealed["records and values"] == len(set(order[40:, :5].flatten().tolist()))
    assert found.revealed["values only"] == 0
    # True positives at 1 % of 50 outsiders: none of them may pass.
    ratio = next(
        a
        for a in found.attacks
        if a.name == "ratio" and a.redaction == "records and values"
    )  # fmt: skip
    expected = (by_hand["ratio"][:40] > by_hand["ratio"][40:].max()).mean()
    assert ratio.rates[1].value == pytest.approx(expected)


def test_withheld_rows_are_never_shown_and_cost_is_the_overlap(fitted):
    found = audit(fitted, range(40), examples(50, 1), k=5)
    name = "equal inputs withheld"
    assert found.predicted[name, "own row"] == 0.5
    assert found.shown[name] == (0.0, 0.0)
    shown = found.shown["records and values"][0]
    assert found.overlap[name] == pytest.approx(5 - shown * 40 / 90)
    assert found.overlap["records and values"] == 5


def test_redactions_of_scores(fitted):
    scores = fitted.attribute(fitted.train.subset([0, 7]))
    plain = redacted(scores, 4)
    assert plain.rows.tolist() == scores.values.abs().topk(4).indices.tolist()
    mask = torch.arange(60) % 3 == 0
    assert all(mask[i] for i in redacted(scores, 4, public=mask).rows.flatten().tolist())
    near = redacted(scores, 4, withhold="near-duplicates", radius=0.0)
    assert near.withheld.tolist() == [1, 1]
    assert 0 not in near.rows[0] and 7 not in near.rows[1]
    wide = redacted(scores, 4, withhold="near-duplicates", radius=1e9)
    assert (wide.rows == -1).all() and (wide.values == 0).all()
    told = redacted(scores, 4, records=False, digits=2)
    assert told.rows is None
    for value, full in zip(told.values.flatten(), plain.values.flatten(), strict=True):
        assert float(value) == pytest.approx(float(f"{float(full):.1e}"))
    assert redacted(scores, 4, Redaction(values=False)).values is None


def test_copies_are_withheld_by_the_default_radius():
    X, _ = examples(200, 3)
    X[100:110] = X[:10]  # 10 % of the rows have a copy: the 1 % quantile of distances is 0
    near = privacy._radius(X)
    assert near == 0
    X[100:110] += 0.01
    assert privacy._radius(X) == pytest.approx(0.01 * 5**0.5)


def test_pages_note_queries_that_were_trained_on(fitted):
    own = fitted.attribute(fitted.train.subset([0, 7]))
    outside = fitted.attribute(examples(3, 1))
    assert own_rows(own) == (0, 1) and own_rows(outside) == ()
    for scores, says in ((own, True), (outside, False)):
        notes = words_of(Answers(scores, Display()), None)["warnings"]
        assert any("2 queries are training examples" in note for note in notes) is says


def test_one_member_one_outsider_and_float32():
    X, y = examples(30, 0)
    X = X.float()
    task = uw.Task(nn.Linear(5, 3).float(), uw.CrossEntropy(), uw.L2(1e-2))
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(1.0)).fit(task, (X, y))
    outside = examples(4, 1)
    outside = (outside[0].float(), outside[1])
    holds(audit(fitted, [0, 1], outside, k=1, redactions={"now": Redaction()}))


def test_bad_questions_and_their_ways_out(fitted):
    outside = examples(5, 1)
    with pytest.raises(DataError, match="needs both"):
        audit(fitted, [], outside)
    with pytest.raises(DataError, match="training data given as outsiders"):
        audit(fitted, range(5), fitted.train.subset(range(5, 9)))
    with pytest.raises(ShapeError):
        audit(fitted, [60], outside)
    for k in (0, 61, 0.5):
        with pytest.raises(SpecError, match="number of training rows"):
            audit(fitted, range(5), outside, k=k)
    with pytest.raises(SpecError, match="near-duplicates"):
        Redaction(withhold="own rows")
    with pytest.raises(SpecError, match="whole or by its arguments"):
        redacted(fitted.attribute(outside), 5, Redaction(), digits=2)
    with pytest.raises(DataError, match="inputs=a function"):
        audit(fitted, range(5), outside, inputs=lambda batch: "no tensor")
    found = audit(fitted, range(5), outside, inputs=lambda batch: batch[0][:, :2])
    with pytest.raises(SpecError, match="as it was in the audit"):
        found.worst("nothing shown")
    assert found.worst("records and values").auc.value >= 0
