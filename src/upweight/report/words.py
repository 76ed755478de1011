"""The text of the page that does not change with the query: what is claimed, and what is known."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from upweight.applications.outcome import Outcome
from upweight.applications.privacy import own_rows
from upweight.notation import count, interval, readable
from upweight.report.answers import Answers
from upweight.report.evidence import Evidence, Series
from upweight.report.live import noun_of
from upweight.report.outcomes import sections_of
from upweight.report.plain import plainly
from upweight.report.spectrum import spectrum
from upweight.report.trust import trust
from upweight.scores import Scores, Unit


def words_of(
    answers: Answers, command: str | None, outcomes: Outcome | Iterable[Outcome] = ()
) -> dict[str, Any]:
    """What the template says; `command` makes the page again, `outcomes` are of applications."""
    scores, evidence, removal = answers.scores, answers.evidence, answers.removal
    provenance, series = scores.provenance, evidence.series
    noun, kind = answers.meta["noun"], answers.meta["kind"]
    columns = "group" if scores.columns is not None else kind
    found = trust(scores, evidence, removal)
    notes = [*provenance.notes, *(() if removal is None else removal.provenance.notes)]
    own = own_rows(scores)
    own_told = []
    if own:
        are = "query is a training example" if len(own) == 1 else "queries are training examples"
        own_told.append(
            f"{len(own)} {are}: who sees this page learns that they were trained on; before "
            "publishing it leave them out, and see upweight.applications.privacy.audit"
        )
    scale = [count(answers.n, f"training {columns}"), count(answers.q, "query")]
    if provenance.p:  # 0: not recorded
        scale.append(count(provenance.p, "parameter"))
    return {
        "title": answers.display.title,
        "heading": f"Which training {count(0, columns).removeprefix('0 ')} moved the {noun}",
        "scale": ", ".join(scale),
        "noun": noun,
        "kind": kind,
        "subsets": evidence.subsets is not None,
        "command": None if command is None else _clean(command),
        "trust": found,
        "removals": verdict(series, kind) if series else None,
        "convention": convention(scores, found.has_sizes),
        "formula": formula(scores),
        "plain": plainly(scores, evidence),
        "check": _how_to_check(scores),
        "warnings": own_told,
        "health": health(scores, evidence),
        "sets": any(len(removal) > 1 for each in series for removal in each.removed),
        "spectrum": spectrum(provenance.health),
        "notes": [_clean(note) for note in dict.fromkeys(notes)],
        "checks": [each.row for each in series],
        "provenance": _provenance(scores),
        "outcomes": sections_of(outcomes),
    }


def health(scores: Scores, evidence: Evidence) -> list[dict[str, Any]]:
    """The lines of the health panel: what retraining, the method and the clock said."""
    stated = [
        {"name": fact.name, "value": fact.value, "told": fact.told, "concern": fact.concern}
        for fact in scores.provenance.facts
    ]
    return [evidence.words, *stated, *_error(scores), *_time(scores)]


def convention(scores: Scores, has_sizes: bool = True) -> str:
    """The unit and its sign, and whether sizes are supported, in a sentence or two."""
    m = noun_of(scores)
    if scores.unit is Unit.DERIVATIVE:
        without = (
            "by about minus the score." if has_sizes else "the other way; by how much is not known."
        )
        return (
            f"A score says how the {m} of a query changes with the weight of one training example: "
            f"positive, its presence raised the {m}; negative, it lowered it. Without the example "
            f"the {m} is predicted to change {without}"
        )
    if scores.unit is Unit.VALUE:
        return (
            f"A score is the example's share of the {m}: the scores of one query add up, and "
            "predict no change without one example."
        )
    return "Only the order of scores within one query means anything; they predict no change."


def formula(scores: Scores) -> str | None:
    """The definition of a score; None where it is none of a derivative."""
    if scores.unit is not Unit.DERIVATIVE:
        return None
    return f"S[q, i] = ∂{noun_of(scores)}/∂wᵢ at the minimum of (1/n) Σ wᵢ ℓᵢ + R, at w = 1"


def _how_to_check(scores: Scores) -> str:
    """A line of Python that retrains."""
    reads = None if scores.context is None else scores.context.task.reads
    given = 'budget="2 min"' if getattr(reads, "fits_own_data", False) else 'recipe, "10 min"'
    return f"{'scores' if hasattr(scores, 'check') else 'fitted'}.check({given})"


def verdict(series: Sequence[Series], noun: str) -> str:
    """What removals and retraining found, without a judgement it cannot support."""
    # One prediction, of all the queries that were checked: the best query alone would flatter it.
    by_label: dict[str, list[Series]] = {}
    for each in series:
        by_label.setdefault(each.of.label, []).append(each)
    best = min(by_label.values(), key=lambda each: max(map(_miscalibration, each)))
    removed, label = _removed(best[0], noun), best[0].of.label
    known = [c for c in best if math.isfinite(c.pearson[0]) and math.isfinite(c.slope[0])]
    if not known:
        return f"{removed} That is too little to say how well prediction and change agree."
    if len(known) > 1:
        return (
            f"{removed} On {len(known)} queries the {label} prediction correlates with the "
            f"measured change at {_range([c.pearson[0] for c in known])}; the measured change is "
            f"{_range([c.slope[0] for c in known])} times the predicted one."
        )
    brackets = " (95% intervals in brackets)" if math.isfinite(known[0].slope[1]) else ""
    return (
        f"{removed} The {label} prediction correlates with the measured change at "
        f"{interval(known[0].pearson)}; the measured change is {interval(known[0].slope)} times "
        f"the predicted one{brackets}."
    )


def _removed(series: Series, noun: str) -> str:
    """What was done, in a sentence."""
    removals, sizes = len(series.removed), {len(removal) for removal in series.removed}
    again = f" from {series.of.repeats} seeds each" if series.of.repeats > 1 else ""
    what, of, each = f"training {noun}", "", "one at a time"
    if sizes != {1}:
        size = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        what, of, each = "set", f" of {size} training {noun}s", "one set at a time"
    were = f"were really removed, {each}," if removals > 1 else "was really removed"
    return f"{count(removals, what)}{of} {were} and the model retrained{again}."


def _range(values: Sequence[float]) -> str:
    nothing = (math.nan, math.nan)
    low, high = (interval((v, *nothing), 2) for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _miscalibration(series: Series) -> float:
    """|log slope|: twice too large is as bad as twice too small."""
    slope = series.slope[0]
    return abs(math.log(slope)) if math.isfinite(slope) and slope > 0 else math.inf


def _error(scores: Scores) -> list[dict[str, Any]]:
    if scores.error is None:
        return []
    relative = float(scores.error.norm() / scores.values.norm())
    meaning = "root mean square of the standard errors over that of the scores"
    return [_line("Standard error", readable(relative), meaning)]


def _time(scores: Scores) -> list[dict[str, Any]]:
    # "fit: pass 1" is a part of "fit".
    stages: dict[str, list[str]] = {}
    total = 0.0
    for name, took in scores.provenance.seconds.items():
        stage, _, part = name.partition(": ")
        total += 0.0 if part else float(took)
        stages.setdefault(stage, []).append(f"{part or stage} {readable(float(took))} s")
    if not stages:
        return []
    words = [whole + (f" (of which {', '.join(parts)})" if parts else "")
             for whole, *parts in stages.values()]  # fmt: skip
    return [_line("Time", f"{readable(total)} s", ", ".join(words))]


def _line(name: str, value: str, told: str) -> dict[str, Any]:
    return {"name": name, "value": value, "told": told, "concern": False}


def _provenance(scores: Scores) -> list[tuple[str, str]]:
    made = scores.provenance
    rows = [
        ("method", made.method),
        ("task", made.task),
        ("measure", made.measure),
        ("numbers", f"{made.dtype} on {made.device}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
        *(
            (name.replace("_", " "), _value(value))
            for name, value in made.health.items()
            if name != "blocks"  # they have a table of their own
        ),
    ]
    return [(name, _clean(value)) for name, value in rows]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_value(part)}" for name, part in value.items())
    return readable(value, 4) if isinstance(value, float) else str(value)


def _clean(text: str) -> str:
    """Without memory addresses, which the repr of a function has and which no two runs share."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
