"""What the docs and a plan say of methods is what the benchmark's file and the classes say."""

import importlib
import json
from pathlib import Path

import pytest

from upweight.cli.spec import REGISTRY
from upweight.front.choice import ROWS
from upweight.front.fidelity import fidelity_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def made(monkeypatch):
    """The scripts, and the benchmark's result."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quoted = importlib.import_module("fidelity_table")
    table = importlib.import_module("method_table")
    return quoted, table, json.loads(quoted.RESULTS.read_text(encoding="utf-8"))


def test_every_method_has_a_row(made):
    _, table, _ = made
    assert set(table.WORDS) == {cls.__name__ for cls in REGISTRY["method"]}
    for cls in REGISTRY["method"]:
        words = table.WORDS[cls.__name__]
        assert table.unit_of(cls, words)
        assert bool(words.unit) == isinstance(cls.unit, property)  # said where it varies, only
        if cls.takes_history is True and cls.__name__ != "TRAK":  # which can do without
            assert "recipe" in words.needs, cls
        file, _, anchor = words.page.partition("#")
        text = (ROOT / "docs" / "methods" / file).read_text(encoding="utf-8")
        assert f"`{cls.__name__}" in text or f"{cls.__name__}(" in text, cls
        heads = [line.strip("# ").lower() for line in text.splitlines() if line.startswith("##")]
        slugs = [head.replace(" ", "-").replace(",", "") for head in heads]
        assert anchor in ("", *slugs)


def test_the_page_is_what_the_script_makes(made):
    _, table, results = made
    text = table.PAGE.read_text(encoding="utf-8")
    assert text == table.page(results), "run benchmarks/method_table.py"
    lds = results["tasks"]["digits-mlp"]["methods"]["upweight EK-FAC"]["subsets-0.5"]["loss"]["lds"]
    (row,) = [line for line in text.splitlines() if "| EK-FAC |" in line]
    assert f"{lds[0]:.2f}<br><small>{lds[1]:.2f} … {lds[2]:.2f}</small>" in row


def test_no_contender_of_ours_is_left_out_of_the_table(made):
    _, table, results = made
    contenders = importlib.import_module("fidelity_ours").OURS
    known = {f"upweight {label}" for words in table.WORDS.values() for label in words.measured}
    assert known == {each.name for each in contenders if each.predicts and each.name != "loss"}
    lines = table.fidelity_rows(results, dict.fromkeys(table.WORDS, ""))
    assert all(set(cells) - {"–"} for _, _, *cells in lines)  # no row of dashes alone
    held = {m for task in results["tasks"].values() for m in task["methods"]}
    assert {m for m in held if m.startswith("upweight ")} <= known
    assert {row.measured_as for row in ROWS} - {""} <= known


def test_the_tables_of_the_pages_are_those_of_the_benchmark(made):
    quoted, _, results = made
    for file in quoted.PAGES:
        text = file.read_text(encoding="utf-8")
        assert quoted.PLACE.search(text)
        assert text == quoted.written(text, results, quoted.contenders()), "run fidelity_table.py"


def test_the_time_of_a_stack_is_that_of_its_attribution_too(made):
    quoted, _, _ = made

    def row(lds, cpu_seconds):
        ranked = {"lds": [lds, lds - 0.1, lds + 0.1], "ceiling": [0.8, 0.7, 0.9]}
        return {
            "status": "ok",
            "cpu_seconds": cpu_seconds,
            "removals": {"loss": {"slope": [1.0, 0.9, 1.1]}},
            quoted.HALVES: {"loss": ranked},
        }

    alone, beside = "upweight stacked SOURCE, 10 halves", "upweight stacked SOURCE, 40 halves"
    methods = {alone: row(0.6, 30.0), f"{beside}, beside the GGN": row(0.76, 120.0)}
    task = {"training_seconds": 2.0, "methods": methods}
    _, _, ten, forty = quoted.stacked({"tasks": {"a task": task}}).splitlines()
    assert "| – | 5 | 15 | 0.60 [0.50, 0.70] | 0.750 [0.625, 0.875] of 0.80 |" in ten
    # The first that reaches 0.9 of the ceiling.
    assert "| **beside** | **20** | **60** |" in forty


def test_what_a_plan_quotes_is_that_of_the_benchmark(made):
    quoted, _, results = made
    assert quoted.TABLE.read_text(encoding="utf-8") == quoted.text(results)
    for row in ROWS:
        assert bool(fidelity_of(row.measured_as)) == (row.measured_as in quoted.measured(results))
    first = {each.task: each for each in fidelity_of("upweight EK-FAC")}["digits-mlp"]
    truth = results["tasks"]["digits-mlp"]["methods"]["upweight EK-FAC"]["subsets-0.5"]["loss"]
    assert first.lds[0] == pytest.approx(truth["lds"][0], abs=5e-4)
    assert first.ceiling[0] == pytest.approx(truth["ceiling"][0], abs=5e-4)


def test_steps_are_for_what_is_better_than_all_that_is_cheaper(made):
    _, table, _ = made
    points = [(1.0, 0.2, "a"), (5.0, 0.5, "d"), (2.0, 0.1, "b"), (4.0, 0.21, "c"), (6.0, 0.4, "e")]
    assert [name for _, _, name in table.best_for_price(points)] == ["a", "d"]
