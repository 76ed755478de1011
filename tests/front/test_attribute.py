"""The front door: any trained model in, scores out, with the method chosen and said."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import upweight as uw
from tests.market import draw, labels
from upweight.errors import (
    DataError,
    NotConverged,
    NotPositiveDefinite,
    SpecError,
    UnsupportedModel,
)
from upweight.front import choice
from upweight.front.attribute import TIMED, asked
from upweight.front.facts import facts_of, resolved
from upweight.front.fidelity import fidelity_of
from upweight.front.opened import opened, queries_of
from upweight.task.data import as_data
from upweight.task.torch_losses import Rescaled

N = 40


def g(seed):
    return torch.Generator().manual_seed(seed)


X, Y = draw(g(0), N, 4), labels(g(1), N, 3)
TRAIN, QUERIES = (X, Y), (X[:5] + 0.1, Y[:5])
SMOOTH = nn.CrossEntropyLoss(label_smoothing=0.1)


def network(dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype).eval()


def fitted_linear(penalty=0.1):
    """Softmax regression at its minimum."""
    model = nn.Linear(4, 3).double()
    task = uw.Task(model, SMOOTH, uw.L2(penalty) if penalty else None)
    return uw.training.Newton().prepare(task, as_data(TRAIN)), task


def trained(penalty=0.1):
    trainer, task = fitted_linear(penalty)
    theta = trainer(torch.ones(1, N).double()).theta[0]
    return task.moved_to(theta).model


def test_a_linear_model_has_the_exact_scores(capsys):
    model = trained()
    scores = uw.attribute(model, TRAIN, QUERIES, SMOOTH, penalty=uw.L2(0.1))
    line = capsys.readouterr().err
    assert line.startswith("upweight: chose Influence(") and line.count("\n") == 1
    assert line.removeprefix("upweight: ").strip() in scores.provenance.notes
    # By hand: −(1/n) ∇mᵀ H⁻¹ g, all by autograd.
    task = uw.Task(model, SMOOTH, uw.L2(0.1))
    theta, ones = task.theta(), torch.ones(N).double()

    def gradients(data):
        rows = [
            torch.func.grad(lambda t, i=i: SMOOTH(*_out(task, t, data, i)))(theta)
            for i in range(len(data[0]))
        ]
        return torch.stack(rows)

    H = torch.func.jacrev(torch.func.jacrev(lambda t: task.objective(t, TRAIN, ones)))(theta)
    expected = -gradients(QUERIES) @ torch.linalg.solve(H, gradients(TRAIN).T) / N
    assert_close(scores.values, expected, rtol=1e-8, atol=1e-10)


def _out(task, theta, data, i):
    return task.outputs(theta, (data[0][i : i + 1], data[1][i : i + 1]))


def test_a_singular_hessian_is_damped_slightly_and_that_is_said(capsys):
    """Without a penalty the classes' biases shift together; least-norm scores are the truth."""
    rows = draw(g(5), 200, 4)
    y = (rows[:, :3] + 2 * draw(g(6), 200, 3)).argmax(dim=1)
    task = uw.Task(nn.Linear(4, 3).double(), uw.CrossEntropy(), uw.L2(1e-10))
    theta = uw.training.Newton().prepare(task, as_data((rows, y)))(torch.ones(1, 200).double())
    model = task.moved_to(theta.theta[0]).model
    scores = uw.attribute(model, (rows, y), (rows[:3], y[:3]), nn.CrossEntropyLoss())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "singular" in lines[1]
    plain = uw.Task(model, uw.CrossEntropy())
    exact = uw.Influence(solver=uw.solvers.MINRES(rtol=1e-10)).fit(plain, (rows, y))
    truth = exact.attribute((rows[:3], y[:3])).values
    assert float((scores.values - truth).norm() / truth.norm()) < 1e-3
    with pytest.raises(NotPositiveDefinite):  # a method that was given is taken at its word
        uw.attribute(plain, (rows, y), (rows[:3], y[:3]), method=uw.Influence())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_answer_within_seconds_and_never_by_their_hessian(dtype, capsys):
    image = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3, 3)
    ).to(dtype).eval()  # fmt: skip
    pictures = X.reshape(N, 1, 2, 2).to(dtype)
    for model, inputs in ((network(dtype), X.to(dtype)), (image, pictures)):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        scores = uw.attribute(model, (inputs, Y), (inputs[:5], Y[:5]), SMOOTH, budget="1 min")
        assert scores.values.shape == (5, N) and scores.values.dtype == dtype
        assert "Hessian" not in scores.provenance.method and "GGN" in scores.provenance.method
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        quick = uw.attribute(model, (inputs, Y), (inputs[:5], Y[:5]), SMOOTH, budget=1e-6)
        assert "EKFAC" in quick.provenance.method
    assert "nothing ends within" in capsys.readouterr().err


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.HuberLoss(), nn.MSELoss(reduction="sum")])
def test_regressions_by_networks(loss):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    targets = draw(g(3), N, 2)
    scores = uw.attribute(model, (X, targets), (X[:2], targets[:2]), loss)
    assert bool(scores.values.isfinite().all())
    assert isinstance(loss, nn.L1Loss) == ("EKFAC" in scores.provenance.method)
    said = [note for note in scores.provenance.notes if note.startswith("reduction=")]
    assert len(said) == 1


def test_a_function_of_the_users_own_needs_no_likelihood():
    def cubed(f, y):
        return (f[:, 0] - y).abs() ** 3

    scores = uw.attribute(network(), (X, X[:, 0]), (X[:3], X[:3, 0]), cubed)
    assert "Observed" in scores.provenance.method
    scores = uw.attribute(network(), TRAIN, QUERIES, uw.CrossEntropy(), into=uw.Top(3))
    assert scores.top(query=1).query == 1
    assert "chose" in scores.provenance.notes[0]


RECIPE = uw.Training(network, uw.SGD(lr=0.1, momentum=0.9), epochs=4, batch=10, seed=0)
LAM = 1 / sum(0.1 * (1 - 0.9 ** (16 - t)) / (1 - 0.9) for t in range(16))


def of_recipe(recipe=RECIPE, made=network):
    task = uw.Task(made(), uw.CrossEntropy())
    return recipe.trained(task, TRAIN), task


def recorded(folder, model):
    """A loop of the user's own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with uw.record(model, optimizer, folder, every=2) as run:
        for _ in range(4):
            for rows in torch.arange(N).split(10):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()
                optimizer.step()
                run.step(rows)
    return run.history(uw.Task(model.eval(), uw.CrossEntropy()))


def test_a_recipe_chooses_source_and_the_ggn(capsys):
    model, task = of_recipe()
    assert resolved(RECIPE, task, N) == pytest.approx(LAM, rel=1e-12)
    history = RECIPE.trajectory(task, TRAIN)
    method = uw.Averaged((uw.SOURCE(), choice.ggn_by_cg(uw.Absolute(0.02), choice.ROUGH)))
    expected = method.fit(uw.Task(model, uw.CrossEntropy()), TRAIN, history=history)
    expected = expected.attribute(QUERIES).values
    for known in ({"recipe": RECIPE}, {"trajectory": history}):
        scores = uw.attribute(model, TRAIN, QUERIES, uw.CrossEntropy(), **known)
        told = capsys.readouterr().err
        assert "chose Averaged((SOURCE(), Influence(GGN(), CG(0.1, preconditioner=EKFAC())" in told
        assert_close(scores.values, expected)
    facts = facts_of(task, as_data(TRAIN), 5, trajectory=history)
    assert facts.trajectory and facts.recipe and facts.resolved == pytest.approx(LAM)
    assert facts.layers == 2 and 0 < facts.training_seconds < 10
    for other in (uw.Training(None, uw.SGD()), uw.Training(network, uw.Adam()), None, lambda w: w):
        assert resolved(other, task, N) is None


def test_a_recorded_loop_chooses_source(tmp_path, capsys):
    model = network().train()
    history = recorded(tmp_path / "run", model)
    facts = facts_of(uw.Task(model, uw.CrossEntropy()), as_data(TRAIN), 5, trajectory=history)
    assert facts.trajectory and not facts.recipe and facts.resolved == pytest.approx(LAM)
    scores = uw.attribute(model, TRAIN, QUERIES, uw.CrossEntropy(), trajectory=history, budget=60)
    assert scores.provenance.method.startswith("Averaged(methods=(SOURCE(segments=3")


def test_a_recipe_that_does_not_lead_to_the_model_is_not_taken_for_its_training(capsys):
    model, _ = of_recipe(uw.Training(network, uw.SGD(lr=0.1), epochs=4, batch=10, seed=5))
    scores = uw.attribute(
        model, TRAIN, (X[:1], Y[:1]), uw.CrossEntropy(), recipe=RECIPE, budget="9 s"
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "chose Averaged((SOURCE" in lines[0]
    assert "SOURCE and the GGN, SOURCE: could not be" in lines[1]
    (told,) = (note for note in scores.provenance.notes if "must end at the parameters" in note)
    assert "the mean loss there is" in told and "other settings" in told
    assert "GGN" in scores.provenance.method and "CG(" in scores.provenance.method
    assert scores.provenance.health["damping"] == pytest.approx(LAM, rel=1e-9)
    exact = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), LAM)
    truth = exact.fit(uw.Task(model, uw.CrossEntropy()), TRAIN).attribute((X[:1], Y[:1])).values
    assert float((scores.values - truth).norm() / truth.norm()) < 3e-2  # its rtol is 1e-2
    with pytest.raises(SpecError, match="must end at the parameters"):  # given: taken at its word
        uw.attribute(model, TRAIN, QUERIES, uw.CrossEntropy(), recipe=RECIPE, method=uw.SOURCE())


def test_a_recipe_that_cannot_train_the_model_is_no_reason_to_fail():
    def normed():
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()

    recipe = uw.Training(normed, uw.SGD(0.1), epochs=2, batch=10)
    task = uw.Task(normed().eval(), uw.CrossEntropy())
    assert facts_of(task, as_data(TRAIN), 5, recipe).half_seconds == float("inf")
    scores = uw.attribute(
        normed().eval(), TRAIN, QUERIES, uw.CrossEntropy(), recipe=recipe, budget="2 min"
    )
    assert "GGN" in scores.provenance.method
    assert any(n.startswith("the recipe does not train this model. Training is a function")
               for n in scores.provenance.notes)  # fmt: skip


def test_a_budget_for_retraining_is_spent_on_halves(capsys, monkeypatch):
    """Sizes are then fitted; what is fitted with is the recipe, also beside a trajectory."""
    full, ekfac = choice.stacked(40), uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    first = uw.Ensemble(uw.SOURCE(3, states=1, segment=0), 40, 0.5)
    assert full.subsets == 40 and full.methods[0] == first
    fewer = uw.Stacked((uw.Ensemble(ekfac, 2, 0.5),), 8, seeds=2)
    monkeypatch.setattr(choice, "stacked", lambda halves: fewer)
    model, task = of_recipe()
    history = RECIPE.trajectory(task, TRAIN)
    scores = uw.attribute(
        model, TRAIN, QUERIES, uw.CrossEntropy(), recipe=RECIPE, trajectory=history, budget="1 h"
    )
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "chose Stacked((Ensemble(Influence(EKFAC(), damping=" in line
    assert scores.unit is uw.Unit.DERIVATIVE and scores.provenance.health["subsets"] == 8
    assert "40 trainings on halves" in scores.provenance.notes[0]
    of_model = asked(
        model, TRAIN, None, uw.CrossEntropy(), recipe=RECIPE, budget="1 h",
        measure=uw.Coefficient(0),
    )  # fmt: skip
    assert isinstance(of_model.choice.method, uw.Averaged)
    adam = uw.Training(network, uw.Adam(1e-2), epochs=2, batch=10)
    for given, of in ((adam, uw.Stacked), (uw.Training(None, uw.SGD()), uw.Influence)):
        found = asked(model, TRAIN, QUERIES, uw.CrossEntropy(), recipe=given, budget="1 h")
        assert isinstance(found.choice.method, of)
    plan = uw.plan(model, TRAIN, QUERIES, uw.CrossEntropy(), recipe=RECIPE, budget="1 h")
    assert isinstance(plan.method, uw.Stacked) and 1 < plan.seconds < 3600
    assert plan.bytes > 0 and "MB" in str(plan)


def test_what_is_said_of_training_and_does_not_count_is_told():
    def notes(recipe, **more):
        ce = uw.CrossEntropy()
        scores = uw.attribute(network(), TRAIN, QUERIES, ce, recipe=recipe, **more)
        told = ("did not count", "does not train this model")
        return [n for n in scores.provenance.notes if any(words in n for words in told)]

    (told,) = notes(uw.training.Newton(), budget="1 min")
    assert "Newton" in told and "upweight.Training with init= or a function" in told
    (told,) = notes(lambda weights: network())
    assert "a longer budget= may help" in told
    (told,) = notes(lambda weights: nn.Linear(4, 7), budget="1 min")
    assert "does not train this model. A training function returns the task's model" in told
    assert notes(RECIPE) == [] == notes(None)


def normed(weights, *, seed=0):
    """A loop with batch normalization."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(10):
        optimizer.zero_grad()
        with torch.enable_grad():
            losses = nn.functional.cross_entropy(model(TRAIN[0]), TRAIN[1], reduction="none")
            (weights * losses).mean().backward()
        optimizer.step()
    return model.eval()


def test_halves_are_trained_by_a_function(monkeypatch, capsys):
    """The ends of halves are seen by EK-FAC, which needs no steps of training."""
    full = choice.stacked_ends(40)
    assert [m.method.damping for m in full.methods] == [uw.Relative(0.1), uw.Relative(1.0)]
    monkeypatch.setattr(choice, "stacked_ends", lambda halves: replace(full, subsets=8, seeds=8))
    model, ce = normed(torch.ones(N).double()), uw.CrossEntropy()
    scores = uw.attribute(model, TRAIN, QUERIES, ce, recipe=normed, budget="1 h")
    first, line = capsys.readouterr().err.splitlines()
    assert first == f"upweight: {TIMED}" and "chose Stacked((Ensemble(Influence(EKFAC()" in line
    assert "trainings on halves of the data by a function" in scores.provenance.notes[0]
    of_halves = choice.stacked_ends(40)
    beside = choice.ggn_by_cg(uw.Absolute(choice.LEARNED), choice.ROUGH)
    method = replace(of_halves, methods=(*of_halves.methods, beside))
    expected = method.fit(uw.Task(model, ce), TRAIN, history=normed)
    assert_close(scores.values, expected.attribute(QUERIES).values)
    plan = uw.plan(model, TRAIN, QUERIES, ce, recipe=normed, budget="1 h")
    assert isinstance(plan.method, uw.Stacked) and 0 < plan.facts.half_seconds < plan.seconds < 3600
    method = choice.stacked_ends(40)
    given = uw.plan(model, TRAIN, QUERIES, ce, recipe=normed, method=method)
    assert 0 < given.facts.half_seconds < given.seconds < 3600
    # One training is timed where there is time for some, and none is where there is not.
    calls = []
    uw.plan(model, TRAIN, QUERIES, ce, recipe=lambda w: calls.append(w) or normed(w))
    assert calls == []


def test_a_function_that_does_not_repeat_itself_is_no_reason_to_fail():
    model = normed(torch.ones(N).double())
    scores = uw.attribute(
        model, TRAIN, QUERIES, uw.CrossEntropy(), budget="1 h",
        recipe=lambda w: normed(w, seed=int(torch.seed() % 2**31)),
    )  # fmt: skip
    assert "GGN" in scores.provenance.method
    assert any("gives the same model for the same weights" in n for n in scores.provenance.notes)


@pytest.mark.parametrize(
    "kind, halves", [(DataError, [40]), (NotConverged, [40, 40, 16, 16, 10, 10])]
)
def test_halves_that_tell_nothing_are_not_trained_again(monkeypatch, capsys, kind, halves):
    """40 halves whose differences go against what is predicted: 16 of them say less."""
    tried = []

    def fails(self, fitting):
        tried.append(self.subsets)
        raise kind("Coefficients are fitted.", "nothing.", "noise.", "more.")

    monkeypatch.setattr(uw.Stacked, "prepare", fails)
    model, _ = of_recipe()
    scores = uw.attribute(model, TRAIN, QUERIES, uw.CrossEntropy(), recipe=RECIPE, budget="1 h")
    assert tried == halves and scores.provenance.method.startswith("Averaged(methods=(SOURCE(")
    assert capsys.readouterr().err.count("chose") == 1 + len(halves)


def test_scikit_learn_and_statsmodels():
    linear_model = pytest.importorskip("sklearn.linear_model")
    pipeline = pytest.importorskip("sklearn.pipeline")
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    sm = pytest.importorskip("statsmodels.api")
    import upweight.adapters.sklearn as sk
    import upweight.adapters.statsmodels as smx

    rows, words = 3 * X.numpy() + 1, np.array(["a", "b"])[(Y > 0).int().numpy()]
    model = pipeline.make_pipeline(scaler, linear_model.LogisticRegression(tol=1e-10))
    model.fit(rows, words)
    scores = uw.attribute(model, (rows, words), rows[:3])
    task, train = sk.task(model, rows, words)
    expected = uw.Influence().fit(task, train).attribute(rows[:3])
    assert_close(scores.values, expected.values, rtol=1e-9, atol=1e-12)
    weighted = linear_model.Ridge().fit(rows, X[:, 0].numpy(), sample_weight=np.arange(N))
    uw.attribute(weighted, (rows, X[:, 0].numpy(), np.arange(N)), (rows[:2], X[:2, 0].numpy()))

    exog = sm.add_constant(X[:, :2].numpy())
    yes = (X[:, 0] + draw(g(4), N) > 0).double().numpy()
    for fit in (sm.OLS(X[:, 3].numpy(), exog).fit(), sm.Logit(yes, exog).fit(disp=0, tol=1e-12)):
        asked = (exog[:3], fit.model.endog[:3])
        scores = uw.attribute(fit, None, asked)
        again = uw.attribute(fit, (exog, fit.model.endog), asked)
        task, train = smx.task(fit)
        expected = uw.Influence().fit(task, train).attribute(asked)
        assert_close(scores.values, expected.values, rtol=1e-9, atol=1e-12)
        assert torch.equal(scores.values, again.values)
    with pytest.raises(SpecError, match="sample_weight"):
        uw.attribute(model, rows, rows[:3])
    with pytest.raises(SpecError, match="an estimator knows its objective"):
        uw.attribute(model, (rows, words), rows[:3], nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: uw.attribute(network(), TRAIN, QUERIES), SpecError, r"targets of torch\.int64"),
        (lambda: uw.attribute("model", TRAIN, QUERIES), UnsupportedModel, "the path .model."),
        (
            lambda: uw.attribute(uw.Task(network(), SMOOTH), TRAIN, QUERIES, SMOOTH),
            SpecError,
            "a Task has its loss",
        ),
        (
            lambda: uw.attribute(network(), TRAIN, QUERIES, SMOOTH, method="ekfac"),
            SpecError,
            "A method is an object",
        ),
        (
            lambda: uw.attribute(network(), TRAIN, QUERIES, SMOOTH, budget="soon"),
            SpecError,
            "A budget is a time",
        ),
        (
            lambda: uw.plan(network(), TRAIN, None, SMOOTH, measure=uw.Coefficient(0)),
            SpecError,
            "single queries",
        ),
        (
            lambda: uw.attribute(uw.Task(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(),
                                         SMOOTH), TRAIN, QUERIES),
            RuntimeError,
            r"model\.eval\(\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_has_a_way_out(ask, error, words):
    with pytest.raises(error, match=words) as caught:
        ask()
    assert "Way out" in str(caught.value)


def test_models_of_transformers_that_say_what_they_predict():
    class TinyForSequenceClassification(nn.Module):
        def __init__(self, **config):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.config = type("Config", (), config)()

    several = {"num_labels": 3, "problem_type": "multi_label_classification"}
    for config, loss in (
        ({"num_labels": 3}, uw.CrossEntropy()),
        (several, Rescaled(uw.Bernoulli(), mean=True)),
        ({"num_labels": 1}, Rescaled(uw.SquaredError(), 2.0, mean=True)),
    ):
        assert opened(TinyForSequenceClassification(**config), TRAIN).task.loss == loss
    with pytest.raises(SpecError, match="must be said"):
        opened(nn.Linear(4, 3), TRAIN)


def test_a_functional_needs_no_queries():
    model = trained()
    found = uw.attribute(
        model, TRAIN, None, SMOOTH, penalty=uw.L2(0.1), measure=uw.Coefficient("weight[0, 0]")
    )
    assert found.values.shape == (1, N)


def test_one_example_duplicates_frozen_layers_and_tied_weights():
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    scores = uw.attribute(model, TRAIN, QUERIES, SMOOTH, penalty=uw.L2(0.1))
    assert scores.provenance.p == 21 and "Hessian" in scores.provenance.method
    twice = torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]])
    scores = uw.attribute(network(), twice, QUERIES, SMOOTH)
    assert_close(scores.values[:, 0], scores.values[:, -1], rtol=1e-8, atol=1e-12)
    one = uw.attribute(network(), (X[:1], Y[:1]), (X[:1], Y[:1]), SMOOTH)
    assert one.values.shape == (1, 1)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    tied[2].weight = tied[0].weight
    assert uw.attribute(tied, TRAIN, QUERIES, SMOOTH).values.shape == (5, N)


def test_a_plan_says_what_and_how_long_and_how_good(capsys):
    model = network()
    plan = uw.plan(model, TRAIN, QUERIES, SMOOTH)
    assert plan.seconds > 0 and plan.epochs > 0 and plan.bytes > 0
    shown = str(plan)
    assert "chose Influence(GGN()" in shown and "plain epochs" in shown and "LDS" in shown
    assert shown == repr(plan) and capsys.readouterr().err == ""
    assert plan.fidelity == fidelity_of("upweight GGN, usual λ") and len(plan.fidelity) > 1
    scores = uw.attribute(model, TRAIN, QUERIES, SMOOTH, method=plan.method)
    chosen = uw.attribute(model, TRAIN, QUERIES, SMOOTH)
    assert_close(scores.values, chosen.values)
    given = uw.plan(model, TRAIN, QUERIES, SMOOTH, method=uw.GradientDot())
    assert "not measured" in str(given) and given.fidelity == ()


def test_a_plan_of_a_named_method_knows_what_the_table_knows():
    """No "about 0 s" of what takes trainings, and no "not measured" of what was."""
    model = RECIPE.trained(uw.Task(network(), uw.CrossEntropy()), TRAIN)

    def planned(method, **known):
        return uw.plan(model, TRAIN, QUERIES, uw.CrossEntropy(), method=method, **known)

    ekfac = planned(uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)))
    assert ekfac.fidelity == fidelity_of("upweight EK-FAC") and ekfac.seconds > 0
    chosen = uw.plan(model, TRAIN, QUERIES, uw.CrossEntropy(), recipe=RECIPE)
    source = planned(chosen.method, recipe=RECIPE)
    assert source.method == chosen.method and source.fidelity == chosen.fidelity
    assert source.seconds > 1 and source.bytes == chosen.bytes > 0
    magic = planned(uw.MAGIC(), recipe=RECIPE)
    assert math.isnan(magic.seconds) and " 0 s" not in str(magic) and "0 MB" not in str(magic)
    assert "one training takes about" in str(magic)
    assert planned(uw.TRAK(8)).forecast is not None  # without a history it is timed as any other


def test_notes_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uw.attribute(trained(), TRAIN, QUERIES, SMOOTH, penalty=uw.L2(0.1))


def test_asking_with_a_given_method_takes_nothing_but_that_method(monkeypatch):
    """As for a model that is split over processes: θ as one vector is not asked for."""
    model, method = network(), uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    expected = method.fit(uw.Task(model, nn.CrossEntropyLoss()), TRAIN).attribute(QUERIES)
    monkeypatch.setattr("upweight.front.attribute.facts_of", None)
    found = uw.attribute(model, TRAIN, QUERIES, nn.CrossEntropyLoss(), method=method)
    assert_close(found.values, expected.values, rtol=0, atol=0)


def test_the_class_that_stands_for_inputs_alone_leaves_nothing_on_the_model():
    class Noting(nn.Linear):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    model = Noting(4, 3).double()
    queries = queries_of(uw.Task(model, uw.CrossEntropy()), X[:5])
    assert queries.batch(0, 5)[1].tolist() == nn.Linear.forward(model, X[:5]).argmax(1).tolist()
    assert "seen" not in vars(model)


@pytest.mark.parametrize(
    ("budget", "taken", "left"), [("2 min", 50.0, 70.0), ("2 min", 115.0, 10.0), (None, 9.0, 10.0)]
)
def test_a_method_that_failed_has_used_its_part_of_the_budget(budget, taken, left):
    question = asked(network(), TRAIN, QUERIES, nn.CrossEntropyLoss(), budget=budget)
    after = question.otherwise(NotConverged("tried in vain"), taken)
    assert after.facts.budget_seconds == pytest.approx(left)
    assert after.choice.name != question.choice.name
    assert "could not be used: tried in vain" in after.notes[-1]
