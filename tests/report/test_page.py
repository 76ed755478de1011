"""The page: what is in it, that it is the same each time, and that data cannot become markup."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.errors import DataError, ShapeError
from upweight.evaluation import Estimate
from upweight.report import Display, html
from upweight.report.spectrum import spectrum
from upweight.scores import Unit

HOSTILE = "</script><script>document.documentElement.dataset.owned='yes'</script><b>&\u2028"


class Tags(HTMLParser):
    """The elements of a page and the addresses they name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data") and v]


def test_the_page_has_its_parts_in_order(run, make_check):
    run.options = {
        "evidence": [make_check(), make_check(label="leverage-corrected", scale=1.4)],
        "command": "upweight demo --out here",
    }
    page = run.write()
    parts = [
        "Which training images moved the loss",
        "Raised its loss",
        "Lowered its loss",
        '<h2 id="trust-title" tabindex="-1">Can I trust this?',
        "3 training images were really removed",
        "The leverage-corrected prediction",
        "<b>What a score is.</b> A score says how the loss of a query changes",
        "1.010<small>[1.000, 1.020]",
        "S[q, i] = ∂loss/∂wᵢ",
        "Sum of scores (row-sum excess)",
        "How this was made",
        "upweight demo --out here",
        "Influence(curvature=Hessian()",
        "What if I drop these?",
    ]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    text = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    assert not re.search("helpful|harmful|proponent", text, re.I)


def test_the_data_are_the_ends_of_the_scores(run):
    run.options = {"k": 2, "values": [0.5, 1.5, 2.5], "predictions": [0, 2, 2]}
    data = run.data()
    for q, answer in enumerate(data["answers"]):
        ranking = run.scores.top(2, q)
        assert tuple(answer["raised"]["ids"]) == ranking.raises
        np.testing.assert_allclose(answer["lowered"]["scores"], ranking.lowers_by, rtol=1e-5)
        assert sum(answer["histogram"]["counts"]) == 10
    assert [query["wrong"] for query in data["queries"]] == [False, True, False]
    assert data["queries"][1]["value"] == 1.5
    for example in data["examples"]:
        assert example["label"] == str(run.train[1][example["id"]])


def test_better_predictions_of_removal_take_the_place_of_minus_the_score(run):
    removal = replace(run.scores.removal(), values=run.scores.values * -1.4)
    run.options = {"removal": removal, "k": 1}
    data = run.data()
    raised = data["answers"][0]["raised"]
    np.testing.assert_allclose(raised["changes"], [-1.4 * s for s in raised["scores"]], rtol=1e-5)


def test_removed_examples_are_on_the_page_even_if_not_among_the_strongest(run, make_check):
    run.options = {"k": 1, "evidence": [make_check(query=1)]}
    data = run.data()
    assert data["checks"][0]["removed"] == [[2], [5], [7]]
    assert {2, 5, 7} <= {example["id"] for example in data["examples"]}
    assert data["start"] == 1


def test_bytes_are_the_same_each_time(run, make_check):
    run.options = {"evidence": [make_check()], "title": "twice"}
    assert run.write() == run.write()


def test_a_function_as_measure_leaves_no_memory_address(run, make_provenance):
    made = make_provenance(measure="OutputMeasure(function=<function f at 0x7f3a1c>)")
    run.scores = replace(run.scores, provenance=made)
    page = run.write()
    assert "Which training images moved the measurement" in page
    assert "0x7f3a1c" not in page


def test_hostile_text_stays_text(run, make_check, make_provenance):
    honest = Tags(run.write()).tags
    run.scores = replace(run.scores, provenance=make_provenance(method=HOSTILE, notes=(HOSTILE,)))
    run.options = {
        "title": HOSTILE,
        "names": [HOSTILE] * 3,
        "predictions": [HOSTILE] * 3,
        "command": HOSTILE,
    }
    page = run.write()
    assert "<script>document" not in page
    assert "\u2028" not in re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert run.data()["queries"][0]["label"] == HOSTILE
    # A kicker, a list of notes with its heading and a command with its button: elements of ours and
    # no others.
    ours = ["p", "h3", "ul", "li", "p", "pre", "code", "p", "button", "span"]
    assert sorted(Tags(page).tags) == sorted([*honest, *ours])


def test_nothing_comes_from_outside(run):
    page = run.write()
    assert all(a.startswith(("#", "data:")) for a in Tags(page).addresses)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_one_query_and_one_training_example(run):
    run.scores = replace(run.scores, values=torch.tensor([[0.5]]))
    run.train, run.queries = (run.train[0][:1], [1]), (run.queries[0][:1], [2])
    run.train, run.queries = tuple(map(np.asarray, run.train)), tuple(map(np.asarray, run.queries))
    data = run.data()
    assert data["answers"][0]["raised"]["ids"] == [0]
    assert data["answers"][0]["lowered"]["ids"] == []


def test_scores_of_zero_make_a_page_without_ranked_images(run):
    run.scores = replace(run.scores, values=torch.zeros(3, 10))
    data = run.data()
    assert all(q[side]["ids"] == [] for q in data["answers"] for side in ("raised", "lowered"))


def test_tables_show_the_columns_that_differ_most(run):
    rows = np.zeros((10, 8))
    rows[:, 5] = np.arange(10)
    rows[:, 2] = 100 * np.arange(10)
    asked = np.zeros((3, 8))
    asked[:, 5], asked[:, 2] = 20.0, 100.0
    run.train, run.queries = (rows, run.train[1]), (asked, run.queries[1])
    run.options = {"features": list("abcdefgh")}
    data = run.data()
    assert (data["kind"], data["sprites"], data["features"][5]) == ("row", {}, "f")
    first = data["answers"][0]["raised"]
    example = first["ids"][0]
    by_column = {column: (theirs, mine) for column, theirs, mine in first["differs"][0]}
    assert by_column[5] == (20.0, float(example))
    assert first["differs"][0][0][0] in (2, 5)
    for side in (answer[side] for answer in data["answers"] for side in ("raised", "lowered")):
        for apart, together in zip(side["differs"], side["alike"], strict=True):
            assert not {c for c, *_ in apart} & {c for c, *_ in together}


def test_flat_inputs_are_shown_as_the_images_given_for_them(run):
    images, labels = run.train
    asked, answers = run.queries
    run.train = (images.reshape(10, 30) / 255.0, labels)
    run.queries = (asked.reshape(3, 30) / 255.0, answers)
    assert run.data()["kind"] == "row"
    run.options = {"train_images": images, "query_images": asked}
    assert run.data()["kind"] == "image"
    run.options = {"train_images": images[:4], "query_images": asked}
    with pytest.raises(ShapeError, match=r"one entry per example: 10[\s\S]*4 entries"):
        run.write()


def test_groups_are_shown_by_name(run):
    run.scores = run.scores.group(["even", "odd"] * 5)
    data = run.data()
    assert {example["name"] for example in data["examples"]} <= {"even", "odd"}
    assert "train" not in data["sprites"]


def test_loss_and_prediction_come_from_the_live_model(run):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    X, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    task = uw.Task(model, loss=uw.CrossEntropy(), penalty=uw.L2(0.1))
    context = uw.provenance.Context(task, uw.as_data((X, y)), uw.as_data((X[:3], y[:3])), uw.Loss())
    values = torch.randn(3, 12, dtype=torch.float64)
    run.scores = replace(run.scores, values=values, context=context)
    run.train, run.queries = (X, y), (X[:3], y[:3])
    queries = run.data()["queries"]
    expected = nn.functional.cross_entropy(model(X[:3]), y[:3], reduction="none")
    np.testing.assert_allclose([q["value"] for q in queries], expected.tolist(), rtol=1e-5)
    assert [q["prediction"] for q in queries] == [str(int(c)) for c in model(X[:3]).argmax(dim=1)]
    page = run.write()  # what the model predicts of a row that it was trained on is no proposal
    assert "the model predicts " in page and "· proposed" not in page


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_positive_logit_predicts_yes_and_several_logits_no_class(run, outputs):
    torch.manual_seed(0)
    model = nn.Linear(4, outputs).double()
    X, y = torch.randn(12, 4, dtype=torch.float64), (torch.arange(12) % 2).double()
    y = y[:, None].expand(-1, outputs)
    context = uw.provenance.Context(
        uw.Task(model, uw.Bernoulli()), uw.as_data((X, y)), uw.as_data((X[:3], y[:3])), uw.Loss()
    )
    values = torch.randn(3, 12, dtype=torch.float64)
    run.scores = replace(run.scores, values=values, context=context)
    run.train, run.queries = (X, y[:, 0]), (X[:3], y[:3, 0])
    found = [q.get("prediction") for q in run.data()["queries"]]
    assert found == ([str(int(f > 0)) for f in model(X[:3])] if outputs == 1 else [None] * 3)


def test_rank_scores_predict_no_change(run):
    run.scores = replace(run.scores, unit=Unit.RANK)
    assert run.data()["predicts"] is False
    assert "they predict no change" in run.write()


def test_a_failed_write_leaves_the_old_page(run, monkeypatch):
    before = run.write()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError))
    run.options = {"title": "another"}
    with pytest.raises(OSError):
        run.write()
    assert run.path.read_text(encoding="utf-8") == before


def test_data_of_another_split_are_refused(run):
    with pytest.raises(ShapeError, match=r"\(3, 10\) with 3 training examples and 10 queries"):
        html(run.scores, run.path, Display(train=run.queries, queries=run.train))


def test_no_queries_are_refused(run):
    empty = replace(run.scores, values=torch.zeros(0, 10))
    with pytest.raises(DataError, match=r"at least one query[\s\S]*\(0, 10\)"):
        html(empty, run.path, run.display)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"values": [1.0]}, "values must have one entry per query: 3"),
        ({"predictions": [1, 2]}, "predictions must have one entry per query: 3"),
        ({"start": 3}, "start=3"),
        ({"k": 0}, "k=0"),
        ({"features": ["a"]}, None),
    ],
)
def test_options_that_do_not_fit_are_refused(run, options, words):
    run.options = options
    if words is None:  # names of columns mean nothing for images
        assert run.data()["features"] == []
        return
    with pytest.raises(ShapeError, match=words):
        run.write()


def test_wrong_feature_names_are_refused(run):
    run.train, run.queries = (np.zeros((10, 4)), run.train[1]), (np.zeros((3, 4)), run.queries[1])
    run.options = {"features": ["a"]}
    with pytest.raises(ShapeError, match="each of the 4 columns"):
        run.write()


def test_checks_of_examples_that_are_not_there_are_refused(run, make_check):
    run.options = {"evidence": [replace(make_check(), examples=((2,), (5,), (10,)))]}
    with pytest.raises(ShapeError, match=r"examples \[10\]"):
        run.write()
    run.options = {"evidence": [make_check(query=3)]}
    with pytest.raises(ShapeError, match="query 3"):
        run.write()


def test_removals_of_other_examples_are_refused(run):
    run.options = {"removal": run.scores.removal([0, 1])}
    with pytest.raises(ShapeError, match=r"shape \(3, 2\), groups \[\(0,\), \(1,\)\] first"):
        run.write()
    run.options = {"removal": run.scores.removal([*range(9, -1, -1)])}
    with pytest.raises(ShapeError, match=r"groups \[\(9,\), \(8,\)"):
        run.write()


def test_a_check_without_a_slope_is_valid_json(run, make_check):
    unknown = Estimate(math.nan, math.nan, math.nan)
    run.options = {"evidence": [replace(make_check(), slope=unknown, pearson=unknown)]}
    assert run.data()["checks"][0]["slope"] is None
    assert "too little to say" in run.write()


def test_json_is_strict(run):
    found = re.search(r'id="data">(.*?)</script>', run.write(), re.S)
    json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_damping_stands_against_the_spectrum_block_by_block(layerwise):
    page = layerwise.write()
    assert "Damping against the spectrum" in page
    assert "2.&lt;b&gt;weight" in page
    assert "<b>weight" not in page
    assert 'data-name="below λ">25 %' in page
    assert 'data-name="below λ">100 %' in page
    assert "± 3.0 %" in page
    assert "0.weight: mean eigenvalue 0.00200, largest 1.50, λ 2.00×10⁻⁴" in page
    assert "contraction</dt><dd>0.weight: 7 products" in page
    assert page == layerwise.write()


def test_the_marks_of_the_spectrum_are_on_one_logarithmic_axis(layerwise):
    found = spectrum(layerwise.scores.provenance.health)
    marks = {k: float(v[:-1]) for k, v in found["rows"][0]["marks"].items()}
    (first, _), (second, _) = found["ticks"][:2]
    decades = len(range(-4, 2)) - 1  # from 10⁻⁴, below the smallest λ, to 10¹, above the largest
    assert float(second[:-1]) > float(first[:-1])
    # The mean is ten times λ: one decade apart.
    assert abs(marks["mean"] - marks["damping"] - 92 / decades) < 0.02
    assert set(found["rows"][1]["marks"].values()) != {None}
    assert found["rows"][1]["marks"]["mean"] is None


def test_no_spectrum_without_blocks(run):
    assert spectrum(run.scores.provenance.health) is None
    assert "Damping against the spectrum" not in run.write()


def test_many_blocks_wait_behind_a_click(layerwise, make_provenance):
    block = layerwise.scores.provenance.health["blocks"]["0.weight"]
    blocks = {f"{k}.weight": block for k in range(30)}
    health = {**layerwise.scores.provenance.health, "blocks": blocks}
    layerwise.scores = replace(layerwise.scores, provenance=make_provenance(health=health))
    assert "<summary>30 blocks</summary>" in layerwise.write()


def test_a_check_of_sets_names_them_and_gives_their_errors(run, make_sets):
    run.options = {"evidence": [make_sets()], "k": 1}
    data = run.data()
    check = data["checks"][0]
    assert check["removed"] == [[2, 5], [7, 9], [0, 1]]
    assert check["errors"] == [0.1, 0.2, 0.05]
    assert check["names"][2] == "2 at random"


def test_a_text_that_no_encoding_holds_is_shown_and_leaves_no_part(run, make_check, tmp_path):
    """Half of an emoji, as of a text that was cut; what two halves make together stays."""
    cut = "cut \ud83d, whole \ud83d\ude00 \U0001f600"
    run.options = {
        "title": cut, "names": [cut] * 3, "command": cut, "evidence": [make_check(label=cut)],
        "train_texts": [cut] * 10, "query_texts": [cut] * 3, "metadata": {cut: [cut, "b"] * 5},
    }  # fmt: skip
    page = run.write()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "<title>cut \ufffd, whole \U0001f600 \U0001f600</title>" in page
    texts = {query["text"] for query in run.data()["queries"]}
    assert texts == {"cut \ufffd, whole \U0001f600 \U0001f600"}


def test_what_cannot_be_written_leaves_what_was_there(run, tmp_path, monkeypatch):
    run.path.write_text("before")

    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no room"):
        run.write()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert run.path.read_text() == "before"


def test_targets_that_are_images_have_a_page(tmp_path):
    """A class for each pixel: no one class is predicted, and the model's answer is no label."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 1, 5, 5).double(), torch.randint(2, (6, 5, 5))
    task = uw.Task(
        nn.Conv2d(1, 2, 3, padding=1).double(), uw.CrossEntropy(),
        forward=lambda model, batch: (model(batch[0]).movedim(1, -1), batch[1]),
    )  # fmt: skip
    fitted = uw.Influence(uw.EKFAC(), damping=1.0).fit(task, (x, y))
    scores = fitted.attribute((x[:3], y[:3]))
    page = html(scores, tmp_path / "r.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert all("prediction" not in query for query in data["queries"])
    assert all(query["label"].startswith("(") for query in data["queries"])
