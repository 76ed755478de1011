"""What holds of the answer of every application."""

import json
import re

import pandas as pd
from matplotlib.axes import Axes

from upweight.applications.outcome import Outcome

CLAIMS = re.compile(r"\b(found|robust|fair|repaired|cleansed|confirmed)\b", re.IGNORECASE)
SENTENCES = re.compile(r"[a-z0-9%)\]]\. [A-Z]")
DENIED = re.compile(r"\b(no|not|nothing|none|never)\b", re.IGNORECASE)


def holds(outcome, figure=True):
    """Assert the laws of an `Outcome`, and give it back."""
    assert isinstance(outcome, Outcome)
    assert outcome.title and "\n" not in outcome.title
    verdict = outcome.verdict
    assert verdict[0].isupper() or not verdict[0].isalpha(), verdict
    assert verdict.endswith(".") and "\n" not in verdict and len(verdict) <= 400, verdict
    assert not SENTENCES.search(verdict), f"more than a sentence: {verdict}"
    assert "nan" not in verdict.lower().split(), verdict
    if not outcome.is_confirmed:
        claims = CLAIMS.search(verdict)
        assert claims is None or DENIED.search(verdict), f"claims without a refit: {verdict}"
    else:
        assert outcome.actual is not None
    for note in outcome.notes:
        assert not note.endswith("."), note
    assert str(outcome).startswith(verdict)
    table = outcome.frame()
    assert isinstance(table, pd.DataFrame) and len(table.columns)
    found = json.loads(json.dumps(outcome.summary(), allow_nan=False))
    assert found["verdict"] == verdict
    if figure:
        assert isinstance(outcome.plot(), Axes)
    return outcome
