"""Whatever is trained again goes on after a kill, bit for bit; the folder of another is refused."""

import dataclasses
import functools
import importlib.metadata
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import upweight as uw
from tests.killing import kill_once_kept
from upweight.adapters.sklearn_folds import Clones
from upweight.adapters.sklearn_outputs import EstimatorRefit
from upweight.applications import (
    acquisition,
    cross_validation,
    debugging,
    fairness,
    poisoning,
    selection,
    unlearning,
)
from upweight.errors import StaleStore
from upweight.front.choice import Facts, named
from upweight.front.kept import kept_choice
from upweight.methods.shapley import DataShapley
from upweight.task.recipe import Trained
from upweight.training import trainer
from upweight.training.kept import Kept, kept_trainer
from upweight.training.newton import Newton
from upweight.training.subset_models import subset_models
from upweight.training.trainer import TrainingTrainer

draw = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, generator=draw).double()
Y = (X[:, 0] + 0.3 * torch.randn(24, generator=draw).double() > 0).long()
XV, YV = X + 0.2, Y
GROUPS = ["a", "b"] * 12


class Killed(BaseException):
    """As a kill: nothing may catch it."""


class Count:
    """Trainings that were made, and how many more may be."""

    made, left, prepared = 0, math.inf, 0

    @classmethod
    def one(cls):
        if cls.left == 0:
            raise Killed
        cls.made, cls.left = cls.made + 1, cls.left - 1


@dataclasses.dataclass(frozen=True)
class Counted:
    """Some function of weights and labels, whose calls are counted and end where they are told."""

    def prepare(self, task, train):
        Count.prepared += 1
        seed, labels = getattr(self, "seed", 0), train.batch(0, len(train))[-1].double()

        class Trainer:
            at_once = 1

            def __call__(self, weights):
                Count.one()
                n = weights.shape[1]
                to = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)).double()
                theta = task.theta() + 0.1 * ((1 - weights.double() * labels) @ to).tanh()
                return Trained(theta, torch.ones(len(weights)).double())

        return Trainer()


@dataclasses.dataclass(frozen=True)
class Seeded(Counted):
    seed: int = 0


@functools.cache
def task_of():
    torch.manual_seed(0)
    blank = uw.Task(nn.Linear(3, 2).double(), uw.CrossEntropy(), uw.L2(0.1))
    return blank.moved_to(
        Newton().prepare(blank, blank.training((X, Y)))(torch.ones(1, 24)).theta[0]
    )


def killed_and_resumed(ask, folder, after):
    """What was asked without a folder, and what a call says that goes on after a kill."""
    Count.made, Count.left = 0, math.inf
    whole, total = ask(None), Count.made
    assert total > after
    Count.left = after
    with pytest.raises(Killed):
        ask(uw.Resources(folder=folder))
    Count.made, Count.left = 0, math.inf
    resumed = ask(uw.Resources(folder=folder))
    assert 0 < Count.made <= total - after  # some were wanted twice
    Count.made = 0
    ask(uw.Resources(folder=folder))
    assert Count.made == 0
    return whole, resumed


def same(a, b):
    assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


METHODS = {
    "leave-one-out": (uw.LeaveOneOut(2), Seeded()),
    "subsets of one seed": (uw.SubsampledInfluence(12), Counted()),
    "subsets of their own seeds": (uw.SubsampledInfluence(12), Seeded()),
    "coalitions": (DataShapley(1), Counted()),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_train_go_on_where_they_were(name, tmp_path):
    (method, recipe), task = METHODS[name], task_of()

    def ask(resources, train=(X, Y)):
        using = uw.Resources() if resources is None else resources
        fitted = method.fit(task, train, history=recipe, resources=using)
        return fitted.attribute((XV[:4], YV[:4]))

    Count.prepared = 0
    whole, resumed = killed_and_resumed(ask, tmp_path, 7)
    assert Count.prepared == 4 or isinstance(recipe, Seeded)  # without a seed once for each fit
    same(whole.values, resumed.values)
    assert whole.error is None or torch.equal(whole.error, resumed.error)
    with pytest.raises(StaleStore, match="another train") as told:
        ask(uw.Resources(folder=tmp_path), (X + 1e-3, Y))
    assert "give another folder" in str(told.value)
    assert ask(uw.Resources(folder=tmp_path / "another"), (X + 1e-3, Y)).values.shape == (4, 24)


def test_models_of_subsets_go_on_where_they_were(tmp_path):
    task = task_of()

    def ask(resources):
        data = task.training((X, Y))
        return subset_models(Seeded(), task, data, 12, 0.5, 2, resources=resources)

    whole, resumed = killed_and_resumed(ask, tmp_path, 5)
    same(whole.theta[1.0], resumed.theta[1.0])
    # The methods of such models hand the folder on.
    Count.made, using = 0, uw.Resources(folder=tmp_path / "fit")
    for _ in range(2):
        uw.Ensemble(uw.GradientDot(), 2, 0.5).fit(task, (X, Y), history=Seeded(), resources=using)
    assert Count.made == 2


def test_runs_of_subsets_go_on_where_they_were(tmp_path, monkeypatch):
    torch.manual_seed(0)
    init = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    recipe = uw.Training(lambda: init, uw.Adam(0.01), epochs=2, batch=8)
    task, method = (
        uw.Task(init, uw.CrossEntropy()),
        uw.Stacked((uw.Ensemble(uw.SOURCE(1), 2, 0.5),), 8, 0.5, 2),
    )
    states = TrainingTrainer.states

    def counted(self, weights, wanted, begin=None):
        if begin is None:  # a training, and not a replay from a kept state
            Count.one()
        return states(self, weights, wanted, begin)

    monkeypatch.setattr(TrainingTrainer, "states", counted)
    monkeypatch.setattr(trainer, "TOGETHER", 2)

    def ask(resources):  # two models of two seeds at a time
        data = task.training((X, Y))
        return subset_models(
            recipe, task, data, 8, 0.5, 8, at=(0.5, 1.0), runs=True, resources=resources
        )

    whole, resumed = killed_and_resumed(ask, tmp_path / "models", 2)
    for one, other in zip(whole.runs, resumed.runs, strict=True):
        assert one.kept == other.kept and len(one.kept) > 2
        for t in range(len(one) + 1):  # replayed from a kept state as well
            for a, b in zip(one.state(t).tensors, other.state(t).tensors, strict=True):
                same(a, b)
    same(whole.theta[0.5], resumed.theta[0.5])

    def attributed(resources):
        using = uw.Resources() if resources is None else resources
        return method.fit(task, (X, Y), history=recipe, resources=using).attribute((XV[:3], YV[:3]))

    whole, resumed = killed_and_resumed(attributed, tmp_path / "method", 2)
    same(whole.values, resumed.values)


def test_a_killed_process_goes_on_with_the_method_that_it_chose(tmp_path, monkeypatch):
    script = f"""
        import time
        import numpy as np
        from sklearn.neighbors import KNeighborsClassifier
        import upweight as uw
        from upweight.adapters.sklearn_outputs import EstimatorRefit

        fitted = EstimatorRefit.fitted
        def slow(self, weights=None):
            time.sleep(0.03)
            return fitted(self, weights)
        EstimatorRefit.fitted = slow
        draw = np.random.default_rng(0)
        X = draw.normal(size=(200, 1))
        y = (X[:, 0] + draw.normal(size=200) > 0).astype(int)
        knn, using = KNeighborsClassifier(9).fit(X, y), uw.Resources(folder={str(tmp_path)!r})
        uw.attribute(knn, (X, y), X[:3], budget="3 s", resources=using)
    """
    kill_once_kept(script, tmp_path, 9)
    kept = len(list(tmp_path.glob("queries-*/refits/*.safetensors")))
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(200, 1))
    y = (rows[:, 0] + draw.normal(size=200) > 0).astype(int)
    knn, fitted = KNeighborsClassifier(9).fit(rows, y), EstimatorRefit.fitted

    def counted(self, weights=None):
        Count.one()
        return fitted(self, weights)

    monkeypatch.setattr(EstimatorRefit, "fitted", counted)
    Count.made, Count.left = 0, math.inf
    using = uw.Resources(folder=tmp_path)
    scores = uw.attribute(knn, (rows, y), rows[:3], budget="3 s", resources=using)
    # Here a fit is quicker, and each row by itself would have been chosen: no fit tries it.
    method = scores.require_context().fitted.spec
    assert isinstance(method, uw.SubsampledInfluence) and 9 <= kept
    assert Count.made == method.subsets - kept
    whole = uw.attribute(knn, (rows, y), rows[:3], method=method)
    same(scores.values, whole.values)
    same(scores.error, whole.error)
    # What `check` trains is kept as well, without a word.
    Count.made = 0
    first = scores.check(subsets=4)
    assert Count.made == 10 and scores.check(subsets=4).lds.summary() == first.lds.summary()
    assert Count.made == 10


def test_other_queries_of_an_estimator_have_a_folder_of_their_own(tmp_path):
    """Its outputs at the queries are what is kept; other training data are refused still."""
    knn, method = KNeighborsClassifier(3).fit(X, Y), uw.SubsampledInfluence(12)
    using = uw.Resources(folder=tmp_path)
    for rows in (XV[:3], XV[2:6]):
        kept = uw.attribute(knn, (X, Y), rows, method=method, resources=using)
        same(kept.values, uw.attribute(knn, (X, Y), rows, method=method).values)
    other = KNeighborsClassifier(3).fit(X + 1.0, Y)
    with pytest.raises(StaleStore, match="another"):
        uw.attribute(other, (X + 1.0, Y), XV[:3], method=method, resources=using)


def test_the_choice_for_a_network_is_kept(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    using = uw.Resources(folder=tmp_path)

    def ask(q=2, **more):
        found = uw.attribute(model, (X, Y), (XV[:q], YV[:q]), uw.CrossEntropy(), **more)
        return found.require_context().fitted.spec, found.values

    method, values = ask(resources=using)
    other = named("EK-FAC of the data's labels", "", Facts(1, 1, 1, 1, False, True))
    monkeypatch.setattr("upweight.front.attribute.choose", lambda facts: other)
    again, resumed = ask(resources=using)
    assert again == method != other.method
    same(values, resumed)
    assert ask(resources=using, budget=30)[0] == ask()[0] == other.method  # another question
    less = uw.Resources(folder=tmp_path, memory_bytes=2**30)
    assert ask(3, resources=using)[0] == ask(resources=less)[0] == other.method


def test_of_two_processes_one_chooses_for_both(tmp_path):
    def ask(k):
        def choose():
            time.sleep(0.05)  # the other asks meanwhile
            return {"row": str(k)}

        return kept_choice(uw.Resources(folder=tmp_path), lambda: {"of": "this"}, choose)["row"]

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(ask, range(2)))) == 1


def test_cross_validation_goes_on_where_it_was(tmp_path, monkeypatch):
    fitted = uw.Influence(uw.Hessian()).fit(task_of(), (X, Y))

    def by_recipe(resources):
        return cross_validation.kfold(
            fitted, folds=6, recipe=Counted(), confirm=99, resources=resources
        )

    whole, resumed = killed_and_resumed(by_recipe, tmp_path / "recipe", 3)
    same(whole.exact, resumed.exact)

    without, clf = Clones._without, LogisticRegression(C=2.0).fit(X.numpy(), Y.numpy())

    def counted(self, group):
        Count.one()
        return without(self, group)

    monkeypatch.setattr(Clones, "_without", counted)

    def by_library(resources, C=2.0):
        grid = {"C": [0.5, C]}
        return cross_validation.path(
            clf, X.numpy(), Y.numpy(), grid, folds=6, confirm=99, resources=resources
        )

    whole, resumed = killed_and_resumed(by_library, tmp_path / "library", 8)
    for one, other in zip(whole.along, resumed.along, strict=True):
        same(one.exact, other.exact)
    # Values in another order, or among others, have the folders that they had.
    Count.made, grid = 0, {"C": [2.0, 0.5]}
    data, using = (X.numpy(), Y.numpy()), uw.Resources(folder=tmp_path / "library")
    cross_validation.path(clf, *data, grid, folds=6, confirm=99, resources=using)
    assert Count.made == 0
    with pytest.raises(StaleStore, match="another refits"):  # and is not of the value
        cross_validation.path(clf, data[0] + 1e-3, data[1], grid, confirm=99, resources=using)
    # A value whose folder is of another one is not answered with its refits.
    first = next((tmp_path / "library").iterdir())
    with pytest.raises(StaleStore, match="another refits"):
        cross_validation.kfold(
            clf, (X.numpy() + 1e-3, Y.numpy()), 6, confirm=99,
            resources=uw.Resources(folder=first),
        )  # fmt: skip


def test_models_of_other_versions_of_what_fits_them_are_refused(tmp_path, monkeypatch):
    """An estimator may be fitted within a recipe, and outputs are read by this library."""
    task, was = task_of(), importlib.metadata.version
    clf, data = LogisticRegression().fit(X.numpy(), Y.numpy()), (X.numpy(), Y.numpy())

    def by_recipe():
        using = uw.Resources(folder=tmp_path / "recipe")
        kept_trainer(Counted(), task, task.training((X, Y)), using)(torch.ones(1, 24))

    def by_library():
        using = uw.Resources(folder=tmp_path / "library")
        cross_validation.kfold(clf, data, 6, confirm=1, resources=using)

    for ask in (by_recipe, by_library):
        ask()
        for package in ("upweight", "scikit-learn", "numpy"):
            with monkeypatch.context() as patch:
                other = {package: "9"}
                patch.setattr(importlib.metadata, "version", lambda p, o=other: o.get(p) or was(p))
                with pytest.raises(StaleStore, match="another versions"):
                    ask()


def test_unlearning_and_fairness_go_on_where_they_were(tmp_path):
    fitted = uw.Influence(uw.Hessian()).fit(task_of(), (X, Y))
    gap = fairness.gap("demographic_parity", GROUPS)

    def unlearned(resources):
        return unlearning.without(fitted, [1, 2], recipe=Counted(), resources=resources)

    whole, resumed = killed_and_resumed(unlearned, tmp_path / "unlearning", 1)
    same(whole.actual, resumed.actual)

    def causes(resources):
        found = fairness.causes(fitted, (XV, YV), gap, recipe=Counted(), resources=resources)
        return found, found.by(GROUPS, refits=2)

    (whole, groups), (resumed, again) = killed_and_resumed(causes, tmp_path / "causes", 2)
    same(whole.actual, resumed.actual)
    assert repr(groups.causes) == repr(again.causes)

    for how in ("weights", "relabel"):

        def repair(resources, how=how):
            return fairness.repair(
                fitted, (XV, YV), gap, test=(X - 0.2, Y), test_groups=GROUPS, recipe=Counted(),
                how=how, budget=0.5, target=0.0, resources=resources,
            )  # fmt: skip

        whole, resumed = killed_and_resumed(repair, tmp_path / how, 2)
        assert whole.summary() == resumed.summary()

    # What is wrong with the folder is no refit that failed.
    for kept in (tmp_path / "weights", tmp_path / "causes"):
        for file in kept.glob("*/*.safetensors"):
            file.write_bytes(b"damaged")
    with pytest.raises(StaleStore):
        repair(uw.Resources(folder=tmp_path / "weights"), "weights")
    with pytest.raises(StaleStore):
        causes(uw.Resources(folder=tmp_path / "causes"))


def test_cleansing_goes_on_where_it_was(tmp_path):
    task = task_of()
    fitted = uw.GradientDot().fit(task, (X, Y))
    other = Y != 0
    triggered = X[other] - torch.tensor([5.0, 0.0, 0.0])
    found = poisoning.suspects(fitted, (triggered[:4], Y[other][:4]), (X[other][:4], Y[other][:4]))

    def cleanse(resources):
        return poisoning.cleanse(
            Counted(), found, (triggered[4:], Y[other][4:]), (XV, YV), [2, 4], resources=resources
        )

    whole, resumed = killed_and_resumed(cleanse, tmp_path, 2)
    assert whole.summary() == resumed.summary()
    same(whole.theta, resumed.theta)


def selections(task, fitted):
    """What fits again under other weights, other labels, or more rows: (resources) -> numbers."""
    guide, test = (XV, YV), (X - 0.2, Y)
    found = debugging.suspects(fitted, by="label")
    oracle = [int(y) for y in Y[8:]]

    def repairs(resources):
        both = ({0: 1 - int(Y[0]), 3: "drop"}, {1: "drop"})
        return [found.apply(d, test, Counted(), resources=resources).summary() for d in both]

    return {
        "subset": lambda using: selection.subset(
            fitted, 0.6, "drop", validation=guide, test=test, recipe=Counted(), resources=using
        ).summary(),
        "reweight": lambda using: selection.reweight(
            fitted, Counted(), guide, test=test, steps=2, resources=using
        ).summary(),
        "target": lambda using: selection.for_target(
            fitted, guide, 0.5, test=test, recipe=Seeded(), against={}, seeds=2, resources=using
        ).summary(),
        "apply": repairs,
        "curve": lambda using: acquisition.curve(
            Counted(), task, (X[:8], Y[:8]), X[8:], oracle, guide, test,
            ("random", "expected gain"), 3, 2, repeats=1, resources=using,
        ).summary(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["subset", "reweight", "target", "apply", "curve"])
def test_what_chooses_rows_goes_on_where_it_was(name, tmp_path):
    task = task_of()
    ask = selections(task, uw.Influence(uw.Hessian()).fit(task, (X, Y)))[name]
    whole, resumed = killed_and_resumed(ask, tmp_path, 2)
    assert repr(whole) == repr(resumed)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(StaleStore):
        ask(uw.Resources(folder=tmp_path))


def test_models_that_fail_are_not_tried_again(tmp_path):
    class Trainer:
        at_once = 2

        def __call__(self, weights):
            Count.one()
            return Trained(torch.zeros(2, 8).double(), torch.ones(2), {1: "diverged"})

    task, kept = task_of(), Kept.of(uw.Resources(folder=tmp_path), lambda: {"of": "this"})
    Count.made = 0
    told = [kept.trainer(Trainer(), task)(torch.eye(2)) for _ in range(2)]
    assert Count.made == 1 and told[0].failures == told[1].failures == {1: "diverged"}
    kept.trainer(Trainer(), task, "of another seed")(torch.eye(2))
    assert Count.made == 2
