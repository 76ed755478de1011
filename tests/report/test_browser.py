"""The page in a real browser: what a person does with it, and that data cannot do anything."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from upweight.verdict import Verdict

OWNED = "document.documentElement.dataset.owned"
HOSTILE = f'</script><script>{OWNED}="yes"</script><img src=x onerror="{OWNED}=1">'
CONTRAST = """() => {
  const channel = v => v <= 10.02 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
  };
  return ["h1", ".scale", "#pages a", "#raised-title", "#lowered-title", ".card dt", ".card dd",
    "#found", ".option .under"].map(s => {
    const e = document.querySelector(s);
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""
UNNAMED = """[...document.querySelectorAll('button, a, input, select, [role=img]')].filter(e =>
  !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)
"""


def numbers(text):
    """Numbers of a page's text as floats: a true minus sign, powers of ten spelled out."""
    digits = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻−", "0123456789--")
    found = re.findall(r"([+−]?[\d,]*\.?\d+)(?:×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?", text)
    return [
        float(m.translate(digits).replace(",", "")) * 10.0 ** int(p.translate(digits) or 0)
        for m, p in found
    ]


def changes(page):
    """The table of every query: {query: change}."""
    rows = page.locator("#drop-panel table.changes tbody tr").all()
    return {
        int(row.locator("th").inner_text().split()[-1]): numbers(
            row.locator("td").nth(2).inner_text()
        )[0]
        for row in rows
    }


def dropping(page, *examples):
    for example in examples:
        page.locator(f'.drop-tick input[data-id="{example}"]:visible').first.check()


@pytest.fixture
def facts(run):
    run.options |= {"values": [0.5, 2.5, 1.5], "predictions": [0, 2, 2]}
    return run


def test_three_pages_and_the_way_back(run, make_check, opened):
    run.options = {"evidence": [make_check(), make_check(label="corrected", scale=1.4)], "k": 2}
    run.write()
    page = opened(run.path)
    assert page.locator("#query-title").inner_text() == "Query 0", "the answer comes first"
    page.get_by_role("link", name="Can I trust this?").click()
    assert page.locator("#scatter .dot[data-removal]").count() == 2 * 3
    assert "#2" in page.locator("#readout").inner_text()
    page.get_by_role("link", name="Queries").click()
    assert page.locator("#page-trust").is_hidden()
    assert page.locator("#page-queries .card").count() == 4
    page.locator("#query-1").click()
    assert page.locator("#query-title").inner_text() == "Query 1"
    page.get_by_role("link", name="Training set").click()
    assert page.get_by_role("heading", name="What the examples are worth").is_visible()
    page.go_back()
    assert page.locator("#query-title").inner_text() == "Query 1"
    page.go_back()
    assert page.locator("#query-title").inner_text() == "Query 0"
    page.go_back()
    assert page.locator("#page-trust").is_visible()
    page.go_back()
    assert page.locator("#query-title").inner_text() == "Query 0"


def test_the_cards_are_the_ends_of_the_scores(run, opened):
    run.options = {"k": 3}
    run.write()
    page = opened(run.path, "#queries/2")
    ranking = run.scores.top(3, 2)
    for side, scores in (("raised", ranking.raises_by), ("lowered", ranking.lowers_by)):
        cards = page.locator(f"#{side} .card").all()
        shown = [numbers(card.locator("dd").first.inner_text())[0] for card in cards]
        np.testing.assert_allclose(shown, scores, rtol=6e-3)  # three digits


@pytest.mark.parametrize("sizes", [(8, 8), (5, 9)])
def test_each_tile_shows_its_own_image(run, opened, monkeypatch, sizes):
    monkeypatch.setattr("upweight.report.sprite.TILES", 4)  # ten images on three sheets
    grays = np.arange(10, dtype=np.uint8) * 25
    images = np.broadcast_to(grays[:, None, None], (10, *sizes)).copy()
    run.train, run.queries = (images, run.train[1]), (images[[9, 5, 0]], run.queries[1])
    run.options = {"k": 10}
    run.write()
    page = opened(run.path, "#queries/1", height=3000)  # nothing lies over a tile
    cards = page.locator("#page-queries .card").all()
    assert len(cards) == 10
    shown = [(card.locator(".drop-tick input"), card.locator(".tile")) for card in cards]
    expected = [grays[int(box.get_attribute("data-id"))] for box, _ in shown]
    tiles = [tile for _, tile in shown] + [page.locator("#query-image .tile")]
    for tile, gray in zip(tiles, [*expected, grays[5]], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(tile.screenshot())).convert("L")).astype(int)
        middle = pixels[12:-12, 12:-12]  # the corners are round
        assert np.abs(middle - int(gray)).max() <= 1


def test_filters_leave_what_they_say(facts, opened):
    facts.write()
    page = opened(facts.path, "#queries")
    left = lambda: [o.get_attribute("id") for o in page.locator("#list .option").all()]  # noqa: E731
    assert left() == ["query-0", "query-1", "query-2"]
    page.locator("#order").select_option("high")
    assert left() == ["query-1", "query-2", "query-0"]
    page.locator("#least").fill("1")
    page.locator("#most").fill("2")
    assert left() == ["query-2"]
    assert page.locator("#query-title").inner_text() == "Query 2"
    assert page.locator("#found").inner_text() == "1 of 3 queries"
    page.locator("#least").fill("")
    page.locator("#most").fill("")
    page.locator("#wrong").check()
    assert left() == ["query-1"]
    page.locator("#wrong").uncheck()
    page.locator("#label").select_option("0")
    assert left() == ["query-0"]
    page.locator("#label").select_option("")
    page.locator("#search").fill("#2")
    assert left() == ["query-2"]


def test_keys_choose_queries_but_not_while_typing(run, opened):
    run.write()
    page = opened(run.path, "#queries")
    title = page.locator("#query-title")
    page.keyboard.press("j")
    assert title.inner_text() == "Query 1"
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == "Query 2"
    page.keyboard.press("j")
    assert title.inner_text() == "Query 2"
    page.keyboard.press("k")
    assert title.inner_text() == "Query 1"
    page.locator("#search").focus()
    page.keyboard.press("k")
    assert title.inner_text() == "Query 1"


def test_everything_can_be_reached_by_keyboard(run, opened):
    run.write()
    page = opened(run.path, "#queries")
    page.locator("#main").focus()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className"
                " || document.activeElement.dataset.id || document.activeElement.tagName"
            )
        )
    assert {"search", "list", "previous", "next"} <= reached
    box = page.locator(".drop-tick input").first
    box.focus()
    outline = box.evaluate("e => getComputedStyle(e).outlineStyle")
    page.keyboard.press("Space")
    assert page.locator("#whatif").is_visible()
    assert outline != "none"


def test_what_if_is_what_predict_says_for_every_query(facts, opened):
    facts.options |= {"k": 2}
    facts.write()
    page = opened(facts.path, "#queries/1")
    dropped = [int(b.get_attribute("data-id")) for b in page.locator(".drop-tick input").all()][:3]
    dropping(page, *dropped)
    expected = facts.scores.predict(drop=dropped).tolist()
    text = page.locator("#drop-change").inner_text()
    assert numbers(text)[0] == pytest.approx(expected[1], rel=6e-3)
    assert f"from 2.50 to {2.5 + expected[1]:.3g}"[:12] in page.locator("#drop-words").inner_text()
    page.locator("#drop-all").click()
    shown = changes(page)
    assert sorted(shown) == [0, 1, 2]
    np.testing.assert_allclose([shown[q] for q in range(3)], expected, rtol=6e-3)
    order = [abs(v) for v in shown.values()]
    assert order == sorted(order, reverse=True)
    page.locator("#drop-none").click()
    assert page.locator("#whatif").is_hidden()
    assert page.locator(".drop-tick input:checked").count() == 0


def test_so_many_together_have_no_size_where_first_order_is_off(run, opened):
    health = dict(run.scores.provenance.health)
    health["beyond_first_order"] = [[1, 0.05], [10, 0.5]]
    run.scores = replace(run.scores, provenance=replace(run.scores.provenance, health=health))
    run.write()
    page = opened(run.path, "#queries/0")
    boxes = page.locator(".drop-tick input").all()
    first, second = (int(box.get_attribute("data-id")) for box in (boxes[0], boxes[1]))
    dropping(page, first)
    assert numbers(page.locator("#drop-change").inner_text())
    dropping(page, second)
    words = page.locator("#drop-words").inner_text()
    assert "predicted to" in words and "size of so many together not supported" in words
    assert not numbers(page.locator("#drop-change").inner_text())


def test_any_example_may_be_dropped_by_number_where_all_columns_are_there(run, opened):
    run.options = {"k": 1}
    run.write()
    page = opened(run.path, "#queries/0")
    shown = {int(b.get_attribute("data-id")) for b in page.locator(".drop-tick input").all()}
    other = next(i for i in range(10) if i not in shown)
    dropping(page, min(shown))
    page.locator("#drop-all").click()
    page.locator(".add input").fill(str(other))
    page.keyboard.press("Enter")
    expected = run.scores.predict(drop=[min(shown), other]).tolist()
    page.locator(".chip").nth(1).wait_for()
    got = changes(page)
    np.testing.assert_allclose([got[q] for q in range(3)], expected, rtol=6e-3)


def test_without_its_column_an_example_changes_only_the_queries_that_show_it(
    run, opened, monkeypatch
):
    monkeypatch.setattr("upweight.report.whatif.BUDGET_BYTES", 4 * 3 * 2)  # two columns
    run.options = {"k": 1}
    data = run.data()
    assert len(data["whole"]) == 2
    shown = {q: [i for side in ("raised", "lowered") for i in answer[side]["ids"]]
             for q, answer in enumerate(data["answers"])}  # fmt: skip
    query, example = next(
        (q, i) for q, some in shown.items() for i in some
        if i not in data["whole"] and sum(i in other for other in shown.values()) == 1
    )  # fmt: skip
    page = opened(run.path, f"#queries/{query}")
    dropping(page, example)
    page.locator("#drop-all").click()
    assert list(changes(page)) == [query]
    assert "2 queries the change is not known" in page.locator("#drop-panel").inner_text()
    page.get_by_role("link", name="Training set").click()
    ticks = page.locator("#training .drop-tick input")
    allowed = {int(b.get_attribute("data-id")) for b in ticks.all() if b.is_enabled()}
    assert allowed <= set(data["whole"])


def test_ranks_predict_nothing_and_offer_no_what_if(run, opened):
    from upweight.scores import Unit

    run.scores = replace(run.scores, unit=Unit.RANK)
    run.write()
    page = opened(run.path, "#queries")
    assert page.locator(".card").count() > 0
    assert page.locator(".drop-tick").count() == 0


def test_the_training_page_has_its_parts(run, opened):
    draw = np.random.default_rng(1)
    run.train[0][4] = run.train[0][7]
    run.train[1][4], run.train[1][7] = 0, 1
    run.options = {
        "train_losses": draw.exponential(size=10),
        "self_influence": -draw.exponential(size=10),
        "metadata": {"source": ["web", "scan"] * 5},
    }
    run.write()
    page = opened(run.path, "#training")
    for name in (
        "What the examples are worth",
        "Suspicious labels",
        "Classes on classes",
        "Groups",
        "Near-duplicates",
    ):
        assert page.get_by_role("heading", name=name).is_visible()
    assert page.locator("#training svg[role=img]").count() == 3
    assert "labels differ" in page.locator("#training").inner_text()
    page.locator("#group-column").select_option("1")
    table = page.get_by_role("region", name="Groups by source")
    cells = table.locator("tbody tr").all()
    sums = {
        c.locator("th").inner_text(): numbers(c.locator("td").nth(2).inner_text())[0] for c in cells
    }
    expected = run.scores.group(["web", "scan"] * 5)
    for name, total in zip(expected.columns, expected.values.mean(dim=0).tolist(), strict=True):
        assert sums[name] == pytest.approx(total, rel=6e-3)


@pytest.mark.parametrize("route", ["#trust", "#queries", "#training"])
def test_a_phone_shows_it_without_scrolling_sideways(run, make_check, route, opened):
    run.options = {
        "evidence": [make_check()],
        "command": "upweight demo --out a-rather-long-name " * 5,
        "names": ["a class with a very long name indeed " * 3] * 3,
        "train_losses": [0.1] * 10,
        "self_influence": [-0.1] * 10,
    }
    run.write()
    page = opened(run.path, route, width=360, height=740)
    if route != "#trust":
        page.locator(".drop-tick input:visible").first.check()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them_in_light_and_dark(run, scheme, opened):
    run.write()
    page = opened(run.path, "#queries", scheme=scheme)
    ratios = page.evaluate(CONTRAST)
    assert min(ratios) >= 4.5, ratios  # WCAG 2.2, 1.4.3
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", dark)[0]) < 60) == (scheme == "dark")


def test_readers_of_a_screen_are_told(run, opened):
    run.write()
    page = opened(run.path, "#queries")
    assert page.get_by_role("listbox", name="Queries").get_by_role("option").count() == 3
    assert page.locator("#list [aria-selected=true]").get_attribute("id") == "query-0"
    assert page.locator("#list").get_attribute("aria-activedescendant") == "query-0"
    assert page.locator("#drop-words[aria-live=polite][role=status]").count() == 1
    assert page.get_by_role("img", name=re.compile("^Histogram of 10 scores")).is_visible()
    page.locator("#histogram summary").click()
    counts = page.locator("#histogram tbody td").all_inner_texts()
    assert sum(int(c) for c in counts) == 10
    assert page.get_by_role("link", name="Queries").get_attribute("aria-current") == "page"
    unnamed = page.evaluate(UNNAMED)
    assert unnamed == []


def test_hostile_words_run_nothing_anywhere(run, make_check, opened):
    run.options = {
        "names": [HOSTILE] * 3,
        "predictions": [HOSTILE] * 3,
        "title": HOSTILE,
        "command": HOSTILE,
        "evidence": [make_check(label=HOSTILE)],
        "train_tokens": [[HOSTILE, HOSTILE]] * 10,
        "token_scores": lambda q, some: (
            np.ones((len(some), 2)),
            run.scores.values[q, some].numpy() - 2.0,
        ),
        "query_texts": [HOSTILE] * 3,
        "metadata": {HOSTILE: [HOSTILE, "b"] * 5, "other": ["a", HOSTILE] * 5},
        "train_losses": [0.1] * 10,
    }
    run.write()
    page = opened(run.path)
    for route in ("#trust", "#queries/1", "#training"):
        page.goto(run.path.as_uri() + route)
        page.wait_for_timeout(100)
        assert page.evaluate(OWNED) is None
        assert page.locator("img[src=x]").count() == 0
    assert HOSTILE in page.locator("#group-column").evaluate("e => e.textContent")
    page.goto(run.path.as_uri() + "#queries/1")
    assert HOSTILE in page.locator("#query-facts").inner_text()
    assert HOSTILE in page.locator("#query-content").inner_text()
    dropping(page, page.locator(".drop-tick input").first.get_attribute("data-id"))
    page.locator("#drop-all").click()
    assert page.evaluate(OWNED) is None


def test_a_name_that_turns_the_direction_of_text_turns_nothing_but_itself(run, make_check, opened):
    """U+202E: what follows is written from right to left, until the element ends."""
    turned = "\u202eabc"
    run.options = {"names": [turned] * 3, "evidence": [make_check()], "predictions": [turned] * 3,
                   "values": [1.0, 2.0, 3.0]}  # fmt: skip
    run.write()
    page = opened(run.path, "#queries/0")
    dropping(page, page.locator(".drop-tick input").first.get_attribute("data-id"))
    page.locator("#drop-all").click()
    places = """(host) => {
      const walk = document.createTreeWalker(host, NodeFilter.SHOW_TEXT), found = [];
      for (let node; (node = walk.nextNode());) {
        const range = document.createRange();
        range.selectNodeContents(node);
        const { left, width } = range.getBoundingClientRect();
        if (width) found.push(left);
      }
      return found;
    }"""
    for host in ("#query-0 .word", ".chip"):
        found = page.locator(host).first.evaluate(places)
        assert len(found) > 1 and found == sorted(found), host
    assert run.path.read_text().count('dir: "auto"') > 1


def test_hostile_feature_names_and_renderers_run_nothing(run, opened):
    images, labels = run.train
    run.train = (images.reshape(10, 30) / 255.0, labels)
    run.queries = (run.queries[0].reshape(3, 30) / 255.0, run.queries[1])
    run.options = {"features": [HOSTILE] * 30}
    run.write()
    page = opened(run.path, "#queries")
    assert page.evaluate(OWNED) is None
    assert HOSTILE in page.locator("#raised").inner_text()
    run.options = {"render": lambda role, i: [HOSTILE, {HOSTILE: HOSTILE}, np.eye(4)]}
    run.write()
    page = opened(run.path, "#queries")
    assert page.evaluate(OWNED) is None
    assert HOSTILE in page.locator("#raised").inner_text()
    assert page.locator("#raised img").first.evaluate("e => e.naturalWidth") == 4


def test_texts_are_shown_whole_on_a_click_and_searched(run, opened):
    long = "a first word, " * 40 + "and the last one"
    run.options = {"train_texts": [long] * 10, "query_texts": ["apple pie", "pear cake", long]}
    run.write()
    page = opened(run.path, "#queries/1")
    assert page.locator("#query-content").inner_text() == "pear cake"
    details = page.locator("#raised details").first
    assert "and the last one" not in details.inner_text()
    details.locator("summary").click()
    assert "and the last one" in details.inner_text()
    page.locator("#search").fill("APPLE")
    assert page.locator("#list .option").count() == 1


def test_tokens_are_coloured_by_their_share(run, opened):
    words = [[f"word{i}", "the", "end"] for i in range(10)]
    run.options = {
        "train_tokens": words,
        "token_scores": lambda q, some: (
            np.array([[i + 1.0, -0.5, 0.0] for i in some]),
            run.scores.values[q, some].numpy() - [i + 0.5 for i in some],
        ),
    }
    run.write()
    page = opened(run.path, "#queries/0")
    card = page.locator("#raised .card").first
    colours = card.locator(".tokens span").evaluate_all(
        "all => all.map(e => getComputedStyle(e).backgroundColor)"
    )
    assert colours[2] == "rgba(0, 0, 0, 0)"
    assert len(set(colours)) == 3
    best = run.scores.top(1, 0).raises[0]
    assert f"most through “word{best}”" in card.inner_text()
    assert "of the score not through any one token" in card.inner_text()


def test_tables_groups_and_zeros_draw(run, opened):
    images, labels = run.train
    run.train = (images.reshape(10, 30) / 255.0, labels)
    run.queries = (run.queries[0].reshape(3, 30) / 255.0, run.queries[1])
    run.write()
    page = opened(run.path, "#queries")
    assert "differs most in" in page.locator("#raised").inner_text()
    assert (
        "x29" in page.locator("#query-content").inner_text()
        or page.locator("#query-content details").count()
    )
    whole = run.scores
    for scores in (whole.group(["even", "odd"] * 5), replace(whole, values=torch.zeros(3, 10))):
        run.scores = scores
        run.write()
        for route in ("#queries", "#training"):
            opened(run.path, route)
    page = opened(run.path, "#queries")
    assert page.locator("#raised-hint").inner_text() == "No training row raised it."


def test_ticked_rows_leave_the_page(run, opened):
    images, labels = run.train
    run.train = (images.reshape(10, 30)[:, :3] / 255.0, labels)
    run.queries = (run.queries[0].reshape(3, 30)[:, :3] / 255.0, run.queries[1])
    ids = ["=1+1", "a,b", *(f"p{i}" for i in range(2, 10))]
    predicted = [(int(label) + 1) % 3 for label in labels]
    run.options = {
        "train_ids": ids, "features": ["one", "-two", "three"], "train_predictions": predicted,
        "train_losses": range(10), "self_influence": [-float(i) for i in range(10)],
    }  # fmt: skip
    run.write()
    page = opened(run.path, "#training", width=390, scheme="dark")
    page.locator("#suspicious-title").wait_for()
    assert "predicts" in page.locator(".labels").first.inner_text()
    assert page.locator(".card dl.row:visible").count() == 4, "the rows of the first suspects"
    page.evaluate(
        "() => document.querySelectorAll('#training [hidden]').forEach(e => e.hidden = 0)"
    )
    dropping(page, 0, 1)
    assert page.locator("#drop-python").inner_text() == "scores.predict(drop=torch.tensor([0, 1]))"
    with page.expect_download() as saved:
        page.locator("#drop-save").click()
    head, *rows = csv.reader(saved.value.path().read_text().splitlines())
    assert head == ["row", "id", "label", "predicted", "one", "'-two", "three"]
    assert [row[:4] for row in rows] == [
        [str(i), name, str(labels[i]), str(predicted[i])] for i, name in enumerate(["'=1+1", "a,b"])
    ]
    np.testing.assert_allclose([float(row[4]) for row in rows], run.train[0][:2, 0], rtol=1e-4)
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.locator("#spots summary").click()
    page.locator("#spots .spot").first.wait_for()
    assert page.locator("#spots .spot").count() == 10
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [320, 360, 400])
def test_on_a_telephone_the_verdict_and_the_keys_stay_in_sight(run, opened, width):
    """Beside the names of the pages there is no room for them: they were cut off."""
    run.write()
    page = opened(run.path, "#trust", width=width)
    page.evaluate("window.scrollTo(0, 600)")
    for each in ("#pages a:last-of-type", "#pages .pill", "#keys-open"):
        box = page.locator(each).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width
        assert 0 <= box["y"] and box["y"] + box["height"] <= 120


def test_the_command_that_makes_it_again_is_whole_and_can_be_copied(run, opened):
    run.options = {"command": "upweight demo --out a-rather-long-name " * 5}
    run.write()
    page = opened(run.path, "#trust", width=390)
    code = page.locator("pre.command").last
    assert code.evaluate("e => e.scrollWidth <= e.clientWidth"), "nothing is cut off at the edge"
    page.locator("#command-copy").click()
    page.locator("#command-done").get_by_text("Command copied.", exact=True).wait_for(timeout=5000)


def test_one_query_needs_no_list(run, opened):
    run.scores = replace(run.scores, values=run.scores.values[:1])
    run.queries = (run.queries[0][:1], run.queries[1][:1])
    run.write()
    page = opened(run.path, "#queries")
    assert page.locator("#list").is_hidden()
    assert page.locator("#raised .card").count() > 0


def test_sets_with_errors_draw_and_are_named(run, make_sets, opened):
    run.options = {"evidence": [make_sets(), make_sets(query=1)]}
    run.write()
    page = opened(run.path, "#trust")
    assert page.locator("#scatter .error").count() == 3
    assert "the 2 that lowered it" in page.locator("#readout").inner_text()
    assert "+1.20 ± 0.10" in page.locator("#readout").inner_text()
    assert "2 at random" in page.locator("#scatter-table").inner_text()
    assert "the mean of 3 retrainings" in page.locator("#scatter").inner_text()


def test_a_comparison_on_subsets_is_drawn(run, opened):
    from types import SimpleNamespace

    draw = torch.Generator().manual_seed(0)
    predicted = torch.randn(8, 3, generator=draw)
    lds = SimpleNamespace(predicted=predicted, measured=predicted + 1.0)
    found = SimpleNamespace(verdict=Verdict.SIZE, reason="so", notes=(), models=18, lds=lds)
    run.options = {"evidence": [found]}
    run.write()
    page = opened(run.path, "#trust")
    name = re.compile("on 8 random subsets of the data")
    assert page.get_by_role("img", name=name).is_visible()
    assert page.locator("#subsets .cloud").get_attribute("d").count("M") == 24
    page.locator("#subsets summary").click()
    rows = page.locator("#subsets tbody tr").all()
    for row in rows[:5]:  # each about its query's mean, so that the shift of 1 is gone
        predicted_, measured = (numbers(c.inner_text())[0] for c in row.locator("td").all())
        assert predicted_ == pytest.approx(measured, abs=2e-3)


def test_the_spectrum_draws_without_a_complaint(layerwise, opened):
    layerwise.write()
    page = opened(layerwise.path, "#trust")
    # Each in the legend; the second block has no positive eigenvalue to place.
    assert [page.locator(f"svg .{mark}").count() for mark in ("mean", "lambda")] == [2, 3]


def test_a_standard_error_stands_beside_its_score(run, opened):
    error = torch.full_like(run.scores.values, 1e-6)
    error[0, 4] = 10.0
    run.scores = replace(run.scores, error=error)
    run.write()
    page = opened(run.path)
    cards = page.locator("#page-queries .card:visible")
    told = cards.locator("dl").all_inner_texts()
    assert told and all("standard error" in each for each in told)
    chance = cards.filter(has_text="May be chance")
    assert chance.count() == 1 and chance.get_attribute("data-example") == "4"
    assert numbers(chance.locator("dl").inner_text().split("standard error")[1])[0] in (
        pytest.approx(10.0),
        pytest.approx(100 * 10 / abs(float(run.scores.values[0, 4])), rel=0.01),
    )
