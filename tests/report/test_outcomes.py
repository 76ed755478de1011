"""Outcomes of applications on a page: what each says, and nothing of what it is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from upweight.applications.outcome import Outcome
from upweight.errors import SpecError
from upweight.plot import axes
from upweight.report import html, outcomes


@dataclass(frozen=True)
class Told(Outcome):
    predicted: Any = 1.0
    actual: Any = None
    rows: int = 3
    said: str = "Removing <b>3</b> rows is predicted to change the sign."
    notes: tuple[str, ...] = field(default=("statsmodels left out 2 rows",))  # type: ignore[assignment]

    @property
    def title(self):
        return "Robustness of white"

    @property
    def verdict(self):
        return self.said

    @property
    def is_confirmed(self):
        return self.actual is not None

    def frame(self):
        some = range(self.rows)
        return pd.DataFrame({"removed": some, "estimate": [0.5 / (k + 3) for k in some]})

    def plot(self, ax=None):
        ax = axes(ax)
        ax.plot([0, 1], [1, 0])
        return ax

    def numbers(self):
        return {}


def test_a_page_of_outcomes_says_the_verdict_and_whether_a_refit_confirms_it(tmp_path):
    page = outcomes([Told(), Told(actual=0.9, rows=80)], tmp_path / "a.html", "Wages").read_text()
    assert page.count("Removing &lt;b&gt;3&lt;/b&gt; rows") == 4  # the sentence, and the figure's
    assert page.index("nothing was fitted again") < page.index("Confirmed by fitting again")
    assert "<h1>Wages</h1>" in page and "statsmodels left out 2 rows" in page
    assert "0.1667" in page and "and 30 further rows" in page
    assert page.count("data:image/png;base64,") == 2 and "<script" not in page
    assert (
        page
        == outcomes([Told(), Told(actual=0.9, rows=80)], tmp_path / "b.html", "Wages").read_text()
    )


def test_a_report_of_scores_has_a_page_of_outcomes_where_there_are_some(tmp_path, run):
    without = html(run.scores, tmp_path / "a.html", run.display).read_text()
    assert 'id="page-outcomes"' not in without
    with_one = html(run.scores, tmp_path / "b.html", run.display, outcomes=Told()).read_text()
    assert 'id="page-outcomes"' in with_one and "Robustness of white" in with_one


def test_what_is_no_outcome_is_refused_with_a_way_out(tmp_path):
    target: Path = tmp_path / "a.html"
    with pytest.raises(SpecError, match="pass the outcome itself"):
        outcomes([Told(), Told().frame()], target)
    with pytest.raises(SpecError, match="at least one"):
        outcomes([], target)
    assert not target.exists()
