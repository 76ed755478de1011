"""`upweight show`: what a run says, in twenty lines, from the run alone."""

import shlex
from pathlib import Path
from typing import Any

import click

from upweight.cli.named import has_packed, to_ask_for
from upweight.cli.rankings import display_of, hardest, named_queries, rankings
from upweight.cli.screen import Answer, verb
from upweight.cli.spec import parse
from upweight.facts import UNKNOWN, WITHIN, Fact
from upweight.notation import count, in_short
from upweight.runs.directory import Run
from upweight.runs.record import is_reference
from upweight.runtime.evaluations import HALVES

NOTES, FILES = 2, 3
"""Notes, and files of its owner, that are listed; of more their number is said."""


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--top",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="K",
    help="Examples at each end of a query's ranking.",
)
@click.option(
    "--query",
    "asked_of",
    multiple=True,
    metavar="Q",
    help="Of which queries, by place or id.  [default: the hardest]",
)
@verb
def show(run: Path, top: int, asked_of: tuple[str, ...]) -> Answer:
    """Print the verdict, settings and strongest examples of a run.

    It needs the run alone, and runs no code: for a run that somebody else made.

    \b
    Examples:
        upweight show runs/digits
        upweight show received --query 17 --top 5
    """
    place = Run.named(run.absolute())
    record = place.record
    lines, facts = settings(place, run)
    if not place.is_finished:
        lines.append(f"  to finish it, if you trust its files: {place.command('rerun')}")
        return Answer("\n".join(lines), facts)
    scores, display = place.open(), display_of(place)
    named = named_queries(asked_of, None if display is None else display.query_ids, record.q)
    found = rankings(scores, display, top, named or hardest(scores, display, 1))
    ranked = ([] if asked_of else ["where the model does worst:"]) + list(map(str, found))
    said = shlex.quote(str(run))
    lines += ["", *ranked, "", f"next: upweight report {said}; upweight show {said} --query Q"]
    return Answer("\n".join(lines), facts | {"top": [ranking.facts for ranking in found]})


def settings(place: Run, shown: Path) -> tuple[list[str], dict[str, Any]]:
    """The verdict and what was asked of what by which method, in lines and as facts."""
    record = place.record
    is_finished = place.is_finished
    halves = place.evaluations().get(HALVES, {}) if is_finished else {}
    verdict, reason = halves.get("verdict"), halves.get("reason", "")
    made = place.provenance if is_finished else {}
    told = f"{verdict}: {reason}" if verdict else "not checked against retraining"
    method = record.method
    if not is_reference(method):
        method = in_short(parse(method, "method"))
    lines = [
        f"{shown}: {'finished' if is_finished else 'unfinished'}",
        f"  verdict: {told}",
        f"  asked: {record.measure} of {count(record.q, 'query')} ({record.queries}), on "
        f"{count(record.n, 'training example')} ({record.train})",
        f"  method: {method}, {count(record.p, 'parameter')}"
        + (f", trained as {record.recipe}" if record.recipe else ""),
    ]
    past = [fact for fact in (Fact(**each) for each in made.get("facts", ())) if fact.concern]
    health = "; ".join(map(str, past)) or (WITHIN if made.get("facts") else UNKNOWN)
    lines += [f"  health: {health}"] if is_finished else []
    notes = list(made.get("notes", ()))
    lines += [f"  note: {note}" for note in notes[:NOTES]]
    more = len(notes) - NOTES
    lines += [f"  {count(more, 'more note')}: --json"] if more > 0 else []
    asked = to_ask_for(record)
    files, machine = [line.split("  ")[0] for line in asked[:-1]], asked[-1]
    lacking = [name for name in files if not has_packed(place, record, name)]
    is_packed, files = bool(files) and not lacking, lacking
    others = f" and {count(len(files) - FILES, 'other')}" if len(files) > FILES else ""
    rerun = shlex.join(["upweight", "rerun", str(shown)])
    lines += [
        f"  {machine}",
        f"  what computing it again needs is packed with it; how: {rerun}"
        if is_packed
        else f"  to compute it again, ask its owner for {', '.join(files[:FILES])}{others}: "
        f"{rerun}",
    ]
    facts = {
        "run": str(place.path), "finished": is_finished, "verdict": verdict, "reason": reason,
        "method": record.method, "measure": record.measure, "recipe": record.recipe,
        "n": record.n, "q": record.q, "p": record.p, "train": record.train,
        "queries": record.queries, "notes": notes, "provenance": made, "ask_for": asked,
    }  # fmt: skip
    return lines, facts
