"""`upweight ask`: a call of an application, read and not evaluated."""

import json

import pytest
from click.testing import CliRunner

from upweight.cli.ask import ask

pytest.importorskip("sklearn")

PROJECT = """
import numpy as np
from sklearn.linear_model import LogisticRegression

draw = np.random.default_rng(0)
X = draw.normal(size=(40, 2))
y = (X[:, 0] > draw.normal(size=40)).astype(int)

def model():
    return LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(X, y)
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project.py").write_text(PROJECT)
    return lambda *words: CliRunner().invoke(ask, ["project.py", *words])


def test_answers_as_the_function_does_with_a_page_and_a_table(asked, tmp_path):
    found = asked(
        "cross_validation.loo(model, (X, y))", "--page", "p.html", "--table", "t.csv", "--json"
    )
    (answer,) = json.loads(found.stdout)["answers"]
    space = {}
    exec(PROJECT, space)
    from upweight.applications import cross_validation

    own = cross_validation.loo(space["model"](), (space["X"], space["y"]))
    assert answer["verdict"] == own.verdict
    assert answer["is_confirmed"] == own.is_confirmed
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + len(own.frame())
    assert own.verdict.split(",")[0] in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize(
    "question, said",
    [
        ("len(X)", "a call of a function of upweight.applications"),
        ("cross_validation.lo(model)", "a misspelling of loo"),
        ("robustnes.amip(model)", "a misspelling of robustness"),
        ("cross_validation.loo(models, (X, y))", "must define models"),
        ("cross_validation.loo(model, (X[:3], y))", "nothing is evaluated"),
        ("cross_validation.loo(*[model])", "nothing is evaluated"),
        ("cross_validation.loo(model", "in double quotes"),
    ],
)
def test_what_is_no_question_is_refused(asked, question, said):
    found = asked(question)
    assert found.exit_code == 1
    assert said in found.output
