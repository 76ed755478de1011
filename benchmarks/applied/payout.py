"""Payouts to contributors of text: do refits without each of them agree with what it is paid?"""

import gzip
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from torch import nn

import upweight as uw
from applied.goal import Goal
from upweight.applications import payout, valuation
from upweight.evaluation import Bootstrap

WORDS = 150
PENALTIES = (1e-2, 1e-1)
"""Worth to first order is nearer to refits under a larger one: both are told."""

BUDGET = "10000.01"
IMAGINED = ("fiction", "humor")


LOT = {"Brown by genre": 5, "SpamAssassin by folder and time": 20}
"""Documents of a contributor where there are more contributors: a person's, not a publisher's."""


WHY = {
    "worth against refits without each": (
        "an additive worth is a sum over single examples, and leaving out all that there is "
        "of a genre or a folder is not: the model loses what the others did not say. The "
        "Newton step without each contributor (the row after it) has the refits' values, r from "
        ".97 on, but does not add up to what all are worth together, which a payout must. With "
        "small contributors or the larger penalty the sum is nearer."
    ),
}
"""Of goals that are not reached, by a part of their name: the reason, and what shows it."""


def in_lots(givers: np.ndarray, size: int) -> np.ndarray:
    """Contributors of at most so many documents each."""
    place = {giver: iter(range(len(givers))) for giver in givers}
    return np.array([f"{giver}, lot {next(place[giver]) // size}" for giver in givers])


def texts(file: Path) -> list[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def spam(data: Path) -> tuple[list[str], list[int], list[str]]:
    """E-mails; a contributor is a folder and 250 files of it in order, about a month."""
    rows = texts(data / "spamassassin.jsonl.gz")
    names = [row["id"].split("/") for row in rows]
    givers = [f"{folder} {int(number) // 250}" for folder, number in names]
    return [f"{r['subject']} {r['text']}" for r in rows], [r["spam"] for r in rows], givers


def brown(data: Path) -> tuple[list[str], list[int], list[str]]:
    """Documents, imagined or informative; a contributor is a genre."""
    rows = texts(data / "brown.jsonl.gz")
    labels = [int(row["genre"].startswith(IMAGINED)) for row in rows]
    return [row["text"] for row in rows], labels, [row["genre"] for row in rows]


def fitted_to(text: list[str], labels: list[int], givers: list[str], penalty: float):
    """A softmax classifier of word counts on two thirds, the other third as validation."""
    order = np.random.default_rng(0).permutation(len(text))
    train, held = order[: 2 * len(text) // 3], order[2 * len(text) // 3 :]
    counts = CountVectorizer(max_features=WORDS).fit([text[i] for i in train])
    X = np.log1p(counts.transform(text).toarray().astype(float))
    X = (X - X[train].mean(0)) / (X[train].std(0) + 1e-9)
    X, y = torch.tensor(X), torch.tensor(labels)
    task = uw.Task(nn.Linear(X.shape[1], 2).double(), uw.CrossEntropy(), uw.L2(penalty))
    recipe = uw.training.Newton()
    trainer = recipe.prepare(task, uw.as_data((X[train], y[train])))
    task = task.moved_to(trainer(torch.ones(1, len(train)).double()).theta[0])
    fitted = uw.Influence(uw.Hessian()).fit(task, (X[train], y[train]))
    scores = fitted.attribute((X[held], y[held]))
    neighbours = uw.KNNShapley(10).fit(task, (X[train], y[train])).attribute((X[held], y[held]))
    return recipe, scores, neighbours, np.array(givers)[train]


def paid(found: payout.Statement) -> dict[str, float]:
    """Payouts before rounding."""
    cents = payout.divided(found.predicted[None], found.budget, found.floor)[0]
    return dict(zip(found.contributors, cents.tolist(), strict=True))


def goals(data: Path) -> Iterator[Goal]:
    for name, read in (("Brown by genre", brown), ("SpamAssassin by folder and time", spam)):
        for penalty in PENALTIES:
            yield from of_texts(f"{name}, L2({penalty:g})", read(data), LOT[name], penalty)


def of_texts(name: str, texts: tuple, lot: int, penalty: float) -> Iterator[Goal]:
    recipe, scores, neighbours, givers = fitted_to(*texts, penalty)
    found = payout.statement(
        scores, givers, BUDGET, recipe=recipe, bootstrap=Bootstrap(resamples=1000)
    )
    r = found.agreement
    yield Goal(
        f"{name}: worth against refits without each of {len(found.contributors)} contributors",
        "r ≥ .95",
        f"r = {r}; {found.verdict}",
        r.value >= 0.95,
    )
    rows = {c: np.flatnonzero(givers == c) for c in found.contributors}
    steps = valuation.worth(
        scores.context.fitted, rows, scores.context.queries, recipe=recipe,
        bootstrap=Bootstrap(resamples=1000),
    )  # fmt: skip
    yield Goal(
        f"{name}: the same by a Newton step for each contributor, which does not add up",
        "r ≥ .95",
        f"r = {steps.agreement}",
        steps.agreement.value >= 0.95,
    )
    lots = in_lots(givers, lot)
    small = payout.statement(
        scores, lots, BUDGET, recipe=recipe, bootstrap=Bootstrap(resamples=200)
    )
    yield Goal(
        f"{name}: worth against refits without each of {len(small.contributors)} contributors "
        f"of at most {lot} documents",
        "r ≥ .95",
        f"r = {small.agreement}",
        small.agreement.value >= 0.95,
    )
    everyone = [found, payout.statement(neighbours, givers, BUDGET)]
    sums = [sum(each.payouts.values()) for each in everyone]
    yield Goal(
        f"{name}: payouts add up to the budget",
        f"{BUDGET} to the cent, by influence and by neighbours",
        ", ".join(map(str, sums)),
        all(total == Decimal(BUDGET) for total in sums),
    )
    who = max(found.payouts, key=found.payouts.get)
    parts = [f"{g} / {i % 5}" if g == who else g for i, g in enumerate(givers)]
    changes = {}
    for by, given in (("influence", scores), ("neighbours", neighbours)):
        for floor in (None, 0):
            try:
                whole = paid(payout.statement(given, givers, BUDGET, floor))
                split = paid(payout.statement(given, parts, BUDGET, floor))
            except uw.errors.DataError:
                changes[by, floor] = None  # all together are worth less than 0
                continue
            together = sum(v for g, v in split.items() if g.startswith(f"{who} / "))
            split = {g: v for g, v in split.items() if g in whole} | {who: together}
            changes[by, floor] = max(abs(split[g] - whole[g]) for g in whole) / 100
    said = {
        f"{by}, {'no floor' if floor is None else 'floor 0'}": "refused"
        if change is None
        else f"{change:.1e}"
        for (by, floor), change in changes.items()
    }
    yield Goal(
        f"{name}: {who} split into five",
        "payouts change by < 1e-9 without a floor",
        str(said),
        all(c is None or c < 1e-9 for (_, floor), c in changes.items() if floor is None)
        and changes["neighbours", None] is not None,
    )
    copied = payout.if_copied(neighbours, givers, BUDGET, who)
    yield Goal(
        f"{name}: a copy of {who} under another name, by neighbours",
        "said in the statement of the copy, whatever it is",
        copied.verdict,
        copied.is_confirmed,
    )
