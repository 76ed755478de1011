"""A run directory from somebody else: it is looked at without its project, and runs no code."""

import hashlib
import json
import os
import re
import shlex
import shutil
import urllib.request
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
import torch

import upweight as uw
from tests.cli.test_verbs import OWN, PROJECT, answer, attribute, call, refusal, rerun
from upweight.cli.compared import compared
from upweight.cli.evaluate import command as command_of
from upweight.cli.pages import alone
from upweight.cli.rankings import named_queries
from upweight.errors import DataError, SpecError, StaleStore
from upweight.report.examples import Examples, KeptExamples
from upweight.runs import shown
from upweight.runs.directory import Run
from upweight.runtime.headers import own_digest
from upweight.runtime.matrix import StoredMatrix
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
        line = f"{name} = {json.dumps(value)}"
        text, done = re.subn(rf"(?m)^{name} = .*$", lambda _: line, text, count=1)  # noqa: B023
        assert done == 1
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
VIEWS = ("report", "view")
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
    for name, verb in VERBS.items():
        for own in ([], OWN):
            result = call(*verb, *own)
            assert not marker.exists(), (verb, own)
            is_alone = finished and not own and name in ("report", "view", "rerun")
            assert result.exit_code == (0 if is_alone else 1), result.output
            if finished and not is_alone:
                assert "only where you name its file" in result.stderr
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


def test_a_run_of_two_files_of_one_name_takes_each_from_its_place(made, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "sub" / "project.py").write_text(PROJECT + "mine = uw.Margin()\n")
    monkeypatch.chdir(tmp_path)
    printed = call(*attribute("--measure", "sub/project.py:squared")).stdout
    (command,) = re.findall(r"upweight (rerun .*)", printed)
    assert "--project project.py --project sub/project.py" in command
    assert answer(*shlex.split(command))["same"] == "bits"
    (command,) = re.findall(r"upweight (evaluate .*)", printed)
    assert answer(*shlex.split(command), "--lds", "3")["models"] > 3


def test_an_edited_score_is_noticed_by_every_verb(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    (path,) = (tmp_path / "run" / "scores").glob("tile-*")
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 1
    path.write_bytes(contents)
    for verb in (
        ["rerun", "run"], rerun("run"), rerun("run", "--out", "again"), attribute(),
        ["report", "run"], ["report", "run", *OWN], ["view", "run"],
        ["evaluate", "run", "--recipe", "project.py:recipe"],
    ):  # fmt: skip
        assert refusal(*verb).removeprefix("loading run ...\n").startswith("StaleStore"), verb
    assert not (tmp_path / "again").exists()


def test_two_named_files_of_one_name_are_told_apart_by_nobody(gift):
    folder, _ = gift
    for name in ("a", "b"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "project.py").write_text(PROJECT)
    named = [part for name in ("a", "b") for part in ("--project", f"{name}/project.py")]
    assert "of one name" in refusal("rerun", folder, *named, "--out", "again")


def test_a_way_out_is_the_whole_command_and_works(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "a run")
    shutil.copy(made / "project.py", tmp_path)
    (tmp_path / "other.py").write_text("shown = {'title': 'Mine'}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Server, "wait", lambda _: None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy("project.py", name)
    both = [part for name in ("a", "b") for part in ("--project", f"{name}/project.py")]
    for verb in (
        ["report", "a run", "--show", "other.py:shown", "--out", "a page.html"],
        ["view", "a run", "--show", "other.py:shown"],
        ["rerun", "a run", "--out", "again"],
        ["evaluate", "a run", "--recipe", "Newton()", "--lds", "3", *both],
    ):
        (command,) = re.findall(r"trust these files: upweight (.*)", refusal(*verb))
        assert call(*shlex.split(command)).exit_code == 0, command
    assert "Mine" in (tmp_path / "a page.html").read_text()
    assert (tmp_path / "again" / "scores").exists()


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


def test_a_view_of_the_run_alone_is_the_view_of_the_project(made, tmp_path, monkeypatch):
    paths = ["query/3", "ranking/3/lowered", "examples", "training", "picture/train/7"]
    paths += ["picture/query/3", "browse/loss", "drop"]

    def seen(folder, *options):
        found = {}

        def looked_at(server):
            for path in paths:
                address = server.address.replace("/?", f"/{path}?") + "&start=0&ids=4,9"
                with urllib.request.urlopen(address, timeout=10) as got:
                    found[path] = got.read()
            raise KeyboardInterrupt

        monkeypatch.setattr(Server, "wait", looked_at)
        monkeypatch.chdir(folder)
        result = call("view", "pictures", *options)
        assert result.exit_code == 0, result.output
        return found

    shutil.copytree(made / "pictures", tmp_path / "pictures")
    alone = seen(tmp_path)
    assert seen(made, "--show", "project.py:pictures") == alone
    assert json.loads(alone["browse/loss"])["rows"][0]["loss"] > 0
    assert "suspicious" in json.loads(alone["training"])


@pytest.mark.parametrize("kind", ["texts", "pictures", "rendered", "run"])
def test_where_there_is_room_for_few_the_page_has_its_own_and_says_what_is_missing(
    made, tmp_path, monkeypatch, kind
):
    """What a page lists is kept first: with room for just that, the page is the same."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "owner")
    monkeypatch.chdir(tmp_path / "owner")
    assert answer("report", kind)
    whole = (tmp_path / "owner" / kind / "report.html").read_text()
    show = [] if kind == "run" else ["--show", f"project.py:{'shown' if kind == 'texts' else kind}"]
    monkeypatch.setattr("upweight.report.kept.KEPT_BYTES", 10)
    if kind == "run":
        shutil.rmtree(tmp_path / "owner" / kind / "shown")
    answer("report", kind, *OWN, *show)
    facts, _ = shown.read(Run(tmp_path / "owner" / kind))
    if kind == "rendered":  # a function of the user's is asked for what the page lists alone
        assert answer("report", kind)
        assert (tmp_path / "owner" / kind / "report.html").read_text() == whole
        return
    assert (facts["whole"], len(facts["train"]["labels"])) == (False, 1)
    assert answer("report", kind)
    page = (tmp_path / "owner" / kind / "report.html").read_text()
    assert "Not kept in the run" in page and len(page) < len(whole)
    kept = KeptExamples(100, Examples(("a", "b"), table=np.array([[1.0], [2.0]])), np.array([3, 7]))
    found = kept.at([7, 4, 3])
    assert (found.labels[0], found.labels[2], found.known) == ("b", "a", (True, False, True))
    assert found.table.tolist() == [[2.0], [0.0], [1.0]]
    with pytest.raises(DataError, match="name the project"):
        kept.take([0])


def test_a_run_of_an_older_version_says_what_to_do_and_it_works(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("run/shown")
    toml = tmp_path / "run" / "run.toml"
    old = re.sub(r"(?ms)^show = .*?$|^\[files\].*?(?=^\[|\Z)", "", toml.read_text())
    toml.write_text(old)
    commands = [re.findall("upweight (report .*)", refusal(verb, "run")) for verb in VIEWS]
    assert commands[0] == commands[1] and len(commands[0]) == 1
    answer(*shlex.split(commands[0][0]))
    project = (tmp_path / "project.py").read_text()
    os.remove("project.py")
    assert answer("report", "run")["bytes"] > 10_000
    (tmp_path / "project.py").write_text(project)
    shutil.rmtree("run/shown")
    assert answer(*attribute())["did"] == "nothing"
    assert (tmp_path / "run" / "shown" / "finished.json").exists(), "kept by the same command"


def test_what_is_kept_is_refused_where_it_is_damaged(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = json.loads((made / "rendered/shown/finished.json").read_text())
    about = json.loads((made / "rendered/shown/manifest.json").read_text())
    numbers = (made / "rendered/shown/shown.safetensors").read_bytes()
    (tmp_path / "evil.py").write_text("")

    def signed(**changes):
        """With a hash that fits: what it says must be refused for what it says."""
        told = {k: v for k, v in whole.items() if k != "digest"} | changes
        return json.dumps(told | {"digest": own_digest(told)})

    def facts(**changes):
        return signed(facts=whole["facts"] | changes)

    custom, twins = whole["facts"]["queries"]["custom"], whole["facts"]["twins"]
    pairs = len(twins["near"])
    outside = [[{"picture": "https://example.org/x.png"}], *custom[1:]]
    markup = [[{"markup": "<script>"}], *custom[1:]]
    damaged = [
        "", "{}", "[]", "null", "7", "\0", json.dumps(whole)[:200], "[" * 10**5,
        json.dumps(whole | {"digest": "0"}), signed(more=1),
        json.dumps(whole | {"facts": whole["facts"] | {"options": {"title": "edited"}}}),
        signed(schema=2), signed(shards={"shown": "0"}), signed(facts=[]), signed(facts={}),
        facts(n=99), facts(n="x"), facts(n=100.7), facts(left_out=5),
        facts(left_out=[5]), facts(whole=True), facts(labels=["a"]), facts(labels=7),
        facts(train=None), facts(train=whole["facts"]["train"] | {"labels": ["a"]}),
        facts(queries=whole["facts"]["queries"] | {"custom": outside}),
        facts(queries=whole["facts"]["queries"] | {"custom": markup}),
        facts(queries=whole["facts"]["queries"] | {"texts": ["a"]}),
        facts(twins=[1]), facts(twins={}), facts(metadata=[1]), facts(predictions=7),
        facts(twins=twins | {"near": [[0, 10**6]] * pairs}),
        facts(twins=twins | {"near": [[0]] * pairs}),
        facts(twins=twins | {"cosines": [float("inf")] * pairs}),
        facts(twins=twins | {"cosines": [1.0] * (pairs + 1)}),
        facts(twins=twins | {"extra": 10**40}),
        facts(twins=twins | {"sets": -1}),
        facts(options={"k": "many"}), facts(options={"title": 7}), facts(options=None),
        facts(options={"names": 7}), facts(predictions=["a"] * 3),
    ]  # fmt: skip
    shutil.copytree(made / "rendered", tmp_path / "run")
    for k, text in enumerate(damaged):
        (tmp_path / "run/shown/finished.json").write_text(text)
        with pytest.raises(StaleStore, match=r"--project"):  # noqa: PT012
            alone(Run(tmp_path / "run"))
            pytest.fail(f"{k}: {text[:200]}")
    (tmp_path / "run/shown/finished.json").write_text(facts())
    alone(Run(tmp_path / "run"))  # so each of these is refused for what was changed in it
    (tmp_path / "run/shown/finished.json").write_text(json.dumps(whole))
    of = {k: v for k, v in about.items() if k != "digest"} | {"description": {}}
    for told in ("", json.dumps(of | {"digest": own_digest(of)})):
        (tmp_path / "run/shown/manifest.json").write_text(told)
        assert refusal("report", "run").startswith("StaleStore")
    (tmp_path / "run/shown/manifest.json").write_text(json.dumps(about))
    for contents in (b"", numbers[:100], numbers[:-1] + b"\7", b"\x80\x04K\x01."):
        (tmp_path / "run/shown/shown.safetensors").write_bytes(contents)
        assert refusal("report", "run").startswith("StaleStore")
    os.remove("run/shown/shown.safetensors")
    assert refusal("report", "run").startswith("StaleStore")
    shutil.copy(made / "project.py", tmp_path)
    answer("report", "run", *OWN)  # the way out that it names
    page = (tmp_path / "run" / "report.html").read_text()
    answer("report", "run")
    assert (tmp_path / "run" / "report.html").read_text() == page


def test_what_was_to_be_shown_is_kept_by_whatever_finishes_the_run(made, tmp_path, monkeypatch):
    shutil.copytree(made / "texts", tmp_path / "texts")
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "texts/shown/finished.json").read_bytes()
    for verb in (rerun("texts"), attribute(out="texts"), ["report", "texts", *OWN]):
        shutil.rmtree("texts/shown")
        answer(*verb)
        assert (tmp_path / "texts/shown/finished.json").read_bytes() == before, verb


def test_what_no_page_can_show_is_attributed_all_the_same(made, tmp_path, monkeypatch):
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    fails = ["--show", "project.py:fails"]
    (tmp_path / "project.py").write_text(PROJECT + "fails = {'train_texts': ['too few']}\n")
    result = call(*attribute(*fails))
    assert result.exit_code == 0
    assert "note: what a page shows was not kept in the run: ShapeError" in result.stderr
    assert "holds no such thing" in refusal("report", "run")
    assert "train_texts" in (tmp_path / "run/log.txt").read_text()
    (tmp_path / "project.py").write_text(PROJECT + "fails = {}\n")  # mended
    (command,) = re.findall(r"needs the project then: upweight (.*)", result.stderr)
    answer(*shlex.split(command))
    answer("report", "run")


def test_scores_too_many_for_memory_are_shown_as_a_view_reads_them(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "run/shown/finished.json").read_bytes()
    shutil.rmtree("run/shown")

    def too_many(_):
        raise SpecError("Scores must fit into memory.")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "load", too_many)
        answer(*rerun("run"))
    told = json.loads((tmp_path / "run/shown/finished.json").read_bytes())
    assert told == json.loads(before)


def test_what_is_kept_is_not_written_through_a_link(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("run/shown")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "shown").symlink_to(tmp_path / "elsewhere")
    for verb in (
        ["report", "run"],
        ["report", "run", *OWN],
        ["view", "run"],
        attribute(),
        rerun("run"),
    ):
        assert "shown, which is a link" in refusal(*verb)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "run" / "shown").unlink()  # the way out
    answer("report", "run", *OWN)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "run" / "shown" / "finished.json").exists()


def test_words_of_a_run_cannot_drive_the_terminal(gift):
    folder, _ = gift
    rewrite(folder, measure="\x1b]0;owned\x07\u202e", task="\x1b[2J.py:task")
    for verb in (["rerun", "gift"], VERBS["rerun --out"], VERBS["evaluate"]):
        result = call(*verb)
        assert not set(result.output) & set("\x1b\x07\u202e"), verb
        assert "\\x1b" in result.output


def changed(run, by):
    """The same run with other scores, written as the library writes them."""
    stored = StoredMatrix.load(run / "scores")
    facts = stored.facts
    stored.append(0, 0, stored.values() if by is None else by(stored.values()))
    stored.finish(facts)


SAID = {"bits": "the same bits", "rounding": ("the same to rounding", "not the same bits"),
        "different": "different: "}  # fmt: skip


def test_two_runs_are_the_same_bits_the_same_to_rounding_or_different(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)

    first, second = Run(tmp_path / "first"), Run(tmp_path / "again")

    def told():
        found, said, failed = compared(first, second)
        assert said.startswith(SAID[found["same"]])
        return failed, found

    for out in ("first", "again"):  # with the same libraries imported, which runs record
        answer(*rerun("run", "--out", out))
    failed, found = told()
    assert (failed, found["same"]) == (False, "bits")
    changed(second.path, None)  # in another form: the same numbers
    assert told()[1]["same"] == "bits"
    changed(second.path, lambda s: s * (1 + 1e-10))
    failed, found = told()
    assert (failed, found["same"], found["differences"]) == (True, "rounding", [])
    text = second.toml.read_text()
    second.toml.write_text(text.replace(f'numpy = "{np.__version__}"', 'numpy = "1.0"'))
    failed, found = told()
    assert (failed, found["same"]) == (False, "rounding")
    assert found["differences"] == [f"numpy {np.__version__} → 1.0"]
    second.toml.write_text(re.sub(r"(?ms)^\[environment\].*?(?=^\[|\Z)", "", text))
    assert not told()[0], "of a run of upweight 0.1.0 nobody knows the machine"
    second.toml.write_text(text)
    changed(second.path, lambda s: s * (1 + 1e-6))
    failed, found = told()
    assert (failed, found["same"]) == (True, "different")
    assert found["largest_difference"] == pytest.approx(1e-6, rel=1e-3)
    for by in (torch.neg, torch.Tensor.float, lambda s: s[:, :50]):
        whole = uw.Scores.load(second.scores)
        changed(second.path, by)
        assert told()[0]
        changed(second.path, lambda _, whole=whole: whole.values)
    result = call(*rerun("run", "--out", "again"))
    assert (
        result.exit_code == 1 and "different: the scores differ by up to 1.0e-06" in result.stdout
    )
    assert call("rerun", "run", *OWN, "--out", "run").exit_code == 2, "itself is no comparison"


def test_a_finished_run_says_its_verdict_and_what_to_ask_for(made, tmp_path, monkeypatch):
    for name in ("project.py", "numbers_beside.py"):
        shutil.copy(made / "project.py", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    np.save("weights.npy", np.ones(3))
    (tmp_path / "names.txt").write_text("a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("1,2")
    (tmp_path / "project.py").write_text(
        "import pathlib, numpy\nimport numbers_beside\n"
        "numpy.load('weights.npy')\npathlib.Path('data', 'rows.csv').read_text()\n"
        "pathlib.Path('out.txt').write_text('x')\n"
        "unread = 'names.txt'\n" + PROJECT
    )
    answer(*attribute())
    record = Run(tmp_path / "run").record
    assert set(record.files) == {"weights.npy", "data/rows.csv", "names.txt"}
    assert str(tmp_path) not in (tmp_path / "run/run.toml").read_text()
    found = hashlib.sha256((tmp_path / "weights.npy").read_bytes()).hexdigest()
    assert record.files["weights.npy"] == f"sha256 {found}"
    assert record.environment["torch"] == torch.__version__
    assert {"python", "numpy", "platform", "processor", "BLAS"} <= set(record.environment)
    evaluated = answer("evaluate", "run", "--recipe", "project.py:recipe", "--lds", "3")
    shutil.move("run", "alone")
    os.remove("project.py")
    said = call("rerun", "alone").stdout
    assert evaluated["verdict"] in said
    for name in ("project.py", "numbers_beside.py", "weights.npy", "data/rows.csv"):
        assert f"{name}  sha256 " in said
    assert f"torch {torch.__version__}" in said and record.environment["processor"] in said
    assert "weights.npy" in refusal("rerun", "alone", "--out", "again")


def test_rankings_are_printed_of_few_queries_and_of_those_asked_for(made, monkeypatch):
    monkeypatch.chdir(made)
    printed = call(*attribute("--top", "1")).stdout
    assert printed.count("raises the ") == 5 and "and 5 other queries" in printed
    printed = call(*attribute("--top", "1", "--query", "7", "--query", "2")).stdout
    assert re.findall(r"(?m)^query (\d+): ", printed) == ["7", "2"]
    assert call(*attribute("--top", "1", "--query", "10")).exit_code == 2
    assert call(*attribute("--query", "7")).stdout.count("raises the ") == 3


def test_queries_are_named_by_place_or_else_by_id():
    ids = ["resp-7", "12", "resp-7", "resp-8"]
    assert named_queries(("1", "resp-8", "12"), ids, 4) == [1, 3, 1]
    for name, words in (("4", "0 to 3, or resp-7"), ("resp-7", "2 queries have that id")):
        with pytest.raises(click.UsageError, match=words):
            named_queries((name,), ids, 4)


def test_a_run_is_shown_in_twenty_lines_by_its_names_without_its_project(made, monkeypatch):
    monkeypatch.chdir(made)
    said = call("show", "texts").stdout
    assert len(said.splitlines()) <= 20
    for words in ("not checked against retraining", "Loss() of 10 queries",
                  "Influence(EKFAC(), damping=",
                  "ask its owner for project.py", "where the model does worst"):  # fmt: skip
        assert words in said
    facts = answer("show", "texts", "--top", "1")
    scores, display = uw.Scores.load("texts/scores"), alone(Run(made / "texts"))
    hardest = int(np.argmax(display.values))  # of Loss()
    (top,) = facts["top"]
    assert top == json.loads(json.dumps(scores.top(1, hardest).facts)) and facts["ask_for"]
    label = display.train.all_labels[top["lowers"][0]]
    assert re.search(rf"lowers the loss +{top['lowers'][0]}  {label} ", said)
    asked = call("show", "run", "--query", "3", "--query", "1").stdout
    assert re.findall(r"(?m)^query (\d+)", asked) == ["3", "1"]
    assert call("show", "run", "--query", "10").exit_code == 2


def test_looking_and_packing_run_nothing_and_pack_only_what_the_run_was_made_of(gift):
    folder, marker = gift
    assert call("show", "gift").exit_code == 0
    rewrite(folder, task=str(folder.parent / "other" / "secret.py:task"))
    packed = answer("pack", "gift")
    assert packed["files"] == [] and not marker.exists()
    unfinish(folder)
    assert "unfinished" in call("show", "gift").stdout and not marker.exists()
    assert "needs a finished run" in refusal("pack", "gift")


def test_a_packed_run_is_computed_again_from_the_zip_alone(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "project.py", tmp_path)
    shutil.copytree(made / "run", "run")
    assert answer("pack", "run", *OWN)["files"] == ["project.py"]
    first = (tmp_path / "run.zip").read_bytes()
    call("pack", "run", *OWN)
    assert (tmp_path / "run.zip").read_bytes() == first
    with zipfile.ZipFile("run.zip") as archive:
        archive.extractall("auditor")
    monkeypatch.chdir(tmp_path / "auditor")
    assert "<title>" in (tmp_path / "auditor/run/report.html").read_text()
    assert f"unzip {Path('../run.zip').absolute()}, and" in refusal("show", "../run.zip")
    said = call("rerun", "run").stdout
    assert "run/project/project.py is that file" in said
    assert "rerun run --project run/project/project.py --out OTHER" in said
    assert "packed with it" in call("show", "run").stdout
    (tmp_path / "auditor/run/project/project.py").write_text("task = 1")
    assert "run/project/project.py is another file" in call("rerun", "run").stdout
    shown = call("show", "run").stdout
    assert "ask its owner for project.py: upweight rerun run" in shown and "packed" not in shown
    with zipfile.ZipFile("../run.zip") as archive:
        archive.extractall(".")
    same = answer("rerun", "run", "--project", "run/project/project.py", "--out", "again")
    assert same["bit_identical"]
    monkeypatch.chdir(tmp_path)
    alone = refusal("attribute", "project.py", "--train", "some", "--out", "other")
    assert "for example project.py:some" in alone
    (tmp_path / "project.py").write_text("task = 1")
    assert "changed since" in answer("pack", "run", *OWN)["missing"]["project.py"]


def test_ids_of_a_frame_are_kept_in_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.py").write_text(
        "import pandas as pd\nfrom sklearn.datasets import load_iris\n"
        "from sklearn.linear_model import LogisticRegression\n"
        "X, y = load_iris(as_frame=True, return_X_y=True)\n"
        "X.index = y.index = [f'flower-{i}' for i in range(150)]\n"
        "model = LogisticRegression(tol=1e-8, max_iter=1000).fit(X, y)\n"
        "train, test = (X, y), (X[70:80], y[70:80])\n"
    )
    printed = call("attribute", "table.py", "--out", "run", "--top", "1").stdout
    assert re.search(r"query \d: flower-7\d, 1\n  raises the loss  flower-\d+  [012] ", printed)
    (own,) = re.findall(r"upweight (evaluate .*)", printed)
    assert "--recipe" not in own  # scikit-learn's own fit
    assert answer(*shlex.split(own), "--lds", "3")["subsets"] == 3
    os.remove("table.py")
    assert re.search(r"lowers the loss +flower-\d+", call("show", "run").stdout)
    call("report", "run")
    page = (tmp_path / "run/report.html").read_text()
    assert '"name":"flower-73"' in page and "petal width (cm)" in page


def test_the_next_commands_are_complete_and_work(made, tmp_path, monkeypatch):
    shutil.copy(made / "project.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    printed = call(*attribute()).stdout
    commands = re.findall(r"(?m)^(?:  next:|       ) upweight (.*)$", printed)
    assert [c.split()[0] for c in commands] == ["report", "evaluate", "rerun"]
    for command in commands:
        extra = ["--lds", "3"] if command.startswith("evaluate") else []
        answer(*shlex.split(command), *extra)


def test_the_next_commands_of_a_moved_project_name_the_files_that_ran(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "moved").mkdir()
    shutil.copy(made / "project.py", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for out in ("again", "once more"):
        printed = call("rerun", "run", "--project", "moved/project.py", "--out", out).stdout
        commands = re.findall(r"(?m)^(?:  next:|       ) upweight (.*)$", printed)
        assert "--recipe moved/project.py:recipe" in commands[1]
        assert "--project moved/project.py" in commands[2]
        answer(*shlex.split(commands[2]))


def test_a_refusal_names_the_files_that_the_user_named_and_the_command_works(
    made, tmp_path, monkeypatch
):
    """Not those where run.toml says that they lie: the run was moved."""
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "moved").mkdir()
    shutil.copy(made / "project.py", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    unfinish(tmp_path / "run")
    mine = ["run", "--project", "moved/project.py"]
    for verb in (["report", *mine], ["view", *mine], ["evaluate", *mine, "--recipe", "Newton()"]):
        (command,) = re.findall(r"trust its files: upweight (.*)", refusal(*verb))
    assert command.endswith("--project moved/project.py")
    answer(*shlex.split(command))
    assert answer("report", *mine)["report"]


def test_the_command_of_a_page_makes_the_run_again_from_wherever_it_was_made(
    made, tmp_path, monkeypatch
):
    (tmp_path / "owner").mkdir()
    (tmp_path / "reader").mkdir()
    shutil.copy(made / "project.py", tmp_path / "owner")
    monkeypatch.chdir(tmp_path / "owner")
    options = ["--memory", "1MB", "--show", "project.py:shown"]
    answer(*attribute(*options, out="runs/one"))
    monkeypatch.chdir(tmp_path / "reader")
    run = Run(tmp_path / "owner/runs/one")
    told = command_of(run, run.record)
    before = run.record
    shutil.rmtree(run.path)
    monkeypatch.chdir(tmp_path / "owner")
    for each in told.split(" && "):
        answer(*shlex.split(each)[1:])
    assert run.record == before
    assert (run.path / "report.html").exists()


def test_a_refusal_of_view_goes_on_with_the_port(made, monkeypatch):
    monkeypatch.chdir(made)
    said = refusal("view", "run", "--show", "numbers.py:shown", "--port", "8765", "--browser")
    assert "upweight view run --show numbers.py:shown --port 8765 --browser --project" in said
