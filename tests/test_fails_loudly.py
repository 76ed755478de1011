"""No mistake of benchmarks/fails_loudly.py passes silently."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "fails_loudly.py"
SPEC = importlib.util.spec_from_file_location("fails_loudly", PATH)
assert SPEC is not None and SPEC.loader is not None
fails_loudly = importlib.util.module_from_spec(SPEC)
sys.modules["fails_loudly"] = fails_loudly
SPEC.loader.exec_module(fails_loudly)


@pytest.mark.parametrize("name", list(fails_loudly.CASES))
def test_fails_loudly(name):
    outcome = fails_loudly.outcome(fails_loudly.CASES[name])
    assert outcome.verdict != "silent", outcome.said


def test_the_honest_problem_is_silent():
    """Otherwise any case could end in a warning of something else."""
    assert fails_loudly.outcome(fails_loudly.attribute).said == "no error"


def test_the_script_ends_with_1_where_a_case_is_silent(monkeypatch, capsys):
    loud = dict(list(fails_loudly.CASES.items())[:1])
    monkeypatch.setattr(fails_loudly, "CASES", loud)
    assert fails_loudly.main() == 0
    monkeypatch.setattr(fails_loudly, "CASES", loud | {"honest": fails_loudly.attribute})
    assert fails_loudly.main() == 1
    assert capsys.readouterr().out.endswith("2 cases, 1 passed silently\n")
