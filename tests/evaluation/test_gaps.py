"""The five gaps: they add up, and where a stage changes nothing its gap is nothing."""

import pytest
import torch

import upweight as uw
from tests.market import draw, problem
from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.evaluation.gaps import GAPS, STAGES, Gaps, gaps
from upweight.training.optimizers import SGD
from upweight.training.training import Training

DAMPING = 0.05


def made(seed=0, e=30, q=4):
    g = torch.Generator().manual_seed(seed)
    return {name: draw(g, e, q) for name in STAGES}


def test_the_gaps_add_up_to_the_whole():
    found = Gaps(tuple((k,) for k in range(30)), made())
    assert [gap.name for gap in found.each] == list(GAPS)
    assert sum(gap.share.value for gap in found.each) == pytest.approx(1.0, abs=1e-12)


def test_each_number_is_its_definition():
    effects = made()
    found = Gaps(tuple((k,) for k in range(30)), effects)
    total = effects["cold start"] - effects["scores"]
    for gap, before, after in zip(found.each, STAGES[:-1], STAGES[1:], strict=True):
        difference = effects[before] - effects[after]
        assert gap.size.value == pytest.approx(float(difference.square().mean().sqrt()))
        share = float((difference * total).sum() / total.square().sum())
        assert gap.share.value == pytest.approx(share)
        pairs = torch.stack([effects[before].flatten(), effects[after].flatten()])
        assert gap.pearson.value == pytest.approx(float(torch.corrcoef(pairs)[0, 1]))
        for estimate in (gap.size, gap.share, gap.pearson):
            assert estimate.low < estimate.value < estimate.high
    assert found.largest.size.value == max(gap.size.value for gap in found.each)


def test_intervals_shrink_with_the_square_root_of_the_removals():
    def width(e):
        gap = Gaps(tuple((k,) for k in range(e)), made(e=e)).each[0]
        return gap.size.high - gap.size.low

    assert width(400) == pytest.approx(width(100) / 2, rel=0.3)


@pytest.fixture(scope="module")
def on_ridge():
    """Convex, converged, quadratic: only what removal does to the curvature is left."""
    p = problem("ridge")
    recipe = Training(lambda: torch.nn.Linear(3, 1, bias=False), SGD(0.3), 400, p.n)
    method = uw.Influence(uw.GGN(), damping=uw.Absolute(DAMPING))
    scores = method.fit(p.task, p.train).attribute(p.queries, uw.Loss())
    return gaps(scores, scores, recipe, range(p.n), damping=DAMPING)


def test_where_nothing_is_approximated_gaps_are_zero(on_ridge):
    sizes = {gap.name: gap.size.value for gap in on_ridge.each}
    effect = float(on_ridge.effects["cold start"].square().mean().sqrt())
    assert sizes["warm start"] < 1e-6 * effect
    assert sizes["non-convergence"] < 1e-6 * effect
    assert sizes["solver"] == 0.0
    assert sizes["proximity"] > 1e-3 * effect, "a damping of this size is seen"
    assert sizes["linearization"] > 1e-3 * effect, "so is a removal's own curvature"


def test_it_says_what_it_found(on_ridge):
    text = str(on_ridge)
    assert all(name in text for name in GAPS)
    assert f"the largest is {on_ridge.largest.name}" in text
    assert on_ridge.summary()["largest"] == on_ridge.largest.name
    assert set(on_ridge.summary()["gaps"]) == set(GAPS)


@pytest.mark.parametrize("wrong", ["cold", "few"])
def test_what_would_mix_gaps_up_is_refused_before_any_training(wrong):
    p = problem("ridge")
    recipe = Training(lambda: torch.nn.Linear(3, 1, bias=False), SGD(0.3), 1, p.n)
    method = uw.Influence(uw.GGN(), damping=uw.Absolute(DAMPING))
    scores = method.fit(p.task, p.train).attribute(p.queries, uw.Loss())
    given = {"warm": recipe} if wrong == "cold" else {}
    examples = range(2 if wrong == "few" else p.n)
    with pytest.raises(SpecError, match="warm start without an init"):
        gaps(scores, scores, recipe, examples, damping=DAMPING, **given)


def test_stages_must_fit_each_other():
    wrong = made()
    wrong["PBRF"] = wrong["PBRF"][:, :2]
    with pytest.raises(ShapeError, match=r"PBRF \(30, 2\)"):
        Gaps(tuple((k,) for k in range(30)), wrong)
    missing = made()
    del missing["warm start"]
    with pytest.raises(ShapeError, match="six matrices"):
        Gaps(tuple((k,) for k in range(30)), missing)
    diverged = made()
    diverged["cold start"][3, 0] = torch.nan
    with pytest.raises(NonFinite, match="cold start"):
        Gaps(tuple((k,) for k in range(30)), diverged)


def test_the_figure_holds_the_five_sizes():
    found = Gaps(tuple((i,) for i in range(30)), made())
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(GAPS)
    assert [bar.get_width() for bar in ax.patches] == [gap.size.value for gap in found.each]
    shares = [text.get_text().strip() for text in ax.texts]
    assert shares == [f"{round(100 * gap.share.value)} % of the whole" for gap in found.each]
