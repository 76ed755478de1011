"""Three verdicts, and the rule that gives them."""

import math

import pytest

from upweight.verdict import Judgement, Reproduction, Verdict, judged, worst

FIRM, RIGHT = (0.8, 0.7, 0.9), (1.0, 0.9, 1.1)
SAME, OTHER = Reproduction(0.01, 1.0), Reproduction(1.5, 0.5)


@pytest.mark.parametrize(
    "correlation, slope, verdict",
    [
        (FIRM, RIGHT, Verdict.SIZE),
        (FIRM, (1.0, 0.5, 2.0), Verdict.SIZE),
        (FIRM, (1.0, 0.49, 1.5), Verdict.ORDER),
        (FIRM, (1.0, 0.6, 2.01), Verdict.ORDER),
        (FIRM, (0.02, 0.01, 0.03), Verdict.ORDER),
        (FIRM, (8.0, 6.0, 9.0), Verdict.ORDER),
        (FIRM, (0.1, -0.5, 0.7), Verdict.ORDER),
        (FIRM, (-0.4, -0.5, -0.3), Verdict.DOUBT),
        (FIRM, (1.0, math.nan, math.nan), Verdict.ORDER),
        ((0.01, 1e-6, 0.02), RIGHT, Verdict.SIZE),
        ((-0.01, -0.21, 0.19), RIGHT, Verdict.DOUBT),
        ((0.2, 0.0, 0.4), RIGHT, Verdict.DOUBT),
        ((-0.5, -0.6, -0.4), (-1.0, -1.1, -0.9), Verdict.DOUBT),
        ((0.9, math.nan, math.nan), RIGHT, Verdict.DOUBT),
    ],
)
def test_intervals_make_the_verdict(correlation, slope, verdict):
    assert judged(correlation, slope, 20).verdict is verdict
    assert judged(correlation, slope, 20, (0.9, 0.8, 1.0), SAME).verdict is verdict


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reproduction": OTHER}, "the recipe makes another model"),
        ({"models": 7}, "7 retrained models are too few to tell"),
        ({"ceiling": (0.1, -0.1, 0.3)}, "does not repeat itself"),
    ],
)
def test_what_makes_any_agreement_worthless_is_the_verdict(changes, words):
    found = judged(**{"correlation": FIRM, "slope": RIGHT, "models": 20} | changes)
    assert found.verdict is Verdict.DOUBT
    assert words in found.reason


def test_another_model_comes_before_everything_else():
    found = judged((-0.01, -0.2, 0.2), RIGHT, 3, (0.0, -1.0, 1.0), OTHER)
    assert found.reason.startswith("on all of the data the recipe makes another model")


@pytest.mark.parametrize("apart, holds", [(0.1, True), (0.11, False), (math.nan, False)])
def test_a_model_is_the_same_within_a_tenth_of_what_removals_do(apart, holds):
    for noise in (None, 0.01):
        found = Reproduction(apart, 1.0, noise)
        assert found.is_same == found.holds == holds
        assert len(found.notes) == (not holds)
        assert ("another seed" in "".join(found.notes)) == (noise is not None and not holds)


@pytest.mark.parametrize("apart, holds", [(0.3, True), (1.0, True), (1.01, False)])
def test_a_model_may_be_another_seed_within_twice_what_seeds_do(apart, holds):
    found = Reproduction(apart, 1.0, 0.5)
    assert (found.holds, found.is_same) == (holds, False)
    assert not Reproduction(apart, 1.0).holds, "without seeds nothing is known of their spread"
    (note,) = found.notes
    assert note.startswith("the model is as another seed of the recipe") == holds
    assert "recipe makes another model" not in note or not holds
    said = judged(FIRM, RIGHT, 20, (0.9, 0.8, 1.0), found)
    assert said.verdict is (Verdict.SIZE if holds else Verdict.DOUBT)


def test_nothing_agrees_and_disagrees_at_once():
    said = judged((-0.01, -0.21, 0.19), (0.02, -0.3, 0.4), 20).reason
    assert "agree" not in said
    assert "may be chance" in said


def test_the_worst_of_several_says_least_for_the_scores():
    each = [Judgement(v, v.value) for v in (Verdict.SIZE, Verdict.DOUBT, Verdict.ORDER)]
    assert worst(each).verdict is Verdict.DOUBT
    assert worst(each[::2]).verdict is Verdict.ORDER
