"""Packages that upweight does without: what needs one that is missing names it and installs it."""

import re
import sys
from pathlib import Path

import pytest
import torch

import upweight as uw
from upweight.applications.calibration import calibration
from upweight.applications.least_change import least_change
from upweight.errors import MissingPackage

SOURCE = Path(uw.__file__).parent


@pytest.fixture
def scores():
    torch.manual_seed(0)
    X, y = torch.randn(20, 3), torch.arange(20) % 2
    model = torch.nn.Linear(3, 2)
    return uw.attribute(model, (X, y), (X[:2], y[:2]), torch.nn.CrossEntropyLoss())


@pytest.fixture
def without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # as Python marks what cannot be imported
    monkeypatch.delitem(sys.modules, "upweight.runtime.tables", raising=False)


TABLES = {
    "table": lambda scores: scores.table(),
    "to_pandas": lambda scores: scores.to_pandas(),
    "suspects": lambda scores: scores.suspects().frame(),
    "self-influence": lambda scores: scores.self_influence().top(),
}


@pytest.mark.parametrize("verb", TABLES)
def test_a_table_without_pandas_says_what_to_install(verb, scores, without_pandas):
    with pytest.raises(MissingPackage, match=r"(?s)made by pandas.*pip install pandas") as raised:
        TABLES[verb](scores)
    assert isinstance(raised.value, ImportError) and "upweight[pandas]" in str(raised.value)


def test_what_is_no_table_needs_no_pandas(scores, without_pandas, tmp_path):
    found = scores.suspects()
    assert found.title in found._repr_html_()
    for shown in (repr(scores), scores._repr_html_(), repr(scores.top()), repr(found)):
        assert shown
    scores.report(tmp_path / "page.html")


def test_a_figure_without_matplotlib_says_what_to_install(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match=r"(?s)made by matplotlib.*upweight\[plot\]"):
        scores.plot.histogram(0)


SCIPY = {
    "calibration": lambda: calibration(torch.rand(6, 2), torch.arange(6) % 2),
    "least change": lambda: least_change(torch.rand(1, 6), torch.rand(6), torch.rand(1), 0.5, 0.0),
}


@pytest.mark.parametrize("asked", SCIPY)
def test_what_scipy_solves_says_what_to_install(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingPackage, match=r"(?s)made by scipy.*upweight\[sklearn\]"):
        SCIPY[asked]()


def test_tables_are_made_by_the_one_import_that_explains_itself():
    for path in SOURCE.rglob("*.py"):
        found = re.findall(r"^ {8,}import (?:pandas|matplotlib)", path.read_text(), re.MULTILINE)
        assert not found, path
