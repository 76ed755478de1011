"""The health panel and the summary for a terminal."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from upweight.facts import FIRST_ORDER
from upweight.methods.facts import COMPRESSION, SUM
from upweight.report import Display, summary
from upweight.report.evidence import evidence_of
from upweight.report.plain import plainly
from upweight.report.trust import trust
from upweight.report.words import convention, health, verdict
from upweight.scores import Unit
from upweight.verdict import Verdict


def said(scores, evidence=()):
    return evidence_of(evidence, *scores.values.shape)


def by_name(scores, evidence=()):
    return {
        line["name"]: SimpleNamespace(**line) for line in health(scores, said(scores, evidence))
    }


def test_a_sound_run_that_was_checked_has_no_concern(run, make_check):
    facts = by_name(run.scores, [make_check()])
    assert [name for name, fact in facts.items() if fact.concern] == []
    assert facts["Retraining"].value == "3 removals, 1 query"
    assert facts["Solver"].value == "Cholesky()"
    assert "condition number at least 812" in facts["Damping"].told
    assert facts["Time"].value == "2.00 s"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("At a minimum", {"decrement": 1e-3}),
        ("At a minimum", {"decrement": math.nan}),
        (SUM, {"row_sum_excess_relative": 0.05}),
        (FIRST_ORDER, {"beyond_first_order": [[1, 0.3], [10, 0.4]]}),
        (FIRST_ORDER, {"beyond_first_order": [[1, None]]}),
        ("Solver", {"largest_residual": 0.01}),
        ("Solver", {"largest_residual": math.nan}),
    ],
)
def test_what_is_past_its_limit_is_marked(run, make_provenance, make_check, name, changes):
    made = make_provenance(health={**run.scores.provenance.health, **changes})
    facts = by_name(replace(run.scores, provenance=made), [make_check()])
    assert [fact.name for fact in facts.values() if fact.concern] == [name]


def test_a_residual_that_was_asked_for_is_told_and_not_marked(run, make_provenance, make_check):
    health = {**run.scores.provenance.health, "largest_residual": 0.01, "solver_rtol": 0.02}
    scores = replace(run.scores, provenance=make_provenance(health=health))
    assert not any(fact.concern for fact in by_name(scores, [make_check()]).values())
    told = " ".join(each.said for each in plainly(scores, said(scores)))
    assert "solved to 1.0 %, as asked" in told and "accurately" not in told


def test_removals_are_told_in_a_sentence(run, make_provenance):
    def told(known):
        health = {**run.scores.provenance.health, "beyond_first_order": known}
        scores = replace(run.scores, provenance=make_provenance(health=health))
        return next(each for each in plainly(scores, said(scores)) if "strongest" in each.said)

    found = told([[1, 0.095], [5, 0.1], [500, 0.66]])
    assert not found.concern and "500 strongest together does to a query is 66 %" in found.said
    assert found.said.startswith(
        "What removing the strongest example does to a query is 9.5 % away"
    )
    assert told([[1, 0.3]]).concern and "fitted.removal(queries)" in told([[1, 0.3]]).todo
    assert (
        told([[1, None]]).said == "Without the strongest example the others determine no minimum."
    )


def test_damping_is_told_in_eigenvalue_units(run, make_provenance):
    made = make_provenance(health={"damping": 0.02, "mean_eigenvalue": 0.2})
    fact = by_name(replace(run.scores, provenance=made))["Damping"]
    assert fact.value == "λ = 0.0200 = 0.100 × mean eigenvalue"


def test_standard_errors_are_told_where_there_are_any(run):
    noisy = replace(run.scores, error=torch.full_like(run.scores.values, 0.1))
    expected = 0.1 * math.sqrt(30) / float(run.scores.values.norm())
    assert by_name(noisy)["Standard error"].value == f"{expected:.3g}"
    assert "Standard error" not in by_name(run.scores)


def test_not_compared_with_retraining_is_a_concern(run):
    assert by_name(run.scores)["Retraining"].concern
    assert trust(run.scores, said(run.scores)).title == "Not checked against retraining"


class Found:
    """What `fitted.check` gives, as far as a report reads it."""

    verdict = Verdict.SIZE
    reason = "rank correlation with <b>retraining</b> 0.41 ± 0.05; sizes are right"
    notes = ()
    models = 34


def test_a_comparison_as_a_whole_is_said_first(run, make_check):
    found = trust(run.scores, said(run.scores, [make_check(), Found()]))
    assert (found.title, found.reason) == ("Order and size", Found.reason)
    fact = by_name(run.scores, [Found()])["Retraining"]
    assert fact.value == "34 models: Order and size" and not fact.concern


def test_the_page_shows_it_before_everything_else(run):
    run.options["evidence"] = [Found()]
    run.write()
    page = run.path.read_text()
    words = "rank correlation with &lt;b&gt;retraining&lt;/b&gt; 0.41 ± 0.05; sizes are right."
    assert page.index(words) < page.index('id="pages"'), "seen on every page of it"
    assert "Not checked against retraining" not in page


def test_the_verdict_is_about_the_best_calibrated_prediction(make_check):
    given = [make_check(), make_check(label="leverage-corrected", scale=1.4)]
    checks = evidence_of(given, 3, 10).series
    assert "leverage-corrected prediction" in verdict(checks, "image")
    assert "leverage-corrected prediction" in verdict(checks[::-1], "image")


def test_each_unit_has_its_sentence(run):
    sentences = {convention(replace(run.scores, unit=unit)) for unit in Unit}
    assert len(sentences) == 3


def test_summary_tells_ends_agreement_and_concerns(run, make_check, make_provenance):
    made = make_provenance(
        health={**run.scores.provenance.health, "largest_residual": 0.5}, notes=("a note",)
    )
    scores = replace(run.scores, provenance=made)
    display = Display(train_labels=[7] * 10)
    text = summary(scores, query=1, k=2, display=display, evidence=[make_check()])
    ranking = scores.top(2, 1)
    assert "10 training examples, 3 queries, 7 parameters; unit ∂m/∂w of the loss" in text
    raised = next(line for line in text.splitlines() if "raised its loss" in line)
    assert [f"#{i} (7)" in raised for i in ranking.raises] == [True, True]
    assert "Pearson 0.980 [0.970, 0.990]  slope 1.470 [1.400, 1.540]" in text
    assert "look at solver" in text
    assert text.endswith("note: a note")


def test_summary_of_groups_and_of_zeros(run):
    assert "odd " in summary(run.scores.group(["even", "odd"] * 5))
    zeros = replace(run.scores, values=torch.zeros(3, 10))
    assert "raised its loss:   none" in summary(zeros)


def test_damping_by_block_is_a_range_and_a_share_of_eigenvalues(layerwise):
    facts = by_name(layerwise.scores)
    assert facts["Damping"].value == "λ from 2.00×10⁻⁴ to 0.00100"
    # (0.25 · 100 + 1 · 50) / 150 of the eigenvalues.
    assert "50 % of all eigenvalues are below" in facts["Damping"].told
    assert facts["Curvature"].value == "± 3.0 %"


@pytest.mark.parametrize(
    "error, concern", [(0.004, False), (0.01, False), (0.011, True), (math.nan, True)]
)
def test_a_contraction_past_its_tolerance_is_marked(layerwise, make_provenance, error, concern):
    health = {**layerwise.scores.provenance.health, "contraction_error": error}
    scores = replace(layerwise.scores, provenance=make_provenance(health=health))
    fact = by_name(scores)[COMPRESSION]
    assert fact.concern == concern
    assert "worst 0.0200" in fact.told


def test_an_exact_contraction_says_so(layerwise, make_provenance):
    health = {**layerwise.scores.provenance.health, "contraction_error": 0.0, "tolerance": 0.0}
    made = make_provenance(health=health)
    assert by_name(replace(layerwise.scores, provenance=made))[COMPRESSION].value == "exact"


def test_passes_are_part_of_the_fit_and_not_counted_twice(run, make_provenance):
    seconds = {"fit": 2.0, "fit: pass 1": 1.5, "fit: pass 2": 0.25, "attribute": 1.0}
    made = make_provenance(seconds=seconds)
    fact = by_name(replace(run.scores, provenance=made))["Time"]
    assert fact.value == "3.00 s"
    expected = "fit 2.00 s (of which pass 1 1.50 s, pass 2 0.250 s), attribute 1.00 s"
    assert expected in fact.told


def test_the_verdict_on_several_queries_is_about_all_of_them(make_sets):
    series = evidence_of([make_sets(), make_sets(query=1, slope=0.9)], 3, 10).series
    words = verdict(series, "image")
    assert "3 sets of 2 training images were really removed" in words
    assert "from 3 seeds each" in words
    assert "0.40 to 0.90 times the predicted one" in words


def test_removals_of_several_queries_are_counted_once(run, make_sets):
    fact = by_name(run.scores, [make_sets(), make_sets(query=1)])["Retraining"]
    assert fact.value == "3 removals, 2 queries"
    assert "mean of 3 retrainings" in fact.told


def test_each_concern_says_what_to_do_in_plain_words(layerwise, make_provenance):
    worse = {"gradient_norm": 0.1, "decrement": 0.03, "row_sum_excess_relative": 0.49,
             "solver": "CG()", "largest_residual": 0.01}  # fmt: skip
    made = make_provenance(health={**layerwise.scores.provenance.health, **worse})
    found = plainly(replace(layerwise.scores, provenance=made), said(layerwise.scores))
    assert [bool(each.todo) for each in found] == [True] * 4 + [False] * 3
    told = " ".join(each.said + each.todo for each in found)
    assert "off by 49 % of their size" in told and "along 50 % of all directions" in told
    assert not re.search("[λ∇‖∂]|residual|eigenvalue|decrement", told)
