"""`upweight attribute` and `upweight rerun`: scores in a run directory, and the same again."""

import contextlib
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from upweight.cli.compared import compared
from upweight.cli.named import named, project_option, to_ask_for
from upweight.cli.pages import Shown, is_kept, keep, shown_of
from upweight.cli.project import Project, opened
from upweight.cli.question import Asked, Posed, question_options, reopened, require_same
from upweight.cli.rankings import display_of, hardest, named_queries, rankings
from upweight.cli.screen import Answer, continued_by, duration, say, verb
from upweight.errors import StaleStore, UpweightError
from upweight.front.attribute import is_unusable
from upweight.front.opened import own_recipe
from upweight.runs import work
from upweight.runs.directory import Run
from upweight.runs.environment import environment
from upweight.runs.question import Question
from upweight.runs.record import Record, is_reference, relative_to
from upweight.runs.work import refit
from upweight.runtime.evaluations import HALVES
from upweight.runtime.ranks import ALL, ALONE, Ranks, launched, share_of
from upweight.runtime.versions import library_versions

TO_DO, DONE = 1, 0
"""What rank 0 tells the others."""

SHOWN_QUERIES, SHOWN_EXAMPLES = 5, 3
"""Queries whose strongest examples are printed, unless others are named; and how many of each."""

BEGUN = (
    "The method was chosen when the run was begun, and an interrupted run goes on with it. With "
    "another --out one is chosen anew, and the next is taken where it cannot be used."
)
"""Of a run that was interrupted."""


@click.command()
@question_options
@click.option(
    "--out",
    required=True,
    metavar="RUN",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run directory; made if it does not exist.",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="K",
    help="Print the K strongest examples of the hardest queries, or of those that --query names "
    f"({SHOWN_EXAMPLES} where it does).",
)
@click.option(
    "--query",
    "asked_of",
    multiple=True,
    metavar="Q",
    help=f"Of which queries, by place or id.  [default: the {SHOWN_QUERIES} hardest]",
)
@click.option(
    "--show",
    metavar="FILE.py:NAME",
    help="A dict of what the page shows beside the data; kept in the run.",
)
@click.option(
    "--shards",
    default=ALL,
    metavar="I/M",
    help="Score only every M-th part, from the I-th on: for M processes that do not talk to each "
    "other, such as the jobs of an array. The last to end finishes the run.",
)
@verb
def attribute(
    out: Path,
    top: int | None,
    asked_of: tuple[str, ...],
    show: str | None,
    shards: str,
    **options: Any,
) -> Answer:
    """Score every training example for every query.

    Writes a run directory. TASK names an upweight.Task in a file of yours, a model, or a function
    that makes one; of a file alone, task or model in it, with loss, train and queries or test. If
    interrupted, the same command resumes. A directory of another question is refused; a finished
    one is left as it is. Under torchrun all processes share the work; the files are the same.

    \b
    Examples:
        upweight attribute project.py --out run
        upweight attribute project.py:task --train project.py:train --queries project.py:test \\
            --method "Influence(EKFAC(), damping=Relative(0.1))" --measure "Margin()" --out run
        upweight attribute project.py:task --train project.py:train --queries project.py:test \\
            --method "Influence(Hessian())" --top 3 --out run
        torchrun --nproc-per-node 4 -m upweight attribute project.py --out run
    """
    asked, run, shown = Asked(**options), Run(out.absolute()), out
    is_part = share_of(shards)[1] > 1
    if is_part and asked.method is None:
        raise click.UsageError("--shards needs --method: all processes must ask the same")
    with launched() as ranks, contextlib.ExitStack() as stack:
        if ranks.rank > 0:
            share_in(asked, run, ranks, shards)
            return Answer("", {})
        exists = run.path.exists()
        if exists:  # refused before anything is loaded
            if not is_part:
                stack.enter_context(run.held("upweight attribute"))
            asked = as_begun(asked, run)
        project = stack.enter_context(opened())
        posed = asked.posed(project, is_shared=ranks.size > 1)
        question, new = posed.question, posed.record(project, run)
        ids = getattr(getattr(question.queries, "given", None), "ids", None)
        named = named_queries(asked_of, ids, new.q)
        if not exists and not is_part:  # only now: a mistake in the options leaves no directory
            stack.enter_context(run.held("upweight attribute"))
        with run.together() if is_part else contextlib.nullcontext():
            old = run.record if (run.has_work or is_part) and run.toml.exists() else None
            if old is not None:
                require_same(run, old.differences(new), old, project)
            elif is_part:
                new.write(run.toml)
        files = run.naming(replace(new, show=show or ""))
        to_go_on = shlex.join(["upweight", "rerun", str(shown / "run.toml"), *files])
        did = finished(run, old or new, question, to_go_on, project, show, ranks, shards, posed)
        if not run.is_finished:
            text = f"{shown}: part {shards} is done; the run is finished when all parts are"
            return Answer(text, {"run": str(run.path), "did": did, "shards": shards})
    done = answer(run, shown, did, project)
    if top is None and not named:
        return done
    return with_rankings(done, run, top or SHOWN_EXAMPLES, named)


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

    With --out the same question is asked again from nothing. The answer says whether the scores are
    the same bits, the same to rounding, with what was different, or different. Exit code 1: they
    are different, or not the same bits on the same machine with the same versions.

    \b
    Examples:
        upweight rerun runs/digits/run.toml
        upweight rerun runs/digits/run.toml --project project.py
        upweight rerun runs/digits/run.toml --project project.py --out runs/again
    """
    first = Run.named(run.absolute(), projects)
    if out is None and not projects and first.is_finished:
        return audited(first, run)
    if out is not None and out.absolute().resolve() == first.path.resolve():
        raise click.UsageError("--out is the run itself; name another directory to compare it with")
    typed, apart = ["upweight", "rerun", str(run)], ["--out", str(out)] if out else []
    code = named(first, projects, (), shlex.join([*typed, *apart]))
    files = [part for each in projects for part in ("--project", each)]
    to_go_on = shlex.join([*typed, *files, *apart])
    if out is None:
        with first.held("upweight rerun"), reopened(first, code) as (project, record, question):
            did = finished(first, record, question, to_go_on, project)
        return answer(first, _short(first.path), did, project)
    if first.is_finished:
        first.open()  # scores that are damaged are told before hours of work, not after
    second = Run(out.absolute(), projects)
    with (
        reopened(first, code) as (project, record, question),
        second.held("upweight rerun"),
    ):
        again = replace(
            record,
            directory=relative_to(Path.cwd(), second.path),
            sources=project.sources(),
            versions=library_versions(),
            environment=environment(question.task.layout.device),
            files=project.files(),
        )
        if second.toml.exists():
            again = second.record
        require_same(second, again.differences(record), again, project)
        did = finished(second, again, question, to_go_on, project)
    done = answer(second, out, did, project)
    if not first.is_finished:
        said = f"{_short(first.path)} is not finished: nothing to compare"
        return Answer(f"{done.text}\n{said}", done.facts | {"bit_identical": None})
    facts, said, failed = compared(first, second)
    return Answer(f"{done.text}\n{said}", done.facts | facts, failed)


def audited(run: Run, shown: Path) -> Answer:
    """A finished run by itself: its scores are read, its verdict is said again, nothing is run."""
    run.open()  # which raises where they are damaged
    record = run.record
    done = answer(run, shown, "nothing")
    again = shlex.join(["upweight", "rerun", str(shown), *run.naming(record), "--out", "OTHER"])
    lines = [
        done.text,
        "  No code was run: whether these are the scores of that model and those data was not "
        "checked. To compute them again:",
        f"    {again}",
        "  which takes these files of the owner of the run:",
        *(f"    {line}" for line in to_ask_for(record, run)),
    ]
    return Answer("\n".join(lines), done.facts)


def as_begun(asked: Asked, run: Run) -> Asked:
    """With the method that a run was begun with, where none is asked for: none is chosen anew.

    A method that run.toml names as an object is not taken up, and what the method was fitted with
    is found in the user's own file again: a run directory names no code to run.
    """
    if asked.method is not None or not (run.has_work and run.toml.exists()):
        return asked
    method, recipe = run.record.method, run.record.recipe
    if is_reference(method):
        return asked
    return replace(asked, method=method, recipe=asked.recipe if recipe else None)


def share_in(asked: Asked, run: Run, ranks: Ranks, shards: str) -> None:
    """What a rank other than 0 does: its share of the work that rank 0 has begun.

    It loads the project after rank 0 has: a mistake in it is said once.

    Raises:
        StaleStore: The project gives this rank another model or data.
    """
    if ranks.number(TO_DO) == DONE:
        return
    record = run.record
    if asked.method is None:
        asked = replace(asked, method=record.method, recipe=record.recipe or None)
    with opened() as project:
        question = asked.posed(project).question
        require_same(run, record.changed(question.fingerprints()), record, project)
        work.attribute(run, record, question, ranks, shards)


def finished(
    run: Run,
    record: Record,
    question: Question,
    to_go_on: str,
    project: Project,
    show: str | None = None,
    ranks: Ranks = ALONE,
    shards: str = ALL,
    posed: Posed | None = None,
) -> str:
    """Do what is left of a run, or this process's part; what was done, in a word.

    Where a method that was chosen, as `posed` says, cannot be used, the run is begun anew with the
    next, which is chosen for what is left of the budget; unless other processes work on it too.

    Raises:
        StaleStore: An interrupted run was begun with other versions, or scores were altered.
    """
    if run.is_finished:
        run.open()  # which raises where they are damaged: then nothing is finished
    if run.is_finished and is_kept(run) and show is None:
        ranks.number(DONE)
        return "nothing"
    record = record if show is None else replace(record, show=show)
    beside = shown_of(project, record.show) if record.show else Shown()
    if run.is_finished:
        ranks.number(DONE)
        fitted = refit(run, record, question) if run.factors.exists() else None
        with continued_by(to_go_on):
            record.write(run.toml)
            keep(run, question, fitted, beside)
        return "nothing"
    began = run.has_work
    if began and record.versions != library_versions():
        raise StaleStore(
            "An interrupted run is finished with the versions that it was begun with.",
            f"{dict(record.versions)}, now {library_versions()}.",
            "an upgrade in between: the scores of two versions would be mixed.",
            f"go back to those, or start anew: {to_go_on.partition(' --out ')[0]} --out OTHER",
        )
    record.write(run.toml)
    word = "resuming" if began else "starting"
    say(f"{word} {record.q} queries × {record.n} training examples, {record.p} parameters")
    started = time.perf_counter()
    with continued_by(to_go_on):
        run.log(f"{word}: {record.method}, {record.measure}, {record.n} × {record.q}")
        try:
            ranks.number(TO_DO)
            while True:
                try:
                    fitted = work.attribute(run, record, question, ranks, shards)
                    break
                except UpweightError as error:
                    if posed is None or ranks.size > 1 or shards != ALL:
                        raise
                    if began and record.notes and is_unusable(question.method, error):
                        error.add_note(BEGUN)
                    posed = posed.otherwise(error, time.perf_counter() - started)
                    question = posed.question
                    record = replace(posed.record(project, run), show=record.show)
                    run.begin_anew()
                    record.write(run.toml)
                    run.log(f"could not be used: {str(error).splitlines()[0]}; {record.method} now")
            if shards != ALL and not run.is_finished:
                return "a part"
            with run.together() if shards != ALL else contextlib.nullcontext():
                keep(run, question, fitted if fitted.scorer.is_quick_of_itself else None, beside)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the disk may be full
                run.log(f"stopped by {type(error).__name__}: {error}")
            raise
        run.log(f"finished after {time.perf_counter() - started:.1f} s")
    say(f"finished after {duration(time.perf_counter() - started)}")
    return "continued" if began else "computed"


def answer(run: Run, shown: Path, did: str, project: Project | None = None) -> Answer:
    """Where the scores are, what they say of themselves, and what to do next."""
    record = run.record
    facts = {
        "run": str(run.path),
        "did": did,
        "n": record.n,
        "q": record.q,
        "p": record.p,
        "method": record.method,
        "measure": record.measure,
        "provenance": run.provenance,
        "verdict": run.evaluations().get(HALVES, {}).get("verdict"),
    }
    retraining = facts["verdict"] or "not checked"
    lines = [
        f"{shown}: finished already; nothing to do" if did == "nothing" else f"{shown}: finished",
        f"  scores [{record.q} queries × {record.n} training examples] of {record.measure}",
        *(f"  note: {note}" for note in run.provenance["notes"]),
        *([f"  retraining: {retraining}"] if did == "nothing" else []),
        f"  next: upweight report {shlex.quote(str(shown))}",
    ]
    if project is not None:
        recipe = ["evaluate", str(shown), *_recipe(project, run, record)]
        again = ["rerun", str(shown), *_naming(project, run, record), "--out", f"{shown}-again"]
        lines += [f"        upweight {shlex.join(each)}" for each in (recipe, again)]
    return Answer("\n".join(lines), facts)


def with_rankings(done: Answer, run: Run, top: int, asked_of: list[int]) -> Answer:
    """An answer with the strongest examples of the hardest queries; as JSON of all queries."""
    scores, display = run.load(), display_of(run)
    q = len(scores)
    some = list(asked_of) or hardest(scores, display, SHOWN_QUERIES)
    found = rankings(scores, display, top, asked_of or range(q))
    of = {ranking.query: ranking for ranking in found}
    lines = [str(of[query]) for query in some]
    if not asked_of and len(some) < q:
        lines.insert(0, f"the {len(some)} queries on which the model does worst:")
        lines.append(f"and {q - len(some)} other queries: --query Q, or `upweight report`")
    facts = done.facts | {"top": [ranking.facts for ranking in found]}
    return Answer("\n".join([done.text, "", *lines]), facts)


def _naming(project: Project, run: Run, record: Record) -> list[str]:
    """The options that name the files that just ran, which may not lie where the run says."""
    if project.only is None:
        return run.naming(record)
    files = dict.fromkeys(str(_short(Path(project.only[source]))) for source in record.asked)
    return [part for file in files for part in ("--project", file)]


def _recipe(project: Project, run: Run, record: Record) -> list[str]:
    """The recipe of the user's file under its usual name, with the other files of the run."""
    if own_recipe(project.named(record.task)) is not None:
        return _naming(project, run, record)
    file, name = "FILE.py", "NAME"
    for module in project.modules.values():
        if "recipe" in vars(module) and isinstance(module.__file__, str):
            file, name = str(_short(Path(module.__file__))), "recipe"
            break
    files = _naming(project, run, record)[1::2]
    others = [each for each in files if Path(each).absolute() != Path(file).absolute()]
    return [
        "--recipe",
        f"{file}:{name}",
        *(part for each in others for part in ("--project", each)),
    ]


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
