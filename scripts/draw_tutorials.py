"""Run the tutorials as they stand on their pages, and draw their pictures.

python scripts/draw_tutorials.py [--print] [PAGE ...]

Blocks of Python run in order, and so do the commands of a console; `--print` shows what they say.
Pages of the library are photographed by headless Chromium, which playwright must find.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from PIL import Image

DOCS = Path(__file__).resolve().parents[1] / "docs"
IMAGES = DOCS / "images"
PARTS = re.compile(r"```(python|console)\n(.*?)```", re.DOTALL)


def ran(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """The names after the blocks of a page."""
    for kind, block in PARTS.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            if block.startswith("# project.py"):
                Path("project.py").write_text(block, encoding="utf-8")
            exec(compile(block, page, "exec"), names)
            continue
        for line in block.splitlines():
            command = line.removeprefix("$ ").partition(" # ")[0].strip()
            if command.startswith("pip install"):
                continue
            if command.startswith("unzip"):
                Path("other").mkdir()
                os.chdir("other")
                command = command.replace("run.zip", "../run.zip")
            print(f"$ {command}", flush=True)
            subprocess.run(command, shell=True, check=True)
    return names


def photograph(
    page: str | Path,
    name: str,
    script: str = "",
    width: int = 1000,
    height: int = 640,
    scheme: Literal["light", "dark"] = "light",
) -> None:
    """A picture of a page of the library, after `script`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM"))
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        tab.goto(Path(page).absolute().as_uri())
        tab.wait_for_timeout(500)
        if script:
            tab.evaluate(script)
            tab.wait_for_timeout(500)
        tab.screenshot(path=IMAGES / f"{name}.png")
        browser.close()
    with Image.open(IMAGES / f"{name}.png") as picture:
        smaller = picture.convert("RGB").quantize(64)
    smaller.save(IMAGES / f"{name}.png", optimize=True)


def tab(words: str) -> str:
    """The script that opens a tab of a page."""
    return f"[...document.querySelectorAll('nav a')].find(t => t.textContent == '{words}').click()"


def table(names: dict[str, Any]) -> None:
    """A patient and the training patients behind it."""
    photograph("patients.html", "tutorial-table", tab("Queries"), height=1080)


def results(names: dict[str, Any]) -> None:
    """The coefficient with and without the states that carry it."""
    figure = names["ax"].figure
    figure.set_size_inches(7, 3.6)
    figure.savefig(IMAGES / "tutorial-results.png", dpi=110, bbox_inches="tight")


def checkpoint(names: dict[str, Any]) -> None:
    """The digit that is misread, and the images that speak against and for it."""
    (X, y), (X_test, y_test) = names["train"], names["test"]
    query, found = names["wrong"], names["scores"].top(5, names["wrong"])
    figure, axes = plt.subplots(2, 6, figsize=(7.4, 3.4))
    said = int(names["model"](X_test[query : query + 1]).argmax())
    for row, (title, at) in enumerate(
        [("lower its margin", found.lowers), ("raise its margin", found.raises)]
    ):
        for k, ax in enumerate(axes[row]):
            ax.axis("off")
            if k == 0 and row == 0:
                ax.imshow(X_test[query, 0], cmap="gray_r")
                ax.set_title(f"a {int(y_test[query])},\ntaken for {said}", fontsize=10)
            elif k and k <= len(at):
                ax.imshow(X[at[k - 1], 0], cmap="gray_r")
                label = f"a {int(y[at[k - 1]])}"
                ax.set_title(f"{title}:\n{label}" if k == 1 else f"\n{label}", fontsize=10)
    figure.tight_layout()
    figure.savefig(IMAGES / "tutorial-checkpoint.png", dpi=110)


def text(names: dict[str, Any]) -> None:
    """The loss of the query with all texts, and after training without some."""
    without, found = names["without"], names["scores"].top(3, 0)
    bars = {
        "all texts": float(without.baseline[0]),
        "without ten others": float(without.values[1, 0]),
        "without the ten strongest": float(without.values[0, 0]),
    }
    figure, ax = plt.subplots(figsize=(7.4, 3.1))
    drawn = ax.barh(list(bars), list(bars.values()), color=["0.6", "0.6", "tab:orange"], height=0.6)
    ax.bar_label(drawn, fmt="%.0f", padding=3)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("loss of the held-out sentence, trained again (nats)")
    start = " ".join(names["held_out"][0].split())[:58]
    strongest = "\n".join(names["texts"][i][:70] + " …" for i in found.lowers[:3])
    ax.set_title(f"“{start} …”\nstrongest:\n{strongest}", fontsize=9, loc="left")
    figure.tight_layout()
    figure.savefig(IMAGES / "tutorial-text.png", dpi=110)


def audit(names: dict[str, Any]) -> None:
    """The page of the run that was received."""
    photograph("run/report.html", "tutorial-audit")


def main() -> None:
    """Run the pages that are named, or all, each in an empty folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="show what the blocks print")
    parser.add_argument("pages", nargs="*", help="names of tutorials; all of them if none")
    asked = parser.parse_args()
    draw = {f.__name__: f for f in (table, results, checkpoint, text, audit)}
    for name in asked.pages or draw:
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as kept:
            os.chdir(folder)
            kept.callback(os.chdir, before)
            if not asked.print:
                kept.enter_context(contextlib.redirect_stdout(sys.stderr))
            draw[name](ran(DOCS / "tutorials" / f"{name}.md", {"__name__": "tutorial"}))


if __name__ == "__main__":
    main()
