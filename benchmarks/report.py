"""Does the report of 50 000 training images and 1 000 queries open at once and scroll smoothly?

Softmax regression on MNIST: EK-FAC scores of the first 1 000 test images with the first 50 000
training images, then `upweight.report.html`, then headless Chromium: how long until the first
picture is painted, from the beginning of the navigation; how long frames take while it scrolls; how
long a tick of "what if I drop these" takes until its number is there. Sizes and times, no judgement
of the scores.
"""

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import DATA, environment

import upweight as uw
from upweight import report

HERE = Path(__file__).resolve().parent
PENALTY = 1e-3

FIRST_PICTURE = """
(() => {
  const look = () => {
    const tile = [...document.querySelectorAll(".tile")].find(e => e.getClientRects().length);
    if (!tile) return requestAnimationFrame(look);
    const image = new Image();
    image.src = getComputedStyle(tile).backgroundImage.slice(5, -2);
    // Decoded, and two frames later on the screen.
    image.decode().then(() => requestAnimationFrame(() => requestAnimationFrame(
      () => { document.documentElement.dataset.picture = performance.now(); })));
  };
  document.addEventListener("DOMContentLoaded", look);
})();
"""

SCROLL = """
([selector, steps]) => new Promise(done => {
  const node = selector ? document.querySelector(selector) : document.scrollingElement;
  const frames = [];
  let last = performance.now(), k = 0;
  const step = now => {
    frames.push(now - last);
    last = now;
    node.scrollTop += 120;
    node.scrollLeft += 120;
    if (++k < steps) requestAnimationFrame(step); else done(frames.slice(2));
  };
  requestAnimationFrame(step);
})
"""

TICK = """
() => new Promise(done => {
  const box = document.querySelector(".drop-tick input:not(:checked)"), start = performance.now();
  const look = () => {
    if (document.querySelector("#drop-change")) done(performance.now() - start);
    else requestAnimationFrame(look);
  };
  box.click();
  look();
})
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data", type=Path, default=DATA, metavar="DIR",
        help="the folder of mnist.npz, with X [60000, 28, 28] uint8, y, Xt and yt (default: "
        "../shared/data from the repository's root)",
    )  # fmt: skip
    add("--n", type=int, default=50_000, help="training images (default: 50000)")
    add("--queries", type=int, default=1_000, help="test images (default: 1000)")
    add("--runs", type=int, default=5, help="times the page is opened (default: 5)")
    add("--report", type=Path, metavar="FILE", help="keep the report here")
    add("--chromium", default=shutil.which("chromium"), help="the browser's executable")
    add("--out", type=Path, metavar="FILE", help="the result file (default: "
        "benchmarks/results/report.json for a run with all defaults, else none)")  # fmt: skip
    given = parser.parse_args()
    if given.out is None and (given.n, given.queries, given.runs) == (50_000, 1_000, 5):
        given.out = HERE / "results" / "report.json"
    return given


def main() -> None:
    """Train, score, write, open."""
    given = arguments()
    where = environment()
    with np.load(given.data / "mnist.npz") as held:
        images, labels = held["X"][: given.n], held["y"][: given.n].astype(np.int64)
        asked, answers = held["Xt"][: given.queries], held["yt"][: given.queries].astype(np.int64)
    train = (flat(images), torch.from_numpy(labels))
    queries = (flat(asked), torch.from_numpy(answers))
    model = trained(*train)
    task = uw.Task(model, loss=uw.CrossEntropy(), penalty=uw.L2(PENALTY))
    started = time.perf_counter()
    fitted = uw.Influence(curvature=uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
    scores = fitted.attribute(queries, measure=uw.Loss())
    scored = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = given.report or Path(folder) / "report.html"
        before, started = peak_bytes(), time.perf_counter()
        report.html(
            scores, path,
            report.Display(
                title="Softmax regression on MNIST", names=[str(digit) for digit in range(10)],
                train_images=images, query_images=asked,
                metadata={"ink": images.mean(axis=(1, 2))},
            ),
            command="python benchmarks/report.py",
        )  # fmt: skip
        result: dict[str, Any] = {
            "n": given.n,
            "queries": given.queries,
            "seconds_scores": scored,
            "seconds_report": time.perf_counter() - started,
            "peak_bytes_before_report": before,
            "peak_bytes": peak_bytes(),
            "file_bytes": path.stat().st_size,
            "browser": browsed(path, given.chromium, given.runs),
            "environment": where,
        }
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def flat(images: np.ndarray) -> torch.Tensor:
    """Images as rows of 0 … 1."""
    return torch.from_numpy(images.reshape(len(images), -1)).float() / 255


def trained(X: torch.Tensor, y: torch.Tensor) -> torch.nn.Module:
    """Softmax regression, by L-BFGS from zero."""
    model = torch.nn.Linear(X.shape[1], 10)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        size = sum((p**2).sum() for p in model.parameters())
        loss = torch.nn.functional.cross_entropy(model(X), y) + PENALTY / 2 * size
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def peak_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def browsed(path: Path, chromium: str, runs: int) -> dict[str, Any]:
    """What headless Chromium takes for the page."""
    from playwright.sync_api import sync_playwright

    found: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        found["version"] = browser.version
        for name, width, height in (("laptop", 1280, 900), ("phone", 390, 844)):
            opened, ready = [], []
            for _ in range(runs):
                page = browser.new_page(viewport={"width": width, "height": height})
                page.add_init_script(FIRST_PICTURE)
                page.goto(path.resolve().as_uri() + "#queries/0")
                page.wait_for_selector("html[data-picture]")
                opened.append(float(page.locator("html").get_attribute("data-picture")))
                ready.append(
                    page.evaluate("performance.getEntriesByType('paint')[0]?.startTime ?? null")
                )
                if len(opened) < runs:
                    page.close()
            found[name] = {
                "first_picture_ms": opened,
                "first_paint_ms": ready,
                "page_frames_ms": frames(page.evaluate(SCROLL, [None, 60])),
                "list_frames_ms": frames(page.evaluate(SCROLL, ["#list", 200])),
                "tick_ms": [page.evaluate(TICK), *(ticked(page) for _ in range(4))],
            }
            started = time.perf_counter()
            page.goto(path.resolve().as_uri() + "#training")
            page.wait_for_selector("#training .panel svg")
            found[name]["training_page_ms"] = 1000 * (time.perf_counter() - started)
            found[name]["training_frames_ms"] = frames(page.evaluate(SCROLL, [None, 60]))
            page.close()
        browser.close()
    return found


def ticked(page: Any) -> float:
    """One more tick, until its number stands there."""
    return page.evaluate(
        TICK.replace(
            'document.querySelector("#drop-change")',
            'document.querySelector("#drop-words").textContent !== before',
        ).replace("start =", 'before = document.querySelector("#drop-words").textContent, start =')
    )


def frames(times: list[float]) -> dict[str, float]:
    """The middle, the slowest of a hundred, and the slowest."""
    ordered = sorted(times)
    return {
        "median": statistics.median(ordered),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "worst": ordered[-1],
    }


if __name__ == "__main__":
    main()
