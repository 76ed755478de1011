"""A loop of the user's own, whose models have running statistics, wherever models are retrained."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import upweight as uw
from upweight.errors import NotOffered, SpecError, UnsupportedModel
from upweight.methods import stacked
from upweight.training import FromFunction, removal_weights, subset_models

N = 24
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=DRAW, dtype=torch.float64)
Y = torch.arange(N) % 3
QUERIES = (torch.randn(4, 3, generator=DRAW, dtype=torch.float64), Y[:4])
DOT = uw.GradientDot()
EKFAC = uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.1, tolerance=0)


def net(normed=True):
    middle = nn.BatchNorm1d(4) if normed else nn.Identity()
    return nn.Sequential(nn.Linear(3, 4), middle, nn.Tanh(), nn.Linear(4, 3)).double()


def fit(weights, *, seed=0):
    """Batch normalization in training mode, and the running statistics that it leaves."""
    torch.manual_seed(seed)
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(8):
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(X), Y, reduction="none")
        (weights * losses).mean().backward()
        optimizer.step()
    return model.eval()


RECIPE = FromFunction(fit, seed=0)


def task_of(model):
    return uw.Task(model, uw.CrossEntropy())


TASK = task_of(fit(torch.ones(N).double()))
STEPS = uw.Training(lambda: net(False), uw.SGD(0.3), epochs=4, batch=8)


def steps(weights, *, seed=0):
    """What the recipe of steps does, by a function."""
    task = uw.Task(net(False), uw.CrossEntropy())
    return replace(STEPS, seed=seed).prepare(task, uw.as_data((X, Y)))(weights[None]).theta[0]


@pytest.mark.parametrize(
    "method",
    [
        uw.Stacked((EKFAC, uw.Ensemble(EKFAC, 3, 0.5), uw.Ensemble(DOT, 3, 0.5)), 8, seeds=8),
        uw.Stacked((uw.Ensemble(EKFAC, 2, 1.0),), 8, seeds=2, by_layer=False),
        uw.Ensemble(EKFAC, 3, 0.5),
        uw.Ensemble(DOT, 3),
        uw.Datamodels(8, seeds=2, prior=EKFAC),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_function_is_the_recipe_that_it_does(method):
    model = net(False)
    task, data = task_of(model), uw.as_data((X, Y))
    task = task.moved_to(STEPS.prepare(task, data)(torch.ones(1, N).double()).theta[0])
    expected = method.fit(task, (X, Y), history=STEPS).attribute(QUERIES)
    found = method.fit(task, (X, Y), history=steps).attribute(QUERIES)
    assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
    told, as_told = found.provenance.health, expected.provenance.health
    assert told["trainings"] == as_told["trainings"]
    if "coefficients" in told:
        assert_close(told["coefficients"], as_told["coefficients"], rtol=1e-8, atol=1e-10)


def members(count, at_once=slice(None)):
    models = subset_models(RECIPE, TASK, uw.as_data((X, Y)), count, 0.5, count)
    return [fit(w, seed=1000 + k) for k, w in enumerate(models.weights)][at_once], models


def test_members_are_asked_with_their_own_running_statistics():
    own, models = members(3)
    assert [sorted(each) for each in models.others] == [["1.running_mean", "1.running_var"]] * 3
    each = [EKFAC.fit(task_of(model), (X, Y)).attribute(QUERIES).values for model in own]
    for history in (RECIPE, fit, models):
        found = uw.Ensemble(EKFAC, 3, 0.5).fit(TASK, (X, Y), history=history).attribute(QUERIES)
        assert_close(found.values, torch.stack(each).mean(dim=0), rtol=1e-10, atol=1e-13)


def test_a_stack_is_fitted_to_models_with_their_own():
    """One predictor has one coefficient: the mean of rows of one length, of all members but one."""
    before = {name: x.clone() for name, x in TASK.model.state_dict().items()}
    own, models = members(8)
    method = uw.Stacked((uw.Ensemble(DOT, 8, 0.5),), 8, seeds=8, by_layer=False)
    found = method.fit(TASK, (X, Y), history=RECIPE).attribute(QUERIES)
    each = torch.stack([DOT.fit(task_of(m), (X, Y)).attribute(QUERIES).values for m in own])
    length = each.norm(dim=2, keepdim=True)
    each = each * (length.mean(dim=0) / length)
    ((factor, *_),) = found.provenance.health["coefficients"].values()
    assert_close(found.values, factor * each.mean(dim=0), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        outcomes = torch.stack(
            [nn.functional.cross_entropy(m(QUERIES[0]), QUERIES[1], reduction="none") for m in own]
        )
    scorer = method.fit(TASK, (X, Y), history=models).scorer
    assert_close(stacked.outcomes(scorer.models, TASK, uw.as_data(QUERIES), uw.Loss()), outcomes)
    after = TASK.model.state_dict()  # comes back as it was lent
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert not any(module.training for module in TASK.model.modules())


@pytest.mark.parametrize("folder", [False, True])
def test_refits_are_measured_with_their_own(tmp_path, folder):
    def measured(weights):
        inputs, labels = QUERIES
        return nn.functional.cross_entropy(fit(weights)(inputs), labels, reduction="none").detach()

    whole = measured(torch.ones(N).double())
    without = [measured(w) for w in removal_weights(N, [[i] for i in range(N)])]
    expected = torch.stack([whole - each for each in without], dim=1)
    using = uw.Resources(folder=tmp_path) if folder else None
    for _ in range(1 + folder):  # what is read from the folder is the same
        fitted = uw.LeaveOneOut().fit(TASK, (X, Y), history=RECIPE, resources=using)
        assert_close(fitted.attribute(QUERIES).values, expected, rtol=1e-10, atol=1e-12)


def test_members_in_a_folder_are_the_same(tmp_path):
    method = uw.Ensemble(DOT, 3, 0.5)
    expected = method.fit(TASK, (X, Y), history=RECIPE).attribute(QUERIES).values
    for _ in range(2):
        using = uw.Resources(folder=tmp_path)
        found = method.fit(TASK, (X, Y), history=RECIPE, resources=using).attribute(QUERIES)
        assert torch.equal(found.values, expected)


def test_members_that_need_steps_are_refused():
    """And the way out works: methods that look at one θ."""
    for method in (uw.SOURCE(), uw.TracIn()):
        stack = uw.Stacked((uw.Ensemble(method, 8, 0.5),), 8, seeds=8)
        with pytest.raises(SpecError, match=r"says its steps.*(?s:.)*looks at one θ"):
            stack.fit(TASK, (X, Y), history=fit)
    stack = uw.Stacked((uw.Ensemble(DOT, 8, 0.5, at=0.5),), 8, seeds=8)
    with pytest.raises(SpecError, match="handed out by a `Training`"):
        stack.fit(TASK, (X, Y), history=fit)
    stack = uw.Stacked((uw.Ensemble(EKFAC, 8, 0.5),), 8, seeds=8)
    assert bool(stack.fit(TASK, (X, Y), history=fit).attribute(QUERIES).values.isfinite().all())


def test_members_that_are_asked_by_their_parameters_alone_are_refused():
    _, models = members(8)
    with pytest.raises(SpecError, match=r"1\.running_mean.*no part of θ"):
        uw.TRAK(8).fit(TASK, (X, Y), history=models)
    theta = models.theta[1.0]  # the same, of models without them
    expected = uw.TRAK(8).fit(TASK, (X, Y), history=list(theta)).attribute(QUERIES).values
    found = uw.TRAK(8).fit(TASK, (X, Y), history=replace(models, others=()))
    assert_close(found.attribute(QUERIES).values, expected)


def test_what_compares_parameters_refuses_them():
    own, other = (
        replace(RECIPE, seed=seed).prepare(TASK, uw.as_data((X, Y)))(torch.ones(1, N).double())
        for seed in (0, 1)
    )
    assert torch.equal(own.alone(), TASK.theta())
    with pytest.raises(UnsupportedModel, match=r"(?s)running_mean, 1\.running_var.*eval mode"):
        other.alone()


def generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def seeds_everything(weights, seed=0):
    """As the docs tell a loop: `torch.manual_seed(seed)`, and whatever else it draws from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    return fit(weights, seed=seed)


@pytest.mark.parametrize("budget", [None, "60 s"])
def test_the_generators_of_whoever_asks_are_theirs(budget):
    """Whether it is trained within a budget, or by a check."""
    model = fit(torch.ones(N).double())
    before = generators()
    scores = uw.attribute(
        model, (X, Y), QUERIES, nn.CrossEntropyLoss(), recipe=seeds_everything, budget=budget
    )
    if budget is not None:
        assert scores.provenance.method.startswith("Stacked")
        with pytest.raises(NotOffered):  # as docs/first-answer.md says
            scores.self_influence()
        again = uw.attribute(model, (X, Y), QUERIES, nn.CrossEntropyLoss())
        assert len(again.self_influence().values) == N
    else:
        scores.check(seeds_everything, subsets=4)
    assert generators() == before


def test_a_function_that_fails_leaves_the_generators_as_they_were():
    def fails(weights, seed=0):
        seeds_everything(weights, seed)
        raise RuntimeError("out of memory")

    before = generators()
    with pytest.raises(RuntimeError, match="out of memory"):
        FromFunction(fails, seed=3).prepare(TASK, uw.as_data((X, Y)))(torch.ones(1, N).double())
    assert generators() == before


def test_a_function_that_draws_without_a_seed_is_refused_as_before():
    """Its two calls draw from one stream: restored between them, they would look alike."""

    def unseeded(weights):
        return torch.randn(TASK.layout.size, dtype=torch.float64)

    with pytest.raises(SpecError, match="bit for bit"):
        FromFunction(unseeded).prepare(TASK, uw.as_data((X, Y)))(torch.ones(1, N).double())
