"""The demo's files, on fewer and coarser digits than the command itself uses."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from upweight.cli import demo, network_demo
from upweight.cli.networks import NetworkRecipe
from upweight.scores import Scores


@pytest.fixture
def small(monkeypatch):
    full = demo.digits

    def digits():
        train, test = full()
        return (
            demo.Split(train.X[::20], train.y[::20]),
            demo.Split(test.X[::20], test.y[::20]),
        )

    monkeypatch.setattr(demo, "digits", digits)
    monkeypatch.setattr(demo, "QUERIES", 3)
    monkeypatch.setattr(demo, "REMOVALS", 5)
    monkeypatch.setattr(demo, "PENALTY", 0.1)


def test_demo_writes_what_it_says(small, tmp_path, capsys):
    demo.run(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["loo"]) == {"first_order", "leverage_corrected"}
    for name in ("pearson", "spearman", "slope", "n"):
        assert name in summary["loo"]["leverage_corrected"]
    assert summary["loo"]["first_order"]["n"] == 5
    assert summary["loo"]["leverage_corrected"]["pearson"] > 0.99
    assert 0.9 < summary["loo"]["leverage_corrected"]["slope"] < 1.1
    assert summary["seconds"] > 0
    scores = Scores.load(tmp_path / "out" / "scores")
    assert scores.values.shape == (3, 250)
    assert_close(scores.removal().values, -scores.values)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Can I trust this?" in page
    assert "raised" in capsys.readouterr().out


@pytest.fixture
def quick(small, monkeypatch):
    """Few removals and seeds, of networks that see the digits once."""
    monkeypatch.setattr(network_demo, "QUERIES", 3)
    monkeypatch.setattr(network_demo, "CHECKED", 2)
    monkeypatch.setattr(network_demo, "TOGETHER", 5)
    monkeypatch.setattr(network_demo, "RANDOM", 1)
    monkeypatch.setattr(network_demo, "SEEDS", 2)
    monkeypatch.setattr(
        network_demo, "NetworkRecipe", lambda network: NetworkRecipe(network, epochs=3, batch=25)
    )
    monkeypatch.setattr(network_demo.os, "cpu_count", lambda: 1)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_network_demo_writes_what_it_says(quick, network, tmp_path, capsys):
    network_demo.run(tmp_path / "out", network)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["model"] == network
    assert set(summary["loo"]) == {"query_0", "query_1"}
    assert summary["loo"]["query_0"]["n"] == 2 * 4 + 1
    rows = summary["removals"]
    assert len(rows) == 2 * 9
    assert all(len(row["by_seed"]) == 2 for row in rows)
    # −Σ S: removing what lowered its loss must be predicted to raise it, and the other way round.
    own = [row for row in rows if row["query"] == row["chosen_for"]]
    assert all((row["predicted"] > 0) == ("lowered" in row["removed"]) for row in own)
    health = summary["provenance"]["health"]
    assert health["contraction_error"] <= health["tolerance"]
    assert health["gradient_norm"] > 0
    assert Scores.load(tmp_path / "out" / "scores").values.shape == (3, 250)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Damping against the spectrum" in page
    assert "sets of 5 training images were really removed" in page
    assert "at random" in capsys.readouterr().out


def test_the_recipe_gives_the_same_network_for_the_same_seed_and_leaves_the_generator(quick):
    (X, y), recipe = demo.images()[0].data, NetworkRecipe("mlp", epochs=1)
    before = torch.random.get_rng_state()
    first, second = (recipe.trained(X, y).state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = replace(recipe, seed=1).trained(X, y).state_dict()
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_an_example_of_weight_zero_is_not_learned_from(quick):
    (X, y), recipe = demo.images()[0].data, NetworkRecipe("cnn", epochs=1)
    w = torch.ones(len(X))
    w[3] = 0
    other = y.clone()
    other[3] = (y[3] + 1) % 10
    first, second = (recipe.trained(X, labels, w).state_dict() for labels in (y, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
