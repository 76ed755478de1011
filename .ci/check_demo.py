"""Does a demo's report open in a browser and do its numbers hold? Used by .ci/run."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def browse(report: Path, *what: str) -> str:
    """What headless Chromium prints about a page, in a fresh profile and without a network."""
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            ["chromium", *FLAGS, f"--user-data-dir={profile}", *what, report.resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout


def check_softmax(summary: dict) -> None:
    """An exact Hessian predicts single removals to about one part in a hundred."""
    corrected, first = summary["loo"]["leverage_corrected"], summary["loo"]["first_order"]
    assert corrected["pearson"] >= 0.999, corrected
    assert 0.98 <= corrected["slope"] <= 1.02, corrected
    assert first["n"] == corrected["n"] == 60, first


def check_network(summary: dict) -> None:
    """For a network: the right sign on average, and far more than sets drawn at random do."""
    health = summary["provenance"]["health"]
    assert health["contraction_error"] <= health["tolerance"], health["contraction_error"]
    rows = summary["removals"]
    own = [
        row["actual"] if row["predicted"] > 0 else -row["actual"]
        for row in rows
        if row["query"] == row["chosen_for"] and "most" in row["removed"]
    ]
    # The median: one of nine may meet an unlucky seed.
    random = [abs(row["actual"]) for row in rows if row["chosen_for"] is None]
    assert sum(own) / len(own) > 3 * statistics.median(random), (own, random)
    for name, found in summary["loo"].items():
        assert found["pearson"] > 0.5, (name, found)


def main() -> None:
    """Check summary.json, then render report.html and look for what its script draws."""
    out = Path(sys.argv[1])
    summary = json.loads((out / "summary.json").read_text())
    (check_softmax if summary["model"] == "softmax" else check_network)(summary)
    report = out / "report.html"
    page = browse(report, "--dump-dom")
    assert 'data-ready="yes"' in page, "the report's script did not run to its end"
    assert "http://" not in page.replace("http://www.w3.org/", ""), "the report refers elsewhere"
    screenshot = out / "report.png"
    browse(report, f"--screenshot={screenshot.resolve()}", "--window-size=1200,1600")
    with Image.open(screenshot) as picture:
        colors = len(picture.convert("RGB").getcolors(maxcolors=2**24))
    assert colors > 100, f"the report's picture has {colors} colors: nothing was drawn"
    print(f"report of {len(page) / 1e6:.1f} MB rendered; {json.dumps(summary['loo'])}")


if __name__ == "__main__":
    main()
