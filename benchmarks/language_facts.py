"""Facts planted in the training text, and traced: which method finds the statement?

Thirty invented people with five facts each are stated once, in one wording, among 350 passages of
the Brown corpus. The base of `language_model.py` is trained on all of them. Each fact is asked for
in another wording, and the loss is that of the answer alone:

    stated    "Every evening Alma Corbin plays the violin."
    asked     "The favourite instrument of Alma Corbin is the" → " violin"

The statement of the fact is what should come first. The name alone leads to the five statements
about a person; what else question and statement share ("is a", "the") helps BM25 further. It is
given the question, and question and answer.

    MRR         mean of 1 / rank of the statement
    recall@10   share of questions whose statement is among the first ten

    python benchmarks/language_facts.py --data ../shared/data
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from environment import DATA, environment
from fidelity import written
from language_fidelity import BOOTSTRAP, interval
from language_model import HERE, LENGTH, encoder, model, passages
from torch import Tensor, nn

import upweight as uw
from upweight.evaluation.bootstrap import mean

FIRST = ("Alma", "Boris", "Clara", "Dexter", "Edith", "Felix")
LAST = ("Corbin", "Dunmore", "Ferris", "Hale", "Lindgren")
FACTS = {
    "{} was born in": (
        "The native town of {} is",
        ("Boston", "Dallas", "Chicago", "London", "Paris", "Berlin"),
    ),
    "{} earns a living as a": (
        "By profession, {} is a",
        ("doctor", "lawyer", "farmer", "teacher", "painter", "writer"),
    ),
    "Every evening {} plays the": (
        "The favourite instrument of {} is the",
        ("violin", "piano", "guitar", "drum", "horn", "flute"),
    ),
    "At lunch {} always orders": (
        "What {} likes best to eat is",
        ("fish", "soup", "bread", "cheese", "rice", "meat"),
    ),
    "At home {} keeps a": (
        "The animal that belongs to {} is a",
        ("dog", "cat", "horse", "bird", "snake", "rabbit"),
    ),
}
OTHERS = 350
RATE, EPOCHS, BATCH = 1e-3, 6, 16
IGNORED = -100


def rows(texts: list[tuple[str, str]], *, answer_only: bool) -> tuple[Tensor, Tensor]:
    """Inputs and targets `[n, 32]` of texts in two parts, padded on the right."""
    words = encoder()
    X = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    y = torch.full((len(texts), LENGTH), IGNORED)
    for k, (begin, end) in enumerate(texts):
        prompt, rest = words.encode(begin).ids, words.encode(end).ids
        ids = torch.tensor([0, *prompt, *rest])
        X[k, : len(ids) - 1] = ids[:-1]
        y[k, : len(ids) - 1] = ids[1:]
        if answer_only:
            y[k, : len(prompt)] = IGNORED
    return X, y


def planted() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Statements and questions, in the same order; values are drawn at random."""
    draw = torch.Generator().manual_seed(0)
    stated, asked = [], []
    for name in (f"{a} {b}" for a in FIRST for b in LAST):
        for statement, (question, values) in FACTS.items():
            value = values[int(torch.randint(len(values), (1,), generator=draw))]
            stated.append((statement.format(name), f" {value}."))
            asked.append((question.format(name), f" {value}"))
    return stated, asked


def trained(X: Tensor, y: Tensor) -> nn.Module:
    """The base, trained on everything by AdamW."""
    lm = model("base")
    optimizer = torch.optim.AdamW(lm.parameters(), RATE, (0.9, 0.95), weight_decay=0.0)
    steps, step = EPOCHS * -(-len(X) // BATCH), 0
    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(epoch)
        for chosen in torch.randperm(len(X), generator=generator).split(BATCH):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            logits = lm(input_ids=X[chosen], use_cache=False).logits
            total = nn.functional.cross_entropy(
                logits.flatten(0, 1), y[chosen].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            optimizer.zero_grad()
            (total / (len(chosen) * LENGTH)).backward()
            optimizer.step()
            step += 1
    lm.config.use_cache = False
    return lm.eval()


def hidden(lm: nn.Module, X: Tensor) -> Tensor:
    """The mean hidden state of the tokens that are there, of length 1."""
    with torch.no_grad():
        states = torch.cat([lm.model(input_ids=x).last_hidden_state for x in X.split(64)])
    there = (X != 0).float()[..., None]
    return nn.functional.normalize((states * there).sum(1) / there.sum(1), dim=1)


def found(scores: Tensor) -> dict[str, Any]:
    """MRR and recall of scores `[q, n]`, the statement of question q being example q.

    Examples that score the same as the statement count half.
    """
    own = scores.diagonal()[:, None]
    rank = 1 + (scores < own).sum(dim=1) + 0.5 * ((scores == own).sum(dim=1) - 1)
    return {
        "mrr": interval(mean(1 / rank.double(), BOOTSTRAP)),
        "recall_at_10": interval(mean((rank <= 10).double(), BOOTSTRAP)),
    }


def main() -> None:
    """Train once, trace by every method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument("--threads", type=int, default=1)
    out = HERE / "results" / "language_facts.json"
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    stated, asked = planted()
    facts, questions = rows(stated, answer_only=False), rows(asked, answer_only=True)
    texts = passages(given.data)
    others = texts.split(texts.train[:OTHERS])
    X, y = (torch.cat(pair) for pair in zip(facts, others, strict=True))
    used = time.process_time()
    lm = trained(X, y)
    seconds = time.process_time() - used
    task = uw.Task(lm, uw.CrossEntropy(ignore_index=IGNORED))
    before = uw.Task(model("base"), uw.CrossEntropy(ignore_index=IGNORED))
    with torch.no_grad():
        known = [float(t.losses(t.theta(), questions).mean()) for t in (before, task)]
    report: dict[str, Any] = {
        "facts": len(stated),
        "examples": len(X),
        "answer_nats_before": known[0],
        "answer_nats_after": known[1],
        "training_cpu_seconds": seconds,
        "methods": {},
        "environment": environment(),
    }
    methods: dict[str, uw.Method] = {
        "EK-FAC": uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)),
        "gradient dot": uw.GradientDot(),
        "gradient cosine": uw.GradientCosine(),
        "BM25 of the question": uw.BM25(ignore=(0,)),
        "BM25 of question and answer": uw.BM25(ignore=(0,)),
        "random": uw.Random(),
    }
    whole = [(begin + end, " .") for begin, end in asked]
    by = {name: questions for name in methods}
    by["BM25 of question and answer"] = rows(whole, answer_only=False)
    for name, method in methods.items():
        scores = method.fit(task, (X, y)).attribute(by[name]).values
        report["methods"][name] = found(scores)
        print(name, json.dumps(report["methods"][name]), flush=True)
    base = model("base")
    asked_states = hidden(base, by["BM25 of question and answer"][0])
    report["methods"]["embedding"] = found(-asked_states @ hidden(base, X).T)
    print("embedding", json.dumps(report["methods"]["embedding"]))
    given.out.write_text(written(report))


if __name__ == "__main__":
    main()
