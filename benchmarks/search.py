"""How long does `upweight view index` take from a text to the 20 passages behind it?

The commands of a user, on the fine-tuned model of `language_model.py` (2 049 440 parameters) and
100 000 windows of 32 tokens of the Brown corpus, one every 13 tokens: `index build` on the first
4 096, `index extend` with the others, rows of 4 kB. Then the page is served, and asked over HTTP
from this machine about 60 sentences of the corpus, one after another, after 5 that are not counted.

    text to top 20     the request as a whole, at the browser's end
    scan               the products of one query with all rows and the first 40 of them, alone

    python benchmarks/search.py --data ../shared/data --folder kept    # builds once, asks again
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import torch
from contest import process_environment
from environment import DATA, environment
from language_model import LENGTH, documents, encoder, model, tokenizer
from safetensors import safe_open

from upweight.index import scan
from upweight.index.codes import Codes

HERE = Path(__file__).resolve().parent
EVERY = 13
FITTED = 4096
WARM, ASKED, TOP = 5, 60, 20


def windows(folder: Path, count: int) -> list[str]:
    """Texts of 32 tokens, in a random order."""
    words, found = encoder(), list[str]()
    for document in documents(folder):
        ids = words.encode(document["text"]).ids
        starts = range(0, len(ids) - LENGTH, EVERY)
        found += [words.decode(ids[start : start + LENGTH]) for start in starts]
    random.Random(0).shuffle(found)
    if len(found) < count:
        sys.exit(f"{len(found)} windows are there, fewer than {count}.")
    return found[:count]


def command(*words: Any, threads: int) -> float:
    """Run `upweight …`; processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "upweight", *map(str, words)],
        check=True, env=process_environment(threads), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def built(folder: Path, texts: list[str], threads: int) -> dict[str, float]:
    """The model and the index in a folder, and what they took where they were made."""
    lm, index, took = folder / "model", folder / "index", dict[str, float]()
    parts = {"first": texts[:FITTED], "others": texts[FITTED:]}
    if not lm.exists():
        model().save_pretrained(lm)
        tokenizer().save_pretrained(lm)
        for name, some in parts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = [folder / f"{name}.jsonl" for name in parts]
    finished = folder / "finished"
    if not finished.exists():
        took["build"] = command(
            "index", "build", "--hf", lm, "--data", data[0], "--out", index, threads=threads
        )
        took["extend"] = command("index", "extend", index, data[1], "--hf", lm, threads=threads)
        finished.touch()
    return took


def asked(folder: Path, texts: list[str], threads: int) -> tuple[list[float], float]:
    """Seconds of each request, and until the page was there."""
    started = time.perf_counter()
    served = subprocess.Popen(
        [sys.executable, "-m", "upweight", "view", folder / "index", "--hf", folder / "model"],
        env=process_environment(threads), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert served.stderr is not None
        address = next(line.strip() for line in served.stderr if line.startswith("http"))
        opened = time.perf_counter() - started
        base, token = address.split("?")[0], urlsplit(address).query
        seconds = []
        for text in texts:
            start = time.perf_counter()
            query = urlencode({"text": text, "k": TOP, "order": "lowers"})
            with urllib.request.urlopen(f"{base}top?{query}&{token}") as answer:
                found = json.load(answer)
            seconds.append(time.perf_counter() - start)
            if len(found["results"]) != TOP or not found["results"][0]["tokens"]:
                sys.exit(f"an answer without {TOP} passages: {found}")
    finally:
        served.terminate()
        served.wait()
    return seconds[WARM:], opened


def scanned(folder: Path, rounds: int = 20) -> list[float]:
    """Seconds of the products of one query with the rows of all shards, and the first of them."""
    shards, seconds = sorted((folder / "index").glob("rows-*.safetensors")), []
    for _ in range(rounds + 1):
        start, found = time.perf_counter(), []
        asked: scan.Scan | None = None
        for path in shards:
            with safe_open(path, framework="pt") as file:
                kept = {key: file.get_tensor(key) for key in ("codes", "scales")}
            if asked is None:
                asked = scan.Scan(torch.randn(1, kept["codes"].shape[1] * 8), Codes(1))
            found.append(asked.products(kept))
        torch.cat(found, dim=1).topk(2 * TOP, largest=False)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and worst."""
    worst = sorted(seconds)
    return {
        "p50": statistics.median(worst),
        "p95": worst[int(0.95 * (len(worst) - 1))],
        "worst": worst[-1],
    }


def main() -> None:
    """Build, serve, ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="the folder of brown.jsonl.gz")
    add("--passages", type=int, default=100_000)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--folder", type=Path, help="keep model and index here, and use those that are there")
    add("--out", type=Path, default=HERE / "results" / "search.json")
    given = parser.parse_args()
    where, texts = environment(), windows(given.data, given.passages)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        took = built(folder, texts, given.threads)
        torch.set_num_threads(given.threads)
        chosen = texts[:: len(texts) // (WARM + ASKED)][: WARM + ASKED]
        seconds, opened = asked(folder, chosen, given.threads)
        report = {
            "passages": given.passages,
            "threads": given.threads,
            "cpu_seconds": took,
            "seconds_until_served": opened,
            "text_to_top_20": summary(seconds),
            "scan": summary(scanned(folder)),
            "environment": where,
        }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
