"""Ensemble: the mean over members, and its standard error."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import spread
from upweight.errors import NotOffered, SpecError
from upweight.methods.method import Method
from upweight.testing import check_method
from upweight.testing.problems import closed_forms

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(13, 3, generator=DRAW, dtype=torch.float64)
Y = torch.arange(13) % 2
XQ = torch.randn(4, 3, generator=DRAW, dtype=torch.float64)
QUERIES = (XQ, torch.tensor([0, 1, 1, 0]))
EKFAC = uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.1, tolerance=0)
DENSE = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), 0.1)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


torch.manual_seed(0)
TASK = uw.Task(net(), uw.CrossEntropy())
THETA = [TASK.theta() + 0.1 * k for k in range(3)]


@dataclass(frozen=True)
class Around(Method):
    """The mean over θ̂ and two models near it."""

    method: Method

    @property
    def unit(self):
        return self.method.unit

    def prepare(self, fitting):
        theta = fitting.theta
        beside = [theta * (1 + 1e-3 * k) for k in range(3)]
        return uw.Ensemble(self.method).prepare(replace(fitting, history=beside))


# Each law on one closed form: what a mean does to a law is not a matter of what it is a mean of.
FORMS = [form.name for form in closed_forms()]
CASES = [
    pytest.param(check, id=f"{method!r}: {name}")
    for turn, method in enumerate((EKFAC, DENSE, uw.GradientDot()))
    for name, check in spread(check_method(Around(method), damped=True, rtol=1e-9), FORMS, turn)
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


@pytest.mark.parametrize("method", [EKFAC, DENSE, uw.GradientCosine(), uw.TRAK(16)], ids=repr)
def test_is_the_mean_over_the_members_each_at_its_own_model(method):
    fitted = uw.Ensemble(method).fit(TASK, (X, Y), history=THETA)
    each = [method.fit(TASK.moved_to(theta), (X, Y)) for theta in THETA]
    every = torch.stack([f.attribute(QUERIES).values for f in each])
    scores = fitted.attribute(QUERIES)
    torch.testing.assert_close(scores.values, every.mean(dim=0), rtol=1e-12, atol=1e-14)
    spread = (every - every.mean(dim=0)).square().sum(dim=0).div(2).sqrt() / 3**0.5
    torch.testing.assert_close(scores.error, spread, rtol=1e-9, atol=1e-13)
    selves = torch.stack([f.self_influence() for f in each]).mean(dim=0)
    torch.testing.assert_close(fitted.self_influence(), selves, rtol=1e-12, atol=1e-14)
    if isinstance(method, uw.TRAK):  # projections of all of θ are of no layer
        return
    layers = fitted.attribute(QUERIES, into=uw.PerLayer())
    total = torch.stack([part.values for part in layers.values()]).sum(dim=0)
    torch.testing.assert_close(total, scores.values, rtol=1e-10, atol=1e-13)


def test_few_queries_at_a_time_are_the_same():
    whole = uw.Ensemble(EKFAC).fit(TASK, (X, Y), history=THETA)
    small = uw.Ensemble(EKFAC).fit(
        TASK, (X, Y), history=THETA, resources=uw.Resources(memory_bytes=2_000)
    )
    torch.testing.assert_close(
        small.attribute(QUERIES).values, whole.attribute(QUERIES).values, rtol=1e-12, atol=1e-14
    )


def test_members_come_as_models_states_or_a_trajectory():
    models = [TASK.moved_to(theta).model for theta in THETA]
    expected = uw.Ensemble(DENSE).fit(TASK, (X, Y), history=THETA).attribute(QUERIES).values
    states = [model.state_dict() for model in models]
    for history in (models, states, torch.stack(THETA)):
        found = uw.Ensemble(DENSE).fit(TASK, (X, Y), history=history).attribute(QUERIES)
        torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=1e-14)
    recipe = uw.Training(net, uw.SGD(0.1), epochs=2, batch=4)
    run = recipe.trajectory(TASK, (X, Y), every=3)
    found = uw.Ensemble(DENSE).fit(TASK, (X, Y), history=run).attribute(QUERIES)
    kept = [run.state(t).theta for t in run.kept[1:]]
    by_hand = uw.Ensemble(DENSE).fit(TASK, (X, Y), history=kept).attribute(QUERIES)
    torch.testing.assert_close(found.values, by_hand.values)


def test_a_recipe_trains_them_from_other_seeds():
    recipe = uw.Training(net, uw.SGD(0.1), epochs=2, batch=4)
    fitted = uw.Ensemble(DENSE, members=3).fit(TASK, (X, Y), history=recipe)
    models = uw.training.subset_models(recipe, TASK, uw.as_data((X, Y)), 3, 1.0)
    by_hand = uw.Ensemble(DENSE).fit(TASK, (X, Y), history=list(models.theta[1.0]))
    found = fitted.attribute(QUERIES)
    torch.testing.assert_close(found.values, by_hand.attribute(QUERIES).values)
    assert (found.provenance.health["members"], found.provenance.health["trainings"]) == (3, 3.0)
    shared = uw.Ensemble(DENSE, members=2).fit(TASK, (X, Y), history=models)
    assert shared.attribute(QUERIES).provenance.health["members"] == 2


@pytest.mark.parametrize("method", [uw.TracIn(2), uw.SOURCE(2, uw.GGN())], ids=repr)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_each_member_has_its_own_run(method, fraction):
    recipe = uw.Training(net, uw.SGD(0.1), epochs=2, batch=4, skip_absent=True)
    fitted = uw.Ensemble(method, 3, fraction).fit(TASK, (X, Y), history=recipe)
    found = fitted.attribute(QUERIES)
    assert found.provenance.health["trainings"] == 3 * fraction
    models = uw.training.subset_models(recipe, TASK, uw.as_data((X, Y)), 3, fraction, 3)
    rows = []
    for k in range(3):
        seeded = replace(recipe, seed=1_000 + k)
        run = seeded.trajectory(TASK, (X, Y), models.weights[k], every=1)  # it is short
        torch.testing.assert_close(run.theta, models.theta[1.0][k], rtol=1e-12, atol=1e-14)
        member = method.fit(TASK.moved_to(run.theta), (X, Y), history=run)
        rows.append(member.attribute(QUERIES).values)
    torch.testing.assert_close(found.values, torch.stack(rows).mean(dim=0), rtol=1e-12, atol=1e-14)
    kept = uw.training.subset_models(
        recipe, TASK, uw.as_data((X, Y)), 3, fraction, 3, at=(0.5, 1.0), runs=True
    )
    torch.testing.assert_close(kept.theta[1.0], models.theta[1.0], rtol=1e-12, atol=1e-14)
    halfway = uw.training.subset_models(
        recipe, TASK, uw.as_data((X, Y)), 3, fraction, 3, at=(0.5,)
    ).theta[0.5]
    torch.testing.assert_close(kept.theta[0.5], halfway, rtol=1e-12, atol=1e-14)
    for history in (kept, list(kept.runs)):
        given = uw.Ensemble(method).fit(TASK, (X, Y), history=history)
        torch.testing.assert_close(given.attribute(QUERIES).values, found.values)


def test_magic_is_averaged_over_runs_of_other_seeds():
    recipe = uw.Training(net, uw.SGD(0.1), epochs=2, batch=4)
    found = uw.Ensemble(uw.MAGIC(), 3).fit(TASK, (X, Y), history=recipe).attribute(QUERIES)
    rows, runs = [], []
    for k in range(3):
        run = replace(recipe, seed=1_000 + k).trajectory(TASK, (X, Y))
        member = uw.MAGIC().fit(TASK.moved_to(run.theta), (X, Y), history=run)
        rows.append(member.attribute(QUERIES).values)
        runs.append(run)
    each = torch.stack(rows)
    torch.testing.assert_close(found.values, each.mean(dim=0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.error, each.std(dim=0) / 3**0.5, rtol=1e-8, atol=1e-14)
    given = uw.Ensemble(uw.MAGIC()).fit(TASK, (X, Y), history=runs).attribute(QUERIES)
    torch.testing.assert_close(given.values, found.values, rtol=1e-10, atol=1e-14)
    with pytest.raises(SpecError, match="training on all of the data"):  # before any training
        uw.Ensemble(uw.MAGIC(), 2, 0.5)


def test_stacked_weighs_runs_of_the_subset_models():
    """One predictor has one coefficient: scores are a multiple of a mean over the members."""
    recipe = uw.Training(net, uw.SGD(0.1), epochs=2, batch=4, skip_absent=True)
    method = uw.Ensemble(uw.SOURCE(2, uw.GGN()), 8, 0.5)
    stacked = uw.Stacked((method,), subsets=8, seeds=2, by_layer=False)
    found = stacked.fit(TASK, (X, Y), history=recipe).attribute(QUERIES)
    models = uw.training.subset_models(recipe, TASK, uw.as_data((X, Y)), 8, 0.5, 2, runs=True)
    each = torch.stack(
        [
            method.method.fit(TASK.moved_to(theta), (X, Y), history=run).attribute(QUERIES).values
            for theta, run in zip(models.theta[1.0], models.runs, strict=True)
        ]
    )
    length = each.norm(dim=2, keepdim=True)
    mean = (each * (length.mean(dim=0) / length)).mean(dim=0)
    ((factor, *_),) = found.provenance.health["coefficients"].values()
    torch.testing.assert_close(found.values, factor * mean, rtol=1e-10, atol=1e-14)
    assert found.provenance.health["trainings"] == 4
    without = uw.training.subset_models(recipe, TASK, uw.as_data((X, Y)), 8, 0.5, 2)
    with pytest.raises(SpecError, match="runs=True"):
        stacked.fit(TASK, (X, Y), history=without)


def test_members_without_their_run_are_refused():
    recipe = uw.Training(net, uw.SGD(0.1), epochs=2, batch=4)
    models = uw.training.subset_models(recipe, TASK, uw.as_data((X, Y)), 2, 1.0)
    with pytest.raises(SpecError, match="runs=True"):
        uw.Ensemble(uw.TracIn()).fit(TASK, (X, Y), history=models)
    for history in (THETA, models.theta[1.0], None, []):
        with pytest.raises(SpecError, match="the run of each member"):
            uw.Ensemble(uw.TracIn()).fit(TASK, (X, Y), history=history)
    with pytest.raises(SpecError, match="where training ends"):
        uw.Ensemble(uw.SOURCE(), at=0.5)
    newton = uw.training.Newton(tol=1e-8)
    with pytest.raises(SpecError, match="says its steps"):
        uw.training.subset_models(newton, TASK, uw.as_data((X, Y)), 2, 0.5, runs=True)


def test_one_member_has_no_error():
    scores = uw.Ensemble(DENSE).fit(TASK, (X, Y), history=THETA[:1]).attribute(QUERIES)
    assert scores.error is None
    alone = DENSE.fit(TASK, (X, Y)).attribute(QUERIES)
    torch.testing.assert_close(scores.values, alone.values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("history", "said"),
    [
        (None, "several models"),
        ([], "several models"),
        ([torch.zeros(3)], "shape"),
        ([nn.Linear(3, 2)], "without '0.weight'"),
    ],
)
def test_other_members_are_refused(history, said):
    with pytest.raises(SpecError, match=said):
        uw.Ensemble(DENSE).fit(TASK, (X, Y), history=history)


def test_what_cannot_be_meant_is_refused():
    for given in ({"members": 0}, {"fraction": 50}, {"at": 0.0}):
        with pytest.raises(SpecError, match="one member or more"):
            uw.Ensemble(DENSE, **given)
    with pytest.raises(SpecError, match="looks at one model"):
        uw.Ensemble(uw.Ensemble(DENSE))
    fitted = uw.Ensemble(DENSE).fit(TASK, (X, Y), history=THETA)
    with pytest.raises(NotOffered):
        fitted.parameter_influence(0)
    with pytest.raises(NotOffered):
        fitted.attribute(None, uw.Coefficient(0))


def test_members_have_running_statistics_of_their_own():
    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
        model[1].running_mean += seed
        return model

    task, models = uw.Task(made(0), uw.CrossEntropy()), [made(1), made(2)]
    spec = uw.GradientDot()
    alone = [
        spec.fit(uw.Task(model, uw.CrossEntropy()), (X, Y)).attribute((X, Y)).values
        for model in models
    ]
    for history in (models, [model.state_dict() for model in models]):
        found = uw.Ensemble(spec, 2).fit(task, (X, Y), history=history)
        torch.testing.assert_close(found.attribute((X, Y)).values, (alone[0] + alone[1]) / 2)
    wider = made(1)
    wider[1].running_mean = torch.zeros(3, 1).double()
    with pytest.raises(SpecError, match=r"without '1\.running_mean' of shape \(4,\)"):
        uw.Ensemble(spec, 1).fit(task, (X, Y), history=[wider])


def test_members_with_a_tied_weight():
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    task, other = uw.Task(Tied(0), uw.CrossEntropy()), Tied(1)
    spec = uw.Ensemble(uw.GradientDot(), 1)
    theta = uw.Task(other, uw.CrossEntropy()).theta()
    expected = spec.fit(task, (X, Y), history=[theta]).attribute((X, Y)).values
    for history in ([other], [other.state_dict()]):
        found = spec.fit(task, (X, Y), history=history).attribute((X, Y)).values
        assert torch.equal(found, expected)


def test_what_members_say_alike_is_one_note():
    """Each leaves other tokens out: a note for each member buried what else was said."""
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 1, 1, 2, 3, 0])[:, None]

    def words():
        return nn.Sequential(nn.Embedding(8, 3), nn.Flatten(), nn.Linear(3, 3)).double()

    train = (tokens, torch.arange(16) % 3)
    recipe = uw.Training(words, uw.Adam(0.05), 4, 4, skip_absent=True)
    task = uw.Task(words(), uw.CrossEntropy())
    method = uw.Ensemble(uw.SOURCE(1), 4, 0.5)
    found = method.fit(task, train, history=recipe).attribute((tokens[:2], train[1][:2]))
    told = [note for note in found.provenance.notes if "are left out" in note]
    assert len(told) == 1 and "0.weight" in told[0]


@pytest.mark.parametrize("epochs", [2, 3])
def test_short_runs_of_members_have_a_state_in_each_third(epochs):
    recipe = uw.Training(net, uw.Adam(0.01), epochs, batch=2, skip_absent=True)
    method = uw.Ensemble(uw.SOURCE(3, uw.GGN(), states=1), 2, 0.5)
    found = method.fit(TASK, (X, Y), history=recipe).attribute(QUERIES)
    assert bool(found.values.isfinite().all())
