"""The demo's files, on fewer and coarser digits than the command itself uses."""

import json

import pytest
from torch.testing import assert_close

from upweight.cli import demo
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
