"""The page of suspects, and what comes back from it."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.errors import DataError, ShapeError


@pytest.fixture(scope="module")
def found():
    X, y = load_iris(return_X_y=True)
    names = np.array(["<b>setosa</b>", "versicolor", "virginica"])[y]
    names[::15] = "virginica"
    model = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(X, names)
    return uw.applications.debugging.suspects(model, (X, names), (X, names), by="label")


def test_a_page_shows_the_first_rows_and_no_markup_of_a_label(found, tmp_path):
    display = uw.report.Display(features=["sepal", "width", "petal", "petal width"], title="Iris")
    path = uw.report.suspects(found, tmp_path / "page.html", display, k=8)
    text = path.read_text()
    assert text.count('class="suspect"') == 8
    assert f'id="row-{int(found.order[0])}"' in text
    assert "<b>setosa</b>" not in text and "&lt;b&gt;setosa" in text
    assert "sepal" in text and "Iris" in text and found.verdict in text
    assert "http" not in text.split("<body>")[1]
    again = uw.report.suspects(found, tmp_path / "again.html", display, k=8)
    assert again.read_text() == text


@pytest.mark.parametrize("kind", ["images", "texts", "render"])
def test_rows_are_shown_as_the_display_says(found, tmp_path, kind):
    display = {
        "images": uw.report.Display(train_images=torch.rand(150, 6, 6).numpy()),
        "texts": uw.report.Display(train_texts=[f"flower {i}" for i in range(150)]),
        "render": uw.report.Display(render=lambda role, i: {"flower": i}),
    }[kind]
    text = uw.report.suspects(found, tmp_path / "page.html", display, k=3).read_text()
    shown = {"images": "data:image/png", "texts": f"flower {int(found.order[0])}"}
    assert shown.get(kind, "<dt>flower</dt>") in text


def downloaded(found, changes=()):
    """The file that the page's script writes for the first three suspects."""
    first = found.order[:3].tolist()
    rows = [{"row": i, "label": found.label(i), "action": "drop"} for i in first]
    rows[0] |= {"action": "relabel", "new": "versicolor"}
    rows[1] |= {"action": "keep"}
    return {"format": "upweight decisions 1", "rows": 150, "decisions": rows} | dict(changes)


def test_decisions_come_back(found, tmp_path):
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps(downloaded(found)))
    a, b, c = found.order[:3].tolist()
    made = uw.report.decisions(path, found)
    assert made == {a: "versicolor", b: "keep", c: "drop"}
    X, y = load_iris(return_X_y=True)
    result = found.apply(made, (X, np.array(found.classes.names)[y]))
    assert result.decisions.dropped == (c,) and result.decisions.kept == (b,)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[]", "edited"),
        ("{", "edited"),
        (json.dumps({"format": "another"}), "edited"),
        ("other rows", "other data"),
        ("other labels", "other data"),
    ],
)
def test_a_file_of_another_page_is_refused(found, tmp_path, text, said):
    path = tmp_path / "decisions.json"
    if text == "other rows":
        text = json.dumps(downloaded(found, {"rows": 149}))
    elif text == "other labels":
        rows = [{"row": 0, "label": "rose", "action": "drop"}]
        text = json.dumps(downloaded(found, {"decisions": rows}))
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        uw.report.decisions(path, found)


def test_a_page_of_nothing_is_refused(found, tmp_path):
    with pytest.raises(ShapeError):
        uw.report.suspects(found, tmp_path / "page.html", k=0)
