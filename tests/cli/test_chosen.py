"""`upweight attribute project.py`: objects by their usual names, and a method that is chosen."""

import json
import tomllib
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

import upweight as uw
from upweight.cli.main import cli
from upweight.cli.project import opened
from upweight.cli.question import Asked
from upweight.front import attribute as front
from upweight.front import choice
from upweight.runtime.matrix import StoredMatrix

TASK = """
import torch
from torch import nn
import upweight as uw

torch.manual_seed(0)
X = torch.randn(40, 4, dtype=torch.float64)
y = torch.arange(40) % 3
train, test = (X, y), (X[:6] + 0.1, y[:6])

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
"""
NETWORK = """
model = net().eval()
loss = nn.CrossEntropyLoss(label_smoothing=0.1)
penalty = uw.L2(0.01)
"""
LINEAR = """
model = nn.Linear(4, 3).double()
loss = nn.CrossEntropyLoss()
queries = test[0][:2], test[1][:2]
"""
RECIPE = """
recipe = uw.Training(net, uw.SGD(lr=0.1), epochs=2, batch=10)
task = uw.Task(recipe.trained(uw.Task(net(), uw.CrossEntropy()), train), uw.CrossEntropy())
"""
TRAJECTORY = """
trajectory = recipe.trajectory(task, train)
"""
STEPS_ALONE = """
trajectory = uw.Training(net, uw.SGD(lr=0.1), epochs=2, batch=10).trajectory(
    uw.Task(net(), uw.CrossEntropy()), train)
task = trajectory.trainer.task.moved_to(trajectory.theta)
"""
FUNCTION = """
def recipe(weights):
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.enable_grad():
            losses = nn.functional.cross_entropy(model(X), y, reduction="none")
            (weights * losses).mean().backward()
        optimizer.step()
    return model.eval()

task = uw.Task(recipe(torch.ones(40).double()), uw.CrossEntropy())
"""


@pytest.fixture
def steady(monkeypatch):
    """A machine that is always as fast, and a stack of few models."""
    of_now = front.facts_of

    def facts_of(*arguments, **named):
        found = of_now(*arguments, **named)
        quick = {"epoch_seconds": 1e-4, "products_per_second": 2e10}
        seconds = min(found.half_seconds, 1e-2)
        return replace(found, **quick, training_seconds=2 * seconds, half_seconds=seconds)

    monkeypatch.setattr(front, "facts_of", facts_of)
    ekfac = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    few = uw.Stacked((uw.Ensemble(ekfac, 2, 0.5),), 8, seeds=2)
    for name in ("stacked", "stacked_ends"):
        monkeypatch.setattr(choice, name, lambda halves: few)


def made(*parts):
    """What a project defines."""
    names = {}
    exec("".join(parts), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, *parts):
    (folder / "project.py").write_text("".join(parts))


def call(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def answer(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def written(run="run"):
    with open(f"{run}/run.toml", "rb") as file:
        return tomllib.load(file)


def test_a_file_alone_with_a_model_its_loss_and_penalty(folder):
    write(folder, TASK, NETWORK)
    found, said = answer("attribute", "project.py", "--out", "run", "--top", 2)
    assert "chose Influence(GGN()" in said and (found["n"], found["q"]) == (40, 6)
    record = written()
    assert record["task"] == "project.py:model" and record["queries"] == "project.py:test"
    names = {}
    exec(TASK + NETWORK, names)
    expected = uw.attribute(
        names["model"], names["train"], names["test"], names["loss"], penalty=names["penalty"]
    )
    scores = uw.Scores.load("run/scores")
    assert_close(scores.values, expected.values, rtol=1e-9, atol=1e-12)
    assert scores.provenance.method == expected.provenance.method
    assert "label_smoothing=0.1" in scores.provenance.task
    # The same command goes on with the method of the run, and a repetition finds the loss again.
    again, said = answer("attribute", "project.py", "--out", "run")
    assert again["did"] == "nothing" and "chose" not in said
    repeated, _ = answer("rerun", "run", "--project", "project.py", "--out", "other")
    assert repeated["bit_identical"] is True


def test_a_singular_hessian_is_found_before_the_run_is_named(folder):
    write(folder, TASK, LINEAR)
    found, said = answer("attribute", "project.py", "--out", "run")
    assert "Relative(1e-05)" in said and "singular" in said
    assert found["q"] == 2 and "Relative(factor=1e-05)" in written()["method"]


AVERAGED = "Averaged(methods=(SOURCE("


@pytest.mark.parametrize(
    ("parts", "budget", "method", "fitted_with"),
    [
        ((NETWORK,), None, "Influence(curvature=GGN(), solver=Cholesky", ""),
        ((RECIPE,), None, AVERAGED, "recipe"),
        ((STEPS_ALONE,), None, AVERAGED, "trajectory"),
        ((RECIPE, TRAJECTORY), None, AVERAGED, "trajectory"),
        ((RECIPE,), "1 h", "Stacked(", "recipe"),
        ((STEPS_ALONE,), "1 h", "Stacked(", "trajectory"),
        ((RECIPE, TRAJECTORY), "1 h", "Stacked(", "recipe"),
        ((FUNCTION,), None, "Influence(curvature=GGN(), solver=Cholesky", ""),
        ((FUNCTION,), "1 h", "Stacked(", "recipe"),
    ],
)
def test_the_command_line_chooses_as_python_does(
    folder, steady, parts, budget, method, fitted_with
):
    """The same method for the same reason, fitted with the same, so that scores are the same."""
    write(folder, TASK, *parts)
    names = made(TASK, *parts)
    known = {name: names.get(name) for name in ("recipe", "trajectory", "penalty", "loss")}
    model = names.get("task") or names["model"]
    expected = uw.attribute(model, names["train"], names["test"], budget=budget, **known)
    allowed = ("--budget", budget) if budget else ()
    planned, said = answer("plan", "project.py", *allowed)
    assert planned["method"] == expected.provenance.method and expected.why in said
    assert not (folder / "run").exists()
    answer("attribute", "project.py", "--out", "run", *allowed)
    record, scores = written(), uw.Scores.load("run/scores")
    assert record["method"] == expected.provenance.method and record["method"].startswith(method)
    assert record["recipe"] == (fitted_with and f"project.py:{fitted_with}")
    assert torch.equal(scores.values, expected.values)
    assert [n for n in expected.provenance.notes if n in record["notes"]] == record["notes"]
    assert set(record["notes"]) <= set(scores.provenance.notes)
    again, said = answer("attribute", "project.py", "--out", "run")  # no method is chosen anew
    assert again["did"] == "nothing" and "chose" not in said
    repeated, _ = answer("rerun", "run", "--project", "project.py", "--out", "other")
    assert repeated["bit_identical"] is True


@pytest.mark.parametrize("budget", [None, "1 h"])
def test_an_interrupted_run_goes_on_with_what_was_chosen(folder, steady, monkeypatch, budget):
    write(folder, TASK, RECIPE)
    asked = ("attribute", "project.py", *(("--budget", budget) if budget else ()))
    answer(*asked, "--out", "whole")
    append = StoredMatrix.append

    def stopped(self, *arguments):
        append(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(StoredMatrix, "append", stopped)
    assert call(*asked, "--out", "run").exit_code == 130
    before = written()
    monkeypatch.setattr(StoredMatrix, "append", append)
    monkeypatch.setattr(front, "choose", None)  # however fast the machine is now
    found, said = answer(*asked, "--out", "run")
    assert found["did"] == "continued" and "chose" not in said
    assert {k: v for k, v in written().items() if k != "files"} == {
        k: v for k, v in before.items() if k != "files"
    }
    whole, run = (uw.Scores.load(f"{name}/scores") for name in ("whole", "run"))
    assert torch.equal(run.values, whole.values)
    assert run.provenance.notes == whole.provenance.notes


ELSEWHERE = """
task = uw.Task(uw.Training(net, uw.SGD(lr=0.1), epochs=2, batch=10, seed=3).trained(
    uw.Task(net(), uw.CrossEntropy()), train), uw.CrossEntropy())
"""


def test_a_recipe_that_does_not_lead_to_the_model_gives_way_to_the_next_method(folder, steady):
    write(folder, TASK, RECIPE, ELSEWHERE)
    found, said = answer("attribute", "project.py", "--out", "run")
    assert found["did"] == "computed" and said.count("chose") == 2
    names, record = made(TASK, RECIPE, ELSEWHERE), written()
    expected = uw.attribute(names["task"], names["train"], names["test"], recipe=names["recipe"])
    scores = uw.Scores.load("run/scores")
    assert torch.equal(scores.values, expected.values)
    assert record["method"] == expected.provenance.method and record["recipe"] == ""
    assert any("must end at the parameters" in note for note in scores.provenance.notes)
    assert "could not be used: A history must end" in (folder / "run" / "log.txt").read_text()
    again, _ = answer("attribute", "project.py", "--out", "run")
    assert again["did"] == "nothing"
    # A method that was asked for is taken at its word.
    refused = call("attribute", "project.py", "--method", "SOURCE()", "--out", "given")
    assert refused.exit_code == 1 and "must end at the parameters" in refused.stderr


def test_an_interrupted_run_whose_method_cannot_be_used_says_to_begin_anew(
    folder, steady, monkeypatch
):
    write(folder, TASK, RECIPE)
    asked = ("attribute", "project.py", "--budget", "1 h")
    prepare = uw.Stacked.prepare

    def stopped(self, fitting):
        prepare(self, fitting)
        raise KeyboardInterrupt

    def fails(self, fitting):
        prepare(self, fitting)
        raise uw.errors.DataError("Coefficients are fitted.", "nothing.", "noise.", "more.")

    monkeypatch.setattr(uw.Stacked, "prepare", stopped)
    assert call(*asked, "--out", "run").exit_code == 130
    monkeypatch.setattr(uw.Stacked, "prepare", fails)
    refused = call(*asked, "--out", "run")
    assert refused.exit_code == 1 and "With another --out" in refused.stderr
    found, said = answer(*asked, "--out", "other")
    assert found["did"] == "computed" and "stacked over 40 halves" in said
    assert written("other")["method"].startswith(AVERAGED)
    assert not list((folder / "other" / "factors").rglob("*subset*"))  # of the one that failed


def test_a_full_disk_is_no_reason_for_another_method(folder, steady, monkeypatch):
    write(folder, TASK, RECIPE)

    def full(self, fitting):
        raise uw.errors.NotWritten("A file is written.", "no space.", "a full disk.", "free some.")

    monkeypatch.setattr(uw.Stacked, "prepare", full)
    refused = call("attribute", "project.py", "--budget", "1 h", "--out", "run")
    assert refused.exit_code == 1 and "a full disk" in refused.stderr
    assert written()["method"].startswith("Stacked(")


def test_processes_that_share_the_work_choose_by_the_trained_model(folder, steady):
    write(folder, TASK, RECIPE, TRAJECTORY)
    asked = Asked("project.py", None, None, None, None, budget="1 h")
    with opened() as project:
        alone, shared = (asked.posed(project, is_shared=each) for each in (False, True))
    assert isinstance(alone.question.method, uw.Stacked)
    assert isinstance(shared.question.method, uw.Influence) and shared.question.history is None
    assert shared.question.method.damping == uw.Absolute(1.25)  # λ of training
    assert any("not shared by processes" in note for note in shared.notes)


def test_what_is_no_history_is_not_taken_for_one(folder, steady):
    """A list of losses that is called a trajectory."""
    write(folder, TASK, NETWORK, "trajectory = [0.9, 0.5]\n")
    answer("attribute", "project.py", "--out", "run")
    assert written()["recipe"] == "" and "GGN()" in written()["method"]
    refused = call("attribute", "project.py", "--method", "SOURCE()", "--out", "other")
    assert refused.exit_code == 1 and "no `recipe` or `trajectory` in project.py" in refused.stderr


def test_a_recorded_loop_is_a_trajectory(folder, steady):
    loop = """
torch.manual_seed(0)
model = net()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with uw.record(model, optimizer, "steps", every=1) as run:
    for rows in torch.arange(40).split(10):
        optimizer.zero_grad()
        with torch.enable_grad():
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
        optimizer.step()
        run.step(rows)
task = uw.Task(model.eval(), uw.CrossEntropy())

def trajectory():
    return run.history(task)
"""
    write(folder, TASK, loop)
    _, said = answer("attribute", "project.py", "--out", "run")
    assert said.count("chose") == 1
    assert written()["method"].startswith(AVERAGED)
    assert written()["recipe"] == "project.py:trajectory"


def test_a_trajectory_is_the_history_of_a_method_that_was_named(folder):
    write(folder, TASK, RECIPE, TRAJECTORY)
    names = made(TASK, RECIPE, TRAJECTORY)
    asked = ("attribute", "project.py", "--method")
    answer(*asked, "TracIn()", "--out", "run")
    assert written()["recipe"] == "project.py:trajectory"
    fitted = uw.TracIn().fit(names["task"], names["train"], history=names["trajectory"])
    assert torch.equal(uw.Scores.load("run/scores").values, fitted.attribute(names["test"]).values)
    # One of many models is fitted with the recipe; and what is named goes before what is found.
    answer(*asked, "Ensemble(GradientDot(), members=2)", "--out", "many")
    assert written("many")["recipe"] == "project.py:recipe"
    answer(*asked, "TracIn()", "--recipe", "project.py:recipe", "--out", "named")
    assert written("named")["recipe"] == "project.py:recipe"
    # What is checked by retraining is trained by the trajectory's recipe.
    found, _ = answer("evaluate", "run", "--project", "project.py", "--lds", 3)
    assert found["models"] >= 3


def test_a_function_is_a_recipe_of_a_method_that_was_named(folder):
    """Its scores are those of the run: what they say of the function is what run.toml says."""
    write(folder, TASK, FUNCTION)
    method = "Stacked((Ensemble(GradientDot(), 2, 0.5),), 8, 0.5, 2)"
    answer("attribute", "project.py", "--method", method, "--out", "run")
    assert written()["recipe"] == "project.py:recipe"
    assert call("show", "run").exit_code == 0


def test_a_measure_is_found_by_its_name(folder):
    write(folder, TASK, NETWORK, "measure = uw.Margin()\n")
    asked = ("attribute", "project.py", "--method", "GradientDot()")
    found, said = answer(*asked, "--out", "run")
    assert found["measure"] == "Margin()" == written()["measure"]
    assert "asks project.py:measure, which is there by its name" in said
    found, said = answer(*asked, "--measure", "Loss()", "--out", "other")
    assert found["measure"] == "Loss()" and "by its name" not in said
    write(folder, TASK, NETWORK, "measure = 3\n")
    refused = call(*asked, "--out", "third")
    assert refused.exit_code == 1 and 'a function, or "Margin()"' in refused.stderr
    answer(*asked, "--measure", "Margin()", "--out", "third")  # the way out


def test_a_run_from_elsewhere_does_not_name_a_recipe_to_run(folder):
    """The history of a method in run.toml is looked for in the file that the user named."""
    write(folder, TASK, RECIPE)
    answer("attribute", "project.py", "--method", "TracIn()", "--out", "run")
    toml = folder / "run" / "run.toml"
    other = toml.read_text().replace('"project.py:recipe"', '"other.py:recipe"')
    toml.write_text(other)
    (folder / "other.py").write_text("open('ran', 'w')\nrecipe = None\n")
    refused = call("attribute", "project.py", "--out", "run")
    assert refused.exit_code == 1 and "recipe is project.py:recipe" in refused.stderr
    assert not (folder / "ran").exists()


def test_a_method_that_looks_at_training_is_told_the_recipe_beside_the_task(folder):
    write(folder, TASK, RECIPE)
    asked = ("attribute", "project.py", "--method", "TracIn()", "--out", "run")
    answer(*asked)
    assert written()["recipe"] == "project.py:recipe" and "history" in written()["fingerprints"]
    names = {}
    exec(TASK + RECIPE, names)
    expected = uw.TracIn().fit(names["task"], names["train"], history=names["recipe"])
    scores = uw.Scores.load("run/scores")
    assert torch.equal(scores.values, expected.attribute(names["test"]).values)
    again, _ = answer(*asked)
    assert again["did"] == "nothing"
    repeated, _ = answer("rerun", "run/run.toml", "--project", "project.py", "--out", "other")
    assert repeated["bit_identical"] is True
    # Another recipe for the same model is another question.
    with (folder / "project.py").open("a") as file:
        file.write("other = uw.Training(net, uw.SGD(lr=0.1), epochs=2, batch=10, seed=1)\n")
    refused = call(*asked, "--recipe", "project.py:other")
    assert refused.exit_code != 0 and "recipe is project.py:other" in refused.stderr
    assert "what is known of training" in refused.stderr


def test_a_method_that_looks_at_training_without_a_recipe_says_where_to_name_one(folder):
    write(folder, TASK, NETWORK)
    refused = call("attribute", "project.py", "--method", "TracIn()", "--out", "run")
    assert refused.exit_code != 0 and "--recipe FILE.py:NAME" in refused.stderr
    assert not (folder / "run").exists()
    needless = call(
        "attribute", "project.py", "--method", "GradientDot()", "--recipe", "Training()",
        "--out", "run",
    )  # fmt: skip
    assert needless.exit_code != 0 and "looks at θ̂ alone" in needless.stderr
    write(folder, TASK, RECIPE)
    planned = call("plan", "project.py", "--method", "TracIn()")
    assert planned.exit_code != 0 and "looks at how the model was trained" in planned.stderr
    answer("attribute", "project.py", "--method", "TRAK(dim=8)", "--out", "run")  # θ̂ will do
    assert written()["recipe"] == ""


def test_an_estimator_of_scikit_learn(folder):
    pytest.importorskip("sklearn")
    write(
        folder, "from sklearn.linear_model import LogisticRegression\n", TASK,
        "train, test = (X.numpy(), y.numpy()), X[:3].numpy()\n"
        "model = LogisticRegression(tol=1e-10).fit(*train)\n",
    )  # fmt: skip
    found, said = answer("attribute", "project.py", "--out", "run")
    assert "exact" in said and found["q"] == 3
    assert torch.isfinite(uw.Scores.load("run/scores").values).all()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (TASK, "must define task"),
        (TASK + "model = net().eval()\n", "loss that a network was trained with"),
        (TASK.replace("train, test", "a, b") + NETWORK, "must define train"),
        (TASK.replace("train, test", "train, b") + NETWORK, "must define queries"),
        (TASK + "task = 3\n", "must be a task"),
    ],
)
def test_what_is_missing_is_named(folder, code, words):
    write(folder, code)
    result = call("attribute", "project.py", "--out", "run")
    assert result.exit_code == 1 and words in result.stderr and "Way out" in result.stderr
    assert not (folder / "run").exists()


def test_a_run_from_elsewhere_does_not_name_code_to_run(folder):
    """A method in run.toml is taken up only as a spec."""
    own = "class Own(uw.GradientDot):\n    pass\n\nmethod = Own()\n"
    write(folder, TASK, NETWORK, own)
    answer("attribute", "project.py", "--method", "project.py:method", "--out", "run")
    result = call("attribute", "project.py", "--out", "run")
    assert result.exit_code == 1 and "belongs to one question" in result.stderr
