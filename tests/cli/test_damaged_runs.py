"""Runs that were cut, edited, filled with links or put on a full disk: said by name, and mended.

Every way out that a message names is gone here, to the same bits or to the page.
"""

import errno
import json
import os
import re
import shlex
import shutil
import tomllib

import pytest
import tomli_w

from tests.cli.test_verbs import OWN, answer, attribute, call, refusal, rerun
from tests.runs.digests import digests
from tests.runtime.damage import DAMAGES
from upweight import shards
from upweight.errors import StaleStore
from upweight.report import html
from upweight.runs.directory import Run
from upweight.runtime import atomic
from upweight.scoring import stream
from upweight.view import Server

PROJECT = """
import torch
from torch import nn
import upweight as uw

X = torch.sin(torch.arange(770, dtype=torch.get_default_dtype())).reshape(110, 7)
y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
train, test = (X[:100], y[:100]), (X[100:], y[100:])

model = nn.Linear(7, 3)
nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
descent = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

def objective():
    descent.zero_grad()
    squares = sum(p.square().sum() for p in model.parameters())
    total = nn.functional.cross_entropy(model(train[0]), train[1]) + 0.005 * squares
    total.backward()
    return total

descent.step(objective)
task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.01))
"""
"""Small, because most tests here load it; a minimum, so that nothing is noted."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A project with a finished run of several files of scores, and one that was saved whole."""
    folder = tmp_path_factory.mktemp("kept") / "project"
    folder.mkdir()
    (folder / "project.py").write_text(PROJECT)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(shards, "SHARD_BYTES", 1)
        patched.setattr(stream, "MOST_EXAMPLES", 32)
        patched.setattr(stream, "TOGETHER", (32, 32))
        answer(*attribute())
        answer(*attribute("--method", "Influence(Hessian(), damping=0.01)", out="exact"))
        answer("report", "run")
    return folder


@pytest.fixture
def run(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(stream, "MOST_EXAMPLES", 32)
    monkeypatch.setattr(stream, "TOGETHER", (32, 32))
    shutil.copytree(kept, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return Run(tmp_path / "project" / "run")


def told(*arguments):
    """The answer of the whole command that a refusal names as its way out."""
    (command,) = re.findall(r"trust (?:its|these) files: upweight (.*)", refusal(*arguments))
    return answer(*shlex.split(command))


def removed(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("damage", ["an edited score"])
def test_an_altered_shard_is_noticed_and_made_again(run, damage):
    before = digests(run)
    assert len(before) > 2
    shard = sorted(run.scores.glob("tile-*"))[1]
    DAMAGES[damage](shard)
    for verb in (["rerun", "run/run.toml"], ["report", "run"], ["view", "run"], attribute()):
        assert shard.name in refusal(*verb)
    for verb in (["rerun", "run"], rerun("run")):
        said = refusal(*verb)
        assert "delete the file and ask again" in said
        assert "upweight rerun RUN --project FILE.py" in said
    removed(shard)
    assert told("report", "run")["did"] == "continued"
    assert digests(run) == before
    answer("report", "run")
    assert answer("rerun", "run")["did"] == answer(*rerun("run"))["did"] == "nothing"


def written(text):
    return lambda path: path.write_text(text)


def changed(**fields):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


HEADERS = {
    "empty": written(""),
    "another value": written("3"),
    "nothing in it": written("{}"),
    "nested": written("[" * 100_000),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "another type": changed(facts=5, n="3", provenance=[]),
    "edited": changed(more=1),
}


def test_a_damaged_header_of_finished_scores_is_written_again(run):
    before = digests(run)
    header = run.scores / "finished.json"
    text = header.read_text()
    for damage in HEADERS.values():
        header.write_text(text)
        damage(header)
        with pytest.raises(StaleStore, match=r"(?s)finished\.json.*delete the file"):
            _ = run.is_finished
    for verb in (["rerun", "run"], ["report", "run"], ["view", "run"], attribute()):
        assert "finished.json" in refusal(*verb)
    removed(header)
    assert told("rerun", "run")["did"] == "continued"
    assert digests(run) == before
    answer("report", "run")


def test_a_damaged_header_of_shards_ends_with_their_folder(run):
    before = digests(run)
    manifest = run.scores / "manifest.json"
    text = manifest.read_text()
    for damage in HEADERS.values():
        manifest.write_text(text)
        damage(manifest)
        with pytest.raises(StaleStore, match=r"(?s)manifest\.json.*delete the folder"):
            _ = run.is_finished
    for verb in (["rerun", "run"], rerun("run"), ["report", "run"]):
        assert f"delete the folder {run.scores}" in refusal(*verb)
    removed(run.scores)
    assert told("rerun", "run/run.toml")["did"] == "continued"
    assert digests(run) == before


def test_a_damaged_curvature_is_learned_again(run):
    before = digests(run)
    (run.scores / "finished.json").unlink()
    sorted(run.scores.glob("tile-*"))[-1].unlink()
    DAMAGES["one bit"](run.factors / "state.safetensors")
    assert "delete the file and ask again: the same fit" in refusal(*rerun("run"))
    removed(run.factors)
    assert answer(*rerun("run"))["did"] == "continued"
    assert digests(run) == before


def test_a_damaged_comparison_is_refused_until_it_is_deleted(run):
    run.keep_evaluation("other", {"a": [1.0, float("nan")]})
    assert repr(run.evaluations()) == repr({"other": {"a": [1.0, float("nan")]}})
    text = run.evaluation.read_text()
    for damage in HEADERS.values():
        run.evaluation.write_text(text)
        damage(run.evaluation)
        with pytest.raises(StaleStore, match=r"(?s)evaluation\.json.*delete that file"):
            run.evaluations()
    assert "delete that file and evaluate again" in refusal("report", "run")
    removed(run.evaluation)
    answer("report", "run")


TOML = {
    "threads": ["0", "-1", '"a"', "1.0", "true", "99999999", "[1]"],
    "directory": ["5", '""', '"\\u0000"', "[]", f'"{"x" * 5000}"', f'"{"x/" * 2500}"'],
    "task": [f'"{"p" * 300}.py:task"', f'"{"p/" * 2000}p.py:task"', '"p\\u0000.py:task"'],
    "show": [f'"{"p" * 300}.py:task"'],
    "n": ["0", '"100"', "9223372036854775808"],
    "memory_bytes": ["-1", "0.5"],
    "versions": ["3", "{torch = 2}"],
    "method": ["1", "false", f'"{"p" * 300}.py:task"'],
}


def test_a_wrong_value_in_run_toml_is_named_and_may_be_corrected(run):
    text = run.toml.read_text()
    for key, values in TOML.items():
        rest = {k: v for k, v in tomllib.loads(text).items() if k != key}
        for value in values:
            run.toml.write_text(f"{key} = {value}\n{tomli_w.dumps(rest)}")
            with pytest.raises(StaleStore, match=rf"(?s)`{key}.* in run\.toml.*correct the file"):
                _ = run.record
    run.toml.write_text(text)
    assert answer("rerun", "run")["did"] == "nothing"


def test_a_damaged_run_toml_is_said_by_every_verb(run):
    for told in (b"", b"\xff\xfe", b"schema = 1", b"[" * 100_000, b"schema = 2"):
        run.toml.write_bytes(told)
        for verb in (["rerun", "run"], ["report", "run"], ["view", "run"]):
            said = refusal(*verb)
            assert "run.toml" in said and "another --out" in said
    assert "run.toml" in refusal(*attribute())
    assert answer(*attribute(out="other"))["did"] == "computed"


LINKS = [
    ".holder",
    ".lock",
    "log.txt",
    "report.html",
    "report.html.part",
    "evaluation.json",
    "scores",
    "scores/totals",
    "scores/finished.json",
    "factors",
    "retrained",
    "retrained/check-0",
]


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_read_or_written_through_a_link(run, name, tmp_path):
    place = run.path / name
    outside = tmp_path / "outside"
    if place.exists():
        shutil.move(place, outside)
    elif place.suffix or place.name.startswith("."):
        outside.write_text("precious")
    else:
        outside.mkdir()
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside)
    before = state_of(outside)
    for verb in (["rerun", "run"], ["report", "run"], ["view", "run"]):
        assert f"{place}, which is a link" in refusal(*verb)
    assert state_of(outside) == before
    place.unlink()  # the ways out: put what it points to in its place, or only remove it
    if name.startswith(("scores", "factors")):
        shutil.move(outside, place)
    assert Run.named(run.path).load().values.shape == (10, 100)


def test_an_attribute_goes_on_after_a_link_was_removed(run):
    (run.path / ".holder").symlink_to(run.path.with_name("project.py"))
    assert "which is a link" in refusal(*attribute())
    (run.path / ".holder").unlink()
    assert answer(*attribute())["did"] == "nothing"


def state_of(path):
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return [(p, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in files]


@pytest.mark.parametrize("name", [".lock", ".holder", "report.html", "log.txt"])
def test_nothing_is_written_through_a_second_name(run, name, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run.path / name).unlink(missing_ok=True)
    os.link(victim, run.path / name)
    if name == ".lock":
        assert "remove it" in refusal(*rerun("run"))
        (run.path / name).unlink()
    with run.held("a test"):
        run.log("a line")
    html(run.load(), run.report)
    assert "Which training examples moved" in run.report.read_text()
    assert (run.path / "log.txt").read_text().endswith("a line\n")
    assert victim.read_text() == "precious"


def test_a_linked_run_and_a_linked_file_of_a_project_are_the_users_own(run):
    os.symlink(run.path, run.path.with_name("linked"))
    answer("rerun", "linked/run.toml")
    answer("report", "linked")


# -- disks ----------------------------------------------------------------------------------------


def full(monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuses)
    monkeypatch.setattr("os.posix_fallocate", refuses)


def read_only(monkeypatch):
    opened = os.open

    def refuses(path, flags, *more, **others):
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and "project" in str(path):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *more, **others)

    monkeypatch.setattr("os.open", refuses)


@pytest.mark.parametrize("disk", [full, read_only])
def test_a_page_for_which_there_is_no_room_is_written_elsewhere(run, disk, monkeypatch, tmp_path):
    before = [(path, held) for path, _, held in state_of(run.path)]
    with monkeypatch.context() as patched:
        disk(patched)
        said = refusal("report", "run")
        assert str(run.report) in said and "--out FILE" in said
    assert [(path, held) for path, _, held in state_of(run.path)] == before
    with monkeypatch.context() as patched:
        if disk is read_only:
            disk(patched)
        answer("report", "run", "--out", tmp_path / "elsewhere" / "page.html")
    assert "upweight" in (tmp_path / "elsewhere" / "page.html").read_text()


def test_what_is_shown_beside_a_run_on_a_read_only_disk_is_not_kept_and_is_shown(
    run, monkeypatch, tmp_path
):
    monkeypatch.setattr(Server, "wait", lambda server: None)
    run.path.with_name("other.py").write_text("shown = {'title': 'A title of mine'}")
    page = tmp_path / "page.html"
    for name in ("run", "exact"):
        show = [name, "--show", "other.py:shown", *OWN]
        call("view", name)  # which keeps the totals
        before = state_of(run.path.with_name(name))
        with monkeypatch.context() as patched:
            read_only(patched)
            for verb in (["report", *show, "--out", page], ["view", *show]):
                found = call(*verb)
                assert found.exit_code == 0 and "was not kept in the run" in found.stderr
                assert str(run.path.with_name(name) / "run.toml") in found.stderr
        assert state_of(run.path.with_name(name)) == before
        assert "A title of mine" in page.read_text()
    answer("report", "run", *show[1:])  # where there is room it is kept
    answer("report", "run")
    assert "A title of mine" in run.report.read_text()


@pytest.mark.parametrize("disk", [full, read_only])
def test_a_view_needs_no_room(run, disk, monkeypatch):
    monkeypatch.setattr(Server, "wait", lambda server: None)
    with monkeypatch.context() as patched:
        disk(patched)
        assert call("view", "run").exit_code == 0
    assert not list(run.path.rglob("*.part")) and not list(run.path.rglob("totals.safetensors"))


def test_what_a_killed_writer_left_is_removed_by_the_next_that_holds_the_run(run):
    left = run.scores / f"scores.{'0' * 16}.part"
    left.write_bytes(b"half")
    answer(*rerun("run"))
    assert left.exists() == (atomic.fcntl is None)


def test_what_other_versions_wrote_is_made_again_in_one_step(run):
    """Stores of before there were hashes, and runs that newer versions go on with."""
    for path in run.scores.glob("tile-*"):
        DAMAGES["no hash"](path)
    changed(schema="1", digest="")(run.scores / "manifest.json")
    assert f"delete the folder {run.scores}" in refusal("report", "run")
    removed(run.scores)
    run.toml.write_text(run.toml.read_text().replace('upweight = "', 'upweight = "0.0.'))
    shutil.copytree(run.path, "half")
    for verb in (rerun("run"), rerun("run", "--out", "half"), attribute()):
        (anew,) = re.findall(r"start anew: upweight (.*)", refusal(*verb))
        assert answer(*shlex.split(anew))["did"] == "computed"
        answer("report", "OTHER")
        removed(run.path.with_name("OTHER"))


def test_a_directory_of_something_else_is_no_run_but_one_in_it_is(run):
    said = refusal(*attribute(out="."))
    assert "--out" in said and "project.py" in said
    assert answer(*attribute(out="run2"))["did"] == "computed"


EXACT = ["--method", "Influence(Hessian(), damping=0.01)"]
OTHERS = [
    ("run", ["--measure", "Margin()"], "measure"),
    ("run", ["--method", "Influence(EKFAC(), damping=Relative(0.2))"], "method"),
    ("exact", [*EXACT, "--measure", "Margin()"], "measure"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "says"), OTHERS)
def test_scores_of_another_question_are_refused_and_computed_again(run, name, options, says):
    mine = Run(run.path.with_name(name))
    before = digests(mine)
    answer(*attribute(*options, out="other"))
    removed(mine.scores)
    shutil.copytree("other/scores", mine.scores)
    alone = [[verb, name] for verb in ("report", "view", "rerun")]
    live = [["report", name, *OWN], rerun(name), rerun(name, "--out", "again")]
    for verb in alone + live:
        said = refusal(*verb)
        assert f"is of another {says} than" in said
        assert "manifest.json" in said
    removed(mine.scores)
    (command,) = re.findall(r"compute them again: upweight (.*)", said)
    assert answer(*shlex.split(command))["did"] in ("computed", "continued")
    assert digests(mine) == before


def test_exact_scores_of_other_data_are_refused_and_computed_again(run):
    """Nothing but the fingerprints tells these apart."""
    exact = Run(run.path.with_name("exact"))
    before = digests(exact)
    with open("project.py", "a") as file:
        file.write("fewer = (X[100:].flip(0), y[100:].flip(0))\n")
    answer("attribute", "project.py:task", "--train", "project.py:train", "--queries",
           "project.py:fewer", *EXACT, "--out", "other")  # fmt: skip
    removed(exact.scores)
    shutil.copytree("other/scores", exact.scores)
    for verb in (["report", "exact"], ["rerun", "exact"], rerun("exact")):
        said = refusal(*verb)
        assert "is of another queries than" in said
    removed(exact.scores)
    (command,) = re.findall(r"compute them again: upweight (.*)", said)
    answer(*shlex.split(command))
    assert digests(exact) == before


EDITS = {
    "n": ("n = 100", "n = 99"),
    "q": ("q = 10", "q = 9"),
    "p": ("p = 24", "p = 25"),
    "threads": ("threads = ", "threads = 1"),
    "memory_bytes": ("memory_bytes = 0", "memory_bytes = 99"),
    "versions.python": ('python = "3.', 'python = "2.'),
    "environment.BLAS": ('BLAS = "', 'BLAS = "another '),
    "measure": ('measure = "Loss()"', 'measure = "Margin()"'),
    "method": ("Relative(factor=0.1)", "Relative(factor=0.9)"),
}


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_question_of_a_finished_run_is_refused_until_it_is_put_back(run, key):
    text = run.toml.read_text()
    assert EDITS[key][0] in text
    run.toml.write_text(text.replace(*EDITS[key], 1))
    for verb in (["report", "run"], ["view", "run"], ["rerun", "run"]):
        said = refusal(*verb)
        assert "run.toml, which says otherwise" in said
    (line,) = re.findall(rf"has ({key} = .*), not ", said)
    assert re.search(
        rf"{key} is .*, and run.toml says|otherwise|{key} is not", refusal(*rerun("run"))
    )
    fields = tomllib.loads(run.toml.read_text())
    for name, value in tomllib.loads(line).items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    run.toml.write_text(tomli_w.dumps(fields))
    assert answer("rerun", "run")["did"] == answer(*rerun("run"))["did"] == "nothing"


def test_a_comparison_of_other_scores_is_refused_until_it_is_deleted(run):
    with open("project.py", "a") as file:
        file.write("recipe = uw.training.Newton()\n")
    other = Run(run.path.with_name("exact"))
    other.keep_evaluation("other", {"a": 1})
    run.keep_evaluation("other", {"a": 1})
    assert run.evaluations() == other.evaluations() == {"other": {"a": 1}}
    shutil.copy(other.evaluation, run.evaluation)
    evaluate = ["evaluate", "run", "--recipe", "project.py:recipe", "--lds", "4"]
    for verb in (["report", "run"], ["view", "run"], ["rerun", "run"], evaluate):
        assert "evaluation.json, which is of others" in refusal(*verb)
    assert not run.retrained.exists(), "said before anything is trained"
    removed(run.evaluation)  # the way out
    verdict = answer(*evaluate)["verdict"]
    assert answer("rerun", "run")["verdict"] == verdict
    removed(sorted(run.scores.glob("tile-*"))[1])
    answer(*rerun("run"))
    assert answer("rerun", "run")["verdict"] == verdict, "the same scores, made again"
