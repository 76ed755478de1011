"""`upweight view`: a run in the browser of this machine, however large it is."""

import inspect
from pathlib import Path

import click

from upweight.cli.evaluate import command, found_in, shown_of
from upweight.cli.question import reopened
from upweight.cli.screen import Answer, say, verb
from upweight.runs.directory import Run
from upweight.scores import Context
from upweight.view import Answers, keeping, opened, serve

TAKEN = {"title", *inspect.signature(Answers).parameters} - {"scores", "train", "queries", "keep"}
"""Arguments of `upweight.report.html` that a view takes too."""


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--show", metavar="FILE.py:NAME", help="A dict of what to show beside the data.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0: any that is free.")
@click.option("--browser", is_flag=True, help="Open the address in the browser.")
@verb
def view(run: Path, show: str | None, port: int, browser: bool) -> Answer:
    """Serve a run to the browser of this machine, until Ctrl-C.

    The page of `upweight report`, for scores that are too many for one file. It listens on this
    machine only, and its address carries a token. The first time it copies the scores once more.

    \b
    Examples:
        upweight view runs/pile
        upweight view runs/mails --show project.py:shown --port 8765 --browser
    """
    place = Run.named(run.absolute())
    place.require_finished()
    with reopened(place) as (project, record, question):
        # Held while it copies; others may work while it serves.
        scores = opened(place.scores, lambda: place.held("upweight view"))
        context = Context(question.task, question.train, question.queries, question.measure)
        extra = {} if show is None else shown_of(project, show)
        # What only a file needs, such as the number of examples on a page, is left out.
        extra = {name: value for name, value in extra.items() if name in TAKEN}
        serve(
            scores.attach(context),
            question.train,
            question.queries,
            keep=keeping(place.scores),
            port=port,
            comparison=found_in(place),
            command=command(place, record),
            open_browser=browser,
            told=say,
            **extra,
        )
    return Answer("", {"run": str(place.path)})
