"""The task of an estimator reads rows and labels as the estimator does, or refuses them."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy import sparse
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    PolynomialFeatures,
    StandardScaler,
)
from sklearn.svm import LinearSVC
from torch.testing import assert_close

import upweight as uw
import upweight.adapters.sklearn as sk
from upweight import report
from upweight.cli.main import cli
from upweight.errors import DataError, ShapeError, UnsupportedModel
from upweight.task.data import as_data

TIGHT = {"tol": 1e-10, "max_iter": 20_000}
IRIS = load_iris(as_frame=True)
FRAME = IRIS.data.set_axis(["a", "b", "c", "d"], axis=1).assign(
    shop=np.where(np.arange(150) % 3 == 0, "north", "south")
)
NAMES = IRIS.target_names[IRIS.target.to_numpy()]
TRAIN, TEST = slice(None, None, 2), slice(1, None, 9)
NUMBERS = list("abcd")


def one_hot():
    return ColumnTransformer(
        [("n", StandardScaler(), NUMBERS), ("c", OneHotEncoder(sparse_output=False), ["shop"])]
    )


def raw(kind, rows):
    """X and y of a case as a user holds them."""
    frame, names = FRAME[rows], NAMES[rows]
    if kind == "columns":
        return frame, names
    if kind == "arrays":
        return frame[NUMBERS].to_numpy(), names
    if kind in ("numbers", "poisson", "two targets"):
        y = frame[["c", "d"]].to_numpy()
        return frame[["a", "b"]], y if kind == "two targets" else np.round(3 * y[:, 0])
    if kind in ("bool", "signs", "one or two"):
        y = names == "virginica"
        return frame[NUMBERS], y if kind == "bool" else 2 * y - 1 if kind == "signs" else y + 1
    return frame[NUMBERS], list(names) if kind == "list" else pd.Series(names, index=frame.index)


LOGISTIC = LogisticRegression(solver="newton-cg", **TIGHT)
CASES = {
    "series": make_pipeline(StandardScaler(), LOGISTIC),
    "list": make_pipeline(StandardScaler(), LOGISTIC),
    "arrays": make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False), LOGISTIC),
    "columns": make_pipeline(one_hot(), LOGISTIC),
    "bool": make_pipeline(StandardScaler(), LogisticRegression(fit_intercept=False, **TIGHT)),
    "signs": make_pipeline(StandardScaler(), RidgeClassifier()),
    "one or two": make_pipeline(StandardScaler(), LinearSVC(**TIGHT)),
    "numbers": make_pipeline(StandardScaler(), Ridge()),
    "poisson": make_pipeline(StandardScaler(), PoissonRegressor(**TIGHT)),
    "two targets": make_pipeline(StandardScaler(), Ridge()),
}


@functools.cache
def made(kind):
    pipe = clone(CASES[kind]).fit(*raw(kind, TRAIN))
    task, train = sk.task(pipe, *raw(kind, TRAIN))
    return pipe, task, train, uw.Influence(solver=uw.solvers.Cholesky()).fit(task, train)


@pytest.mark.parametrize("kind", CASES)
def test_rows_and_labels_are_read_as_the_estimator_reads_them(kind):
    pipe, task, train, fitted = made(kind)
    X, y = raw(kind, TEST)
    expected = fitted.attribute(sk.data(pipe, X, y))
    assert torch.equal(fitted.attribute((X, y)).values, expected.values)
    assert torch.equal(fitted.removal((X, y)).values, fitted.removal(sk.data(pipe, X, y)).values)
    again = uw.Influence(solver=uw.solvers.Cholesky()).fit(task, raw(kind, TRAIN))
    assert again.train.arrays is train.arrays  # the fit keeps watch over them
    # By hand: a plain task on features that the steps made, with targets as the loss takes them.
    Z = torch.from_numpy(pipe[:-1].transform(X))
    targets = sk.data(pipe, X, y).take(range(len(X)))[1]
    plain = uw.Task(task.model, task.loss, task.penalty)
    arrays = train.take(range(len(train)))
    by_hand = uw.Influence(solver=uw.solvers.Cholesky()).fit(plain, arrays).attribute((Z, targets))
    assert_close(by_hand.values, expected.values, rtol=1e-10, atol=1e-14)


def test_iris_equals_a_pipeline_written_in_torch():
    (X, y), (X_test, y_test) = raw("series", TRAIN), raw("series", TEST)
    pipe, _, _, fitted = made("series")
    mean, scale = X.to_numpy().mean(axis=0), X.to_numpy().std(axis=0)
    features, test = (torch.from_numpy((v.to_numpy() - mean) / scale) for v in (X, X_test))
    classes = sorted(set(NAMES))
    index, asked = (torch.tensor([classes.index(v) for v in w]) for w in (y, y_test))
    model = torch.nn.Linear(4, 3, dtype=torch.float64).eval()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(pipe[-1].coef_))
        model.bias.copy_(torch.from_numpy(pipe[-1].intercept_))
    penalty = uw.L2(1 / len(X), exclude=("bias",)) + uw.SumToZero("bias")
    task = uw.Task(model, uw.CrossEntropy(), penalty)
    expected = uw.Influence(solver=uw.solvers.Cholesky()).fit(task, (features, index))
    assert_close(
        fitted.attribute((X_test, y_test)).values,
        expected.attribute((test, asked)).values,
        rtol=1e-10,
        atol=1e-14,
    )


def test_every_way_to_ask_reads_alike(tmp_path):
    pipe, task, train, fitted = made("series")
    given, translated = raw("series", TEST), sk.data(pipe, *raw("series", TEST))
    for ask in (
        lambda queries: uw.Influence(uw.EKFAC()).fit(task, train).attribute(queries).values,
        lambda queries: fitted.input_influence(3, queries),
        lambda queries: fitted.relabel_influence(3, "virginica", queries),
        lambda queries: (
            uw.evaluation.loo(fitted.attribute(queries), sk.recipe(pipe), range(2)).actual
        ),
        lambda queries: (
            uw.evaluation.leave_one_out(
                uw.training.Newton(), task, raw("series", TRAIN), range(2), queries
            ).values
        ),
    ):
        assert torch.equal(ask(given), ask(translated))
    scores = fitted.attribute(given)
    pages = [
        report.html(scores, tmp_path / f"{k}.html", report.Display(*data)).read_text()
        for k, data in enumerate([(raw("series", TRAIN), given), (train, translated)])
    ]
    assert pages[0] == pages[1]


def test_a_label_is_given_as_the_estimator_knows_it_with_its_class_weight():
    X, y = raw("series", TRAIN)
    weights = {"setosa": 2.0, "versicolor": 1.0, "virginica": 0.5}
    estimator = LogisticRegression(solver="newton-cg", class_weight=weights, **TIGHT)
    pipe = make_pipeline(StandardScaler(), estimator).fit(X, y)
    task, train = sk.task(pipe, X, y)
    fitted = uw.Influence(solver=uw.solvers.Cholesky()).fit(task, (X, y))
    # With the class weights of the objective, which queries have not.
    assert fitted.train.arrays is train.arrays
    queries = raw("series", TEST)
    assert torch.equal(
        fitted.attribute(queries).values, fitted.attribute(sk.data(pipe, *queries)).values
    )
    found = fitted.relabel_influence(40, "setosa", queries)
    # To first order: the row with its old label fades out as one with the new label comes in.
    assert y.iloc[40] == "versicolor"
    both = pd.concat([X, X.iloc[[40]]], ignore_index=True)
    labels, step = [*y, "setosa"], 1e-4
    losses = []
    for sign in (-1, 1):
        v = np.ones(len(both))
        v[40], v[-1] = 1 - sign * step, sign * step
        v += np.array([0.0] * len(X) + [step])  # no negative weights: centred at `step`
        v[40] -= step
        again = make_pipeline(pipe[0], LogisticRegression(**estimator.get_params()))
        again[-1].fit(pipe[0].transform(both), labels, sample_weight=v)
        p = again[-1].predict_log_proba(pipe[0].transform(queries[0]))
        classes = list(again[-1].classes_)
        losses.append([-row[classes.index(name)] for row, name in zip(p, queries[1], strict=True)])
    slope = (np.array(losses[1]) - np.array(losses[0])) / (2 * step)
    np.testing.assert_allclose(found.numpy(), slope, rtol=2e-3, atol=1e-7)
    with pytest.raises(DataError, match="classes"):
        fitted.relabel_influence(0, 1, queries)
    with pytest.raises(DataError, match="classes"):
        fitted.relabel_influence(0, ["setosa", "virginica"], queries)


def test_labels_of_signs_are_not_taken_as_encoded_ones():
    """Classes 1 and 2 are encoded as −1 and 1: label 1 is the former."""
    _, _, _, fitted = made("one or two")
    queries = raw("one or two", TEST)
    y = raw("one or two", TRAIN)[1]
    same = int(np.flatnonzero(y == 1)[0])
    assert bool((fitted.relabel_influence(same, 1, queries) == 0).all())
    assert bool((fitted.relabel_influence(same, 2, queries) != 0).any())


def test_queries_without_labels_take_the_predicted_class():
    pipe, _, _, fitted = made("columns")
    X = FRAME[TEST]
    expected = fitted.attribute((X, pipe.predict(X)), uw.Margin())
    for given in (X, (X,), sk.data(pipe, X)):
        scores = fitted.attribute(given, uw.Margin())
        assert torch.equal(scores.values, expected.values)
        assert any("the class that the estimator predicts" in v for v in scores.provenance.notes)
    assert not any("predicts" in note for note in expected.provenance.notes)


def test_a_number_that_is_an_id_is_answered_with_its_place():
    X, y = raw("columns", TEST)
    X = X.set_axis(np.arange(1000, 1000 + len(X)))
    scores = made("columns")[3].attribute((X, pd.Series(y, X.index)))
    assert "query 2: 1002" in str(scores.top(1, 2))
    with pytest.raises(ShapeError, match=r"its id in the index(.|\n)*query=2"):
        scores.top(1, 1002)
    with pytest.raises(ShapeError, match="one of the"):
        scores.top(1, 999)


def test_one_row_is_refused_with_the_way_to_give_it_as_rows():
    _, _, _, fitted = made("columns")
    X = FRAME[TEST]
    expected = fitted.attribute(X.iloc[[3]]).values
    row = X.iloc[3].to_dict()
    for given, way_out, rows in (
        (X.iloc[3], r"X\.iloc\[\[3\]\]", X.iloc[[3]]),
        (row, r"DataFrame\(\[row\]\)", pd.DataFrame([row])),
        ("a text", r"\[text\]", None),
    ):
        with pytest.raises(DataError, match=rf"one row in place of several(.|\n)*{way_out}"):
            fitted.attribute(given)
        if rows is not None:
            assert torch.equal(fitted.attribute(rows).values, expected)
    _, _, _, fitted = made("arrays")
    X, _ = raw("arrays", TEST)
    with pytest.raises(DataError, match=r"X\[3:4\]"):
        fitted.attribute(X[3])


def test_a_regression_needs_targets_and_says_how_to_do_without():
    _, _, _, fitted = made("numbers")
    X, _ = raw("numbers", TEST)
    with pytest.raises(DataError, match=r"Logit\(0\)"):
        fitted.attribute(X)
    zeros, ones = (
        fitted.attribute((X, np.full(len(X), v)), uw.Logit(0)).values for v in (0.0, 1.0)
    )
    assert torch.equal(zeros, ones)


def test_single_class_and_boolean_queries_keep_their_class():
    _, _, _, fitted = made("bool")
    X, y = raw("bool", TRAIN)
    whole = fitted.attribute((X, y)).values
    for kept in (y, ~y):
        assert_close(fitted.attribute((X[kept], y[kept])).values, whole[torch.from_numpy(kept)])


def test_other_dtypes_of_a_frame_are_the_same_rows():
    X = (FRAME[NUMBERS] * 10).round()
    pipe = make_pipeline(StandardScaler(), clone(LOGISTIC)).fit(X, NAMES)
    fitted = uw.Influence().fit(*sk.task(pipe, X, NAMES))
    expected = fitted.attribute((X[:5], NAMES[:5])).values
    for other in (X.astype("int32"), X.astype("Int64"), X.astype(object)):
        assert torch.equal(fitted.attribute((other[:5], NAMES[:5])).values, expected)
    single = X.astype("float32")  # as scikit-learn scales it, in single precision
    assert_close(fitted.attribute((single[:5], NAMES[:5])).values, expected, rtol=1e-4, atol=1e-7)
    labels = pd.Series(NAMES, dtype="category")
    assert torch.equal(fitted.attribute((X[:5], labels[:5])).values, expected)


def test_what_may_be_features_is_refused():
    pipe, task, _, fitted = made("series")
    X, y = raw("series", TEST)
    Z, targets = sk.data(pipe, X, y).arrays
    for given, match in (
        ((Z, targets), "before or after"),
        ((Z, y), "before or after"),
        (as_data((Z, targets)), "as it was"),
        (torch.utils.data.TensorDataset(Z, targets), "as they were given"),
        ({"x": X.to_numpy(), "y": targets}, "as they were given"),
        ((X, y, np.ones(len(y))), "sample_weight"),
        ((), "as they were given"),
    ):
        with pytest.raises(DataError, match=match):
            fitted.attribute(given)
        with pytest.raises(DataError):
            uw.Influence().fit(task, given)
    # The width of features is not that of rows.
    wide, _, _, wide_fitted = made("arrays")
    X, y = raw("arrays", TEST)
    with pytest.raises(DataError, match="14 is its width after the steps"):
        wide_fitted.attribute((wide[:-1].transform(X), y))


def test_data_of_another_model_or_of_a_part_are_refused():
    pipe, task, _, fitted = made("series")
    X, y = raw("series", TRAIN)
    other = make_pipeline(StandardScaler(), LogisticRegression(C=3.0)).fit(X, y)
    for made_by, rows in ((other, X), (pipe[-1], pipe[:-1].transform(X))):
        with pytest.raises(DataError, match="same fitted model"):
            fitted.attribute(sk.data(made_by, rows[:5], y[:5]))
    with pytest.raises(DataError, match="not the 75"):
        uw.Influence().fit(task, (X[::-1], y[::-1]))
    with pytest.raises(DataError, match="need their labels"):
        uw.Influence().fit(task, X)


def test_a_pipeline_that_is_fitted_again_does_not_change_its_task():
    X, y = raw("series", TRAIN)
    queries = raw("series", TEST)
    pipe = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT)).fit(X, y)
    fitted = uw.Influence().fit(*sk.task(pipe, X, y))
    expected = fitted.attribute(queries).values
    pipe[0].fit(2 * X)
    assert torch.equal(fitted.attribute(queries).values, expected)
    with pytest.raises(DataError, match="fitted again since"):
        fitted.attribute(sk.data(pipe, *queries))


def test_columns_and_rows_in_another_order_are_refused():
    _, _, _, fitted = made("series")
    X, y = raw("series", TEST)
    with pytest.raises(DataError, match="in their order"):
        fitted.attribute((X[X.columns[::-1]], y))
    with pytest.raises(DataError, match=r"y\.loc\[X\.index\]"):
        fitted.attribute((X, y[::-1]))
    assert torch.equal(
        fitted.attribute((X, y[::-1].loc[X.index])).values, fitted.attribute((X, y)).values
    )
    # A function does not look at names; a ColumnTransformer goes by them.
    logs = make_pipeline(FunctionTransformer(np.log1p), LogisticRegression(**TIGHT))
    logs.fit(FRAME[NUMBERS], NAMES)
    with pytest.raises(DataError, match="feature_names_in_"):
        sk.data(logs, X[X.columns[::-1]], y)
    sk.data(logs, X[X.columns[::-1]][logs.feature_names_in_], y)
    _, _, _, by_name = made("columns")
    X, y = raw("columns", TEST)
    assert torch.equal(
        by_name.attribute((X[X.columns[::-1]], y)).values, by_name.attribute((X, y)).values
    )


def test_other_refusals_reach_raw_rows_too():
    _, _, _, fitted = made("arrays")
    X, y = raw("arrays", TEST)
    with pytest.raises(DataError, match=r"such as \[1, 1"):
        fitted.attribute((X, np.where(y == "setosa", 1, 0)))
    with pytest.raises(ShapeError, match="same number"):
        fitted.attribute((X, y[1:]))
    with pytest.raises(DataError, match=r"a single row(.|\n)*X\[None\]"):
        fitted.attribute((X[0], y[0]))
    fitted.attribute((X[0][None], y[:1]))
    X, y = raw("series", TEST)
    with pytest.raises(DataError, match=r"sample_weight\.loc\[X\.index\]"):
        sk.data(made("series")[0], X, y, pd.Series(np.ones(len(X)), X.index[::-1]))
    sparse_estimator = LogisticRegression(**TIGHT).fit(X, y)
    task, train = sk.task(sparse_estimator, X, y)
    fitted = uw.Influence().fit(task, train)
    expected = fitted.attribute((X, y)).values
    assert_close(fitted.attribute((sparse.csr_matrix(X), y)).values, expected)


def test_texts_are_named_by_what_they_say():
    texts = [f"{kind} number {i}" for i in range(12) for kind in ("apple", "pear")]
    kinds = ["apple", "pear"] * 12
    pipe = make_pipeline(TfidfVectorizer(), LogisticRegression(**TIGHT)).fit(texts, kinds)
    scores = uw.attribute(pipe, (texts, kinds), texts[1:3])  # a list of two texts is X alone
    assert len(scores) == 2 and "“pear number" in str(scores.top(2, 0))
    address = "https://" + "a" * 80
    of_one = uw.attribute(pipe, (texts, kinds), [f"{address} apple number 3"])
    assert f"“{address[:59]}…”" in str(of_one.top(2, 0)), "a first word longer than what is shown"
    assert set(scores.table(0, 2)["text"]) <= set(texts)
    named = pd.Series(texts, [f"t{i}" for i in range(24)])
    asked = uw.attribute(pipe, (named, kinds), named[1:3])
    assert_close(asked.values, scores.values)
    assert "t1" in str(asked.top(1, 0))


def test_models_of_other_libraries_are_told_apart():
    pipe = made("series")[0]
    data = raw("series", TRAIN)
    for wrong in (
        lambda: uw.Task(pipe, uw.CrossEntropy()),
        lambda: uw.Influence().fit(pipe, data),
        lambda: uw.training.retrain(sk.recipe(pipe), pipe, data, torch.ones(1, 75), data),
        lambda: uw.evaluation.leave_one_out(sk.recipe(pipe), pipe, data, [0], data),
    ):
        with pytest.raises(UnsupportedModel, match=r"sk\.task\(estimator, X, y\)"):
            wrong()
    with pytest.raises(UnsupportedModel, match=r"Task\(model, loss\)"):
        uw.Task(len, uw.CrossEntropy())
    with pytest.raises(UnsupportedModel, match=r"(?s)tuple of Task and .*task, train = sk\.task"):
        uw.Influence().fit(sk.task(pipe, *data), data)


PROJECT = """
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
import upweight.adapters.sklearn as sk

data = load_iris(as_frame=True)
X, y = data.data, data.target_names[data.target.to_numpy()]
pipe = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=1000)).fit(X, y)
task, made = sk.task(pipe, X, y)
rows, some = (X, y), (X[::30], y[::30])
translated = sk.data(pipe, *some)
unlabeled = X[::30]
"""


def test_the_command_line_reads_rows_too(tmp_path, monkeypatch):
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    found = {}
    for train, queries in (("made", "translated"), ("rows", "some"), ("rows", "unlabeled")):
        asked = ["project.py:task", "--train", f"project.py:{train}"]
        asked += ["--queries", f"project.py:{queries}", "--method", "Influence()"]
        result = CliRunner().invoke(cli, ["attribute", *asked, "--out", queries])
        assert result.exit_code == 0, result.output
        found[queries] = uw.Scores.load(tmp_path / queries / "scores")
    assert torch.equal(found["some"].values, found["translated"].values)
    assert any("estimator predicts" in note for note in found["unlabeled"].provenance.notes)
    result = CliRunner().invoke(cli, ["doctor", *asked[:2], "project.py:rows"])
    assert result.exit_code == 0, result.output
