"""What a stranger sees at the command line: help, version, exit codes, errors on one screen."""

import subprocess
import sys

import pytest

from upweight.cli import demo, main
from upweight.errors import SpecError


@pytest.fixture
def upweight(monkeypatch):
    """The command line in this process; returns its exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["upweight", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return ended.value.code or 0

    return run


def test_it_is_a_program_that_names_the_verbs():
    command = [sys.executable, "-m", "upweight.cli.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "demo" in done.stdout


def test_help_shows_an_example(upweight, capsys):
    assert upweight("demo", "--help") == 0
    shown = capsys.readouterr().out
    assert "upweight demo --out" in shown
    assert "[softmax|mlp|cnn]" in shown


def test_usage_errors_exit_with_2(upweight):
    assert upweight("demno") == 2
    assert upweight("demo", "--model", "transformer") == 2


@pytest.mark.parametrize(
    "error, code, said",
    [
        (SpecError("λ was negative"), 1, "λ was negative"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_are_one_screen_without_a_traceback(
    error, code, said, upweight, monkeypatch, capsys
):
    def fail(out):
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert upweight("demo") == code
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
