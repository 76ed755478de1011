"""What a stranger sees at the command line: help, version, exit codes, errors on one screen."""

import subprocess
import sys

import click
import pytest

from upweight.cli import demo, main
from upweight.cli.screen import Terminated
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


def test_the_table_of_verbs_says_what_their_own_help_says():
    context = click.Context(main.cli)
    for name, (_, line) in main.VERBS.items():
        assert main.cli.get_command(context, name).help.startswith(line + "\n"), name


def test_help_completion_and_the_version_need_no_pytorch():
    code = (
        "import sys, upweight; from upweight.cli.main import cli\n"
        "cli(['--help'], standalone_mode=False); cli(['--version'], standalone_mode=False)\n"
        "context = cli.make_context('upweight', [], resilient_parsing=True)\n"
        "assert cli.shell_complete(context, 're')\n"
        "assert 'torch' not in sys.modules\n"
        "assert upweight.curvature.ekfac.EKFAC is upweight.EKFAC and 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rerun" in done.stdout


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
        (Terminated(), 143, "told to end (SIGTERM)"),
    ],
)
def test_failures_are_one_screen_without_a_traceback(
    error, code, said, upweight, monkeypatch, capsys
):
    def fail(out, model):
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert upweight("demo") == code
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
