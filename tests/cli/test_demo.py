"""The demo's files, on fewer and coarser digits than the command itself uses."""

import json
from dataclasses import replace

import pytest
from torch import nn
from torch.testing import assert_close

import upweight as uw
from upweight.cli import demo
from upweight.scores import Scores
from upweight.verdict import Verdict


@pytest.fixture
def small(monkeypatch):
    full = demo.digits

    def digits(dtype):
        return [(X[::20], y[::20]) for X, y in full(dtype)]

    monkeypatch.setattr(demo, "digits", digits)
    monkeypatch.setattr(demo, "QUERIES", 3)
    monkeypatch.setattr(demo, "REMOVALS", 5)
    subject = replace(demo.MODELS["softmax"], penalty=uw.L2(0.1))
    monkeypatch.setitem(demo.MODELS, "softmax", subject)


@pytest.fixture
def coarse(small, monkeypatch):
    """A quarter of the pixels: the Hessian has (10 · 197)² entries, not (10 · 785)²."""
    full = demo.digits

    def digits(dtype):
        return [(X[..., ::2, ::2], y) for X, y in full(dtype)]

    def linear():
        return nn.Sequential(nn.Flatten(), nn.Linear(196, 10)).double()

    monkeypatch.setattr(demo, "digits", digits)
    monkeypatch.setitem(demo.MODELS, "softmax", replace(demo.MODELS["softmax"], init=linear))


def test_demo_writes_what_it_says(coarse, tmp_path, capsys):
    demo.run(tmp_path / "out", "softmax")
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
    assert_close(scores.removal([[0, 1]]).values[:, 0], -scores.values[:, :2].sum(dim=1))
    assert not scores.checks  # five removals are too few for a verdict
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Can I trust this?" in page
    assert "raised" in capsys.readouterr().out


def test_the_scores_carry_what_the_removals_said(coarse, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "REMOVALS", 8)
    demo.run(tmp_path / "out", "softmax")
    (found,) = Scores.load(tmp_path / "out" / "scores").checks
    assert found.verdict is Verdict.SIZE
    assert found.models == 8 + 1
    assert found.reason.endswith("on the removals that were retrained")
    assert capsys.readouterr().out.strip().startswith(f"{found.verdict}: {found.reason}.")


@pytest.fixture
def quick(small, monkeypatch):
    """Few removals and seeds, of networks that see the digits once."""
    monkeypatch.setattr(demo, "CHECKED", 2)
    monkeypatch.setattr(demo, "TOGETHER", 5)
    monkeypatch.setattr(demo, "RANDOM", 1)
    monkeypatch.setattr(demo, "SEEDS", 2)
    for name in ("mlp", "cnn"):
        subject = demo.MODELS[name]
        recipe = replace(subject.recipe, epochs=3, batch=25)
        monkeypatch.setitem(demo.MODELS, name, replace(subject, recipe=recipe))
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 1)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_network_demo_writes_what_it_says(quick, network, tmp_path, capsys):
    demo.run(tmp_path / "out", network)
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
    scores = Scores.load(tmp_path / "out" / "scores")
    assert scores.values.shape == (3, 250)
    (found,) = scores.checks
    assert found.models == 2 * (2 * 4 + 1 + 1)  # two seeds, of each set and of all digits
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Damping against the spectrum" in page
    assert "sets of 5 training images were really removed" in page
    assert "at random" in capsys.readouterr().out
