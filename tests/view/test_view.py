"""A folder of scores served to a browser: the same numbers, to nobody else, and no other file."""

import http.client
import json
import shutil
import socket
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from tests.report.conftest import Removals, provenance
from tests.runtime.damage import DAMAGES
from upweight.errors import ShapeError, SpecError, StaleStore, UpweightError
from upweight.evaluation import Estimate
from upweight.report import Display
from upweight.report.answers import Answers
from upweight.runtime.matrix import StoredMatrix
from upweight.scores import Scores, Unit
from upweight.verdict import Verdict
from upweight.view import Server, serve
from upweight.view.totals import keeping_totals

N, Q = 60, 4


@pytest.fixture(scope="module")
def values():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(Q, N))).float()


@pytest.fixture(scope="module")
def folder(values, tmp_path_factory):
    """Shards of two groups of queries, each over ranges of examples."""
    path = tmp_path_factory.mktemp("run") / "scores"
    stored = StoredMatrix.open(path, {"task": "t"}, shape=(Q, N))
    for first, last in ((0, 3), (3, 4)):
        for start in range(0, N, 25):
            stored.append(first, start, values[first:last, start : start + 25])
    finish(stored)
    return path


def finish(stored):
    stored.finish({"unit": "DERIVATIVE", "provenance": asdict(provenance(n=N, q=Q))})


def written(folder, values):
    """All scores in one shard."""
    stored = StoredMatrix.open(folder, {}, shape=(Q, N))
    stored.append(0, 0, values)
    finish(stored)


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (N, 6, 5), dtype=np.uint8)
    return (images, draw.integers(0, 3, N)), (images[:Q], np.array([0, 1, 2, 0]))


@pytest.fixture(scope="module")
def server(folder, data):
    train, queries = data
    display = Display(
        train, queries, values=[0.5, 2.0, 1.0, 0.1], metadata={"half": [0, 1] * 30},
        train_losses=np.linspace(0, 1, N), self_influence=-np.linspace(0, 2, N),
    )  # fmt: skip
    with Server(Scores.open(folder), display) as running:
        yield running


def training(folder, metadata=None):
    """The page on the training set, with what is kept for it."""
    summed = keeping_totals(folder)
    return Answers(Scores.open(folder), Display(metadata=metadata or {}), summed=summed).training


def asked(server, path, **parameters):
    """(status, body) of a GET with the token."""
    parts = urlsplit(server.address)
    more = "".join(f"&{key}={value}" for key, value in parameters.items())
    url = f"http://{parts.netloc}/{path}?{parts.query}{more}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:  # as any answer: Python 3.14 warns of one that is left open
            return error.code, error.read()


def raw(server, method, path, **headers):
    """(status, body) of any request."""
    with closing(
        http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=10)
    ) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_shards_open_as_they_were_written_and_nothing_is_copied(folder, values):
    before = sorted(folder.rglob("*"))
    scores = Scores.open(folder)
    assert torch.equal(scores.values[:], values)
    assert scores.unit is Unit.DERIVATIVE
    assert scores.provenance == provenance(n=N, q=Q)
    assert sorted(folder.rglob("*")) == before


def test_totals_are_kept_for_the_same_scores_and_groups(values, tmp_path, monkeypatch):
    written(tmp_path, values)
    halves = {"half": [0, 1] * 30}
    first = training(tmp_path, halves)
    with monkeypatch.context() as patched:
        patched.setattr("upweight.view.totals.totals", lambda *_: pytest.fail("taken again"))
        again = training(tmp_path, halves)
    assert again == first
    other = {"half": [1, 1, 0] * 20}
    assert training(tmp_path, other) != first
    written(tmp_path, 2 * values)
    twice = training(tmp_path, halves)
    np.testing.assert_allclose(
        twice["groups"][0]["totals"], 2 * np.array(first["groups"][0]["totals"]), rtol=1e-4
    )


def test_saved_scores_open_too(values, tmp_path):
    Scores(values, Unit.VALUE, provenance(n=N, q=Q)).save(tmp_path)
    found = Scores.open(tmp_path)
    assert torch.equal(found.values[:], values)
    assert found.unit is Unit.VALUE


def test_no_scores_and_an_unfinished_pass_are_refused_and_leave_nothing(values, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        Scores.open(tmp_path)
    stored = StoredMatrix.open(tmp_path, {}, shape=(Q, N))
    stored.append(0, 0, values[:, :20])
    with pytest.raises(ShapeError, match=r"(?s)ask again to finish it.*into=Shards\(folder\)"):
        Scores.open(tmp_path)
    assert len(list(tmp_path.rglob("*"))) == 2


def test_where_nothing_can_be_written_nothing_is_kept(values, tmp_path, monkeypatch):
    written(tmp_path, values)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        expected = training(tmp_path)
    assert not list(tmp_path.rglob("totals*.safetensors"))
    assert training(tmp_path) == expected


@pytest.mark.parametrize("side", ["raised", "lowered"])
def test_a_ranking_is_paged_through_to_its_end(server, values, side):
    found, start, more = [], 0, True
    while more:
        status, body = asked(server, f"ranking/1/{side}", start=start)
        assert status == 200
        page = json.loads(body)
        found += list(zip(page["ids"], page["scores"], strict=True))
        assert [example["id"] for example in page["examples"]] == page["ids"]
        start, more = len(found), page["more"]
    sign = 1 if side == "raised" else -1
    signed = sign * values[1]
    expected = [i for i in signed.argsort(descending=True, stable=True).tolist() if signed[i] > 0]
    assert [i for i, _ in found] == expected
    np.testing.assert_allclose([s for _, s in found], values[1][expected], rtol=1e-5)


def test_what_if_is_what_predict_says(server, values):
    scores = Scores(values, Unit.DERIVATIVE, provenance())
    for dropped in ([3], [0, 59, 17]):
        _, body = asked(server, "drop", ids=",".join(map(str, dropped)))
        np.testing.assert_allclose(json.loads(body), scores.predict(drop=dropped), rtol=1e-6)


def test_every_example_is_on_some_page_in_order(server, values):
    found = []
    for start in range(0, N, 24):
        _, body = asked(server, "browse/absolute", start=start)
        found += json.loads(body)["rows"]
    assert [row["id"] for row in found] == values.abs().sum(dim=0).argsort(descending=True).tolist()
    np.testing.assert_allclose([r["self"] for r in found], [r["id"] * 2 / 59 for r in found], 1e-4)


@pytest.mark.parametrize(
    ("path", "parameters", "status"),
    [
        ("query/4", {}, 404),
        ("query/-1", {}, 404),
        ("ranking/0/sideways", {}, 404),
        ("browse/values", {}, 404),
        ("picture/train/60", {}, 404),
        ("picture/etc/0", {}, 404),
        ("examples", {"ids": "0,60"}, 400),
        ("examples", {"ids": "../0"}, 400),
        ("drop", {"ids": "1,1"}, 400),
        ("ranking/0/raised", {"start": "-3"}, 400),
        ("../run.toml", {}, 404),
        ("%2e%2e/%2e%2e/etc/passwd", {}, 404),
        ("scores/manifest.json", {}, 404),
        ("query/" + "9" * 5000, {}, 404),
        ("picture/train/" + "9" * 5000, {}, 404),
        ("query/x", {}, 404),
        ("query/0,1", {}, 404),
        ("examples", {"ids": "9" * 5000}, 400),
        ("drop", {"ids": "1" * 5000}, 400),
        ("ranking/0/raised", {"start": "9" * 5000}, 400),
        ("examples", {}, 404),
        ("examples", {"ids": ","}, 404),
    ],
)
def test_addresses_of_nothing_are_refused(server, path, parameters, status):
    assert asked(server, path, **parameters)[0] == status


@pytest.mark.parametrize("path", ["", "query/0", "drop", "picture/train/0", "nothing"])
@pytest.mark.parametrize("query", ["", "token=", "token=wrong"])
def test_without_the_token_nothing_is_told(server, path, query):
    status, body = raw(server, "GET", f"/{path}?{query}")
    assert status == (404 if path == "nothing" else 403)
    assert b"score" not in body


def test_nothing_can_be_written_and_no_other_name_is_served(server):
    token = urlsplit(server.address).query
    for method in ("POST", "PUT", "DELETE"):
        assert raw(server, method, f"/drop?{token}&ids=1")[0] == 405
    assert raw(server, "GET", f"/?{token}", Host="attacker.example")[0] == 400


def test_only_this_machine_can_connect(server):
    port = urlsplit(server.address).port
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    for address in others - {"127.0.0.1", "::1"}:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as attempt:
            attempt.settimeout(2)
            assert attempt.connect_ex((address, port)) != 0
    assert server.address.startswith("http://127.0.0.1:")


def test_a_port_that_is_taken_is_said(server, folder):
    port = urlsplit(server.address).port
    with pytest.raises(SpecError, match=f"port {port}"):
        Server(Scores.open(folder), port=port)


def test_the_page_works_in_a_browser(server, values, browser):
    complaints, elsewhere = [], []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    home = f"http://{urlsplit(server.address).netloc}/"
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith(home) else None)
    page.goto(server.address + "#queries/2")
    page.wait_for_selector("#raised .card")
    scores = Scores(values, Unit.DERIVATIVE, provenance())
    first = scores.top(1, 2).raises[0]
    box = page.locator("#raised .drop-tick input").first
    assert int(box.get_attribute("data-id")) == first
    box.check()
    expected = float(scores.predict(drop=[first])[2])
    page.wait_for_selector("#drop-change")
    told = page.locator("#drop-change").inner_text().replace("−", "-")
    assert float(told) == pytest.approx(expected, rel=6e-3)
    page.locator("#raised button").click()
    page.locator("#raised .card").nth(20).wait_for()
    tile = page.locator("#raised .tile").first
    image = tile.evaluate("e => getComputedStyle(e).backgroundImage")
    assert "picture/train/" in image
    page.keyboard.press("j")
    page.wait_for_selector("#query-3[aria-selected=true]")
    page.get_by_role("link", name="Training set").click()
    page.get_by_role("heading", name="All training images").wait_for()
    for name in ("What the examples are worth", "Suspicious labels", "Classes on classes"):
        assert page.get_by_role("heading", name=name).is_visible()
    page.get_by_role("button", name="Next").click()
    page.get_by_text("25 to 48 of 60").wait_for()
    assert page.evaluate("document.documentElement.dataset.error") is None
    page.close()
    assert complaints == []
    assert elsewhere == []


def test_hostile_labels_run_nothing_when_served(folder, data, browser):
    hostile = "</script><script>document.documentElement.dataset.owned='yes'</script><img src=x>"
    train, queries = data
    display = Display(
        train, queries, names=[hostile] * 3, metadata={hostile: [hostile, "b"] * 30}, title=hostile
    )
    with Server(Scores.open(folder), display) as running:
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.goto(running.address + "#queries/0")
        page.wait_for_selector("#raised .card")
        assert hostile in page.locator("#raised").inner_text()
        page.get_by_role("link", name="Training set").click()
        page.locator("#all-title").wait_for()
        assert page.evaluate("document.documentElement.dataset.owned") is None
        assert page.locator("img").count() == 0
        page.close()


def test_half_of_an_emoji_is_a_character_like_any_other(folder, data):
    train, queries = data
    cut = "cut \ud83d"
    display = Display(
        train, queries, names=[cut] * 3, train_texts=[cut] * N,
        query_texts=[cut] * Q, metadata={cut: [cut, "b"] * 30}, title=cut,
    )  # fmt: skip
    with Server(Scores.open(folder), display) as running:
        for path, more in (("", {}), ("query/0", {}), ("training", {}), ("examples", {"ids": "1"})):
            status, body = asked(running, path, **more)
            assert status == 200
            assert "cut \ufffd" in body.decode().replace(r"\ufffd", "\ufffd")


def test_a_verdict_below_order_and_size_takes_the_sizes(folder, data, browser):
    found = SimpleNamespace(verdict=Verdict.ORDER, reason="because", notes=("n",), models=9)
    with Server(Scores.open(folder), Display(*data), evidence=[found]) as running:
        page = browser.new_page()
        page.goto(running.address + "#queries/0")
        page.wait_for_selector("#raised .card")
        page.get_by_role("button", name="Show more").first.click()
        page.locator("#raised .card dd").nth(12).wait_for()
        ranks = page.locator("#raised .card dd").all_inner_texts()
        assert ranks == [str(k + 1) for k in range(len(ranks))]
        assert page.locator(".banner").inner_text().startswith("Order only: because.")
        page.close()


def test_what_retraining_said_is_drawn_and_removals_are_named(folder, data, browser):
    actual = torch.tensor([[-0.3], [0.2], [1.0]])
    made = Removals(
        "first order", ((2,), (50,), (7,)), actual * 0.9, actual, Estimate(1, 1, 1),
        Estimate(1, 1, 1), Estimate(1.1, 1, 1.2), queries=(2,),
    )  # fmt: skip
    scores = Scores.open(folder)
    better = replace(scores.removal(), values=-2 * scores.values[:])
    with Server(scores, Display(*data, k=30), evidence=[made], removal=better) as running:
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.goto(running.address + "#trust")
        page.wait_for_selector("#scatter .dot[data-removal='50']")
        assert page.locator("#scatter .dot[data-removal]").count() == 3
        page.locator("#scatter .dot[data-removal='50']").click()
        readout = page.locator("#readout")
        assert "#50" in readout.inner_text() and f"label {data[0][1][50]}" in readout.inner_text()
        image = readout.locator(".tile").evaluate("e => getComputedStyle(e).backgroundImage")
        assert "picture/train/50" in image
        page.get_by_role("link", name="Queries").click()
        page.wait_for_selector("#query-2[aria-selected=true]")
        card = page.locator(".card:has([data-id='50'])")
        card.wait_for()
        side = "raised" if better.values[2, 50] < 0 else "lowered"
        assert card.locator(f".meter.{side}").count() == 1
        told = dict(
            zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(),
                strict=True)
        )  # fmt: skip
        values = {name: float(text.replace("−", "-")) for name, text in told.items()}
        score = float(Scores.open(folder).values[2, 50])
        assert values["retrained"] == pytest.approx(0.2)
        assert values["removed"] == pytest.approx(-2 * score, rel=6e-3)
        page.close()


def test_the_page_with_the_token_is_not_stored(server):
    with urllib.request.urlopen(server.address, timeout=10) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
    with urllib.request.urlopen(server.address.replace("/?", "/query/0?"), timeout=10) as answer:
        assert answer.headers["Cache-Control"] == "private, max-age=3600"
        assert answer.headers["X-Frame-Options"] == "DENY"


def test_a_browser_is_led_on_and_never_given_the_token(folder, data, monkeypatch, browser):
    """Command lines of processes are there for every user of a machine to read."""
    given, told = [], []

    def looked_at(server):
        token = urlsplit(server.address).query
        (address,) = given
        file = Path(urlsplit(address).path)
        assert token.removeprefix("token=") not in address
        assert file.parent.stat().st_mode & 0o077 == 0, "its owner's alone"
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=10_000)
        assert page.url.startswith(server.address)
        page.close()
        given.append(file)

    monkeypatch.setattr(Server, "wait", looked_at)
    monkeypatch.setattr("webbrowser.open", given.append)
    serve(Scores.open(folder), Display(*data), open_browser=True, told=told.append)
    assert not given[1].exists()


def test_a_view_that_ended_is_said_on_the_page(folder, browser):
    with Server(Scores.open(folder)) as running:
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.goto(running.address + "#queries/0")
        page.wait_for_selector("#raised .card")
    page.keyboard.press("j")
    page.get_by_text("no longer answers").wait_for()
    page.close()


def test_serve_tells_its_address_and_stops_when_interrupted(folder, data, monkeypatch):
    told = []

    def interrupted(server):
        assert asked(server, "query/0")[0] == 200
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "wait", interrupted)
    serve(Scores.open(folder), Display(*data, title="t"), told=told.append)
    assert told[0].startswith("http://127.0.0.1:") and told[1] == "stopped"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(told[0], timeout=2)


def test_a_live_model_is_asked_about_the_queries(folder):
    import upweight as uw

    torch.manual_seed(0)
    X, y = torch.randn(N, 3, dtype=torch.float64), torch.arange(N) % 2
    task = uw.Task(torch.nn.Linear(3, 2).double(), loss=uw.CrossEntropy())
    train, queries = uw.as_data((X, y)), uw.as_data((X[:Q], y[:Q]))
    scores = Scores.open(folder).attach(uw.provenance.Context(task, train, queries, uw.Loss()))
    answers = Answers(scores, ask=False)
    losses = task.losses(task.theta(), (X[:Q], y[:Q])).tolist()
    np.testing.assert_allclose([q["value"] for q in answers.meta["queries"]], losses, rtol=1e-4)
    assert "suspicious" not in answers.training


def test_without_data_examples_are_numbers(folder):
    answers = Answers(Scores.open(folder))
    ids = answers.query(0)["raised"]["ids"]
    assert answers.examples(ids) == [{"id": i, "label": ""} for i in ids]
    assert answers.range is None


def test_dropping_is_what_scores_predict_and_of_other_units_nothing(values):
    scores = Scores(values, Unit.DERIVATIVE, provenance())
    found = Answers(scores).drop([1, 2])
    np.testing.assert_allclose(found, scores.predict(drop=[1, 2]), rtol=1e-6)
    for unit, words in ((Unit.RANK, "only rank"), (Unit.VALUE, "share out a total")):
        with pytest.raises(UpweightError, match=words):
            Answers(Scores(values, unit, provenance())).drop([1])


def test_rows_of_tables_say_where_they_differ(folder):
    X = np.random.default_rng(0).normal(size=(N, 3))
    X[:, 1] *= 100
    display = Display((X, np.zeros(N)), (X[:Q], np.zeros(Q)), features=list("abc"))
    raised = Answers(Scores.open(folder), display).query(0)["raised"]
    i = raised["ids"][0]
    distance = np.abs(X[i] - X[0]) / np.concatenate([X, X[:Q]]).std(axis=0)
    assert raised["differs"][0][0][0] == int(distance.argmax())


# -- what was altered ------------------------------------------------------------------------------


@pytest.fixture
def opened_once(values, tmp_path):
    written(tmp_path / "scores", values)
    training(tmp_path / "scores")
    return tmp_path / "scores"


@pytest.mark.parametrize("damage", ["one bit", "doubled", "short", "cut", "no hash", "a folder"])
def test_sums_that_were_altered_are_made_again(opened_once, damage):
    file = opened_once / "totals" / "totals.safetensors"
    before = training(opened_once)
    DAMAGES[damage](file)
    assert training(opened_once) == before


@pytest.mark.parametrize("told", ["", "{}", "[1]", "[" * 100_000, '{"schema": 3, "shape": 3}'])
@pytest.mark.parametrize("name", ["manifest.json", "finished.json"])
def test_sums_of_which_nothing_is_known_are_made_again(opened_once, name, told):
    before = training(opened_once)
    (opened_once / "totals" / name).write_text(told)
    assert training(opened_once) == before


def test_sums_of_other_scores_are_made_again(opened_once, values, tmp_path):
    other = tmp_path / "other"
    written(other, 2 * values)
    theirs, before = training(other), training(opened_once)
    shutil.rmtree(opened_once / "totals")
    shutil.copytree(other / "totals", opened_once / "totals")
    assert training(opened_once) == before != theirs


def test_sums_are_not_kept_through_a_link(opened_once, tmp_path):
    shutil.move(opened_once / "totals", tmp_path / "outside")
    (opened_once / "totals").symlink_to(tmp_path / "outside")
    shutil.rmtree(tmp_path / "outside"), (tmp_path / "outside").mkdir()
    training(opened_once)
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("damage", DAMAGES)
def test_scores_that_were_altered_are_noticed(opened_once, damage):
    """Before they are opened, and while they are looked at."""
    (file,) = opened_once.glob("tile-*")
    scores = Scores.open(opened_once)
    DAMAGES[damage](file)
    with pytest.raises(StaleStore, match=file.name):
        Scores.open(opened_once)
    with pytest.raises(StaleStore, match=file.name):
        _ = scores.values[0]


def test_scores_of_two_origins_are_not_mixed_in_one_folder(opened_once, values):
    """A page of one kind beside a view of the other would show two answers."""
    saved = Scores(2 * values, Unit.DERIVATIVE, provenance(n=N, q=Q))
    with pytest.raises(StaleStore, match="give another folder"):
        saved.save(opened_once)
    assert torch.equal(Scores.load(opened_once).values, values)
