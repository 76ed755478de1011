"""Suspects against refits by scikit-learn, repairs against fits by hand."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from torch import nn

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import debugging
from upweight.applications.calibration import calibration
from upweight.applications.repair import decided, movement
from upweight.applications.suspicion import SHORTER
from upweight.errors import (
    AssumptionWarning,
    DataError,
    MissingContext,
    NotOffered,
    SpecError,
    UnsupportedModel,
)
from upweight.task.measures import measured
from upweight.training import FromFunction, Newton

pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")
NAMES = np.array([f"digit {k}" for k in range(5)])


def digits(n=240, wrong=24, kind="next"):
    """Five classes by name, some of them wrong: X, labels, the truth, test data."""
    X, y = load_digits(n_class=5, return_X_y=True)
    draw = np.random.default_rng(0)
    order = draw.permutation(len(y))
    X, y = X[order] / 16, y[order]
    labels, rows = y[:n].copy(), draw.permutation(n)[:wrong]
    labels[rows] = (labels[rows] + (1 if kind == "next" else draw.integers(1, 5, wrong))) % 5
    held = (X[n : n + 100], NAMES[y[n : n + 100]])
    return X[:n], NAMES[labels], NAMES[y[:n]], held, (X[n + 100 :], NAMES[y[n + 100 :]])


def logistic(**options):
    return LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-10, **options)


@pytest.fixture(scope="module")
def found():
    X, labels, _, held, _ = digits()
    return debugging.suspects(logistic().fit(X, labels), (X, labels), held)


@pytest.mark.parametrize("kind", ["next", "uniform"])
def test_wrong_labels_come_first_and_are_proposed_right(kind):
    X, labels, truth, *_ = digits(kind=kind)
    model = logistic().fit(X, labels)
    ours = holds(debugging.suspects(model, (X, labels)))
    wrong, first = labels != truth, ours.order[:24].numpy()
    assert wrong[first].mean() > 0.85
    assert ours.predicted is None
    proposed = ours.proposed(24)
    assert np.mean([proposed.get(i) == truth[i] for i in first[wrong[first]]]) > 0.95
    assert ours.frame().index[0] == first[0]
    assert ours.frame()["label"].iloc[0] == labels[first[0]]
    row = first[0]
    log_p = model.predict_log_proba(X[row : row + 1])[0]
    own = float(-log_p[model.classes_.tolist().index(labels[row])])
    assert ours.frame()["loss"].iloc[0] == pytest.approx(own)


def test_margins_are_those_of_refits_where_the_objective_is_quadratic():
    """RidgeClassifier: the rows U that the model disagrees with, left out by scikit-learn."""
    X, labels, *_ = digits(n=120, wrong=12)
    model = RidgeClassifier(alpha=2.0, fit_intercept=False).fit(X, labels)
    ours = debugging.suspects(model, (X, labels))
    codes = np.searchsorted(model.classes_, labels)

    def margins(outputs, y):
        losses = np.stack(
            [((outputs - (2 * np.eye(5)[c] - 1)) ** 2).sum(1) / 2 for c in range(5)], axis=1
        )
        given = losses[np.arange(len(y)), y]
        losses[np.arange(len(y)), y] = np.inf
        return given - losses.min(axis=1)

    def without(rows):
        kept = np.setdiff1d(np.arange(len(X)), rows)
        part = RidgeClassifier(alpha=2.0, fit_intercept=False).fit(X[kept], labels[kept])
        return X @ part.coef_.T

    alone = np.stack([without([i])[i] for i in range(len(X))])
    against = (margins(alone, codes) > 0).nonzero()[0]
    assert 12 <= len(against) < 60
    left_out = -1
    for _ in range(3):
        if len(against) == left_out:
            break
        left_out = len(against)
        expected = without(against)
        kept = np.setdiff1d(np.arange(len(X)), against)
        expected[kept] += (alone - X @ model.coef_.T)[kept]
        against = (margins(expected, codes) > 0).nonzero()[0]
    scale = float(ours.suspicion[int(against[0])]) / margins(expected, codes)[against[0]]
    assert scale == pytest.approx(1) or scale == pytest.approx(2)  # ½ or 1 before the square
    np.testing.assert_allclose(ours.suspicion.numpy(), scale * margins(expected, codes), atol=1e-8)


def test_a_repair_of_a_quadratic_objective_is_predicted_exactly():
    X, labels, truth, _, test = digits(n=150, wrong=20)
    model = RidgeClassifier(alpha=2.0).fit(X, labels)
    ours = debugging.suspects(model, (X, labels))
    fix = {int(i): truth[i] for i in ours.order[:30]}
    drop = {int(i): "drop" for i in ours.order[:3]}
    for made in (fix, drop):
        result = holds(ours.apply(made, test))
        assert result.predicted.loss.value == pytest.approx(result.actual.loss.value, abs=1e-9)
        assert ours.predict(made, test) == pytest.approx(result.after, abs=1e-9)
    both = ours.apply(fix | drop, test)  # one step for each, added
    assert both.predicted.loss.value == pytest.approx(both.actual.loss.value, rel=0.02)


def test_predicted_changes_are_those_of_relabel_influence(found):
    _, _, _, held, _ = digits()
    fitted = found.subject.fitted
    assert found.by == "harm"
    scores = fitted.attribute(held).values.mean(dim=0)
    torch.testing.assert_close(found.removing, -scores, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.suspicion, scores, rtol=1e-8, atol=1e-12)
    assert bool((scores[found.order].diff() <= 0).all())
    for i in (found.proposals != found.labels).nonzero()[:4, 0].tolist():
        change = fitted.relabel_influence(i, found.classes.names[int(found.proposals[i])], held)
        assert float(found.relabelling[i]) == pytest.approx(float(change.mean()), rel=1e-6)
    same = (found.proposals == found.labels).nonzero()[:, 0]
    assert not bool(found.relabelling[same].any())


def test_the_path_of_gains_is_that_of_correcting_the_first_ones(found):
    _, _, _, held, _ = digits()
    holds(found)
    path = found.predicted
    assert path.counts[0] == 0 and path.best > 0
    for k in (1, len(path.counts) - 1):
        some = found.proposed(path.counts[k])
        if some:
            values = found.predict(some, held)
            assert (path.values[k], path.accuracies[k]) == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"class_weight": "balanced"}])
def test_a_repair_is_the_fit_to_corrected_labels(options):
    X, labels, truth, held, test = digits(wrong=80)
    model = logistic(**options).fit(X, labels)
    ours = debugging.suspects(model, (X, labels), held, by="label")
    first = ours.order[:100].tolist()
    fix = {i: truth[i] for i in first}
    result = holds(ours.apply(fix, test))
    if not options:  # class weights stay those of the first fit
        corrected = labels.copy()
        corrected[first] = truth[first]
        by_hand = logistic().fit(X, corrected)
        assert result.after[1] == pytest.approx(by_hand.score(*test))
        assert result.before[1] == pytest.approx(model.score(*test))
        shown = holds(ours.apply({first[0]: "drop", first[1]: truth[first[1]]}, test))
        weights = np.ones(len(X))
        weights[first[0]] = 0
        corrected = labels.copy()
        corrected[first[1]] = truth[first[1]]
        by_hand = logistic().fit(X, corrected, sample_weight=weights)
        logs = by_hand.predict_log_proba(test[0])
        place = np.searchsorted(by_hand.classes_, test[1])
        assert shown.after[0] == pytest.approx(-logs[np.arange(len(place)), place].mean())
    assert result.is_confirmed and "confirms" in result.verdict
    assert result.after[1] > result.before[1]
    assert 0 < result.predicted.accuracy.value
    assert len(ours.data(fix)) == len(X)
    assert len(ours.data({first[0]: "drop"})) == len(X) - 1


def test_what_makes_it_worse_is_not_called_repaired(found):
    _, labels, _, held, _ = digits()
    harm = {i: NAMES[(np.searchsorted(NAMES, labels[i]) + 1) % 5] for i in range(80)}
    result = holds(found.apply(harm, held))
    assert not result.is_confirmed and "harm" in result.verdict
    assert any("ranked" in note for note in result.notes)


def test_a_prediction_warns_where_nothing_supports_its_size(found):
    """As `Scores.predict` does, for the reason that the method's scores give."""
    X, labels, truth, held, test = digits(n=150, wrong=20)
    exact = debugging.suspects(RidgeClassifier(alpha=2.0).fit(X, labels), (X, labels), held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact.predict({int(i): truth[i] for i in exact.order[:10]}, test)
    assert not any("sizes" in note for note in exact.notes)

    fitted = uw.Influence(uw.EKFAC()).fit(found.subject.fitted.task, found.subject.fitted.train)
    ours, why = debugging.suspects(fitted, validation=held), fitted.attribute(held).against_sizes
    assert "not known to be exact" in why
    made = ours.proposed(10)
    with pytest.warns(AssumptionWarning, match=f"nothing supports the size.*{why}") as warned:
        said = ours.predict(made, test)
    assert warned[0].filename == __file__ and "suspects.apply(decisions, test)" in str(warned[0])
    assert any(why in note for note in ours.notes)
    step, _ = movement(fitted, decided(made, ours.classes, ours.labels))
    there = measured(fitted.task, fitted.theta + step, fitted.task.queries(test), uw.Loss())
    assert said[0] == pytest.approx(float(there.mean()))


def test_a_prediction_warns_where_its_step_is_cut_short():
    """An exact method on a convex objective, whose Newton step overshoots."""
    X, labels, truth, held, test = digits(n=60, wrong=30)
    model = LogisticRegression(C=100.0, solver="newton-cholesky", tol=1e-10).fit(X, labels)
    ours = debugging.suspects(model, (X, labels))
    fitted, made = ours.subject.fitted, {i: truth[i] for i in range(60) if truth[i] != labels[i]}
    assert not fitted.attribute(held).provenance.against_sizes
    _, share = movement(fitted, decided(made, ours.classes, ours.labels))
    assert share < 1
    with pytest.warns(AssumptionWarning, match=f"the prediction is that of {share:g} of it"):
        ours.predict(made, test)


class Pairs(torch.utils.data.Dataset):
    """Examples one by one, as dicts."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        return {"input": self.X[i], "labels": self.y[i]}


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 5))
        self.float()


def test_a_float32_network_by_layer_of_a_dataset():
    X, labels, truth, _, test = digits()
    as_codes = [torch.tensor(np.searchsorted(NAMES, part)) for part in (labels, truth, test[1])]
    train = Pairs(torch.tensor(X, dtype=torch.float32), as_codes[0])
    queries = Pairs(torch.tensor(test[0], dtype=torch.float32), as_codes[2])
    recipe = uw.Training(Net, uw.SGD(0.1, momentum=0.9), epochs=10, batch=24)

    class ByName(uw.Measure):
        def __call__(self, task, params, batch):
            return task.losses(params, batch)

    blank = uw.Task(Net(), uw.CrossEntropy(), uw.L2(1e-3))
    model = recipe.trained(blank, uw.as_data(train)).eval()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-3))
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(1.0)).fit(task, train)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ours = debugging.suspects(
        fitted, validation=queries, measure=ByName(), by="label", recipe=recipe
    )
    wrong = labels != truth
    assert wrong[ours.order[:24].numpy()].mean() >= 0.5  # by chance .1
    result = holds(ours.apply({int(i): int(as_codes[1][i]) for i in ours.order[:36]}, queries))
    assert min(result.before[1], result.after[1]) > 0.9
    changed = ours.data({0: int(as_codes[0][0] + 1) % 5, 1: "drop"})
    assert int(changed.batch(0, 2)["labels"][0]) == int(as_codes[0][0] + 1) % 5
    assert len(changed) == 239
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_calibration_minimizes_its_objective_also_of_a_class_without_rows():
    draw = torch.Generator().manual_seed(0)
    losses = -3 * torch.randn(50, 4, generator=draw, dtype=torch.float64).log_softmax(dim=1)
    labels = torch.randint(0, 3, (50,), generator=draw)  # none of the fourth
    found = calibration(losses, labels)

    def objective(point):
        s, b = point[0], point[1:]
        of_all = nn.functional.cross_entropy(b - s * losses, labels, reduction="sum")
        return of_all + 0.5 * (s - 1) ** 2 + 0.5 * b.square().sum()

    point = torch.cat([torch.tensor([found.scale]), found.shifts])
    assert float(torch.func.grad(objective)(point).abs().max()) < 1e-3
    expected = -(found.shifts - found.scale * losses).log_softmax(dim=1)
    torch.testing.assert_close(found(losses), expected)
    assert found.shifts.argmin() == 3


def test_trusted_rows_find_labels_of_one_class_that_another_was_called():
    X, y = load_digits(n_class=2, return_X_y=True)
    draw = np.random.default_rng(0)
    X = X / 16 + draw.normal(0, 0.8, X.shape)  # so that classes overlap
    labels = y.copy()
    some = draw.permutation(np.nonzero(y[:240] == 1)[0])[:50]
    labels[some] = 0
    model = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-10).fit(
        X[:240], labels[:240]
    )
    train, held = (X[:240], labels[:240]), (X[240:], y[240:])
    alone = debugging.suspects(model, train)
    ours = holds(debugging.suspects(model, train, held, by="label"), figure=False)
    found = [np.isin(s.order[:50], some).sum() for s in (ours, alone)]
    assert found[0] > found[1] + 5
    assert f"fitted to the {len(held[0])} validation rows" in ours.notes[0]
    assert "for class 1" in ours.notes[0].split(" to ")[-1]  # the one that lost rows


def test_a_refit_without_the_suspects_judges_them():
    X, labels, truth, *_ = digits()
    model = logistic().fit(X, labels)
    first = debugging.suspects(model, (X, labels))
    again = holds(debugging.suspects(model, (X, labels), refit=True), figure=False)
    kept = (first.proposals == first.labels).numpy()
    assert again.left_out == (~kept).sum() > 10
    by_hand = logistic().fit(X, labels, sample_weight=kept.astype(float))
    f = torch.tensor(by_hand.decision_function(X))
    own = f.gather(1, first.labels[:, None])[:, 0]
    others = f.scatter(1, first.labels[:, None], -torch.inf).max(dim=1).values
    torch.testing.assert_close(again.suspicion, others - own, rtol=1e-5, atol=1e-5)
    assert again.verdict.endswith(f"the only fit was one without {again.left_out} rows, by which "
        "they are ranked.")  # fmt: skip
    wrong = labels != truth
    assert wrong[again.order[:24].numpy()].sum() >= wrong[first.order[:24].numpy()].sum()
    with pytest.raises(SpecError, match="must know how"):
        debugging.suspects(first.subject.fitted, refit=True)


def test_where_steps_are_too_long_rows_are_judged_by_the_model_itself():
    X, labels, truth, _, _ = digits()
    X, y = torch.tensor(X, dtype=torch.float32), torch.tensor(np.searchsorted(NAMES, labels))
    recipe = uw.Training(Net, uw.SGD(0.1, momentum=0.9), epochs=8, batch=24)
    model = recipe.trained(uw.Task(Net(), uw.CrossEntropy(), uw.L2(1e-3)), (X, y)).eval()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-3))
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(1e-3)).fit(task, (X, y))
    ours = holds(debugging.suspects(fitted), figure=False)
    assert "does not lower the loss of the others" in ours.notes[0]

    def margins(f):
        losses = nn.functional.cross_entropy(f.repeat_interleave(5, 0), torch.arange(5).repeat(240),
            reduction="none").reshape(240, 5)  # fmt: skip
        own = losses[torch.arange(240), y]
        return own - losses.scatter(1, y[:, None], torch.inf).min(1).values, own

    with torch.no_grad():
        first, own = margins(model(X))
        denied = first > 0
        step = fitted.scorer.step(denied.nonzero()[:, 0].tolist())
        tried = [margins(task.moved_to(task.theta() + t * step).model(X)) for t in (0, *SHORTER)]
    m, _ = min(tried, key=lambda each: float(each[1][~denied].mean()))
    h = fitted.leverage("others")
    assert 0 < float(h.min()) and float(h.max()) < 1
    torch.testing.assert_close(ours.suspicion, torch.where(m > 0, m, (1 - h) * m))
    assert torch.equal(ours.suspicion > 0, ours.proposals != ours.labels)
    wrong = torch.tensor(labels != truth)
    too_far = margins(fitted.loo_outputs("others"))[0]
    found = [
        int(wrong[s.argsort(descending=True)[:24]].sum()) for s in (ours.suspicion, own, too_far)
    ]
    assert found[0] >= max(found[1:]) - 1

    # What is predicted of a repair: the step halved while that lowers its own objective.
    first = ours.order[:40].tolist()
    corrected = y.clone()
    corrected[first] = torch.tensor(np.searchsorted(NAMES, truth))[first]
    total = [
        torch.autograd.grad(nn.functional.cross_entropy(model(X), labels), [*model.parameters()])
        for labels in (corrected, y)
    ]
    change = torch.cat([(a - b).reshape(-1) for a, b in zip(*total, strict=True)])
    whole = -fitted.scorer.solve(change[None])[0]
    with torch.no_grad():
        tried = []
        for t in (1, 1 / 2, 1 / 4, 1 / 8):
            there = task.theta() + t * whole
            losses = nn.functional.cross_entropy(task.moved_to(there).model(X), corrected)
            tried.append((float(losses + 5e-4 * there.square().sum()), float(losses)))
    assert tried[0] > min(tried) < tried[-1]
    said = ours.predict({i: int(corrected[i]) for i in first}, (X, corrected))
    assert math.isclose(said[0], min(tried)[1], rel_tol=1e-4)


def test_two_classes_by_one_logit():
    X, y = load_iris(return_X_y=True)
    X, y = torch.tensor((X[50:] - X[50:].mean(0)) / X[50:].std(0)), torch.tensor(y[50:] == 2)
    wrong = y.clone()
    wrong[::10] = ~wrong[::10]
    model = nn.Linear(4, 1).double()
    task = uw.Task(model, uw.Bernoulli(), uw.L2(0.01))
    train = (X, wrong.double()[:, None])
    theta = Newton().prepare(task, uw.as_data(train))(torch.ones(1, 100)).theta[0]
    task = task.moved_to(theta)
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(task, train)
    ours = holds(debugging.suspects(fitted, recipe=Newton()))
    assert ours.classes.names == (0, 1)
    assert set(ours.order[:10].tolist()) >= set(range(0, 100, 10)) - {70, 20, 10}
    fix = {i: int(y[i]) for i in range(0, 100, 10)}
    result = holds(ours.apply(fix, (X, y.double()[:, None])))
    assert result.after[0] < result.before[0]


def test_an_error_is_explained_and_its_refits_are_those_of_scikit_learn(found):
    import upweight.adapters.sklearn as sk

    X, labels, _, _, test = digits()
    model = logistic().fit(X, labels)
    scores = found.subject.fitted.attribute(test)
    errors = (model.predict(test[0]) != test[1]).nonzero()[0]
    q = int(errors[0])
    ours = holds(debugging.explain_error(scores, q, counts=(1, 5, 20), recipe=sk.recipe(model)))
    assert ours.label == test[1][q] and ours.taken_for == model.predict(test[0][q : q + 1])[0]
    assert ours.margin < 0 and len(ours.actual) == 3
    weights = np.ones(len(X))
    weights[list(ours.lowers[:5])] = 0
    again = logistic().fit(X, labels, sample_weight=weights)
    p = again.predict_proba(test[0][q : q + 1])[0][again.classes_ == test[1][q]][0]
    assert ours.actual[1] == pytest.approx(np.log(p / (1 - p)), abs=1e-5)
    assert ours.predicted[0] == pytest.approx(ours.actual[0], abs=0.1)
    assert ours.actual[2] > ours.actual[1] > ours.margin
    alone = holds(debugging.explain_error(scores, q))
    assert not alone.is_confirmed and alone.actual is None
    right = int((model.predict(test[0]) == test[1]).nonzero()[0][0])
    with pytest.raises(DataError, match="predicted as that"):
        debugging.explain_error(scores, right)
    with pytest.raises(SpecError, match="counts"):
        debugging.explain_error(scores, q, counts=(0,))
    with pytest.raises(DataError, match="query 999"):
        debugging.explain_error(scores, 999)


def test_loaded_scores_have_nothing_to_ask(found, tmp_path):
    _, _, _, _, test = digits()
    found.subject.fitted.attribute(test).save(tmp_path / "scores")
    with pytest.raises(MissingContext):
        debugging.explain_error(uw.Scores.load(tmp_path / "scores"), 0)


@pytest.mark.parametrize(
    "decisions, said",
    [
        ({}, "no decision"),
        ({0: "keep"}, "all kept"),
        ({999: "drop"}, "row 999"),
        ({-1: "drop"}, "row -1"),
        ({0: "digit 7"}, "'digit 7'"),
    ],
)
def test_decisions_that_mean_nothing_are_refused(found, decisions, said):
    with pytest.raises(DataError, match=said) as caught:
        found.apply(decisions, digits()[4])
    assert str(caught.value).count("\n  ") == 3
    way_out = {int(found.order[0]): "drop"}  # as the error says
    assert holds(found.apply(way_out, digits()[4])).decisions.dropped


def test_what_cannot_be_asked_is_refused(found):
    X, labels, truth, _, test = digits()
    model = logistic().fit(X, labels)
    with pytest.raises(SpecError, match="harm"):
        debugging.suspects(model, (X, labels), by="harm")
    y = np.searchsorted(NAMES, labels).astype(float)
    with pytest.raises(UnsupportedModel, match="regression"):
        debugging.suspects(Ridge().fit(X, y), (X, y))
    theta = found.subject.fitted.theta
    fixed = FromFunction(lambda weights: theta, twice=False)
    with pytest.raises(SpecError, match="weights alone"):
        found.apply({0: truth[(truth != labels[0]).nonzero()[0][0]]}, test, fixed)
    task, train = found.subject.fitted.task, found.subject.fitted.train
    with pytest.raises(NotOffered):
        debugging.suspects(uw.GradientDot().fit(task, train))
    two = np.where(labels == labels[0], "keep", "sell")
    other = debugging.suspects(logistic().fit(X, two), (X, two))
    with pytest.raises(SpecError, match="rename"):
        other.apply({0: "drop"}, (X, two))
    alone = debugging.suspects(found.subject.fitted)
    with pytest.raises(SpecError, match="recipe"):
        alone.apply({0: "drop"}, test)


def test_a_class_of_one_row_and_rows_that_come_twice():
    X, labels, *_ = digits(n=60, wrong=4)
    X, labels = np.concatenate([X, X[:20]]), np.concatenate([labels, labels[:20]])
    labels[7] = "digit 9"
    ours = holds(debugging.suspects(logistic().fit(X, labels), (X, labels)))
    assert len(ours.classes.names) == 6
    assert sorted(ours.order.tolist()) == list(range(80))


def test_clean_and_separable_rows_have_no_suspects():
    X = np.concatenate([np.random.default_rng(0).normal(size=(40, 3)) + s for s in (-5, 5)])
    y = np.repeat([0, 1], 40)
    ours = holds(debugging.suspects(logistic().fit(X, y), (X, y), (X, y)))
    assert ours.count == 0 and ours.proposed(80) == {}
    assert ours.predicted.counts == (0,)
    assert "not predicted to lower" in ours.verdict


def test_training_rows_are_no_test_of_a_repair(found):
    X, labels, _, _, test = digits()
    drop = {int(found.order[0]): "drop"}
    with pytest.raises(DataError, match="not trained on"):
        found.apply(drop, (X, labels))
    assert holds(found.apply(drop, test)).tested == len(test[1])


def test_the_measure_that_was_asked_is_named(found):
    X, labels, _, held, _ = digits()
    model = logistic().fit(X, labels)
    for measure, said in (
        (uw.LogProb(), "the validation LogProb()"),
        (lambda outputs, targets: outputs[:, 0], "the validation measure"),
    ):
        assert said in debugging.suspects(model, (X, labels), held, measure=measure).verdict
    assert "the validation loss" in found.verdict
