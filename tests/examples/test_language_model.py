"""Without its corpus the language model's example says so in a sentence, and is no failure."""

import subprocess
import sys
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "examples" / "05_language_model.py"


def test_without_the_corpus_it_says_so_and_exits_with_0(tmp_path):
    command = [sys.executable, str(PATH), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "Skipped: brown.jsonl.gz, which this example reads, is not in --data.\n"
