"""Scores → a few lines for a terminal: the same facts as the page, in the same order."""

import math
from typing import Any

from upweight.notation import count, interval, readable
from upweight.report.display import Display
from upweight.report.evidence import Evidence, evidence_of
from upweight.report.examples import class_name
from upweight.report.live import noun_of
from upweight.report.strongest import numbers, ranked, require_scores
from upweight.report.trust import trust
from upweight.report.words import health
from upweight.runtime.selection import row_of
from upweight.scores import Scores


def summary(
    scores: Scores,
    *,
    k: int = 3,
    query: int = 0,
    display: Display = Display(),  # noqa: B008  frozen
    evidence: Any = (),
) -> str:
    """What raised and lowered one measurement, how that compares with retraining, and concerns.

    Args:
        scores: Of any unit.
        k: Examples at each end.
        query: Which row to tell of.
        display: Its `train_labels` and `names` are printed beside indices.
        evidence: What retraining said, as for `html`.

    Raises:
        ShapeError: There is no such query.
        SpecError: `evidence` holds something else.
    """
    require_scores(scores)
    rows, columns = scores.values.shape
    said = evidence_of(evidence, rows, columns, scores.checks)
    query, noun = row_of(query, rows), noun_of(scores)
    what = "group" if scores.columns is not None else "training example"
    found = trust(scores, said)
    lines = [
        f"{found.title}: {found.reason}.",
        f"{count(columns, what)}, {count(rows, 'query')}, "
        f"{count(scores.provenance.p, 'parameter')}; unit {scores.unit.value.split(':')[0]} "
        f"of the {noun}",
        f"query {query}",
    ]
    effect = numbers(scores, query)
    for word, signed in (("raised", effect), ("lowered", -effect)):
        told = [
            _name(scores, i, display)
            + (f" {readable(float(effect[i]), signed=True)}" if found.has_sizes else "")
            for i in ranked(signed, k)
        ]
        start = f"{word} its {noun}:"
        lines.append(f"  {start:<{len(noun) + 13}}  {',  '.join(told) or 'none'}")
    lines += _agreement(said)
    lines += [
        f"look at {line['name'].lower()}: {line['value']} ({line['told']})"
        for line in health(scores, said)
        if line["concern"]
    ]
    lines += [f"note: {note}" for note in scores.provenance.notes]
    return "\n".join(lines)


def _name(scores: Scores, i: int, display: Display) -> str:
    if scores.columns is not None:
        return scores.columns[i]
    if display.train_labels is None:
        return f"#{i}"
    label = display.train_labels[i]
    return f"#{i} ({label if isinstance(label, str) else class_name(label, display.names)})"


def _agreement(evidence: Evidence) -> list[str]:
    series = evidence.series
    if not series:
        return []
    width = max(len(each.of.label) for each in series)
    known = any(math.isfinite(each.slope[1]) for each in series)
    lines = [f"predicted against retrained{', 95% intervals' if known else ''}"]
    lines += [
        f"  {each.of.label:<{width}}  {count(len(each.removed), 'removal')} on query "
        f"{each.query}:  Pearson {interval(each.pearson)}  slope {interval(each.slope)}"
        for each in series
    ]
    return lines
