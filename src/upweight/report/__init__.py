"""Scores → something to look at: one self-contained HTML page, and a few lines of text.

    html(scores, train, queries, "report.html")     summary(scores)

Both show first how far the scores can be trusted (unit, agreement with retraining, health of the
computation), then what raised and lowered each measurement; the page also says what dropping
examples would do, and what the training set is worth. They read `Scores` and its provenance and
know no method; agreement with retraining comes in as a `Check`.
"""

from upweight.report.check import Check
from upweight.report.page import html
from upweight.report.text import summary

__all__ = ["Check", "html", "summary"]
