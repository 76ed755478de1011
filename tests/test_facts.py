"""What a method says of itself: past which limit it is a concern, kept on the disk, and shown."""

import math
from dataclasses import replace

import pytest
import torch

from upweight.facts import Fact
from upweight.methods.facts import stated
from upweight.provenance import Provenance
from upweight.report import html, summary
from upweight.scores import Scores, Unit

MINE = Fact("Agreement of members", "0.31", 0.2, "their scores differ by that share", 0.31)


@pytest.fixture
def scores():
    made = Provenance("Mine()", "t", "Loss()", 4, 2, 3, "float64", "cpu", facts=(MINE,))
    return Scores(torch.randn(2, 4, dtype=torch.float64), Unit.RANK, made)


@pytest.mark.parametrize(
    "number, limit, concern",
    [
        (0.1, 0.2, False),
        (0.2, 0.2, False),
        (0.3, 0.2, True),
        (math.nan, 0.2, True),
        (math.inf, 0.2, True),
        (None, 0.2, True),
        (0.3, None, False),
        (None, None, False),
    ],
)
def test_a_number_past_its_limit_or_unknown_is_a_concern(number, limit, concern):
    assert Fact("n", "v", limit, "m", number).concern == concern


def test_facts_are_the_same_after_a_trip_to_the_disk(scores, tmp_path):
    facts = (MINE, Fact("A", "b"), Fact("C", "not a number", 0.1, "d", math.nan))
    kept = replace(scores, provenance=replace(scores.provenance, facts=facts))
    assert Scores.load(kept.save(tmp_path)).provenance == kept.provenance


def test_what_a_new_method_states_is_shown_where_all_is(scores, tmp_path):
    page = html(scores, tmp_path / "page.html").read_text(encoding="utf-8")
    shown = "Agreement of members</dt>\n          <dd><b>0.31</b>"
    assert shown in page
    assert "their scores differ by that share; marked past 0.2" in page
    line = "agreement of members: 0.31 (their scores differ by that share; marked past 0.2)"
    assert str(MINE) == line
    assert f"look at {line}" in summary(scores)


def test_numbers_that_are_not_there_state_nothing():
    assert stated({}) == ()
    assert [fact.name for fact in stated({"solver": "Mine()"})] == ["Solver"]
