"""Scores → something to look at: one self-contained HTML page, and a few lines of text.

    html(scores, "report.html", Display(names=…), evidence=[check])     summary(scores)
    outcomes([amip, loo], "follows.html")                               what applications returned
    explain(views, "explain.html")                                      where a model looks, and why
    suspects(found, "suspects.html", Display(train_images=…))           decisions(path, found)

Both show first how far the scores can be trusted (unit, agreement with retraining, health of the
computation), then what raised and lowered each measurement; the page also says what dropping
examples would do, and what the training set is worth. They read `Scores` and its provenance and
know no method; agreement with retraining comes in as results of `upweight.evaluation`. The page of
suspects is to click through: its decisions come back as JSON.
"""

from upweight.report.display import Display
from upweight.report.explain import explain
from upweight.report.outcomes import outcomes
from upweight.report.page import html
from upweight.report.suspects import decisions, suspects
from upweight.report.text import summary

__all__ = ["Display", "decisions", "explain", "html", "outcomes", "summary", "suspects"]
