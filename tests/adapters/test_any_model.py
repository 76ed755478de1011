"""Estimators of which outputs alone are known: refits, leaves and neighbours, against their own."""

import functools
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

import upweight as uw
import upweight.adapters.sklearn as sk
import upweight.adapters.sklearn_leaves as leaves
from upweight.applications.debugging import flagged_labels, suspects
from upweight.errors import (
    AssumptionWarning,
    DataError,
    NotConverged,
    NotOffered,
    SpecError,
    UnsupportedModel,
)
from upweight.methods.refits import subsampled

N = 30
DIABETES = load_diabetes(return_X_y=True)
X, Y = DIABETES[0][:N], DIABETES[1][:N]
XQ, YQ = DIABETES[0][400:404], DIABETES[1][400:404]
IRIS = load_iris(return_X_y=True, as_frame=True)
FLOWERS = IRIS[0][::5]
NAMES = IRIS[1][::5].map({0: "setosa", 1: "versicolor", 2: "virginica"})
ASKED = (IRIS[0][1:150:40], IRIS[1][1:150:40].map({0: "setosa", 1: "versicolor", 2: "virginica"}))


def test_leaving_each_row_out_is_what_refits_by_hand_say(capsys):
    for model in (
        make_pipeline(StandardScaler(), SVC()),  # decision values
        GaussianNB(),  # probabilities
        SVR(),  # numbers
    ):
        train, queries = ((FLOWERS, NAMES), ASKED) if model is not None else None
        if isinstance(model, SVR):
            train, queries = (X, Y), (XQ, YQ)
        model.fit(*train)
        scores = uw.attribute(model, train, queries, measure=uw.Logit(0))
        assert "fits, about" in capsys.readouterr().err
        assert isinstance(scores.context.fitted.spec, uw.LeaveOneOut)

        def first(fitted):
            for name in ("predict_proba", "decision_function"):
                if hasattr(fitted, name):
                    return getattr(fitted, name)(queries[0])[:, 0]  # noqa: B023
            return fitted.predict(queries[0])  # noqa: B023

        gone = 3
        kept = [i for i in range(len(train[0])) if i != gone]
        some = [getattr(each, "iloc", each)[kept] for each in train]
        change = first(clone(model).fit(*some)) - first(model)
        effects = scores.removal([gone]).values[:, 0]
        assert np.abs(change).max() > 0
        np.testing.assert_allclose(effects, change, rtol=1e-12, atol=1e-12)
        assert scores.unit is uw.Unit.DERIVATIVE and scores.error is None


def test_loss_of_an_estimator_is_finite_where_its_probabilities_are_0():
    tree = DecisionTreeClassifier(random_state=0).fit(FLOWERS, NAMES)
    wrong = ASKED[1].where(ASKED[1] != "setosa", "virginica")
    found = sk.outputs(tree, (FLOWERS, NAMES), (ASKED[0], wrong))
    losses = found.task.losses(found.task.theta(), found.queries.batch(0, len(wrong)))
    index = [tree.classes_.tolist().index(each) for each in wrong]
    p = tree.predict_proba(ASKED[0])[range(len(wrong)), index]
    np.testing.assert_allclose(losses, 1 - p)
    assert (p == 0).any()
    # A class that a subset has not got has probability 0 there.
    weights = torch.ones(1, len(FLOWERS), dtype=torch.float64)
    weights[0, (NAMES == "setosa").tolist()] = 0
    theta = found.recipe.prepare(found.task, found.train)(weights).theta.reshape(-1, 3)
    assert bool((theta[:, 0] == 0).all()) and bool((theta.sum(dim=1) == 1).all())


def test_subsets_estimate_what_they_say_with_the_error_they_say(monkeypatch, tmp_path):
    # m linear in membership: the effect is the coefficient, up to others that come and go.
    g = torch.Generator().manual_seed(0)
    effects = torch.randn(6, generator=g, dtype=torch.float64)
    inside = torch.rand(4000, 6, generator=g) < 0.5
    noise = torch.randn(4000, generator=g, dtype=torch.float64)
    measured = (inside.double() @ effects + noise)[:, None]
    found, error = subsampled(measured, inside)
    for i in range(6):
        a, b = measured[inside[:, i], 0], measured[~inside[:, i], 0]
        assert float(found[0, i]) == pytest.approx(float(a.mean() - b.mean()))
        expected = (a.var() / len(a) + b.var() / len(b)).sqrt()
        assert float(error[0, i]) == pytest.approx(float(expected))
    assert float(((found - effects) / error).abs().max()) < 3

    forest = RandomForestClassifier(2).fit(FLOWERS, NAMES)  # without random_state
    monkeypatch.setattr(sk.Outputs, "tried", lambda self: (0.1, 0.3, 0.2))
    scores = uw.attribute(forest, (FLOWERS, NAMES), ASKED, budget=11)
    assert scores.context.fitted.spec.subsets == 110  # whole forests
    assert scores.error.shape == scores.values.shape and bool((scores.error >= 0).all())
    assert isinstance(scores.context.fitted.spec, uw.SubsampledInfluence)
    assert any("no random_state" in note for note in scores.provenance.notes)
    assert any("exceed two standard errors" in note for note in scores.provenance.notes)
    best, told = scores.top(1), scores.table(k=2)
    assert told["error"].iloc[0] == float(scores.error[0, best.raises[0]]) and " ± " in str(best)
    assert ".suspects()" not in repr(scores) and " ± " in repr(scores)
    (noise,) = (fact for fact in scores.provenance.facts if fact.name == "Noise")
    share = scores.provenance.health["share_beyond_two_errors"]
    assert noise.number == min(1, 0.05 / share) and noise.concern == (share < 0.1)
    page = scores.report(tmp_path / "page.html").read_text()
    assert all(f'"label":"{name}"' in page for name in set(NAMES)) and '"label":"None"' not in page
    with pytest.raises(NotOffered, match="the diagonal of attribute"):
        scores.self_influence()
    with pytest.raises(NotOffered, match="flagged_labels"):
        scores.suspects()
    few = (FLOWERS[::3], NAMES[::3])
    tree = DecisionTreeClassifier(splitter="random").fit(*few)
    seeds = uw.attribute(tree, few, ASKED, method=uw.LeaveOneOut(2))
    assert seeds.error.shape == seeds.values.shape and bool(seeds.error.any())


LEAVES = [
    DecisionTreeRegressor(max_depth=3, random_state=0),
    ExtraTreesRegressor(3, min_samples_leaf=3, random_state=0),
    RandomForestRegressor(3, min_samples_leaf=3, bootstrap=False, max_features=3, random_state=0),
    GradientBoostingRegressor(n_estimators=5, random_state=0),
    GradientBoostingRegressor(n_estimators=5, init="zero", random_state=0),
    HistGradientBoostingRegressor(max_iter=5, min_samples_leaf=4, l2_regularization=0.5),
]


@pytest.mark.parametrize("model", LEAVES, ids=lambda model: type(model).__name__)
def test_leaf_influence_is_the_derivative_of_a_refit_that_keeps_its_splits(model):
    model = clone(model).fit(X, Y)
    W = sk.leaf_weights(model, X, Y, XQ).numpy()
    np.testing.assert_allclose(W @ Y, model.predict(XQ), rtol=1e-5)
    scores = uw.attribute(model, (X, Y), (XQ, YQ), method=sk.LeafInfluence())
    by_output = uw.attribute(
        model, (X, Y), (XQ, YQ), method=sk.LeafInfluence(), measure=uw.Logit(0)
    )
    slope = torch.from_numpy(model.predict(XQ) - YQ)[:, None]
    torch.testing.assert_close(scores.values, slope * by_output.values)
    by_hand = isinstance(model, HistGradientBoostingRegressor)
    step, rtol = (1e-2, 1e-3) if by_hand else (1e-5, 1e-6)
    for row in (0, 7, 20):
        ends = []
        for sign in (1, -1):
            w = np.ones(N)
            w[row] += sign * step
            ends.append(clone(model).fit(X, Y, sample_weight=w).predict(XQ))
        change = (ends[0] - ends[1]) / (2 * step)
        size = float(by_output.values.abs().max())
        np.testing.assert_allclose(by_output.values[:, row], change, atol=rtol * size)
    # With labels: the other half of the decomposition, by a refit to residuals of moved labels.
    if type(model) is GradientBoostingRegressor:
        moved = Y.copy()
        moved[7] += 1e-6
        change = (clone(model).fit(X, moved).predict(XQ) - model.predict(XQ)) / 1e-6
        np.testing.assert_allclose(W[:, 7], change, atol=1e-6)


BOOSTED = [
    (GradientBoostingClassifier(n_estimators=4, min_samples_leaf=12, random_state=0), 3),
    (GradientBoostingClassifier(n_estimators=4, min_samples_leaf=12, init="zero"), 2),
    (HistGradientBoostingClassifier(max_iter=4, min_samples_leaf=4, l2_regularization=0.5), 3),
    (HistGradientBoostingClassifier(max_iter=4, min_samples_leaf=4, class_weight={0: 2.0}), 2),
]


@pytest.mark.parametrize("model,classes", BOOSTED, ids=lambda x: getattr(x, "init", ""))
def test_leaf_influence_of_boosted_classifiers_is_that_of_refits_with_their_splits(model, classes):
    rows, values = DIABETES[0][:60], DIABETES[1][:60]
    labels = np.digitize(values, np.quantile(values, np.arange(1, classes) / classes))
    v = 1 + np.random.default_rng(0).random(60)  # so that no two splits are equally good
    model = clone(model).fit(rows, labels, sample_weight=v)
    for c in (0, classes - 1):
        scores = uw.attribute(
            model, (rows, labels, v), (XQ, np.zeros(len(XQ), int)), method=sk.LeafInfluence(),
            measure=uw.Logit(c),
        )  # fmt: skip
        in_float32 = isinstance(model, HistGradientBoostingClassifier)
        step, rtol = (3e-3, 5e-3) if in_float32 else (1e-5, 1e-6)
        size = float(scores.values.abs().max())
        assert size > 1e-3
        for row in (0, 7, 20):
            ends = []
            for sign in (1, -1):
                w = v.copy()
                w[row] *= 1 + sign * step
                again = clone(model).fit(rows, labels, sample_weight=w)
                ends.append(again.predict_proba(XQ)[:, c])
            change = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(scores.values[:, row], change, atol=rtol * size)
    with pytest.raises(UnsupportedModel, match=r"method=sk.LeafInfluence\(\)"):
        sk.leaf_weights(model, rows, labels, XQ)


def test_leaf_influence_of_bootstrapped_and_weighted_classifiers():
    forest = RandomForestClassifier(4, max_depth=2, random_state=1).fit(FLOWERS, NAMES)
    scores = uw.attribute(
        forest, (FLOWERS, NAMES), ASKED, method=sk.LeafInfluence(), measure=uw.Logit(1)
    )
    row, total = 11, np.zeros(len(ASKED[0]))
    is_second = (NAMES == "versicolor").to_numpy().astype(float)
    for tree, drawn in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        count = np.bincount(drawn, minlength=N).astype(float)
        own, asked = (tree.apply(each.to_numpy()) for each in (FLOWERS, ASKED[0]))

        def mean(extra, own=own, asked=asked, count=count):
            w = count.copy()
            w[row] *= 1 + extra
            same = (asked[:, None] == own) * w
            return same @ is_second / same.sum(axis=1)

        total += (mean(1e-5) - mean(-1e-5)) / 2e-5 / 4
    assert np.abs(total).max() > 1e-3
    np.testing.assert_allclose(scores.values[:, row], total, atol=1e-9)
    rows = sk.leaf_weights(forest, FLOWERS, NAMES, ASKED[0]).numpy()
    np.testing.assert_allclose(rows @ is_second, forest.predict_proba(ASKED[0])[:, 1])


def test_rounding_of_pure_leaves_is_no_ranking():
    forest = RandomForestClassifier(7, random_state=0).fit(FLOWERS, NAMES)
    asked = (FLOWERS[:3], NAMES[:3])
    with pytest.warns(AssumptionWarning, match="3 of 3 queries are rounding"):
        scores = uw.attribute(forest, (FLOWERS, NAMES), asked, method=sk.LeafInfluence())
    assert not scores.values.any()
    assert any("exactly 0" in note for note in scores.provenance.notes)


def test_only_private_names_of_another_scikit_learn_are_refused(monkeypatch):
    model = HistGradientBoostingRegressor(max_iter=2).fit(X, Y)
    with monkeypatch.context() as patch:
        owner = next(k for k in type(model).__mro__ if "_preprocess_X" in vars(k))
        patch.delattr(owner, "_preprocess_X")
        with pytest.raises(UnsupportedModel, match="_preprocess_X"):
            leaves._histogram_leaves(model, [X])
    monkeypatch.setattr(leaves, "_numbered", lambda column: column.missing)
    with pytest.raises(AttributeError, match="missing"):
        sk.leaf_weights(model, X, Y, XQ)


def test_neighbours_of_any_estimator_are_those_of_its_scaled_columns():
    model = HistGradientBoostingClassifier(max_iter=2).fit(FLOWERS, NAMES)
    scores = uw.attribute(model, (FLOWERS, NAMES), ASKED, method=uw.KNNShapley(3))
    scaler = StandardScaler().fit(FLOWERS)
    Z, A = scaler.transform(FLOWERS), scaler.transform(ASKED[0])
    near = np.argsort(((A[:, None] - Z) ** 2).sum(axis=2), axis=1)[:, :3]
    votes = NAMES.to_numpy()[near] == ASKED[1].to_numpy()[:, None]
    np.testing.assert_allclose(-scores.values.sum(dim=1), votes.mean(axis=1), atol=1e-12)
    assert scores.unit is uw.Unit.VALUE
    assert any("standard deviation" in note for note in scores.provenance.notes)


def test_scores_of_an_estimator_can_be_checked_by_its_own_fit():
    model = SVR(C=10.0).fit(X, Y)
    scores = uw.attribute(model, (X, Y), (XQ, YQ), measure=uw.Logit(0))
    found = uw.check(scores, scores.context.fitted.history, subsets=20)
    assert found.lds.spearman.value > 0.3 and float(found.drift.abs().max()) == 0.0


@functools.cache
def refused():
    tree = DecisionTreeClassifier(random_state=0).fit(FLOWERS, NAMES)
    data, other = (FLOWERS, NAMES), (FLOWERS, NAMES.sample(frac=1, random_state=0))
    rolled = (FLOWERS, np.roll(NAMES, 9))
    search = GridSearchCV(LogisticRegression(), {"C": [1.0]}).fit(FLOWERS, NAMES)
    one = NAMES.to_numpy().copy()
    one[0] = "rare"
    rare = SVC().fit(FLOWERS, one)
    boosted = HistGradientBoostingClassifier(max_iter=2).fit(FLOWERS, NAMES)
    drawn = GradientBoostingClassifier(n_estimators=2, subsample=0.5, random_state=0)
    drawn = drawn.fit(FLOWERS, NAMES)
    return [
        (tree, rolled, ASKED, {}, DataError, "give the model again"),
        (tree, other, ASKED, {}, DataError, "one order"),
        (tree, FLOWERS, ASKED, {}, SpecError, "sample_weight"),
        (tree, data, ASKED, {"method": uw.Influence()}, UnsupportedModel, "LeaveOneOut"),
        (tree, data, ASKED, {"measure": uw.Coefficient(0)}, SpecError, "number of each query"),
        (tree, data, ASKED, {"loss": uw.CrossEntropy()}, SpecError, "leave loss= out"),
        (tree, data, ASKED, {"recipe": uw.training.Newton()}, SpecError, "leave it out"),
        (tree, data, ASKED, {"budget": 1e-4}, SpecError, "KNNShapley"),
        (clone(tree), data, ASKED, {}, UnsupportedModel, "fit"),
        (search, data, ASKED, {}, UnsupportedModel, "best_estimator_"),
        (KMeans(2, n_init=1).fit(FLOWERS), data, ASKED, {}, UnsupportedModel, "follows it"),
        (StandardScaler().fit(FLOWERS), data, ASKED, {}, UnsupportedModel, "predict"),
        (drawn, data, ASKED, {"method": sk.LeafInfluence()}, UnsupportedModel, "means of"),
        (boosted, data, (ASKED[0], ["x"] * len(ASKED[1])), {}, DataError, "classes"),
        (rare, (FLOWERS, one), (ASKED[0], ASKED[1]), {}, NotConverged, "class is missing"),
        (SVR().fit(X, Y), (X, Y), XQ, {}, DataError, "Logit"),
        (boosted, data, (ASKED[0].iloc[:, :2], ASKED[1]), {}, DataError, "as they were given"),
        (boosted, data, (ASKED[0][:0], ASKED[1][:0]), {}, DataError, "one row or more"),
    ]


@pytest.mark.parametrize("case", range(18))
def test_refusals_name_what_can_be_done_instead(case):
    model, train, queries, options, error, words = refused()[case]
    with pytest.raises(error, match=f"(?s){words}"):
        uw.attribute(model, train, queries, **options)


def test_ways_out_of_refusals_work():
    search = GridSearchCV(LogisticRegression(), {"C": [1.0]}).fit(FLOWERS, NAMES)
    uw.attribute(search.best_estimator_, (FLOWERS, NAMES), ASKED)
    # A linear model with a translation is refitted where the method asks for it.
    line = LinearRegression().fit(X, Y)
    alone = uw.attribute(line, (X, Y), (XQ, YQ), method=uw.LeaveOneOut())
    exact = uw.Influence().fit(*sk.task(line, X, Y)).removal((XQ, YQ), evaluate="plugin")
    torch.testing.assert_close(alone.removal().values, exact.values)
    task, train = sk.task(line, X, Y)
    by_newton = uw.attribute(
        task, train, (XQ, YQ), method=uw.LeaveOneOut(), recipe=uw.training.Newton()
    )
    torch.testing.assert_close(by_newton.values, alone.values)
    with pytest.raises(SpecError, match="recipe=recipe"):
        uw.attribute(task, train, (XQ, YQ), method=uw.LeaveOneOut())
    plan = uw.plan(SVR().fit(X, Y), (X, Y), (XQ, YQ))
    assert "31 fits" in str(plan)


MLPS = [
    (
        MLPClassifier((4, 3), activation="tanh", solver="lbfgs", alpha=0.1, max_iter=2000),
        NAMES,
    ),
    (MLPClassifier((4,), activation="logistic", batch_size=10, max_iter=20), NAMES == "setosa"),
    (
        MLPRegressor(hidden_layer_sizes=(4,), activation="tanh", solver="lbfgs", max_iter=2000),
        FLOWERS.to_numpy()[:, 0],
    ),
]


@pytest.mark.parametrize("case", range(3))
def test_networks_of_scikit_learn_are_tasks(case):
    unfitted, y = MLPS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = clone(unfitted).set_params(random_state=0).fit(FLOWERS, y)
    task, train = sk.task(model, FLOWERS, y)
    f = task.outputs(task.theta(), train.batch(0, N))[0].detach()
    if isinstance(model, MLPRegressor):
        np.testing.assert_allclose(f[:, 0], model.predict(FLOWERS), atol=1e-12)
    else:
        p = torch.softmax(f, dim=1) if f.shape[1] > 1 else torch.sigmoid(f)
        expected = model.predict_proba(FLOWERS)[:, -f.shape[1] :]
        np.testing.assert_allclose(p, expected, atol=1e-12)
    # Penalty and 1/n: sklearn's own gradient of its own objective, on a batch of B of the n.
    B = 10 if model.batch_size == 10 else N
    weight = sum(float((W**2).sum()) for W in model.coefs_)
    assert float(task.penalty(task.named(task.theta()), task.layout)) == pytest.approx(
        model.alpha / (2 * B) * weight
    )
    if model.solver == "lbfgs":
        ones = torch.ones(N, dtype=torch.float64)
        J = float(task.objective(task.theta(), train.batch(0, N), ones))
        assert J == pytest.approx(model.loss_, rel=1e-9)
        with pytest.raises(DataError, match="trained on"):
            sk.task(model, FLOWERS, np.roll(y, 9))
    scores = uw.attribute(model, (FLOWERS, y), (FLOWERS[:2], y[:2]))
    assert "GGN" in scores.provenance.method
    assert any("‖∇J‖" in note for note in scores.provenance.notes)
    again = sk.recipe(model).prepare(task, train)(torch.ones(1, N, dtype=torch.float64))
    torch.testing.assert_close(again.theta[0], task.theta(), rtol=1e-6, atol=1e-8)
    moved = task.theta() + 1.0
    changed = sk.with_parameters(model, task.named(moved))
    torch.testing.assert_close(
        sk.networks.network(changed)[0].weight, task.named(moved)["0.weight"]
    )
    early = clone(unfitted).set_params(solver="adam", early_stopping=True)
    assert "early_stopping=False" in sk.supports(early).reason


def test_flagged_labels_are_the_off_diagonal_of_the_confident_joint():
    wrong = NAMES.copy()
    changed = [2, 28]
    wrong.iloc[changed] = ["virginica", "setosa"]
    model = make_pipeline(StandardScaler(), RandomForestClassifier(10, random_state=0))
    found = flagged_labels(model.fit(FLOWERS, wrong), (FLOWERS, wrong))
    assert set(changed) <= set(found.flagged) and len(found.flagged) < 8
    assert {i: found.proposed()[i] for i in changed} == NAMES.iloc[changed].set_axis(
        changed
    ).to_dict()
    # By hand, from the definition.
    p, classes = found.probabilities.numpy(), model.classes_.tolist()
    y = np.array([classes.index(each) for each in wrong])
    t = [p[y == c, c].mean() for c in range(3)]
    rows = []
    for i in range(N):
        above = [c for c in range(3) if p[i, c] >= t[c]]
        if above and max(above, key=lambda c: p[i, c]) != y[i]:
            rows.append(i)
    assert sorted(found.flagged) == rows
    # No probability is of a fit that saw the row: a model that knows its rows by heart is no judge.
    known = DecisionTreeClassifier(random_state=0).fit(FLOWERS, wrong)
    assert set(changed) & set(flagged_labels(known, (FLOWERS, wrong)).flagged)
    frame = found.frame()
    assert frame["flagged"].sum() == len(rows) and frame.index[0] == found.flagged[0]
    assert frame.loc[2, "proposed"] == "setosa" and not found.is_confirmed
    with pytest.raises(UnsupportedModel, match="CalibratedClassifierCV"):
        flagged_labels(SVC().fit(FLOWERS, wrong), (FLOWERS, wrong))
    with pytest.raises(DataError, match="folds=4"):
        flagged_labels(known, (FLOWERS[:23], wrong[:23]))
    assert len(flagged_labels(known, (FLOWERS[:23], wrong[:23]), folds=4)) == 23


def test_other_verbs_refuse_with_what_can_be_done():
    tree = DecisionTreeClassifier(random_state=0).fit(FLOWERS, NAMES)
    with pytest.raises(UnsupportedModel, match=r"(?s)uw\.attribute\(.*flagged_labels"):
        suspects(tree, (FLOWERS, NAMES))
    network = MLPRegressor(hidden_layer_sizes=(2,), solver="lbfgs", max_iter=500).fit(X, Y)
    with pytest.raises(UnsupportedModel, match="minimum of a convex"):
        sk.task(network, X, Y, minimize=True)


def test_a_pipeline_of_one_step_is_weighed_by_the_name_of_its_step():
    X, y, weight = FLOWERS[::3], NAMES[::3], np.linspace(1, 2, len(NAMES[::3]))
    model = make_pipeline(DecisionTreeClassifier(max_depth=2, random_state=0))
    model.fit(X, y, decisiontreeclassifier__sample_weight=weight)
    found = sk.outputs(model, (X, y, weight), (X[:2], y[:2]))
    scores = uw.LeaveOneOut().fit(found.task, found.train, history=found.recipe)
    values = scores.attribute(found.queries).values
    without = clone(model).fit(X[1:], y[1:], decisiontreeclassifier__sample_weight=weight[1:])
    before, after = (-np.log(m.predict_proba(X[:1])[0, 0]) for m in (model, without))
    assert y[0] == model.classes_[0]
    assert float(values[0, 0]) == pytest.approx(before - after, abs=1e-9)


def test_what_chose_its_penalty_says_which_model_needs_no_refits(monkeypatch, capsys):
    from upweight.adapters.sklearn_outputs import Outputs

    monkeypatch.setattr(Outputs, "tried", lambda self: (0.04, 0.0, 0.0))
    uw.attribute(RidgeCV().fit(X, Y), (X, Y), (XQ, YQ), budget="1.2 s")
    assert "refit Ridge with the value it chose (C_ or alpha_)" in capsys.readouterr().err


def test_training_without_a_seed_is_not_repeated():
    X = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    task = uw.Task(torch.nn.Linear(1, 1).double(), uw.SquaredError(), uw.L2(0.1))
    recipe = uw.training.Newton()
    fitted = uw.LeaveOneOut(seeds=3).fit(task, (X, X), history=recipe)
    scores = fitted.attribute((X[:2], X[:2]))
    assert scores.provenance.health["trainings"] == 7
    assert scores.error is None  # of equal trainings there is none


def test_a_forest_too_slow_for_halves_is_asked_by_fewer_of_its_trees(monkeypatch, capsys):
    """The same halves as of a forest of that many trees; the check has the whole one."""
    from upweight.adapters.sklearn_outputs import EstimatorRefit, Outputs

    X, y = load_iris(return_X_y=True)
    X, y = X[::3], y[::3]
    model = RandomForestClassifier(20, random_state=0).fit(X, y)
    monkeypatch.setattr(Outputs, "tried", lambda self: (1.0, 0.1, 0.0))  # as on a slow machine
    monkeypatch.setattr(EstimatorRefit, "timed", lambda self: 0.025)
    scores = uw.attribute(model, (X, y), (X[:4], y[:4]), budget="1 s")
    line = capsys.readouterr().err
    assert "each by 1 of its 20 trees" in line and "with all trees budget='2 min'" in line
    assert any("expectation is the same" in note for note in scores.provenance.notes)
    halves = scores.provenance.health["trainings"]
    assert halves == 40 and scores.error is not None and scores.recipe.trees == 20
    small = RandomForestClassifier(1, random_state=0).fit(X, y)
    again = uw.attribute(small, (X, y), (X[:4], y[:4]), method=uw.SubsampledInfluence(halves))
    torch.testing.assert_close(again.values, scores.values, rtol=0, atol=0)
    with pytest.raises(SpecError, match="must allow 30 refits"):
        uw.attribute(model, (X, y), (X[:4], y[:4]), budget=1e-3)
