"""The user's files: loaded without a trace, and with errors that say where."""

import sys

import pytest

from upweight.cli.project import opened
from upweight.errors import ProjectError, SpecError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project of two files, from whose folder the command is called."""
    (tmp_path / "numbers_beside.py").write_text("three = 3\n")
    (tmp_path / "project.py").write_text(
        "from numbers_beside import three\n"
        "runs = []\n"
        "runs.append(1)\n"
        "def made(): return [three]\n"
        "def late():\n"
        "    import numbers_late\n"
        "    return numbers_late.four\n"
        "def needs(weights): return weights\n"
        "def breaks():\n"
        "    return 1 / 0\n"
    )
    (tmp_path / "numbers_late.py").write_text("four = 4\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_stand_for_objects_and_for_functions_that_make_them(folder):
    with opened() as project:
        assert project.load("project.py:three") == 3
        assert project.load("project.py:made") == [3]
        assert project.load("project:late") == 4
        assert project.load("project.py:needs")(5) == 5


def test_a_file_is_run_once_and_leaves_no_trace(folder):
    path, modules = list(sys.path), dict(sys.modules)
    with opened() as project:
        runs = project.load("project.py:runs")
        project.load("project.py:late")
        assert project.load("project.py:runs") is runs == [1]
        assert project.load("./project.py:runs") is runs
        assert set(project.sources()) == {"numbers_beside.py", "numbers_late.py", "project.py"}
    assert sys.path == path
    assert {name: m for name, m in sys.modules.items() if modules.get(name) is not m} == {}
    assert not (folder / "__pycache__" / "project.cpython-311.pyc").exists()


def test_modules_that_are_nothing_are_no_obstacle(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_name_that_may_not_be_imported", None)
    with opened() as project:
        project.load("project.py:three")
        assert project.sources()
    assert "project" not in sys.modules


def test_libraries_that_the_file_imports_stay(folder):
    (folder / "project.py").write_text("import this_is_json as json\nx = 1\n")
    (folder / "this_is_json.py").write_text("import sqlite3\n")
    sys.modules.pop("sqlite3", None)
    with opened() as project:
        project.load("project.py:x")
    assert "sqlite3" in sys.modules
    assert "this_is_json" not in sys.modules


def test_a_name_that_python_has_taken_is_not_taken_from_it(folder):
    (folder / "json.py").write_text("x = 1\n")
    import json

    with opened() as project:
        assert project.load("json.py:x") == 1
        assert sys.modules["json"] is json


def test_what_a_file_prints_is_not_in_the_answer(folder, capsys):
    (folder / "project.py").write_text("print('epoch 1')\nx = 1\n")
    with opened() as project:
        project.load("project.py:x")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "epoch 1\n")


@pytest.mark.parametrize(
    "reference, says",
    [
        ("project.py:mode", "misspelling of made"),
        ("project.py:nothing_like_it", "defines three, runs, made, late, needs, breaks"),
        ("projekt.py:made", "misspelling of project.py"),
        ("no.such.package:x", "there is no module no"),
        ("project.py:breaks", "ZeroDivisionError"),
    ],
)
def test_errors_say_what_there_is(folder, reference, says):
    with pytest.raises(ProjectError, match=says), opened() as project:
        project.load(reference)


def test_a_reference_without_a_name_is_no_reference(folder):
    for reference in ("project.py", ":x", "project.py:", "project.py:a b"):
        with pytest.raises(SpecError, match=r"file.py:name"), opened() as project:
            project.load(reference)


@pytest.mark.parametrize(
    "code, says",
    [
        ("x = 1\ny = x / 0\n", ["ZeroDivisionError", "project.py:2, in <module>: y = x / 0"]),
        ("def f(:\n", ["SyntaxError", "project.py:1"]),
        ("import sys\nsys.exit('no data')\n", ["sys.exit: no data", "project.py:2"]),
        ("from upweight import Relative\nx = Relative(-1.0)\n", ["SpecError", "project.py:2"]),
    ],
)
def test_an_error_in_the_users_file_is_shown_with_its_place(folder, code, says):
    (folder / "project.py").write_text(code)
    with pytest.raises(Exception) as caught, opened() as project:
        project.load("project.py:x")
    error = caught.value
    text = f"{type(error).__name__} {error} {getattr(error, '__notes__', '')}"
    assert all(part in text for part in says)


def test_an_error_in_the_users_code_long_after_loading_is_shown_with_its_place(folder):
    with pytest.raises(ProjectError, match=r"project.py:10, in breaks"), opened() as project:
        project.named("project.py:breaks")()


def test_an_error_that_is_not_the_users_stays_what_it_is(folder):
    with pytest.raises(KeyError), opened():
        raise KeyError("ours")
