"""`upweight attribute` and `upweight rerun`: scores in a run directory, and the same again."""

import contextlib
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from upweight.cli.named import named, naming, project_option, to_ask_for
from upweight.cli.pages import keep, shown_of
from upweight.cli.project import Project, opened
from upweight.cli.question import Asked, question_options, relative, reopened, require_same
from upweight.cli.screen import Answer, continued_by, duration, say, verb
from upweight.errors import StaleStore, message
from upweight.runs import work
from upweight.runs.directory import Run
from upweight.runs.question import Question
from upweight.runs.record import Record
from upweight.runs.shown import is_kept
from upweight.runs.work import kept_fit
from upweight.scores import Scores, library_versions


@click.command()
@question_options
@click.option(
    "--out",
    required=True,
    metavar="RUN",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run directory; made if it does not exist.",
)
@click.option("--top", type=click.IntRange(1), metavar="K", help="Print the K strongest examples.")
@click.option(
    "--show",
    metavar="FILE.py:NAME",
    help="A dict of what the page shows beside the data; kept in the run.",
)
@verb
def attribute(out: Path, top: int | None, show: str | None, **options: Any) -> Answer:
    """Score every training example for every query.

    Writes a run directory. TASK names an upweight.Task in a file of yours, or a function that makes
    it. Killed at any instant, the same command goes on where it was. A directory that holds another
    question is refused; one that is finished is left as it is.

    \b
    Examples:
        upweight attribute project.py:task --train project.py:train --queries project.py:test \\
            --method "Influence(EKFAC(), damping=Relative(0.1))" --measure "Margin()" --out run
        upweight attribute project.py:task --train project.py:train --queries project.py:test \\
            --method "Influence(Hessian())" --top 3 --out run
    """
    asked, run, shown = Asked(**options), Run(out.absolute()), out
    with contextlib.ExitStack() as stack:
        exists = run.path.exists()
        if exists:  # refused before anything is loaded
            stack.enter_context(run.held("upweight attribute"))
        project = stack.enter_context(opened())
        question = asked.question(project)
        new = asked.record(project, question, run)
        if not exists:  # only now: a mistake in the options leaves no directory behind
            stack.enter_context(run.held("upweight attribute"))
        old = run.record if run.has_work else None
        if old is not None:
            require_same(run, old.differences(new), old, project)
        files = naming(replace(new, show=show or ""), run)
        to_go_on = shlex.join(["upweight", "rerun", str(shown / "run.toml"), *files])
        did = finished(run, old or new, question, to_go_on, project, show)
    return answer(run, shown, did, top)


@click.command()
@click.argument("run", metavar="RUN/run.toml", type=click.Path(exists=True, path_type=Path))
@project_option
@click.option(
    "--out",
    metavar="OTHER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Repeat from nothing into another directory, and compare.",
)
@verb
def rerun(run: Path, projects: tuple[str, ...], out: Path | None) -> Answer:
    """Finish an interrupted run, or repeat a finished one.

    The code that runs is that of the files you name by --project. Without one, the scores of a
    finished run are read, and what was found about them is said again.

    With --out the same question is asked again from nothing; the answer says whether the scores are
    the same, bit for bit. Exit code 1: they are not.

    \b
    Examples:
        upweight rerun runs/digits/run.toml
        upweight rerun runs/digits/run.toml --project project.py
        upweight rerun runs/digits/run.toml --project project.py --out runs/again
    """
    first = Run.named(run.absolute())
    if out is None and not projects and first.is_finished:
        return audited(first, run)
    typed = ["upweight", "rerun", str(run), *(("--out", str(out)) if out else ())]
    code = named(first, projects, (), shlex.join(typed))
    to_go_on = shlex.join([*typed, *(part for each in projects for part in ("--project", each))])
    if out is None:
        with first.held("upweight rerun"), reopened(first, code) as (project, record, question):
            did = finished(first, record, question, to_go_on, project)
        return answer(first, _short(first.path), did, None)
    second = Run(out.absolute())
    with (
        reopened(first, code) as (project, record, question),
        second.held("upweight rerun"),
    ):
        again = second.record or replace(
            record,
            directory=relative(Path.cwd(), second.path),
            sources=project.sources(),
            versions=library_versions(),
        )
        require_same(second, again.differences(record), again, project)
        did = finished(second, again, question, to_go_on, project)
    done = answer(second, out, did, None)
    facts, said, failed = compared(first, second)
    return Answer(f"{done.text}\n{said}", done.facts | facts, failed)


def audited(run: Run, shown: Path) -> Answer:
    """A finished run by itself: its scores are read, its verdict is said again, nothing is run."""
    run.load()
    record = run.record
    assert record is not None
    done = answer(run, shown, "nothing", None)
    verdict = run.evaluations().get("halves", {}).get("verdict")
    found = "nobody has compared them with retraining" if verdict is None else verdict
    lines = [
        done.text,
        f"  retraining: {found}",
        "  The scores are those that were written. No code was run, so that they are those of the "
        "model and the data is not shown.",
        f"  To compute them again: upweight rerun {shown} {shlex.join(naming(record, run))} "
        "--out OTHER",
        "  It takes from the owner of the run:",
        *(f"    {line}" for line in to_ask_for(record)),
    ]
    return Answer("\n".join(lines), done.facts | {"verdict": verdict})


def finished(
    run: Run,
    record: Record,
    question: Question,
    to_go_on: str,
    project: Project,
    show: str | None = None,
) -> str:
    """Do what is left of a run; what was done, in a word.

    Args:
        run: The run.
        record: What it is asked.
        question: The live objects.
        to_go_on: The command that goes on where this one is interrupted.
        project: Where the user's objects are loaded from.
        show: What to show beside the data from now on; None: as before.

    Raises:
        StaleStore: An interrupted run was begun with other versions.
    """
    if run.is_finished and is_kept(run) and show is None:
        return "nothing"
    record = record if show is None else replace(record, show=show)
    extra = shown_of(project, record.show) if record.show else {}
    if run.is_finished:
        fitted = kept_fit(run, record, question) if run.factors.exists() else None
        with continued_by(to_go_on):
            record.write(run.toml)
            keep(run, question, fitted, extra)
        return "nothing"
    began = run.has_work
    if began and record.versions != library_versions():
        raise StaleStore(
            message(
                "An interrupted run is finished with the versions that it was begun with.",
                f"{dict(record.versions)}, now {library_versions()}.",
                "an upgrade in between: the scores of two versions would be mixed.",
                f"go back to those, or start anew: {to_go_on.partition(' --out ')[0]} --out OTHER",
            )
        )
    record.write(run.toml)
    word = "going on with" if began else "beginning"
    say(f"{word} {record.q} queries × {record.n} training examples, {record.p} parameters")
    started = time.perf_counter()
    with continued_by(to_go_on):
        run.log(f"{word}: {record.method}, {record.measure}, {record.n} × {record.q}")
        try:
            fitted = work.attribute(run, record, question)
            keep(run, question, fitted, extra)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the disk may be full
                run.log(f"stopped by {type(error).__name__}: {error}")
            raise
        run.log(f"finished after {time.perf_counter() - started:.1f} s")
    say(f"finished after {duration(time.perf_counter() - started)}")
    return "continued" if began else "computed"


def answer(run: Run, shown: Path, did: str, top: int | None) -> Answer:
    """Where the scores are, what they say of themselves, and what to do next."""
    record = run.record
    assert record is not None
    facts = {
        "run": str(run.path),
        "did": did,
        "n": record.n,
        "q": record.q,
        "p": record.p,
        "method": record.method,
        "measure": record.measure,
        "provenance": run.provenance,
    }
    lines = [
        f"{shown}: finished already; nothing to do" if did == "nothing" else f"{shown}: finished",
        f"  scores [{record.q} queries × {record.n} training examples] of {record.measure}",
        *(f"  note: {note}" for note in run.provenance["notes"]),
        f"  next: upweight report {shown}",
        f"        upweight evaluate {shown} --recipe project.py:recipe",
    ]
    if top is not None:
        scores = run.load()
        rankings = [scores.top(top, query) for query in range(record.q)]
        facts["top"] = [vars(ranking) for ranking in rankings]
        lines += ["", *map(str, rankings)]
    return Answer("\n".join(lines), facts)


def compared(first: Run, second: Run) -> tuple[dict[str, Any], str, bool]:
    """Whether two runs have the same scores: facts, words, and whether that is a failure."""
    if not first.is_finished:
        said = f"{_short(first.path)} is not finished: nothing to compare"
        return {"bit_identical": None}, said, False
    if first.digests() == second.digests():
        return {"bit_identical": True}, "the scores are bit-identical", False
    a, b = Scores.load(first.scores).values, Scores.load(second.scores).values
    apart = float((a - b).abs().max() / a.abs().max())
    facts = {"bit_identical": False, "largest_difference": apart}
    return facts, f"the scores differ by up to {apart:.1e} of the largest", True


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
