"""The page in a real browser, where one is installed: its script runs, without error."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
HOSTILE = "</script><script>document.documentElement.dataset.owned='yes'</script><img src=x>"


class Dom(HTMLParser):
    """Attributes of the root, counts of tags, and texts and attributes by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root: dict[str, str | None] = {}
        self.classes: list[str] = []
        self.tags: list[str] = []
        self.text: dict[str, str] = {}
        self.addresses: list[str] = []
        self._inside: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        if tag == "html":
            self.root = known
        self.classes += (known.get("class") or "").split()
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in ("meta", "link", "input", "br", "img"):
            self._inside.append(known.get("id"))

    def handle_endtag(self, tag):
        if self._inside:
            self._inside.pop()

    def handle_data(self, data):
        for name in self._inside:
            if name:
                self.text[name] = self.text.get(name, "") + data


@pytest.fixture
def dom(tmp_path):
    """What a page has become after its script ran."""

    def opened(path, fragment: str = "") -> Dom:
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri() + fragment,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        # Messages of the page itself: script errors and refusals of its content policy.
        assert "CONSOLE" not in done.stderr, re.findall(r".*CONSOLE.*", done.stderr)
        return Dom(done.stdout)

    return opened


def test_the_script_runs_and_draws_everything(run, make_check, dom):
    run.options = {"checks": [make_check(), make_check(label="corrected", scale=1.4)], "k": 2}
    run.write()
    page = dom(run.path)
    assert page.root.get("data-ready") == "yes"
    assert "data-error" not in page.root
    assert page.classes.count("dot") == 2 * 3 + 2 + 2  # dots, then keys of the legend and table
    assert page.classes.count("card") == 4
    assert page.classes.count("option") == 3
    assert page.text["bar-text"] == "Query 0 · label 0"
    assert "#2" in page.text["readout"]
    assert page.text["readout"].count("predicted") == 2
    assert all(address.startswith("#") for address in page.addresses)


def test_an_address_can_name_the_query(run, dom):
    run.options = {"values": [0.5, 1.5, 2.5], "predictions": [0, 0, 0]}
    run.write()
    page = dom(run.path, "#query=2")
    assert page.text["bar-text"] == "Query 2 · label 2 · predicted 0 · loss 2.50"


def test_hostile_labels_run_nothing(run, make_check, dom):
    run.options = {
        "names": [HOSTILE] * 3,
        "predictions": [HOSTILE] * 3,
        "title": HOSTILE,
        "checks": [make_check(label=HOSTILE)],
    }
    run.write()
    page = dom(run.path)
    assert page.root.get("data-ready") == "yes"
    assert "data-owned" not in page.root
    assert "img" not in page.tags
    assert HOSTILE in page.text["query-facts"]


def test_tables_groups_and_a_single_query_draw(run, dom):
    images, labels = run.train
    run.train = (images.reshape(10, 30) / 255.0, labels)
    run.queries = (run.queries[0].reshape(3, 30) / 255.0, run.queries[1])
    run.write()
    page = dom(run.path)
    assert page.root.get("data-ready") == "yes"
    assert "differs most in" in page.text["raised"]
    run.scores = run.scores.group(["even", "odd"] * 5)
    run.write()
    assert dom(run.path).root.get("data-ready") == "yes"


def test_scores_of_zero_draw(run, dom):
    from dataclasses import replace

    import torch

    run.scores = replace(run.scores, values=torch.zeros(3, 10))
    run.write()
    page = dom(run.path)
    assert page.root.get("data-ready") == "yes"
    assert "No training image raised it" in page.text["raised-hint"]


def test_sets_with_errors_draw_and_are_named(run, make_sets, dom):
    run.options = {"checks": [make_sets(), make_sets(query=1)]}
    run.write()
    page = dom(run.path)
    assert page.root.get("data-ready") == "yes"
    assert page.classes.count("error") == 3
    assert "the 2 that lowered it" in page.text["readout"]
    assert "+1.20 ± 0.10" in page.text["readout"]
    assert "2 at random" in page.text["scatter-table"]
    assert "the mean of 3 retrainings" in page.text["scatter"]


def test_the_spectrum_draws_without_a_complaint(layerwise, dom):
    layerwise.write()
    page = dom(layerwise.path)
    assert page.root.get("data-ready") == "yes"
    # Each in the legend; the second block has no positive eigenvalue to place.
    assert [page.classes.count(mark) for mark in ("mean", "lambda")] == [2, 3]
