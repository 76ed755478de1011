"""`upweight view`: a run in the browser of this machine, however large it is."""

import contextlib
import shlex
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from upweight.cli.evaluate import checks_of, command
from upweight.cli.named import named
from upweight.cli.opened_index import OpenedIndex, model_options, opened_index
from upweight.cli.pages import Shown, alone, context_of, is_kept, refreshed
from upweight.cli.question import reopened
from upweight.cli.screen import Answer, say, verb
from upweight.errors import NotOffered
from upweight.runs.directory import Run
from upweight.runs.indexed import NAME as INDEX
from upweight.runs.work import refit
from upweight.view import serve
from upweight.view.search import Search, SearchServer
from upweight.view.server import until_interrupted


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--show", metavar="FILE.py:NAME", help="A dict of what to show beside the data.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0: any that is free.")
@click.option("--browser", is_flag=True, help="Open the address in the browser.")
@model_options
@verb
def view(
    run: Path,
    show: str | None,
    port: int,
    browser: bool,
    projects: tuple[str, ...],
    hf: Path | None,
    given: tuple[Path, ...],
    device: str,
) -> Answer:
    """Serve a run, or an index, to the browser of this machine, until Ctrl-C.

    The page of `upweight report`, for scores that are too many for one file. It listens on this
    machine only, and its address carries a token. Of the scores it reads what is looked at.
    It shows what the run holds, and runs no code but that of files you name by --show or --project.

    Of an index it is a box for a text: the training passages behind it, with coloured tokens, what
    they share with it verbatim, and BM25. It asks the live model, named by --hf or --project.

    \b
    Examples:
        upweight view index --hf model
        upweight view runs/pile
        upweight view runs/mails --show project.py:shown --port 8765 --browser
    """
    if (run / INDEX).exists():
        if show is not None:
            raise click.UsageError("--show is for runs; an index shows its texts")
        said = shlex.join(["upweight", "view", str(run)])
        return _index(run, opened_index(run, projects, hf, given, device, said), port, browser)
    if hf is not None or given:
        raise click.UsageError("--hf and --data are for an index; a run takes --project")
    say(f"loading {run} ...")
    place = Run.named(run.absolute(), projects)
    scores = place.open()
    record = place.record
    checked = checks_of(place)
    with contextlib.ExitStack() as stack:
        if show is None and not projects:
            beside, context = Shown(alone(place)), None
        else:
            typed = ["upweight", "view", str(run)]
            typed += ["--show", show] if show else []
            typed += ["--port", str(port)] if port else []
            typed += ["--browser"] if browser else []
            code = named(place, projects, filter(None, [show]), shlex.join(typed))
            project, record, question = stack.enter_context(reopened(place, code))
            of = partial(refit, place, record, question)
            fitted = of if place.factors.exists() else (lambda: None)
            beside = refreshed(place, project, record, question, show, fitted)
            # Of a million examples a live model is not asked for these; the run has kept them.
            if is_kept(place):
                had, display = alone(place), beside.display
                asked = {
                    name: getattr(had, name)
                    for name in ("train_losses", "self_influence", "train_predictions")
                    if getattr(display, name) is None
                }
                beside = replace(beside, display=replace(display, **asked))
            context = context_of(question)
        scores = scores if context is None else scores.attach(context)
        serve(
            scores,
            beside.display,
            open_browser=browser,
            told=say,
            evidence=[*beside.live.get("evidence", ()), *checked],
            removal=beside.live.get("removal"),
            outcomes=beside.live.get("outcomes", ()),
            command=command(place, record if show is None else replace(record, show=show)),
            keep=place.scores,
            port=port,
        )
    return Answer("", {"run": str(place.path)})


def _index(
    folder: Path, opened: AbstractContextManager[OpenedIndex], port: int, browser: bool
) -> Answer:
    with opened as found:
        model = found.model
        if model.tokenizer is None:
            raise NotOffered(
                "The page of an index asks about texts.",
                f"an index of {found.record.task}, which has no tokenizer.",
                "a model of images or rows.",
                "`upweight index top INDEX --queries project.py:test`.",
            )
        search = Search(
            found.index,
            found.data,
            model.tokenizer,
            model.queries,
            lambda i: found.example(i)[0],
        )
        with SearchServer(search, port) as server:
            until_interrupted(server, browser, say)
    return Answer("", {"index": str(folder)})
