"""Scores → a few lines for a terminal: the same facts as the page, in the same order."""

import math
from collections.abc import Sequence
from typing import Any

from upweight.report.check import Check, require_checks
from upweight.report.examples import class_name
from upweight.report.facts import noun_of
from upweight.report.health import health
from upweight.report.notation import count, interval, readable
from upweight.report.strongest import effects, require_scores, strongest
from upweight.report.trust import trust
from upweight.runtime.selection import row_of
from upweight.scores import Scores


def summary(
    scores: Scores,
    *,
    query: int = 0,
    k: int = 3,
    labels: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    checks: Sequence[Check] = (),
) -> str:
    """What raised and lowered one measurement, how that compares with retraining, and concerns.

    Args:
        scores: S or Δm.
        query: Which row to tell of.
        k: Examples at each end.
        labels: Of all training examples, to print beside their indices.
        names: Of the classes, where labels are class indices.
        checks: Predictions beside what retraining gave.

    Returns:
        Lines of at most about 100 characters, without a newline at the end.

    Raises:
        NonFinite: A score is NaN or infinite.
        ShapeError: There is no such query.
        SpecError: `checks` holds something else.
    """
    require_scores(scores)
    require_checks(checks)
    rows, columns = scores.values.shape
    query = row_of(query, rows)
    noun = noun_of(scores)
    what = "group" if scores.columns is not None else "training example"
    found = trust(scores, checks, None)
    lines = [
        f"{found.title}: {found.reason}.",
        f"{count(columns, what)}, {count(rows, 'query')}, "
        f"{count(scores.provenance.p, 'parameter')}; unit {scores.unit.value.split(':')[0]} "
        f"of the {noun}",
        f"query {query}",
    ]
    effect = effects(scores, query)
    ends = strongest(effect, k)
    for word, chosen in (("raised", ends.raised), ("lowered", ends.lowered)):
        told = [
            _example(scores, i, float(effect[i]) if found.has_sizes else None, labels, names)
            for i in chosen
        ]
        start = f"{word} its {noun}:"
        lines.append(f"  {start:<{len(noun) + 13}}  {',  '.join(told) or 'none'}")
    lines += _agreement(checks)
    concerns = [fact for fact in health(scores, checks) if fact.concern]
    lines += [f"look at {fact.name.lower()}: {fact.value} ({fact.meaning})" for fact in concerns]
    lines += [f"note: {note}" for note in scores.provenance.notes]
    return "\n".join(lines)


def _example(
    scores: Scores,
    i: int,
    effect: float | None,
    labels: Sequence[Any] | None,
    names: Sequence[str] | None,
) -> str:
    name = scores.columns[i] if scores.columns is not None else f"#{i}"
    if labels is not None and scores.columns is None:
        name += f" ({labels[i] if isinstance(labels[i], str) else class_name(labels[i], names)})"
    return name if effect is None else f"{name} {readable(effect, signed=True)}"


def _agreement(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return []
    width = max(len(check.label) for check in checks)
    known = any(math.isfinite(check.slope[1]) for check in checks)
    lines = [f"predicted against retrained{', 95% intervals' if known else ''}"]
    for check in checks:
        lines.append(
            f"  {check.label:<{width}}  {count(len(check.examples), 'removal')} on query "
            f"{check.query}:  Pearson {interval(check.pearson)}  slope {interval(check.slope)}"
        )
    return lines
