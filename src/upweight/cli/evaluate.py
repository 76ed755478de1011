"""`upweight evaluate` and `upweight report`: the scores against retraining, and the page."""

import inspect
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import torch

from upweight import report as pages
from upweight.cli.project import Project
from upweight.cli.question import is_reference, relative, reopened, spec_or_object
from upweight.cli.screen import Answer, continued_by, size, verb
from upweight.cli.spec import parse
from upweight.errors import SpecError, message
from upweight.evaluation import LDS, Check, check, check_on
from upweight.runs.directory import Run
from upweight.runs.question import Question
from upweight.runs.record import Record
from upweight.runs.work import kept_fit
from upweight.scores import Context, Scores
from upweight.task.recipe import Recipe
from upweight.training.function import FromFunction


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--recipe",
    required=True,
    metavar="FILE.py:NAME",
    help="How the model was trained: a spec, an object of yours, or a function of data weights.",
)
@click.option("--budget", metavar="TIME", help='How long to retrain.  [default: "2 min"]')
@click.option(
    "--lds",
    "subsets",
    type=click.IntRange(3),
    metavar="N",
    help="Retrain on N random halves, however long it takes.",
)
@click.option("--jobs", type=int, metavar="N", help="Processes to retrain in; -1: one per core.")
@verb
def evaluate(
    run: Path, recipe: str, budget: str | None, subsets: int | None, jobs: int | None
) -> Answer:
    """Hold the scores against retraining.

    Trains the model again on random halves of its data, from two seeds each, and says in words and
    numbers whether to believe the scores. Every model is kept: what was trained is not trained
    again, by a larger --budget neither.

    \b
    Examples:
        upweight evaluate runs/digits --recipe project.py:recipe
        upweight evaluate runs/digits --recipe project.py:recipe --budget "10 min"
        upweight evaluate runs/digits --recipe "Newton()" --lds 50
    """
    if budget is not None and subsets is not None:
        raise click.UsageError("--budget and --lds exclude each other")
    if not is_reference(recipe):
        parse(recipe, "recipe")  # an error in it is told before anything is loaded
    place, shown = Run.named(run.absolute()), run
    with place.held("upweight evaluate"), reopened(place) as (project, _, question):
        scores = attached(place, question)
        how = recipe_of(project, recipe)
        options = {"--recipe": recipe, "--budget": budget, "--lds": subsets, "--jobs": jobs}
        given = [str(x) for pair in options.items() if pair[1] is not None for x in pair]
        with continued_by(shlex.join(["upweight", "evaluate", str(shown), *given])):
            place.log(f"retraining by {how!r}")
            if subsets is None:
                found = check(scores, how, budget or "2 min", jobs=jobs, cache=place.retrained)
            else:
                found = check_on(scores, how, subsets, jobs=jobs, cache=place.retrained)
            place.keep_evaluation("halves", kept(found, recipe))
            for note in found.notes:
                place.log(f"note: {note}")
            place.log(f"{found.verdict}: {found.reason}")
    facts = {"run": str(place.path), **found.summary()}
    return Answer(f"{found}\n  next: upweight report {shown}", facts)


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the page.  [default: RUN/report.html]",
)
@click.option(
    "--show",
    metavar="FILE.py:NAME",
    help="A dict of further arguments to upweight.report.html.",
)
@verb
def report(run: Path, out: Path | None, show: str | None) -> Answer:
    """Write the page of a run: one HTML file that opens offline.

    It shows first how far the scores can be trusted, with what `upweight evaluate` found, then
    what raised and lowered the measurement of each query.

    What to show beside the data themselves, such as the names of classes or the texts that numbers
    stand for, comes from a dict in a file of yours: shown = {"names": ["ham", "spam"]}.

    \b
    Examples:
        upweight report runs/digits && open runs/digits/report.html
        upweight report runs/mails --show project.py:shown
    """
    place = Run.named(run.absolute())
    path = place.report if out is None else out.absolute()
    with reopened(place) as (project, record, question):
        fitted = kept_fit(place, record, question) if place.factors.exists() else None
        scores = attached(place, question, fitted)
        extra = {} if show is None else shown_of(project, show)
        written = page(scores, question, path, found_in(place), command(place, record), extra)
    bytes_ = written.stat().st_size
    said = f"{out or run / 'report.html'}: {size(bytes_)}. Open it in a browser."
    return Answer(said, {"run": str(place.path), "report": str(written), "bytes": bytes_})


def page(
    scores: Scores,
    question: Question,
    path: Path,
    comparison: Check | None,
    made_by: str,
    extra: dict[str, Any],
) -> Path:
    """The page of a run."""
    facts: dict[str, Any] = {"comparison": comparison, "command": made_by}
    return pages.html(scores, question.train, question.queries, path, **facts | extra)


def shown_of(project: Project, reference: str) -> dict[str, Any]:
    """A dict of arguments of `upweight.report.html`."""
    value = project.load(reference)
    known = set(inspect.signature(pages.html).parameters) - {"scores", "train", "queries", "path"}
    if not isinstance(value, dict) or not set(value) <= known:
        given = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise SpecError(
            message(
                "--show names a dict of arguments of upweight.report.html.",
                f"{reference}: {given}.",
                "a misspelled key, or another object.",
                f"its keys are among {', '.join(sorted(known))}.",
            )
        )
    return value


def attached(run: Run, question: Question, fitted: Any = None) -> Scores:
    """The scores of a run with the objects that they are of."""
    context = Context(question.task, question.train, question.queries, question.measure, fitted)
    return run.load().attach(context)


def recipe_of(project: Project, text: str) -> Recipe:
    """A spec, an object of the user's, or a training function of the user's."""
    value = spec_or_object(project, text, "recipe")
    if callable(value) and not isinstance(value, Recipe):
        value = FromFunction(value)
    if not isinstance(value, Recipe):
        raise SpecError(
            message(
                "A recipe says how the model was trained.",
                f"{text}, an object of type {type(value).__name__}.",
                "a trained model, or another object of that name.",
                "name a upweight.Training(...), or a function from data weights to a trained "
                "model.",
            )
        )
    return value


def kept(found: Check, recipe: str) -> dict[str, Any]:
    """A comparison as JSON, with all that it takes to make it again."""
    return {
        "recipe": recipe,
        "when": datetime.now().isoformat(" ", "seconds"),
        **found.summary(),
        "predicted": found.lds.predicted.tolist(),
        "measured": found.lds.values.tolist(),
        "drift": None if found.drift is None else found.drift.tolist(),
    }


def found_in(run: Run) -> Check | None:
    """The comparison that `kept` described."""
    facts = run.evaluations().get("halves")
    if facts is None:
        return None
    predicted, measured = (
        torch.tensor(facts[key], dtype=torch.float64) for key in ("predicted", "measured")
    )
    budget = float("inf") if facts["budget"] is None else facts["budget"]
    # Those kept by earlier versions have none.
    drift = facts.get("drift")
    return Check(
        LDS(predicted, measured),
        facts["fraction"],
        facts["models"],
        facts["seconds"],
        budget,
        None if drift is None else torch.tensor(drift, dtype=torch.float64),
    )


def command(run: Run, record: Record) -> str:
    """What makes the run and its page again, from nothing, in the project's directory."""
    out = relative(run.path, Path.cwd())
    parts = [
        "upweight", "attribute", record.task, "--train", record.train, "--queries", record.queries,
        "--method", record.method, "--measure", record.measure, "--out", out,
    ]  # fmt: skip
    if record.tolerance:
        parts += ["--tolerance", f"{record.tolerance:g}"]
    return f"{shlex.join(parts)} && upweight report {shlex.quote(out)}"
