"""What the page may claim: sizes where something supports them, else order, and the verdict."""

import html
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import train_in_place
from upweight.errors import SpecError
from upweight.report import Check, summary
from upweight.report.trust import trust
from upweight.scores import Unit
from upweight.verdict import Verdict

SIGNED = re.compile(r"[+−]\d")


@dataclass
class Found:
    """What `fitted.check` gives, as far as a report reads it."""

    verdict: Verdict
    reason: str = "because"
    notes: tuple[str, ...] = ()
    models: int = 34


def removals(slope=(1.0, 0.9, 1.1), spearman=(0.9, 0.8, 1.0), count=8):
    draw = np.random.default_rng(0).normal(size=count)
    return Check("first order", list(range(count)), draw, draw, spearman, spearman, slope)


def fact(run, make_provenance, **changes):
    known = {**run.scores.provenance.health, **changes}
    return replace(run.scores, provenance=make_provenance(health=known))


def test_an_exact_method_at_the_minimum_of_a_convex_objective_supports_sizes(run):
    found = trust(run.scores, (), None)
    assert found.has_sizes and found.level == "unchecked"
    assert found.title == "Not checked against retraining"
    assert trust(replace(run.scores, unit=Unit.DIFFERENCE), (), None).has_sizes


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"convex": False}, "convex"),
        ({"convex": None}, "convex"),
        ({"damping": 1e-3}, "damping"),
        ({"decrement": 1e-3}, "at a minimum"),
        ({"decrement": float("nan")}, "at a minimum"),
        ({"row_sum_excess_relative": 0.05}, "row-sum excess"),
        ({"largest_residual": 0.01}, "solver"),
        ({"gradient_norm": None}, "at its minimum"),
    ],
)
def test_each_assumption_that_fails_takes_the_sizes(run, make_provenance, changes, why):
    found = trust(fact(run, make_provenance, **changes), (), None)
    assert found.caution == "size not checked"
    assert why in found.reason


@pytest.mark.parametrize(
    "method",
    [
        "Influence(curvature=EKFAC())",
        "Influence(curvature=EmpiricalFisher(), damping=0.0)",
        "Mine(Influence(curvature=Hessian(), ))",
        "not recorded",
    ],
)
def test_an_approximation_or_an_unknown_method_has_no_sizes(run, make_provenance, method):
    scores = replace(run.scores, provenance=make_provenance(method=method))
    assert not trust(scores, (), None).has_sizes


@pytest.mark.parametrize("curvature", [uw.Hessian(), uw.GGN(), uw.EKFAC()])
@pytest.mark.parametrize("hidden", [False, True])
def test_of_real_methods_the_exact_ones_of_linear_models(curvature, hidden):
    torch.manual_seed(0)
    x, y = torch.randn(60, 4).double(), torch.randint(3, (60,))
    layers = [nn.Linear(4, 4), nn.Tanh()] if hidden else []
    task = uw.Task(nn.Sequential(*layers, nn.Linear(4, 3)).double(), uw.CrossEntropy(), uw.L2(0.1))
    train_in_place(task, (x, y))
    scores = uw.Influence(curvature).fit(task, (x, y)).attribute((x[:3], y[:3]))
    exact = not hidden and not isinstance(curvature, uw.EKFAC)
    assert trust(scores, (), None).has_sizes == exact


@pytest.fixture(params=[1e-6, 1.0], ids=["misses", "is right"])
def removed(request):
    """Classes that a line separates: almost without a penalty, one example holds the line."""
    torch.manual_seed(0)
    x = torch.randn(30, 2).double()
    y = (x[:, :1] > 0).double()
    task = uw.Task(nn.Linear(2, 1).double(), uw.Bernoulli(), uw.L2(request.param))
    train_in_place(task, (x, y))
    fitted = uw.Influence(uw.Hessian()).fit(task, (x, y))
    queries = (x[:3], y[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        removal = fitted.removal(queries)
    return request.param < 1, fitted.attribute(queries), removal, (x, y), queries


def test_removals_that_say_they_miss_take_the_sizes(removed, tmp_path):
    """Each page against its opposite: the same problem with a penalty under which none misses."""
    misses, scores, removal, train, queries = removed
    assert any(note.startswith("removal:") for note in removal.provenance.notes) == misses
    for shown, better in ((removal, None), (scores, removal)):
        page = uw.report.html(shown, train, queries, tmp_path / "page.html", removal=better)
        text = html.unescape(page.read_text(encoding="utf-8"))
        assert ("sizes are good to first order" in text) != misses
        assert ("the removals' own note says: for " in text) == misses
        assert ('"caution":""' in text) != misses
        for note in removal.provenance.notes:
            assert text.count(f"<li>{note}</li>") == 1
    assert ("sizes are good" in summary(removal)) != misses


def test_no_retraining_makes_sizes_of_removals_that_say_they_miss(run, make_provenance):
    note = "removal: what was measured is no line over the step. More. And more."
    removal = replace(run.scores, provenance=make_provenance(notes=(note,)), unit=Unit.DIFFERENCE)
    for checks, comparison in (((), Found(Verdict.SIZE, notes=("n",))), ([removals()], None)):
        assert trust(run.scores, checks, comparison).has_sizes
        for found in (
            trust(run.scores, checks, comparison, removal),
            trust(removal, checks, comparison),
        ):
            assert (found.title, found.level, found.has_sizes) == ("Order only", "order", False)
            assert found.reason.endswith("note says: what was measured is no line over the step")
            assert found.notes == (("n",) if comparison else ())


def test_better_predictions_of_a_method_that_is_not_exact_have_no_sizes(run, make_provenance):
    damped = replace(run.scores, provenance=make_provenance(method="Influence(curvature=EKFAC())"))
    found = trust(run.scores, (), None, replace(damped, unit=Unit.DIFFERENCE))
    assert not found.has_sizes and "not known to be exact" in found.reason


def test_ranks_have_no_size(run):
    found = trust(replace(run.scores, unit=Unit.RANK), (), None)
    assert found.caution == "scores only rank"
    assert "no size" in found.reason


@pytest.mark.parametrize("verdict", Verdict)
def test_a_comparison_decides_whatever_the_method(run, layerwise, verdict):
    for scores in (run.scores, layerwise.scores):
        found = trust(scores, (), Found(verdict, notes=("n", "because")))
        assert (found.title, found.reason, found.notes) == (verdict.value, "because", ("n",))
        assert found.has_sizes == (verdict is Verdict.SIZE)


def test_enough_removals_have_a_verdict_the_worst_of_theirs(layerwise, make_sets):
    good, wrong = removals(), removals(slope=(0.02, 0.01, 0.03))
    assert trust(layerwise.scores, [good], None).has_sizes
    found = trust(layerwise.scores, [good, wrong], None)
    assert (found.title, found.has_sizes) == ("Order only", False)
    for few in (removals(count=7), make_sets()):
        found = trust(layerwise.scores, [few], None)
        assert found.title == "Not checked against retraining"
        assert "too few for a verdict" in found.reason


def test_a_comparison_among_the_checks_is_refused_and_is_taken_as_a_comparison(
    tmp_path, make_check
):
    torch.manual_seed(0)
    x, y = torch.randn(30, 2).double(), torch.randn(30, 1).double()
    task = uw.Task(nn.Linear(2, 1).double(), uw.SquaredError(), uw.L2(0.1))
    train_in_place(task, (x, y))
    queries = (x[:3], y[:3])
    scores = uw.Influence(uw.Hessian()).fit(task, (x, y)).attribute(queries)
    found = uw.check(scores, uw.Newton(), subsets=8, jobs=1, progress=False)

    def page(**options):
        return uw.report.html(scores, (x, y), queries, tmp_path / "page.html", **options)

    for given in ([found], found, [make_check(), found]):
        for ask in (lambda: page(checks=given), lambda: summary(scores, checks=given)):  # noqa: B023
            with pytest.raises(SpecError, match="as comparison=") as refused:
                ask()
            assert "uw.report.Check" in str(refused.value)
    with pytest.raises(SpecError, match=r"checks=\[check\]"):
        page(comparison=make_check())
    with pytest.raises(SpecError, match=r"checks=\[check\]"):
        page(checks=make_check())
    with pytest.raises(SpecError, match="another kind"):
        page(checks=["first order"])
    assert found.verdict.value in page(comparison=found).read_text(encoding="utf-8")  # ways out
    assert make_check().label in page(checks=[make_check()]).read_text(encoding="utf-8")


def test_the_terminal_says_it_first_and_prints_no_size_without_support(run, layerwise):
    text = summary(layerwise.scores)
    assert text.startswith("Not checked against retraining: read the order")
    assert not SIGNED.search(text)


def test_no_predicted_change_is_printed_where_nothing_supports_it(layerwise, opened):
    draw = np.random.default_rng(1)
    layerwise.options = {
        "values": [0.5, 2.5, 1.5],
        "train_losses": draw.random(10),
        "self_influence": -draw.random(10),
        "metadata": {"half": [0, 1] * 5},
        "train_tokens": [["ab", "cd"]] * 10,
        "token_scores": lambda q, some: (
            np.ones((len(some), 2)),
            layerwise.scores.values[q, some].numpy() - 2.0,
        ),
    }
    layerwise.write()
    page = opened(layerwise.path, "#queries/0")
    ranks = page.locator("#raised .card dd").all_inner_texts()
    assert ranks == [str(k + 1) for k in range(len(ranks))]
    cards = page.locator(".sides").inner_text()
    assert "size not checked" in cards
    assert "removed" not in cards and not SIGNED.search(cards)
    assert not SIGNED.search(page.locator("#histogram").inner_text())
    page.locator("#raised .drop-tick input").first.check()
    words = page.locator("#drop-words").inner_text()
    assert "predicted to fall (size not checked)" in words
    assert not SIGNED.search(words)
    page.locator("#drop-all").click()
    panel = page.locator("#drop-panel")
    assert not SIGNED.search(panel.inner_text())
    assert panel.locator("thead th").all_inner_texts() == ["query", "label", "", "change", "now"]
    assert set(panel.locator("tbody td:nth-child(4)").all_inner_texts()) <= {"rise", "fall"}
    page.locator("#drop-none").click()
    page.get_by_role("link", name="Training set").click()
    page.locator("#suspicious-title").wait_for()
    shown = page.locator("#training").inner_text()
    assert not SIGNED.search(re.sub(r"(?s)Classes on classes.*?Groups", "", shown))
    assert "predicted to rise" not in shown and "size not checked" in shown


@pytest.mark.parametrize("verdict", Verdict)
def test_the_verdict_is_on_every_page(run, opened, verdict):
    run.options = {"comparison": Found(verdict, notes=("the note",))}
    run.write()
    page = opened(run.path)
    for name in ("Can I trust this?", "Queries", "Training set"):
        page.get_by_role("link", name=name).click()
        banner = page.get_by_role("complementary", name="Verdict")
        assert banner.inner_text().startswith(f"{verdict.value}: because.")
        assert "Note: the note." in banner.inner_text()
        assert page.locator(".pill").inner_text() == verdict.value
    page.get_by_role("link", name="Queries").click()
    removed = page.locator(".card dt", has_text="removed").count()
    assert bool(removed) == (verdict is Verdict.SIZE)
    marked = page.locator(".health .concern dt").all_text_contents()
    assert ("Retraining" in marked) == (verdict is not Verdict.SIZE)
