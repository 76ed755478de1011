"""A run directory from somebody else: it is looked at without its project, and runs no code."""

import json
import os
import re
import shlex
import shutil

import pytest

from tests.cli.test_verbs import OWN, PROJECT, answer, attribute, call, refusal
from upweight.view import Server

EVIL = "import pathlib\npathlib.Path(MARKER).touch()\n" + PROJECT
SHOWN = (
    PROJECT
    + """
shown = {
    "title": "A title", "names": ["zero"] + [f"digit {d}" for d in range(1, 10)],
    "metadata": {"third": [i % 3 for i in range(100)], "size": torch.arange(100.0)},
    "train_texts": [f"text {i} " + "word " * i for i in range(100)],
    "query_texts": [f"query {q}" for q in range(10)],
}
pictures = {"train_images": digits.X[::50].reshape(-1, 28, 28),
            "query_images": digits.X_test[::100].reshape(-1, 28, 28)}
rendered = {"render": lambda role, i: [f"{role} {i}", {"i": i}, digits.X[i].reshape(28, 28)]}
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with a finished run of every kind of contents, made once."""
    folder = tmp_path_factory.mktemp("owner")
    (folder / "project.py").write_text(SHOWN)
    here = os.getcwd()
    os.chdir(folder)
    try:
        answer(*attribute())
        answer(*attribute("--show", "project.py:shown", out="texts"))
        for kind in ("pictures", "rendered"):
            shutil.copytree("run", kind)
            answer(*attribute("--show", f"project.py:{kind}", out=kind))
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def gift(made, tmp_path, monkeypatch):
    """A copy of the run in which run.toml names a file that leaves a mark when it runs."""
    folder = tmp_path / "gift"
    shutil.copytree(made / "run", folder)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.replace("MARKER", repr(str(marker))))
    monkeypatch.chdir(tmp_path)
    return folder, marker


def rewrite(folder, **lines):
    toml = folder / "run.toml"
    text = toml.read_text()
    for name, value in lines.items():
        text = re.sub(rf"(?m)^{name} = .*$", lambda _: f"{name} = {json.dumps(value)}", text)  # noqa: B023
    toml.write_text(text)


def unfinish(folder):
    for path in (folder / "scores").iterdir():
        if path.is_file():
            path.unlink()


SPELLINGS = {
    "beside": {"directory": ".", "task": "evil.py:task"},
    "train": {"directory": ".", "train": "evil.py:train"},
    "a method": {"directory": "..", "method": "gift/evil.py:task"},
    "a measure": {"directory": "..", "measure": "./gift/../gift/evil.py:squared"},
    "what is shown": {"directory": "..", "show": "gift/evil.py:test"},
    "a module": {"directory": ".", "task": "evil:task", "train": "evil:train"},
    "a package": {"directory": "..", "task": "gift.evil:task"},
    "from the root": {"directory": "/", "queries": "{folder}/evil.py:test"},
}
VERBS = {
    "report": ["report", "gift"],
    "view": ["view", "gift"],
    "rerun": ["rerun", "gift/run.toml"],
    "rerun --out": ["rerun", "gift/run.toml", "--out", "again"],
    "evaluate": ["evaluate", "gift", "--recipe", "Newton()"],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_a_stranger_runs_nothing(gift, monkeypatch, spelling, finished):
    folder, marker = gift
    monkeypatch.setattr(Server, "wait", lambda _: None)
    # A project of one's own, which is named, does not open the door to another.
    (folder.parent / "project.py").write_text(PROJECT)
    lines = {k: v.format(folder=folder) for k, v in SPELLINGS[spelling].items()}
    rewrite(folder, **lines)
    if not finished:
        unfinish(folder)
    monkeypatch.syspath_prepend(str(folder / "nowhere"))
    for verb in VERBS.values():
        for own in ([], OWN):
            result = call(*verb, *own)
            assert not marker.exists(), (verb, own)
            assert result.exit_code in (0, 1)
            if (own and verb[0] != "rerun") or "--out" in verb or not finished:
                assert result.exit_code == 1, "refused"
    assert not (folder.parent / "again").exists()


def test_the_control_runs_when_it_is_named(gift):
    folder, marker = gift
    rewrite(
        folder, directory=".", task="evil.py:task", train="evil.py:train", queries="evil.py:test"
    )
    assert "project" in call("rerun", folder, "--project", folder / "evil.py").output
    assert marker.exists()


def test_only_the_name_of_a_file_is_taken_from_a_run(gift):
    """The gift's `project.py` is not the user's, wherever run.toml says that it lies."""
    folder, marker = gift
    (folder / "evil.py").rename(folder / "project.py")
    (folder.parent / "project.py").write_text(PROJECT)
    for directory in (".", str(folder)):
        rewrite(folder, directory=directory)
        assert answer("rerun", folder, *OWN, "--out", f"again-{len(directory)}")["bit_identical"]
    assert not marker.exists()


def test_the_working_directory_is_not_taken_from_a_run(gift):
    """A file that the user's project reads by a relative name is the user's."""
    folder, _ = gift
    mine = folder.parent / "mine"
    mine.mkdir()
    (mine / "project.py").write_text(
        PROJECT + "import pathlib\nassert pathlib.Path('weights.txt').read_text() == 'mine'\n"
    )
    (mine / "weights.txt").write_text("mine")
    (folder / "weights.txt").write_text("theirs")
    rewrite(folder, directory=".")
    assert answer("rerun", folder, "--project", mine / "project.py")["did"] == "nothing"


def test_a_refusal_says_what_to_name_and_the_command_works(made, monkeypatch):
    monkeypatch.chdir(made)
    shutil.copytree("run", "copy")
    said = refusal("evaluate", "copy", "--recipe", "Newton()")
    assert "upweight evaluate copy --recipe 'Newton()' --project project.py" in said
    said = refusal("rerun", "copy", "--out", "again")
    assert "there, and as it was" in said
    command = said.partition("if you trust these files: upweight ")[2].splitlines()[0]
    assert answer(*shlex.split(command))["bit_identical"] is True
    (made / "project.py").write_text("# edited\n" + SHOWN)
    assert "there, but edited since; recorded as sha256" in refusal("rerun", "copy", "--out", "c")
    (made / "project.py").write_text(SHOWN)


def test_two_named_files_of_one_name_are_told_apart_by_nobody(gift):
    folder, _ = gift
    for name in ("a", "b"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "project.py").write_text(PROJECT)
    named = [part for name in ("a", "b") for part in ("--project", f"{name}/project.py")]
    assert "of one name" in refusal("rerun", folder, *named, "--out", "again")


@pytest.mark.parametrize("kind", ["run", "texts", "pictures", "rendered"])
def test_a_page_of_the_run_alone_is_the_page_of_the_project(made, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(made)
    show = {"run": OWN, "texts": ["--show", "project.py:shown"]}.get(kind)
    live = answer("report", kind, *(show or ["--show", f"project.py:{kind}"]), "--out", "live.html")
    assert live["bytes"] > 10_000
    shutil.copytree(made / kind, tmp_path / kind)
    monkeypatch.chdir(tmp_path)
    found = answer("report", kind)
    assert found["report"] == str(tmp_path / kind / "report.html")
    mine, theirs = (p.read_text() for p in (tmp_path / kind / "report.html", made / "live.html"))
    assert "Ranked by self-influence" in mine
    assert mine == theirs
