"""`upweight view`: a run in the browser of this machine, however large it is."""

import contextlib
import inspect
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from upweight.cli.evaluate import command, found_in
from upweight.cli.named import named, project_option
from upweight.cli.pages import alone, context_of, is_kept, refreshed
from upweight.cli.question import reopened
from upweight.cli.screen import Answer, say, verb
from upweight.runs.directory import Run
from upweight.runs.work import refit
from upweight.view import Answers, keeping, opened, serve

TAKEN = {"title", *inspect.signature(Answers).parameters} - {"scores", "keep"}
"""Arguments of `upweight.report.html` that a view takes too."""


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--show", metavar="FILE.py:NAME", help="A dict of what to show beside the data.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0: any that is free.")
@click.option("--browser", is_flag=True, help="Open the address in the browser.")
@project_option
@verb
def view(
    run: Path, show: str | None, port: int, browser: bool, projects: tuple[str, ...]
) -> Answer:
    """Serve a run to the browser of this machine, until Ctrl-C.

    The page of `upweight report`, for scores that are too many for one file. It listens on this
    machine only, and its address carries a token. The first view copies the scores within the run.
    It shows what the run holds, and runs no code but that of files you name by --show or --project.

    \b
    Examples:
        upweight view runs/pile
        upweight view runs/mails --show project.py:shown --port 8765 --browser
    """
    place = Run.named(run.absolute(), projects)
    place.require_finished()
    record = place.record
    rest: dict[str, Any] = {
        "port": port,
        "comparison": found_in(place),
        "command": command(place, record if show is None else replace(record, show=show)),
        "open_browser": browser,
        "told": say,
    }
    with contextlib.ExitStack() as stack:
        if show is None and not projects:
            extra, context = alone(place), None
        else:
            given = [*(("--show", show) if show else ()), *(("--port", str(port)) if port else ())]
            typed = ["upweight", "view", str(run), *given, *(["--browser"] if browser else ())]
            code = named(place, projects, filter(None, [show]), shlex.join(typed))
            project, record, question = stack.enter_context(reopened(place, code))
            of = partial(refit, place, record, question)
            fitted = of if place.factors.exists() else (lambda: None)
            extra = refreshed(place, project, record, question, show, fitted)
            # Of a million examples a live model is not asked for these; the run has kept them.
            if is_kept(place):
                cached = alone(place)
                for name in ("train_losses", "self_influence"):
                    extra.setdefault(name, cached[name])
            extra |= {"train": question.train, "queries": question.queries}
            context = context_of(question)
        # Held while it copies; others may work while it serves.
        scores = opened(place.scores, lambda: place.held("upweight view"))
        # What only a file needs, such as the number of examples on a page, is left out.
        extra = {name: value for name, value in extra.items() if name in TAKEN}
        scores = scores if context is None else scores.attach(context)
        serve(scores, keep=keeping(place.scores), **rest | extra)
    return Answer("", {"run": str(place.path)})
