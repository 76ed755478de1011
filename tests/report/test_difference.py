"""Two texts side by side: what differs is marked, and said in words."""

import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import upweight as uw
from upweight.report.duplicates import duplicates
from upweight.report.rendering import script_of

BASE = (
    "Dear friend, the meeting of the garden club is on Monday at nine, in the old hall by the "
    "river. Bring a chair, a cup and the seeds that you kept from last year."
)
OTHER = BASE.replace("Monday", "Friday").replace(" old", "").replace("a cup", "two cups, bread")
TEXTS = [BASE, OTHER, *(f"something else altogether, number {i} of a few" * 2 for i in range(8))]
LONG = " ".join(f"word{i}" for i in range(300))


def marked(page, place):
    """What is marked in the texts of a comparison."""
    return page.locator(place).locator(".two-texts > div").evaluate_all(
        "all => all.map(e => [...e.querySelectorAll('mark.only')].map(m => m.textContent))"
    )  # fmt: skip


@pytest.fixture
def texts(run):
    run.options = {"train_texts": TEXTS, "query_texts": [OTHER, "pear cake", LONG]}
    return run


def test_a_pair_that_is_nearly_the_same_says_what_differs(texts, opened):
    texts.write()
    page = opened(texts.path, "#training")
    pair = "#training .pairs li:has(.difference)"
    first = page.locator(pair).first
    names = first.locator(".two-texts b").all_inner_texts()
    assert sorted(names) == ["#0", "#1"]
    only = dict(zip(names, marked(page, f"{pair} >> nth=0"), strict=True))
    assert only == {"#0": ["Monday", "old", "a cup"], "#1": ["Friday", "two cups, bread"]}
    assert first.locator("ul li").all_inner_texts() == [
        f"only in {name}: " + ", ".join(f"“{text}”" for text in only[name]) for name in names
    ]
    mark = first.locator("mark.only").first.evaluate(
        "e => [getComputedStyle(e).fontWeight, getComputedStyle(e).borderBottomWidth]"
    )
    assert mark == ["650", "2px"], "told by more than colour"


def test_a_query_is_compared_with_an_example_that_is_like_it(texts, opened):
    texts.write()
    page = opened(texts.path, "#queries/0")
    card = page.locator('.card[data-example="0"]').first
    details = card.locator("details:has-text('What differs from the query')")
    assert re.search(r"\(8\d % of the words are the same\)", details.inner_text())
    assert details.locator(".difference").count() == 0, "made when it is opened"
    summary = details.locator("summary")
    summary.focus()
    page.keyboard.press("Enter")
    details.locator(".difference").wait_for()
    assert details.locator(".two-texts b").all_inner_texts() == ["#0", "the query"]
    assert marked(page, '.card[data-example="0"] .difference >> nth=0')[0][0] == "Monday"
    other = page.locator('.card[data-example="5"]').first
    assert other.locator("details:has-text('What differs')").count() == 0, "unlike: all of it"


def test_long_texts_are_told_by_what_is_around_the_difference(texts, opened):
    changed = LONG.replace("word150 ", "another ")
    texts.options = {"train_texts": [LONG, changed, *TEXTS[2:]]}
    texts.write()
    page = opened(texts.path, "#training")
    text = page.locator("#training .two-texts .words").first.inner_text()
    assert text.startswith("[… 138 words alike …] word138 ")
    assert text.endswith(" word162 [… 137 words alike …]")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def differ(browser):
    """What the script makes of two texts: [text, whether it is marked] of each."""
    page = browser.new_page()
    run = f"""texts => {{ {script_of("difference")}
      const {{ cut, sides }} = difference(...texts);
      return [cut, ...sides.map(runs => runs.map(run => [run.text, run.marked]))]; }}"""
    yield lambda one, two: page.evaluate(run, [one, two])
    page.close()


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        ("The  same\n", "the same", [[], []]),
        ("你好世界", "你好，世人", [["界"], ["，", "人"]]),
        ("a b c", "", [["a b c"], []]),
        ("now, or never", "now or never!", [[","], ["!"]]),
        ("<img src=x> a 😀", "<b> a 😃", [["img src=x", "😀"], ["b", "😃"]]),
        (" x\ny ", "y", [["x"], []]),
    ],
)
def test_what_is_marked(one, two, found, differ):
    _, *sides = differ(one, two)
    assert [[text for text, is_marked in runs if is_marked] for runs in sides] == found
    assert ["".join(text for text, _ in runs) for runs in sides] == [one, two], "nothing is lost"


def test_unmarked_is_a_longest_common_subsequence(differ):
    draw = np.random.default_rng(0)
    for size in (3, 8, 30):
        one, two = (" ".join(draw.choice(list("abcde"), draw.integers(1, size))) for _ in "12")
        kept = [
            " ".join(text for text, is_marked in runs if not is_marked).split()
            for runs in differ(one, two)[1:]
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) == longest_common(one.split(), two.split())


def longest_common(a, b):
    """The length of the longest common subsequence, by its recursion."""
    before = [0] * (len(b) + 1)
    for x in a:
        now = [0]
        for j, y in enumerate(b):
            now.append(before[j] + 1 if x == y else max(before[j + 1], now[j]))
        before = now
    return before[-1]


def test_of_very_long_differences_a_beginning_is_compared(differ):
    cut, mine, theirs = differ("a " * 1500 + "z", "b " * 1500 + "z")
    assert cut
    assert [len(text.split()) for text, is_marked in mine if is_marked] == [1000]
    assert theirs[-1][0].split()[-1] == "z"


def test_texts_that_the_data_hold_are_compared_without_being_named(opened, tmp_path):
    kinds = ["spam", "ham"] * 5
    pipe = make_pipeline(TfidfVectorizer(), LogisticRegression(tol=1e-8)).fit(TEXTS, kinds)
    scores = uw.attribute(pipe, (TEXTS, kinds), [OTHER])
    page = opened(scores.report(tmp_path / "page.html"), "#training")
    names = page.locator("#training .pairs li").filter(has=page.locator("mark.only")).first
    assert sorted(names.locator(".two-texts b").all_inner_texts()) == ["#0", "#1"]
    nearest = duplicates(TEXTS, None, range(10)).cosines[0]
    assert names.locator("p.hint").first.inner_text() == f"cosine {nearest:.3f}"
