"""`upweight attribute project.py`: objects by their usual names, and a method that is chosen."""

import json
import tomllib

import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

import upweight as uw
from upweight.cli.main import cli

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


def test_a_recipe_beside_the_task_says_the_damping_of_its_training(folder):
    write(folder, TASK, RECIPE)
    found, said = answer("plan", "project.py", "--budget", "1 min")
    assert "λ = 1/(step size × steps)" in said and "Absolute(value=1.25" in found["method"]
    assert {each["task"] for each in found["fidelity"]} >= {"spam-mlp", "digits-cnn"}
    assert not (folder / "run").exists()
    shown = call("plan", "project.py", "--method", "Influence(EKFAC(), damping=Relative(0.1))")
    assert "brown-gpt (p = 43,904): rank correlation (LDS) 0.49" in shown.stdout
    given, _ = answer("plan", "project.py", "--method", "GradientDot()")
    assert given["fidelity"] == []


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
