"""Run the demo and the example projects of texts and rows, and draw the pictures of docs/report.md.

python scripts/draw_report.py

Pages are photographed by headless Chromium, as by draw_tutorials.py beside this.
"""

import ast
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from draw_tutorials import photograph, tab

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = ROOT / "examples" / "projects"
MAILS = ROOT.parent / "shared" / "data" / "spamassassin.jsonl.gz"
"""Unless the environment variable SPAMASSASSIN names another file."""
TRUST, TRAINING = tab("Can I trust this?"), tab("Training set")
TICKED = "[...document.querySelectorAll('.card input[type=checkbox]')].slice(0, 2)"
TICKED += ".forEach(box => box.click())"
WIDTH = 1180


def project(name: str, folder: Path) -> Path:
    """The report of an example project, by the commands of its docstring."""
    source = (PROJECTS / name / "project.py").read_text(encoding="utf-8")
    folder.mkdir()
    (folder / "project.py").write_text(source, encoding="utf-8")
    said = ast.get_docstring(ast.parse(source)) or ""
    for line in said.replace("\\\n", "").splitlines():
        if line.startswith("    upweight "):
            environment = {"SPAMASSASSIN": str(MAILS), **os.environ}
            subprocess.run(shlex.split(line), cwd=folder, check=True, env=environment)
    return folder / "run" / "report.html"


def main() -> None:
    """Every picture."""
    with tempfile.TemporaryDirectory() as work:
        demo = Path(work) / "demo"
        subprocess.run(["upweight", "demo", "--out", str(demo)], check=True)
        page = demo / "report.html"
        photograph(page, "report", TRUST, WIDTH, 1000)
        photograph(page, "report-queries", TICKED, WIDTH, 1080)
        photograph(page, "report-training", TRAINING, WIDTH, 1000)
        for name in ("text", "table"):
            page = project(name, Path(work) / name)
            scheme = "dark" if name == "text" else "light"
            photograph(page, f"report-{name}", "", WIDTH, 900, scheme)
            photograph(page, f"report-{name}-trust", TRUST, WIDTH, 900)
            photograph(page, f"report-{name}-training", TRAINING, WIDTH, 900)


if __name__ == "__main__":
    main()
