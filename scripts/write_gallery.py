"""Run the examples and write docs/gallery.md: what each asks, and what it prints.

python scripts/write_gallery.py KEPT [--run]

KEPT is a folder for what examples print, one text file each, named as the example. With --run those
that have none are run first, which takes about half an hour in all.
"""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = 14
"""Printed lines of an example that are shown."""
WIDE = 150
PICTURES = {
    "03_one_row_of_a_regression": "statsmodels-influence",
    "04_image_classifier": "tutorial-checkpoint",
    "10_robustness": "statsmodels-fragile",
    "22_hugging_face": "tutorial-text",
    "02_sklearn": "tutorial-table",
}
"""Figures of the same question, by draw_tutorials.py and draw_statsmodels.py beside this."""
INTRODUCTION = """\
# Gallery

Every program of the folder `examples/`: what it asks and, for the quick ones, what it prints. All
run on real data, and end with a model that was trained again where they claim something. Numbers
were printed on one machine; another may differ in the last digits.

"""


def output(example: Path, kept: Path, run: bool) -> str:
    """What an example printed; empty where it was not run."""
    file = kept / f"{example.stem}.txt"
    if run and not file.exists():
        done = subprocess.run([sys.executable, str(example)], stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            file.write_text(done.stdout, encoding="utf-8")
    return file.read_text(encoding="utf-8") if file.exists() else ""


def entry(example: Path, printed: str) -> str:
    """A section of the page."""
    told = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    title, *rest = told.split("\n\n")
    title, _, asks = " ".join(title.split()).rstrip(".").partition(": ")
    about = "\n".join(part for part in rest if not re.search(r"^ {4}|--data", part, re.MULTILINE))
    lines = [line[:WIDE] for line in printed.rstrip().splitlines()]
    if len(lines) > LINES:
        lines = [*lines[:LINES], "…"]
    asks = f"**{asks[:1].upper()}{asks[1:]}**" if asks else ""
    parts = [f"## {title}", asks, f"`examples/{example.name}`", about]
    if lines:
        parts.append("\n".join(["```", *lines, "```"]))
    if example.stem in PICTURES:
        parts.append(f"![The same question, drawn](images/{PICTURES[example.stem]}.png)")
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kept", type=Path, help="folder of what examples printed")
    parser.add_argument("--run", action="store_true", help="run those that have printed nothing")
    asked = parser.parse_args()
    asked.kept.mkdir(exist_ok=True)
    examples = sorted(ROOT.glob("examples/[0-9]*.py"))
    entries = [entry(each, output(each, asked.kept, asked.run)) for each in examples]
    page = INTRODUCTION + "\n\n".join(entries) + "\n"
    (ROOT / "docs" / "gallery.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
