"""The example projects, by the command lines that their docstrings show and nothing else."""

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import upweight as uw

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = sorted((ROOT / "examples" / "projects").iterdir())
MAILS = (
    ROOT.parent / "shared" / "data" / "spamassassin.jsonl.gz"
)  # where they are kept, if they are


def commands(source):
    """The lines of the docstring that begin with upweight, joined where they are continued."""
    text = ast.get_docstring(ast.parse(source)).replace("\\\n", "")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    upweight ")]


ONE_PROCESS = """
import json, sys
from upweight.cli.main import cli
for command in json.loads(sys.argv[1]):
    cli(command[1:], standalone_mode=False)
"""
"""PyTorch is imported once for all commands."""


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_a_project_runs_by_the_command_line_alone(project, tmp_path):
    source = (project / "project.py").read_text(encoding="utf-8")
    (tmp_path / "project.py").write_text(source, encoding="utf-8")
    shown = commands(source)
    assert [c[1] for c in shown][-3:] == ["attribute", "evaluate", "report"]
    line = [sys.executable, "-c", ONE_PROCESS, json.dumps(shown)]
    environment = {"SPAMASSASSIN": str(MAILS), **os.environ}
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    if "Skipped: " in done.stderr:
        pytest.skip(done.stderr.partition("Skipped: ")[2].splitlines()[0])
    assert done.returncode == 0, done.stderr
    scores = uw.Scores.load(tmp_path / "run" / "scores")
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["halves"]
    assert scores.values.shape == (scores.provenance.q, scores.provenance.n)
    # By chance the rank correlation is about 0; retraining from another seed gets the ceiling.
    assert found["spearman"] > 0.1
    assert "Can I trust this?" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
