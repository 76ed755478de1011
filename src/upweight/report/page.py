"""Scores → one HTML file that opens offline: can it be trusted, what moved each query, what if.

The file is the answers of a view, asked in advance: data (JSON), sheets of thumbnails, columns of
scores and our own style and script. The bytes depend on the arguments alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upweight.applications.outcome import Outcome
from upweight.effects import Effects
from upweight.report.answers import Answers
from upweight.report.display import Display
from upweight.report.rendering import render_page, write_page
from upweight.report.sprite import geometry, sheets
from upweight.report.whatif import columns
from upweight.report.words import words_of
from upweight.scores import Scores

WAY_OUT = "free space, or write it elsewhere: path=, or --out FILE of `upweight report`."


def html(
    scores: Scores,
    path: str | Path,
    display: Display = Display(),  # noqa: B008  frozen
    *,
    evidence: Any = (),
    removal: Effects | None = None,
    outcomes: Outcome | Iterable[Outcome] = (),
    command: str | None = None,
) -> Path:
    """Write a report: can it be trusted, what moved each query, what the training set is worth.

    Args:
        scores: `[q, n]` or `[q, groups]`.
        path: The file to write; it is replaced whole or not at all.
        display: How examples and queries are shown.
        evidence: What retraining said, which the page says first: results of evaluation as they
            are, what `fitted.check(recipe, budget)` found and any number of comparisons of
            removals, as from `evaluation.loo`. Without a check the last of `scores.checks`.
        removal: Better predictions of Δm for the same columns, as from `fitted.removal(queries)`;
            by default removal is predicted to first order.
        outcomes: What applications returned: a section each.
        command: The command that makes this page again, for its footer.

    Returns:
        The path.

    Cost: some passes over the scores, which are never copied whole.

    Raises:
        UpweightError: See `Answers`.

    Example:
        >>> html(scores, "cats.html", Display(names=["cat", "dog"]), evidence=[check])
    """
    answers = Answers(scores, display, evidence, removal)
    shown = answers.hold()
    sprites = {
        role: sheets(images, *answers.range)
        for role, images in (("train", shown.images), ("query", answers.queries.images))
        if images is not None and len(images) and answers.range is not None
    }
    whole, text = columns(
        scores,
        answers.shown_by_queries(),
        [*answers.page.listed, *answers.evidence.removed],
        answers.totals.absolute,
    )
    words = words_of(answers, command, outcomes)
    data = answers.meta | {
        "answers": [answers.query(q) for q in range(answers.q)],
        "examples": answers.examples(answers.listed),
        "training": answers.training,
        "sprites": {role: geometry(found) for role, found in sprites.items()},
        "whole": whole,
        **words["trust"].data,
    }
    parts = {"columns": text}
    for role, found in sprites.items():
        parts |= {f"sheet-{role}-{k}": sheet.text for k, sheet in enumerate(found)}
    return write_page(path, render_page(data, words, parts), WAY_OUT)
