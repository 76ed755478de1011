"""How much faster do two processes build an index than one, and is it the same index?

The fine-tuned model of `language_model.py` (2 049 440 parameters) and 4 096 windows of 32 tokens of
the Brown corpus, rows of 4 kB in shards of 256. Each process has a thread and fits EK-FAC for
itself; then all start at one time on one folder and share the shards by their locks.

    coordinates   seconds of their choice, which one process makes for all
    rows          seconds until the last process has no row left to make
    files         a hash of all rows and of the transform

    python benchmarks/ranks.py --data ../shared/data
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contest import process_environment
from environment import DATA, environment
from language_model import model, tokenizer
from search import windows

import upweight as uw
import upweight.adapters.transformers as hf

HERE = Path(__file__).resolve().parent
PASSAGES, RANKS = 4096, (1, 2)


def one(folder: Path, rank: int, data: Path) -> None:
    """A process: fit, wait for the others, build, and print what it took."""
    torch.set_num_threads(1)
    lm = model().eval()
    task, texts = hf.task(lm), [{"text": text} for text in windows(data, PASSAGES)]
    examples = hf.text(texts, tokenizer(), column="text", length=32)
    method = uw.Influence(uw.EKFAC(examples=128), damping=uw.Relative(0.1))
    fitted = method.fit(task, examples)
    (folder / f"ready {rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    index = uw.Index.build(fitted, None, folder / "index", 4096, shard=256)
    print(json.dumps(index.seconds))


def built(ranks: int, data: Path) -> dict[str, Any]:
    """An index by so many processes at once."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--data", data, "--rank", str(k), "--folder", folder],
                env=process_environment(1), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
            for k in range(ranks)
        ]  # fmt: skip
        while not all((folder / f"ready {k}").exists() for k in range(ranks)):
            if any(process.poll() for process in started):
                sys.exit("A process ended before it built anything.")
            time.sleep(0.1)
        (folder / "go").touch()
        said = [json.loads(process.communicate()[0]) for process in started]
        hashed = hashlib.sha256()
        for path in sorted((folder / "index").glob("*.safetensors")):
            hashed.update(path.name.encode() + path.read_bytes())
    return {
        "coordinates": max(each["coordinates"] for each in said),
        "rows": max(each["rows"] for each in said),
        "files": hashed.hexdigest(),
    }


def main() -> None:
    """One process, then two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of brown.jsonl.gz")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ranks.json")
    given = parser.parse_args()
    if given.rank is not None:
        one(given.folder, given.rank, given.data)
        return
    where = environment()
    found = {ranks: built(ranks, given.data) for ranks in RANKS}
    report = {
        "passages": PASSAGES,
        "ranks": found,
        "speed_up_of_rows": found[1]["rows"] / found[2]["rows"],
        "same_files": found[1]["files"] == found[2]["files"],
        "environment": where,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
