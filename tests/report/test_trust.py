"""What the page may claim: sizes where something supports them, else order, and the verdict."""

import html
import json
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import train_in_place
from tests.report.conftest import Removals, column
from upweight.errors import SpecError
from upweight.evaluation import Estimate
from upweight.report import Display, summary
from upweight.report.evidence import evidence_of
from upweight.report.trust import CAUTIONS, trust
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
    return Removals(
        "first order", tuple((i,) for i in range(count)), column(draw), column(draw),
        Estimate(*spearman), Estimate(*spearman), Estimate(*slope),
    )  # fmt: skip


def trusted(scores, *evidence, removal=None):
    return trust(scores, evidence_of(evidence, *scores.values.shape), removal)


def fact(run, make_provenance, **changes):
    known = {**run.scores.provenance.health, **changes}
    return replace(run.scores, provenance=make_provenance(health=known))


def test_an_exact_method_at_the_minimum_of_a_convex_objective_supports_sizes(run):
    found = trusted(run.scores)
    assert found.has_sizes and found.level == "unchecked"
    assert found.title == "Not checked against retraining"


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
    found = trusted(fact(run, make_provenance, **changes))
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
    assert not trusted(scores).has_sizes


@pytest.mark.parametrize("curvature", [uw.Hessian(), uw.GGN(), uw.EKFAC()])
@pytest.mark.parametrize("hidden", [False, True])
def test_of_real_methods_the_exact_ones_of_linear_models(curvature, hidden):
    torch.manual_seed(0)
    x, y = torch.randn(300, 4).double(), torch.randint(3, (300,))
    layers = [nn.Linear(4, 4), nn.Tanh()] if hidden else []
    task = uw.Task(nn.Sequential(*layers, nn.Linear(4, 3)).double(), uw.CrossEntropy(), uw.L2(0.1))
    train_in_place(task, (x, y))
    scores = uw.Influence(curvature).fit(task, (x, y)).attribute((x[:3], y[:3]))
    exact = not hidden and not isinstance(curvature, uw.EKFAC)
    assert trusted(scores).has_sizes == exact


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
    display = Display(train, queries)
    page = uw.report.html(scores, tmp_path / "page.html", display, removal=removal)
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert ("sizes are good to first order" in text) != misses
    assert ("the removals' own note says: for " in text) == misses
    assert ('"caution":""' in text) != misses
    for note in removal.provenance.notes:
        assert text.count(f"<li>{note}</li>") == 1


def test_no_retraining_makes_sizes_of_removals_that_say_they_miss(run, make_provenance):
    note = "removal: what was measured is no line over the step. More. And more."
    removal = replace(run.scores.removal(), provenance=make_provenance(notes=(note,)))
    for evidence in (Found(Verdict.SIZE, notes=("n",)), removals()):
        assert trusted(run.scores, evidence).has_sizes
        found = trusted(run.scores, evidence, removal=removal)
        assert (found.title, found.level, found.has_sizes) == ("Order only", "order", False)
        assert found.reason.endswith("note says: what was measured is no line over the step")
        assert found.notes == (("n",) if isinstance(evidence, Found) else ())


def test_better_predictions_of_a_method_that_is_not_exact_have_no_sizes(run, make_provenance):
    damped = replace(run.scores, provenance=make_provenance(method="Influence(curvature=EKFAC())"))
    found = trusted(run.scores, removal=damped.removal())
    assert not found.has_sizes and "not known to be exact" in found.reason


def test_ranks_have_no_size(run):
    found = trusted(replace(run.scores, unit=Unit.RANK))
    assert found.caution == "scores only rank"
    assert "no size" in found.reason


@pytest.mark.parametrize("verdict", Verdict)
def test_a_comparison_decides_whatever_the_method(run, layerwise, verdict):
    for scores in (run.scores, layerwise.scores):
        found = trusted(scores, Found(verdict, notes=("n", "because")))
        assert (found.title, found.reason, found.notes) == (verdict.value, "because", ("n",))
        assert found.has_sizes == (verdict is Verdict.SIZE)


def test_enough_removals_have_a_verdict_the_worst_of_theirs(layerwise, make_sets):
    good, wrong = removals(), removals(slope=(0.02, 0.01, 0.03))
    assert trusted(layerwise.scores, good).has_sizes
    found = trusted(layerwise.scores, good, wrong)
    assert (found.title, found.has_sizes) == ("Order only", False)
    for few in (removals(count=7), make_sets()):
        found = trusted(layerwise.scores, few)
        assert found.title == "Not checked against retraining"
        assert "too few for a verdict" in found.reason


def test_results_of_evaluation_are_taken_as_they_are_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(30, 2).double(), torch.randn(30, 1).double()
    task = uw.Task(nn.Linear(2, 1).double(), uw.SquaredError(), uw.L2(0.1))
    train_in_place(task, (x, y))
    scores = uw.Influence(uw.Hessian()).fit(task, (x, y)).attribute((x[:3], y[:3]))
    found = uw.check(scores, uw.training.Newton(), subsets=8, resources=uw.Resources(jobs=1))
    removed = uw.evaluation.loo(scores, uw.training.Newton(), [1, (2, 3), 5], query=2)

    def page(evidence):
        path = uw.report.html(scores, tmp_path / "page.html", evidence=evidence)
        return path.read_text(encoding="utf-8"), summary(scores, evidence=evidence)

    for given in (["first order"], [found, found], found.lds, [None]):
        with pytest.raises(SpecError, match=r"evidence=\[loo, fitted\.check"):
            page(given)
    text, lines = page([removed, found])
    assert found.verdict.value in text and found.verdict.value in lines
    estimate = f"Pearson {removed.pearson.value:.3f}"
    assert f"first order  3 removals on query 2:  {estimate}"[:40] in lines
    shown = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])["checks"]
    assert [check["removed"] for check in shown] == [[[1], [2, 3], [5]]]
    np.testing.assert_allclose(shown[0]["actual"], removed.actual[:, 0], rtol=1e-5)
    every = uw.evaluation.loo(scores, uw.training.Newton(), [1, 5])
    assert [each.query for each in evidence_of([every], 3, 30).series] == [0, 1, 2]
    assert page(removed) == page([removed]), "one by itself needs no list"
    one = uw.evaluation.loo(scores, uw.training.Newton(), [7], query=0)
    assert "too little to say" in page([one])[0]


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
    run.options = {"evidence": [Found(verdict, notes=("the note",))]}
    run.write()
    page = opened(run.path)
    for name in ("Can I trust this?", "Queries", "Training set"):
        page.get_by_role("link", name=name).click()
        banner = page.get_by_role("complementary", name="Verdict")
        assert banner.inner_text().startswith(f"{verdict.value}: because.")
        assert "Note: the note." in banner.inner_text()
        assert page.locator("#pages .pill").inner_text() == verdict.value
    page.get_by_role("link", name="Queries").click()
    on_cards = set(page.locator("#raised .pill").all_inner_texts())
    assert on_cards == {CAUTIONS[verdict] or verdict.value}
    removed = page.locator(".card dt", has_text="removed").count()
    assert bool(removed) == (verdict is Verdict.SIZE)
    marked = page.locator(".health .concern dt").all_text_contents()
    assert ("Retraining" in marked) == (verdict is not Verdict.SIZE)
