"""The page of goals says what the results say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def applications(monkeypatch):
    """The benchmark as a module; it imports its neighbours by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("goals_page", BENCHMARKS / "applications.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def test_the_page_of_goals_is_made_of_the_results(applications):
    assert applications.PAGE.read_text(encoding="utf-8") == applications.page()


def test_every_goal_that_is_not_reached_says_why(applications):
    rows = [
        g for f in applications.RESULTS.glob("*.json") for g in json.loads(f.read_text())["goals"]
    ]
    assert all(bool(row["why"]) != row["holds"] for row in rows)
    assert all(row["why"] in applications.page() for row in rows)


def test_every_application_with_goals_has_results(applications):
    """And the other way round."""
    assert {file.stem for file in applications.RESULTS.glob("*.json")} == set(applications.NAMES)
