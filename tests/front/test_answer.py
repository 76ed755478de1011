"""What attribute returns: names of rows, features and classes, and the verbs of a first look."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.front.test_attribute import SMOOTH, TRAIN, N, X, Y, network, trained
from upweight.applications.debugging import explain_error
from upweight.errors import DataError, ShapeError, SpecError, UnsupportedModel
from upweight.front.answer import Attribution
from upweight.report import Display, html
from upweight.task.rows import class_names
from upweight.verdict import Verdict

pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def made():
    """A pipeline on a frame with ids, names and units; two labels are wrong."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    pipeline = pytest.importorskip("sklearn.pipeline")
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    frame = pd.DataFrame(
        100 * X[:, :2].numpy() + 7,
        columns=["age", "weight"],
        index=[f"patient-{900 + 3 * i}" for i in range(N)],
    )
    true = frame["age"] > 7
    labels = pd.Series(np.where(true, "sick", "well"), index=frame.index)
    wrong = [f"patient-{900 + 3 * i}" for i in frame["age"].abs().to_numpy().argsort()[-2:]]
    for name in wrong:
        labels[name] = "well" if labels[name] == "sick" else "sick"
    model = pipeline.make_pipeline(scaler, linear_model.LogisticRegression(tol=1e-10))
    model.fit(frame, labels)
    return frame, labels, wrong, uw.attribute(model, (frame, labels), frame.iloc[[5, 2, 9]])


def test_a_page_of_rows_with_missing_values_says_which_are(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    impute = pytest.importorskip("sklearn.impute")
    pipeline = pytest.importorskip("sklearn.pipeline")
    frame = pd.DataFrame(X[:, :2].numpy(), columns=["age", "income"])
    labels = np.where(frame["age"] > 0.3 * frame["income"], "sick", "well")
    frame.loc[::4, "income"] = np.nan
    model = pipeline.make_pipeline(
        impute.SimpleImputer(), linear_model.LogisticRegression(tol=1e-8)
    )
    scores = uw.attribute(model.fit(frame, labels), (frame, labels), frame[:4])
    page = scores.report(tmp_path / "page.html").read_text()
    assert '["income","missing"]' in page and '["age","' in page


def test_names_of_a_frame_are_in_every_answer(made, tmp_path):
    frame, labels, _, scores = made
    assert isinstance(scores, Attribution) and len(repr(scores).splitlines()) == 5
    best = scores.values.abs().argmax().item() % N
    assert f"training example {frame.index[best]} ({labels.iloc[best]}) on query" in repr(scores)
    top = scores.top(3, "patient-906")
    assert top == scores.top(3, 1) and "query 1: patient-906" in str(top)
    assert torch.equal(scores["patient-906"], scores[1]) and len(list(scores)) == 3
    table = scores.table("patient-906", k=3)
    assert list(table.index) == [frame.index[i] for i in (*top.raises, *top.lowers)]
    assert list(table["label"]) == list(labels[table.index])
    # In the user's units, not those of the scaler.
    assert table[["age", "weight"]].equals(frame.loc[table.index].rename_axis("example"))
    matrix = scores.to_pandas()
    assert list(matrix.index) == list(frame.index[[5, 2, 9]])
    assert list(matrix.columns) == list(frame.index)
    page = html(scores, tmp_path / "page.html").read_text()
    assert '"features":["age","weight"]' in page and '"name":"patient-906"' in page
    assert all(f'"name":"{name}"' in page for name in table.index)
    assert f"{frame.iloc[2, 0]:.6g}"[:6] in page and '"label":"sick"' in page
    # Names that are said are those of labels and predictions alike.
    said = html(scores, tmp_path / "page.html", Display(names=["ill", "fit"])).read_text()
    assert '"label":"ill"' in said and '"sick"' not in said
    with pytest.raises(ShapeError, match="the nearest id is 'patient-915'"):
        scores.top(3, "patient-1")


def test_ids_stand_for_places_and_a_time_for_a_budget(made):
    frame, labels, wrong, scores = made
    assert torch.equal(scores.predict(drop=wrong), scores.predict(drop=frame.index.isin(wrong)))
    assert torch.equal(
        scores.predict(drop=wrong[0]), -scores.values[:, frame.index == wrong[0]].T[0]
    )
    groups = scores.group(list(labels))
    both = scores.removal([wrong, wrong[0]])
    assert torch.equal(both.values[:, 0], scores.predict(drop=wrong))
    assert torch.equal(both.values[:, 1], scores.predict(drop=wrong[0]))
    ours = scores.context.fitted.removal(frame.iloc[[5]], groups=[wrong])
    assert ours.groups == (tuple(frame.index.get_indexer(wrong)),)
    with pytest.raises(ShapeError, match="nearest id"):
        scores.removal([f"{wrong[0]}0"])
    assert torch.equal(groups.predict(drop=["sick"]), -groups.values[:, 0])
    with pytest.raises(ShapeError, match=f"nearest id is '{wrong[0]}'"):
        scores.predict(drop=[f"{wrong[0]}0"])
    # Of an index of numbers, shuffled or cut, a number could be an id or a place.
    model = scores.model
    numbered = frame.set_axis(range(N, 0, -1)), labels.set_axis(range(N, 0, -1))
    asked = uw.attribute(model, numbered, frame.iloc[[5]])
    for drop in ([15, 2], 15, numbered[0].index[:2]):
        with pytest.raises(ShapeError, match=r"drop=X\.index\.isin\(\[") as found:
            asked.predict(drop=drop)
        assert "drop=torch.tensor([" in str(found.value)
    places = torch.tensor([N - 15, N - 2])
    mask = numbered[0].index.isin([15, 2])
    assert torch.equal(asked.predict(drop=mask), asked.predict(drop=places))
    with pytest.raises(ShapeError) as found:
        asked.predict(drop=["15"])
    assert "nearest" not in str(found.value)
    asked = uw.attribute(model, (frame, labels), (frame.loc[wrong], labels[wrong]))
    assert explain_error(asked, wrong[1]).query == 1
    assert asked.check("1 s").budget == 1
    with pytest.raises(SpecError, match="A budget is a time"):
        asked.check("soon")
    with pytest.raises(SpecError, match="A recipe says how"):
        asked.check(5)
    with pytest.raises(DataError, match="one for each row"):
        uw.attribute(model, (frame, labels), (frame[:1], labels.iloc[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a few rows have another minimum, which says nothing
        uw.plan(model, (frame, labels), (frame, labels))


def test_data_keep_the_names_they_came_with():
    frame = pd.DataFrame({"a": [3.0, 1.0, 2.0]}, index=["x", "y", "z"])
    data = uw.as_data((frame, np.array([0, 1, 1])))
    frame.index, frame.columns = ["u", "v", "w"], ["b"]
    assert data.given.ids == ("x", "y", "z") and data.given.pairs(1) == {"a": 1.0}
    part = data.subset([2, 0]).given
    assert part.ids == ("z", "x")
    assert uw.as_data((np.ones((3, 1)), np.arange(3))).given is None


def test_suspects_self_influence_check_and_report(made, tmp_path):
    _, _, wrong, scores = made
    suspects = scores.suspects()
    frame = suspects.frame()
    flagged = frame[frame["suspected"]]
    assert set(wrong) <= set(flagged["id"]) and (flagged["suspicion"] > 0).all()
    assert (flagged["label"] != flagged["proposed"]).all() and wrong[0] in repr(suspects)
    own = scores.self_influence()
    assert float(own.values.min()) >= 0 and set(own.top(2).index) == set(wrong)
    assert wrong[0] in repr(own).splitlines()[1] + repr(own).splitlines()[2]
    found = scores.check(subsets=9)
    assert found.verdict is not Verdict.DOUBT and str(found.verdict) in repr(scores)
    page = scores.report(tmp_path / "page.html").read_text()
    assert found.verdict.value in page
    for answer in (scores, scores.top(), suspects, own, found, scores.context.fitted):
        card = answer._repr_html_()
        assert card.startswith("<div") and "<script" not in card
        assert len(repr(answer)) < 4000 and "tensor(" not in repr(answer)


def test_rows_of_results_have_the_names_of_their_frame():
    smf = pytest.importorskip("statsmodels.formula.api")
    frame = pd.DataFrame({"y": X[:, 0].numpy(), "x": np.exp(X[:, 1].numpy()), "other": 1.0})
    frame.index = [f"state {i}" for i in range(N)]
    frame.loc["state 3", "x"] = np.nan
    scores = uw.attribute(smf.ols("y ~ np.log(x)", frame).fit(), None, frame.iloc[:2])
    assert "state 3" not in scores.to_pandas().columns
    table = scores.table("state 1", k=2)
    assert list(table["x"]) == list(frame.loc[table.index, "x"]) and "other" not in table


def test_one_number_of_the_whole_model_is_not_named_after_the_first_query(tmp_path):
    smf = pytest.importorskip("statsmodels.formula.api")
    frame = pd.DataFrame({"y": X[:, 0].numpy(), "x": X[:, 1].numpy()})
    results = smf.ols("y ~ x", frame).fit()
    scores = uw.attribute(results, None, frame, measure=uw.Coefficient("x"))
    told = f"query 0: {uw.Coefficient('x')!r}"
    assert str(scores.top(2)).startswith(told + "\n") and "on Coefficient('x'):" in repr(scores)
    assert ".suspects()" not in repr(scores) and scores.report(tmp_path / "page.html").exists()
    with pytest.raises(SpecError, match="measured on single queries"):
        scores.check(subsets=8)


def test_a_network_says_the_classes_of_its_configuration_and_predicts_missing_labels():
    model = network()
    model.config = type("Config", (), {"id2label": {0: "cat", 1: "dog", 2: "owl"}})()
    scores = uw.attribute(model, TRAIN, X[:2], SMOOTH)
    predicted = model(X[:2]).argmax(dim=1).tolist()
    assert f"query 0: {['cat', 'dog', 'owl'][predicted[0]]}" in str(scores.top())
    assert any("the class that the network predicts" in note for note in scores.provenance.notes)
    same = uw.attribute(model, TRAIN, (X[:2], torch.tensor(predicted)), SMOOTH)
    assert torch.equal(scores.values, same.values)
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert class_names(model) is None
    with pytest.raises(DataError, match="need their targets"):
        uw.attribute(nn.Linear(4, 1).double(), (X, X[:, :1]), X[:2], nn.MSELoss())
    with pytest.raises(SpecError, match="A check trains the model again"):
        scores.check()


def test_what_has_no_labels_or_names_says_so():
    model = nn.Linear(4, 1).double()
    scores = uw.attribute(model, (X, X[:, :1]), (X[:2], X[:2, :1]), nn.MSELoss(), penalty=uw.L2(1))
    with pytest.raises(UnsupportedModel, match="classes"):
        scores.suspects()
    few = uw.attribute(trained(), TRAIN, TRAIN, SMOOTH, penalty=uw.L2(0.1), into=uw.Top(2))
    assert "the 2 highest and the 2 lowest scores of 40 training examples" in repr(few)
    assert f"query 1: {int(Y[1])}" in str(few.top(query=1))
    with pytest.raises(SpecError, match=r"is said by an upweight\.report\.Display"):
        html(scores, "page.html", ["cat", "dog"])
