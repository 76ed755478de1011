"""What the page of a run is made of: what the run keeps, or the project where the user names it."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from upweight.cli.project import Project
from upweight.cli.screen import say
from upweight.errors import NotWritten, SpecError, StaleStore
from upweight.provenance import Context
from upweight.report import Display
from upweight.report.kept import kept, reopened
from upweight.runs import shown
from upweight.runs.directory import Run
from upweight.runs.question import Question
from upweight.runs.record import Record

LIVE = {"evidence", "outcomes", "removal"}
"""What is shown beside a display, and not kept in a run."""


@dataclass(frozen=True)
class Shown:
    """What the user shows beside the data: how, and further arguments of `html`."""

    display: Display = field(default_factory=Display)
    live: Mapping[str, Any] = field(default_factory=dict)


def context_of(question: Question, fitted: Any = None) -> Context:
    """The live objects of a run."""
    return Context(question.task, question.train, question.queries, question.measure, fitted)


def keep(run: Run, question: Question, fitted: Any, shown_beside: Shown) -> None:
    """Keep in a finished run what its page shows, with what the user shows beside the data."""
    try:
        scores = run.open().attach(context_of(question, fitted))
        found = kept(scores, shown_beside.display, tuple(shown_beside.live))
    except OSError:
        raise
    except Exception as error:  # data that no page can show are attributed all the same
        text = f"what a page shows was not kept in the run: {type(error).__name__}: {error}"
        run.log(text)
        say(f"note: {text}\n  A page needs the project then: {run.command('report')}")
        return
    shown.write(run, *found)


def refreshed(
    run: Run,
    project: Project,
    record: Record,
    question: Question,
    show: str | None,
    fitted: Callable[[], Any],
) -> Shown:
    """What the user shows beside the data of a live page; kept in the run where `show` is new.

    Without `show` it is what the run names. `fitted` gives the fitted method, for self-influence.
    """
    reference = show or record.show
    beside = shown_of(project, reference) if reference else Shown()
    if show is not None or not is_kept(run):
        try:
            if show is not None:
                replace(record, show=show).write(run.toml)
            keep(run, question, fitted(), beside)
        except NotWritten as error:  # the page of now needs no room in the run
            given = str(error).splitlines()[1].strip().removeprefix("Given: ")
            say(f"note: what is shown was not kept in the run for the next time: {given}")
    return beside


def is_kept(run: Run) -> bool:
    """Whether the run holds what a page shows, whole."""
    with contextlib.suppress(StaleStore):
        reopened(*shown.read(run))
        return True
    return False


def alone(run: Run) -> Display:
    """What the run keeps to show; a StaleStore where that is nothing, or damaged."""
    facts, arrays = shown.read(run)
    found = reopened(facts, arrays)
    if left_out := facts["left_out"]:
        say(f"note: without the project the page has no {', '.join(left_out)}")
    return found


def shown_of(project: Project, reference: str) -> Shown:
    """A `Display`, or a dict of its arguments and of further ones of `upweight.report.html`."""
    value = project.load(reference)
    if isinstance(value, Display):
        return Shown(value)
    known = {each.name for each in fields(Display)} - {"train", "queries"}
    if not isinstance(value, dict) or not set(value) <= known | LIVE:
        given = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise SpecError(
            "--show names a upweight.report.Display, or a dict of its arguments.",
            f"{reference}: {given}.",
            "a misspelled key, or another object.",
            f"its keys are among {', '.join(sorted(known | LIVE))}.",
        )
    shown = {name: each for name, each in value.items() if name in known}
    live = {name: value[name] for name in sorted(LIVE & set(value)) if value[name] is not None}
    return Shown(Display(**shown), live)
