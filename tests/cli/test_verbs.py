"""The verbs on a small real project: what they answer, what they leave on disk and refuse."""

import functools
import html
import json
import os
import shutil
import tomllib
import urllib.request

import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

import upweight as uw
from tests.runs.digests import digests
from upweight import shards
from upweight.cli.main import VERBS, cli
from upweight.cli.spec import parse
from upweight.errors import AssumptionWarning, StaleStore
from upweight.methods.fitted import Fitted
from upweight.runs import work
from upweight.runs.directory import Run
from upweight.runtime.headers import write_json
from upweight.runtime.matrix import StoredMatrix
from upweight.runtime.store import Store
from upweight.scoring import stream
from upweight.view import Server

PROJECT = """
import torch
from torch import nn
import upweight as uw

digits = uw.data.mnist_subset()
dtype = torch.get_default_dtype()

def rows(images, labels, every):
    return (torch.tensor(images[::every], dtype=dtype).reshape(-1, 784)[:, ::8] / 255,
            torch.tensor(labels[::every]))

train = rows(digits.X, digits.y, 50)
test = rows(digits.X_test, digits.y_test, 100)

def network():
    return nn.Linear(98, 10)

recipe = uw.Training(network, uw.SGD(lr=0.3), epochs=3, batch=25, seed=0)
start = uw.Task(network(), uw.CrossEntropy(), uw.L2(0.01))
task = uw.Task(recipe.trained(start, train), uw.CrossEntropy(), uw.L2(0.01))

def squared(outputs, targets):
    return outputs.square().sum(dim=1)
"""
NAMES = ["project.py:task", "--train", "project.py:train", "--queries", "project.py:test"]
OTHER = """
from project import network
import upweight as uw

recipe = uw.Training(network, uw.SGD(lr=0.3), epochs=30, batch=25, seed=0)
"""
OWN = ["--project", "project.py"]
METHOD = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))


digits = functools.cache(uw.data.mnist_subset)  # unpacked once, not by each command


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.setattr(uw.data, "mnist_subset", digits)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The project with a finished run in `run`: to be copied, not to be written."""
    folder = tmp_path_factory.mktemp("computed")
    (folder / "project.py").write_text(PROJECT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uw.data, "mnist_subset", digits)
        patch.chdir(folder)
        answer(*attribute())
    return folder


@pytest.fixture
def finished(project, computed):
    """The project with a finished run in `run`."""
    shutil.copytree(computed, project, dirs_exist_ok=True)
    return project


def attribute(*options, out="run"):
    method = [] if "--method" in options else ["--method", repr(METHOD)]
    return ["attribute", *NAMES, "--out", out, *method, *options]


def rerun(run, *options):
    return ["rerun", run, *OWN, *options]


def call(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def answer(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(*arguments, code=1):
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 25, "one screen"
    return result.stderr


def test_attribute_writes_the_scores_that_the_library_gives(project):
    found = answer(*attribute("--measure", "Margin", "--top", "2"))
    assert (found["did"], found["n"], found["q"], found["p"]) == ("computed", 100, 10, 990)
    scores = uw.Scores.load("run/scores")
    files = {}
    exec(PROJECT, files)
    fitted = METHOD.fit(files["task"], files["train"])
    expected = fitted.attribute(files["test"], uw.Margin())
    assert_close(scores.values, expected.values, rtol=1e-9, atol=1e-12)
    assert scores.provenance.measure == "Margin()"
    excess = scores.provenance.health["row_sum_excess"]
    assert_close(excess, expected.provenance.health["row_sum_excess"], rtol=1e-6, atol=1e-9)
    assert found["top"][3]["raises"] == list(scores.top(2, 3).raises)


def test_run_toml_says_all_and_is_read_back(finished):
    written = tomllib.loads((finished / "run" / "run.toml").read_text())
    assert parse(written["method"]) == METHOD
    assert written["measure"] == "Loss()" and "tolerance=0.01" in written["method"]
    assert written["directory"] == ".."
    assert set(written["fingerprints"]) == {
        "model",
        "task",
        "train",
        "queries",
        "method",
        "measure",
    }
    assert set(written["sources"]) == {"project.py"}
    assert written["versions"]["torch"] == torch.__version__
    assert str(finished) not in (finished / "run" / "run.toml").read_text()
    assert Run(finished / "run").record.method == repr(METHOD)


def test_a_finished_run_is_left_as_it_is(finished, monkeypatch):
    monkeypatch.setattr(work, "attribute", None)  # nothing is computed
    assert answer(*attribute())["did"] == "nothing"
    assert "finished already" in call("rerun", "run/run.toml").stdout


@pytest.mark.parametrize(
    "options, says",
    [
        (["--measure", "Margin()"], "measure is Margin()"),
        (["--method", "Influence(KFAC(), damping=Relative(0.1))"], "method is Influence"),
        (["--memory", "3GB"], "memory_bytes is 3000000000"),
        (["--queries", "project.py:train"], "the set of queries is not what it was"),
    ],
)
def test_a_run_of_something_else_is_refused(finished, options, says):
    said = refusal(*attribute(*options))
    assert says in said
    assert "another --out" in said


def test_a_model_that_changed_is_refused_and_an_edited_comment_is_not(finished):
    path = finished / "project.py"
    path.write_text("# a comment\n" + PROJECT)
    result = call(*attribute())
    assert result.exit_code == 0
    assert "note: project.py changed since" in result.stderr
    path.write_text(PROJECT.replace("epochs=3", "epochs=4"))
    for command in (attribute(), rerun("run/run.toml"), ["report", "run", *OWN]):
        assert "the model's state is not what it was" in refusal(*command)
    path.write_text(PROJECT.replace("uw.L2(0.01))\n\ndef", "uw.L2(0.02))\n\ndef"))
    assert "the task (loss, penalty" in refusal(*attribute())


def test_a_question_that_failed_before_any_work_may_be_mended(project):
    path = project / "project.py"
    custom = "lambda f, y: torch.nn.functional.cross_entropy(f, y, reduction='none')"
    path.write_text(PROJECT.replace("train), uw.CrossEntropy()", f"train), {custom}"))
    assert "UnsupportedModel" in refusal(*attribute())
    found = answer("doctor", "project.py:task", "--train", "project.py:train")
    assert (found["measures"], found["draws_labels"]) == (["Loss()", "Logit()"], False)
    path.write_text(PROJECT)
    assert answer(*attribute())["did"] == "computed"
    found = answer("doctor", "project.py:task", "--train", "project.py:train")
    assert found["measures"] == ["Loss()", "Margin()", "LogProb()", "Logit()"]
    assert found["draws_labels"] is True


@pytest.mark.filterwarnings("default")
def test_warnings_are_lines(project):
    code = "import warnings\nwarnings.warn('a test')\n" + PROJECT
    (project / "project.py").write_text(code)
    result = call("doctor", "project.py:task")
    assert "warning: project.py:2: a test\n" in result.stderr


def test_a_directory_that_holds_other_things_is_refused(project):
    assert "which holds project.py" in refusal(*attribute(out="."))
    assert not (project / "run.toml").exists()


def test_a_mistake_leaves_no_directory(project):
    refusal(*attribute("--method", "Influence(EKAFC())"))
    refusal(*attribute("--measure", "project.py:nothing"))
    assert not (project / "run").exists()


def test_a_second_process_is_refused_and_told_who_holds_the_directory(project):
    with Run(project / "run").held("a test"):
        assert f"held by process {os.getpid()}" in refusal(*attribute())
    (project / "run" / ".holder").write_text("process 1, which was killed")
    assert answer(*attribute())["did"] == "computed"


def test_ctrl_c_says_how_to_go_on_and_the_command_does(project, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Fitted, "attribute", interrupted)
        said = refusal(*attribute(), code=130)
    assert "interrupted" in said
    command = said.split("To resume: upweight ")[1].split()
    assert answer(*command)["did"] == "continued"


def test_a_full_disk_is_an_error_that_leaves_what_was_there(project, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(stream, "MOST_EXAMPLES", 16)
    monkeypatch.setattr(stream, "TOGETHER", (16, 16))
    answer(*attribute(out="whole"))
    expected = digests(Run(project / "whole"))
    assert len(expected) > 2
    sync, left = os.fsync, 8

    def fills(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills)
        said = refusal(*attribute())
    assert "No space left on device" in said
    assert (
        "Finished work is kept. To resume: upweight rerun run/run.toml --project project.py" in said
    )
    kept = digests(Run(project / "run"))
    assert 0 < len(kept) < len(expected)
    assert StoredMatrix.load(project / "run/scores").missing(0, 10) != [(0, 100)]
    assert "needs a finished run" in refusal("report", "run")
    left = 10**6
    assert answer(*rerun("run/run.toml"))["did"] == "continued"
    assert digests(Run(project / "run")) == expected


def test_repeating_from_nothing_says_whether_the_bits_are_the_same(finished):
    assert answer(*rerun("run/run.toml", "--out", "again"))["bit_identical"] is True
    stored = StoredMatrix.load("again/scores")
    values, facts = stored.values(), stored.facts
    values[-1, -1] = 1.0
    stored.append(0, 0, values)
    stored.finish(facts)
    result = call(*rerun("run", "--out", "again"), "--json")
    assert result.exit_code == 1, "an answer, and a failure"
    found = json.loads(result.stdout)
    assert found["did"] == "nothing"
    assert found["bit_identical"] is False
    assert found["largest_difference"] > 0


def test_a_run_can_be_asked_of_from_any_folder_and_moves_with_its_project(finished, monkeypatch):
    moved = finished.with_name("moved")
    shutil.move(finished, moved)
    monkeypatch.chdir("/")
    mine = ["--project", moved / "project.py"]
    assert answer("rerun", moved / "run", *mine)["did"] == "nothing"
    assert answer("rerun", moved / "run", *mine, "--out", moved / "b")["bit_identical"] is True
    shutil.move(moved / "run", moved.with_name("alone"))
    shutil.move(moved, moved.with_name("elsewhere"))
    said = refusal("rerun", moved.with_name("alone"), *mine)
    assert "must exist" in said


def test_an_interrupted_run_is_not_finished_by_other_versions(finished):
    (finished / "run" / "scores" / "finished.json").unlink()
    toml = finished / "run" / "run.toml"
    toml.write_text(toml.read_text().replace(torch.__version__, "1.0"))
    assert "an upgrade in between" in refusal(*attribute())


def test_exact_methods_have_runs_too(project):
    method = ["--method", "Influence(Hessian(), damping=0.01)"]
    assert answer(*attribute(*method))["did"] == "computed"
    assert uw.Scores.load("run/scores").values.shape == (10, 100)
    assert answer(*rerun("run", "--out", "again"))["bit_identical"] is True
    small = answer(*attribute(*method, "--memory", "20kB", out="small"))
    assert small["did"] == "computed"
    assert_close(uw.Scores.load("small/scores").values, uw.Scores.load("run/scores").values)


def test_methods_and_measures_may_be_the_users_own(project):
    path = project / "project.py"
    path.write_text(PROJECT + "method = uw.Influence(uw.Diagonal(), damping=0.1)\n")
    own = ["--method", "project.py:method", "--measure", "project.py:squared"]
    answer(*attribute(*own))
    record = Run(project / "run").record
    assert record.method.startswith("Influence(curvature=Diagonal(")
    assert record.measure == "project.py:squared"
    assert answer(*rerun("run"))["did"] == "nothing"
    path.write_text(path.read_text().replace("outputs.square()", "outputs.abs()"))
    assert "the measure is not what it was" in refusal(*rerun("run"))
    assert "must be a method" in refusal(*attribute("--method", "project.py:test", out="x"))
    assert "must be a task" in refusal("doctor", "project.py:recipe")


def test_a_method_of_the_users_own_kind_is_told_from_another(project):
    code = PROJECT + (
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Mine(uw.Method):\n"
        "    damping: float\n"
        "    unit = uw.Unit.DERIVATIVE\n"
        "    def prepare(self, fitting):\n"
        "        return uw.Influence(uw.Diagonal(), damping=self.damping).prepare(fitting)\n"
        "method = Mine(0.1)\n"
    )
    (project / "project.py").write_text(code)
    answer(*attribute("--method", "project.py:method"))
    assert Run(project / "run").record.method == "project.py:method"
    (project / "project.py").write_text(code.replace("Mine(0.1)", "Mine(0.2)"))
    assert "the method is not what it was" in refusal(*rerun("run"))


def test_evaluation_is_kept_and_the_report_says_it(finished):
    found = answer("evaluate", "run", "--recipe", "project.py:recipe", "--lds", "8")
    assert (found["subsets"], found["seeds"], found["models"]) == (8, 2, 18)
    again = answer("evaluate", "run", "--recipe", "project.py:recipe", "--lds", "8")
    assert again["verdict"] == found["verdict"]
    assert again["seconds"] < found["seconds"], "models are found again"
    kept = json.loads((finished / "run" / "evaluation.json").read_text())["halves"]
    assert kept["verdict"] == found["verdict"]
    assert (kept["reason"], kept["notes"]) == (found["reason"], found["notes"])
    written = answer("report", "run")
    page = (finished / "run" / "report.html").read_text()
    assert written["bytes"] == len(page.encode())
    assert f"<b>{found['verdict']}:</b> {found['reason']}." in html.unescape(page)
    assert "upweight attribute project.py:task --train" in page
    assert "Ranked by self-influence" in page, "from the factors that the run has kept"


def test_scores_of_a_run_carry_what_evaluate_found(finished):
    folder = finished / "run" / "scores"
    assert not uw.Scores.load(folder).checks
    found = answer("evaluate", "run", "--recipe", "project.py:recipe", "--lds", "8")
    shutil.copytree(folder, finished / "scores")
    for scores in (uw.Scores.load(folder), uw.Scores.open("run/scores")):
        (told,) = scores.checks
        assert (told.verdict, told.reason) == (found["verdict"], found["reason"])
        assert (told.models, [*told.notes]) == (found["models"], found["notes"])
        with pytest.warns(AssumptionWarning, match="retraining said"):
            scores.predict(drop=[0])
    run = Run(finished / "run")
    facts = run.evaluations()["halves"]
    run.keep_evaluation("halves", facts | {"verdict": "Order and size"})
    assert not uw.Scores.load(folder).against_sizes

    # Beside scores that are in no run lies somebody else's file of this name.
    (finished / "evaluation.json").write_text("{}")
    assert not uw.Scores.load(finished / "scores").checks
    kept = json.loads(run.evaluation.read_text()) | {"of": "others"}
    kept.pop("digest")
    write_json(run.evaluation, kept.pop("schema"), kept)
    with pytest.raises(StaleStore, match="delete that file"):
        uw.Scores.load(folder)
    run.evaluation.unlink()
    assert not uw.Scores.load(folder).checks


def test_a_recipe_that_makes_another_model_is_kept_and_shown_first(finished):
    """Another strength of the penalty: its retrained models are ordered like the run's own."""
    code = (finished / "project.py").read_text()
    (finished / "other.py").write_text(OTHER)
    command = ["evaluate", "run", *OWN, "--recipe", "other.py:recipe", "--lds", "8"]
    shown = call(*command).stdout
    first = shown.splitlines()[0]
    assert first.startswith("Do not believe these: on all of the data the recipe makes another")
    kept = json.loads((finished / "run" / "evaluation.json").read_text())["halves"]
    assert kept["verdict"] == "Do not believe these"
    assert "the recipe makes another model" in kept["notes"][0]
    assert "the recipe makes another model" in (finished / "run" / "log.txt").read_text()
    answer("report", "run")
    page = (finished / "run" / "report.html").read_text()
    told = page.index("the recipe makes another model")
    assert told < page.index('id="pages"'), "above the pages: seen on each of them"
    assert (finished / "project.py").read_text() == code


def test_an_evaluation_of_an_earlier_version_is_refused_and_the_way_out_works(finished):
    """Its verdict followed another rule, and nothing says whether it was edited."""
    command = ["evaluate", "run", "--recipe", "project.py:recipe", "--lds", "8"]
    answer(*command)
    file = finished / "run" / "evaluation.json"
    kept = json.loads(file.read_text())
    del kept["digest"], kept["schema"]
    kept["halves"]["verdict"] = "on your model, this method's ranking agrees with retraining"
    file.write_text(json.dumps(kept))
    assert "delete that file and evaluate again" in refusal("report", "run")
    file.unlink()
    answer(*command)
    answer("report", "run")
    assert "agrees with retraining" not in (finished / "run" / "report.html").read_text()


def test_an_interrupted_evaluation_goes_on(finished, monkeypatch):
    command = ["evaluate", "run", "--recipe", "project.py:recipe", "--lds", "8"]
    original, count = Store.write, 0

    def write(self, name, tensors):
        nonlocal count
        original(self, name, tensors)
        count += 1
        if count == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", write)
    said = refusal(*command, code=130)
    assert f"To resume: upweight {' '.join(command)}" in said
    assert answer(*command)["subsets"] == 8


def test_evaluation_takes_a_training_function_and_refuses_what_is_no_recipe(finished):
    path = finished / "project.py"
    path.write_text(
        PROJECT + "def fit(w):\n"
        "    data = uw.as_data(train)\n"
        "    return recipe.prepare(start, data)(w[None]).theta[0]\n"
        # With a default of its weights it can be called without any, and is not.
        "def again(weights=None):\n"
        "    assert weights is not None\n"
        "    return fit(weights)\n"
        "def trained(rows=None):\n"
        "    return task.model\n"
    )
    found = answer("evaluate", "run", "--recipe", "project.py:fit", "--lds", "8")
    assert found["seeds"] == 1
    same = answer("evaluate", "run", "--recipe", "project.py:again", "--lds", "8")
    assert same["slope"] == found["slope"]
    assert "def recipe(weights)" in refusal("evaluate", "run", "--recipe", "project.py:trained")
    assert "A recipe says how" in refusal("evaluate", "run", "--recipe", "project.py:test")
    # The name under which it is looked for beside the task.
    assert answer("evaluate", "run", "--project", "project.py", "--lds", "8")["seeds"] == 2
    path.write_text(PROJECT.replace("recipe", "how"))
    assert "must know how" in refusal("evaluate", "run", "--project", "project.py")
    said = refusal("evaluate", "run", "--recipe", "x.py:y", "--lds", 8, "--budget", "1 s", code=2)
    assert "exclude each other" in said


def test_plan_counts_and_writes_nothing(project):
    before = sorted(project.rglob("*"))
    found = answer("plan", *NAMES, "--method", repr(METHOD))
    assert (found["n"], found["q"], found["p"]) == (100, 10, 990)
    assert found["layers"][0]["layer"] == "Linear"
    assert found["scores_bytes"] == 100 * 10 * 8
    assert found["passes"] == "2 for the curvature, 1 for the scores"
    assert all(seconds > 0 for seconds in found["seconds"].values())
    dense = answer("plan", *NAMES, "--method", "Influence(Hessian(), damping=0.01)")
    assert dense["operator_bytes"] == 990**2 * 8
    assert "expected time" in call("plan", *NAMES).stdout
    assert sorted(project.rglob("*")) == before


def test_the_factors_take_about_the_space_that_plan_expected(finished):
    expected = answer("plan", *NAMES, "--method", repr(METHOD))["factors_bytes"]
    size = (finished / "run" / "factors" / "state.safetensors").stat().st_size
    assert expected / 3 < size < 3 * expected


def test_doctor_tells_of_the_machine_and_of_the_model(project):
    machine = answer("doctor")
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["devices"]["cpu"]["free_bytes"] > 0
    assert answer("doctor", "project.py:task")["without_rule"] == []
    found = answer("doctor", "project.py:task", "--train", "project.py:train")
    assert found["n"] == 100
    assert [use["parameters"] for use in found["layers"]] == ["weight + bias"]
    assert answer("doctor", "project.py")["layers"] == found["layers"]  # found by name
    path = project / "project.py"
    path.write_text(PROJECT + "model, loss = task.model, nn.CrossEntropyLoss()\ndel task\n")
    assert answer("doctor", "project.py")["n"] == 100


def test_doctor_says_why_a_model_cannot_be_attributed(project):
    path = project / "project.py"
    path.write_text(PROJECT.replace("nn.Linear(98, 10)", "nn.Sequential(nn.Linear(98, 10), Odd())"))
    path.write_text(
        path.read_text().replace("digits =", "class Odd(nn.Dropout): pass\ndigits =", 1)
        + "task.model.train()\n"
    )
    said = refusal("doctor", "project.py:task", "--train", "project.py:train")
    assert "Way out:" in said


def test_errors_come_as_json_too_and_with_a_traceback_when_asked(project):
    result = call(*attribute("--measure", "Marginal()"), "--json", "--traceback")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "SpecError"
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_shows_an_example(verb):
    shown = call(verb, "--help")
    assert shown.exit_code == 0
    assert f"upweight {verb}" in shown.stdout.split("Example")[1]


def test_usage_errors_exit_with_2(project):
    assert call("attribute", "project.py:task").exit_code == 2
    for option in (["--memory", "much"], ["--memory", "0"]):
        assert call(*attribute(*option)).exit_code == 2
    assert call("report", "nowhere").exit_code == 2
    assert "A run is a directory with a run.toml" in refusal("report", project)


def test_evaluation_says_when_the_recipe_makes_another_model(finished):
    (finished / "project.py").write_text(
        PROJECT + "other = uw.Training(network, uw.SGD(lr=0.1), epochs=1, batch=25, seed=0)\n"
    )
    same = answer("evaluate", "run", "--recipe", "project.py:recipe", "--lds", "3")
    other = answer("evaluate", "run", "--recipe", "project.py:other", "--lds", "3")
    assert same["notes"] == []
    assert "makes another model" in other["notes"][0]


def test_plan_times_a_method_that_a_few_examples_leave_singular(project):
    code = PROJECT.replace("uw.CrossEntropy(), uw.L2(0.01))\n\ndef", "uw.CrossEntropy())\n\ndef")
    (project / "project.py").write_text(code)
    method = ["--method", "Influence(GGN(), Cholesky())"]
    assert "NotPositiveDefinite" in refusal(*attribute(*method))
    assert answer("plan", *NAMES, *method)["seconds"]["fit"] > 0


def test_a_run_is_viewed_until_interrupted_and_does_not_lock_others_out(finished, monkeypatch):
    seen = []

    def looked_at(server):
        with urllib.request.urlopen(server.address, timeout=5) as page:
            seen.append(page.read().decode())
        query = server.address.replace("/?", "/query/1?")
        with urllib.request.urlopen(query, timeout=5) as found:
            seen.append(json.load(found))
        with Run(finished / "run").held("another"):
            seen.append("held")
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "wait", looked_at)
    result = call("view", "run")
    assert result.exit_code == 0, result.stderr
    assert "http://127.0.0.1:" in result.stderr and "stopped" in result.stderr
    page, query, held = seen
    assert "Can I trust this?" in page and "upweight attribute" in page and held == "held"
    scores = uw.Scores.load(finished / "run/scores").values[1]
    assert query["histogram"]["high"] == pytest.approx(float(scores.max()), rel=1e-5)


def test_an_unfinished_run_has_no_view(finished):
    (finished / "run/scores/finished.json").unlink()
    next((finished / "run/scores").glob("*.safetensors")).unlink()
    result = call("view", "run")
    assert (
        result.exit_code == 1
        and "upweight rerun" in result.stderr
        and "--project project.py" in result.stderr
    )
