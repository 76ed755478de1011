"""Which queries does a terminal show, and what are their strongest examples called?"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
import torch

from upweight.cli.pages import alone
from upweight.errors import StaleStore
from upweight.notation import noun_of
from upweight.report import Display
from upweight.report.examples import KeptExamples
from upweight.runs.directory import Run
from upweight.scores import Ranking, Scores

LOW_IS_HARD = ("Margin", "LogProb")
"""Measures that are small where the model does badly."""


def display_of(run: Run) -> Display | None:
    """What the run keeps to show; None where it keeps nothing that can be read."""
    with contextlib.suppress(StaleStore):
        return alone(run)
    return None


def hardest(scores: Scores, display: Display | None, k: int) -> list[int]:
    """The k queries on which the model does worst, the worst first.

    By the largest loss, or the smallest margin or log-probability, where the run keeps them; of
    other measures, and where it does not, those with the largest score.
    """
    kind, q = scores.provenance.measure.split("(")[0], len(scores)
    values = None if display is None else display.values
    if values is not None and kind in ("Loss", *LOW_IS_HARD):
        sign = -1.0 if kind in LOW_IS_HARD else 1.0
        by = sign * torch.tensor(list(values), dtype=torch.float64)
    else:
        by = torch.stack([scores[query].abs().max() for query in range(q)])
    return by.argsort(descending=True, stable=True)[:k].tolist()


def named_queries(asked: Sequence[str], ids: Sequence[Any] | None, q: int) -> list[int]:
    """Places of the queries that `--query` names: a place, or else an id of the data.

    Raises:
        click.UsageError: There is no such query, or several have that id.
    """
    known, found = list(map(str, ids or ())), []
    for name in asked:
        at = [place for place, own in enumerate(known) if own == name]
        if name.isdecimal() and int(name) < q:
            at = [int(name)]
        if len(at) != 1:
            by_id = f", or {known[0]} and the like" if known else ""
            why = f": {len(at)} queries have that id" if at else ""
            raise click.UsageError(f"--query {name}: there are queries 0 to {q - 1}{by_id}{why}")
        found += at
    return found


def rankings(
    scores: Scores, display: Display | None, k: int, queries: Sequence[int]
) -> list[Ranking]:
    """The k examples at each end of some queries, by the names that the run keeps."""
    return [_named(scores.top(k, query), scores, display) for query in queries]


def _named(found: Ranking, scores: Scores, display: Display | None) -> Ranking:
    noun = noun_of(scores.provenance.measure)
    if display is None or scores.columns is not None:
        return replace(found, noun=noun)
    train, asked = display.train, display.queries
    at = [*found.raises, *found.lowers]
    labels = list(train.at(at).labels) if isinstance(train, KeptExamples) else [""] * len(at)
    own = asked.at([found.query]).labels[0] if isinstance(asked, KeptExamples) else ""
    ids, theirs = display.train_ids, display.query_ids
    names = {
        i: (str(i if ids is None else ids[i]), label) for i, label in zip(at, labels, strict=True)
    }
    parts = [] if theirs is None else [str(theirs[found.query])]
    told = ", ".join([*parts, *([own] if own else [])])
    return replace(found, noun=noun, asked=told, names=names)
