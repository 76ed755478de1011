"""`upweight evaluate` and `upweight report`: the scores against retraining, and the page."""

import shlex
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from upweight import report as pages
from upweight.cli.named import named, project_option
from upweight.cli.pages import alone, context_of, refreshed
from upweight.cli.project import Project
from upweight.cli.question import reopened
from upweight.cli.screen import Answer, continued_by, size, verb
from upweight.cli.spec import parse
from upweight.errors import SpecError
from upweight.evaluation import LDS, Check, check
from upweight.front.opened import own_recipe
from upweight.runs.directory import Run
from upweight.runs.record import Record, is_reference, relative_to
from upweight.runs.work import refit
from upweight.runtime.evaluations import HALVES
from upweight.runtime.resources import Resources
from upweight.task.recipe import Recipe
from upweight.training.function import as_recipe
from upweight.training.history import History


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--recipe",
    metavar="FILE.py:NAME",
    help="How the model was trained: a spec, an object of yours, or a function of data weights.  "
    "[default: as `attribute` was told; scikit-learn and statsmodels fit again]",
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
@project_option
@verb
def evaluate(
    run: Path,
    recipe: str | None,
    budget: str | None,
    subsets: int | None,
    jobs: int | None,
    projects: tuple[str, ...],
) -> Answer:
    """Compare the scores with retraining.

    Trains the model again on random halves of its data, from two seeds each, and says in words and
    numbers whether to believe the scores. Trained models are cached: a larger --budget reuses them.
    Only code in files that you name runs: that of the recipe, and others by --project.

    \b
    Examples:
        upweight evaluate runs/patients --project project.py
        upweight evaluate runs/digits --recipe project.py:recipe
        upweight evaluate runs/digits --recipe project.py:recipe --budget "10 min"
        upweight evaluate runs/digits --recipe "Newton()" --lds 50 --project project.py
    """
    if budget is not None and subsets is not None:
        raise click.UsageError("--budget and --lds exclude each other")
    if recipe is not None and not is_reference(recipe):
        parse(recipe, "recipe")  # an error in it is reported before anything is loaded
    place, shown = Run.named(run.absolute(), projects), run
    options = {"--recipe": recipe, "--budget": budget, "--lds": subsets, "--jobs": jobs}
    given = [str(x) for pair in options.items() if pair[1] is not None for x in pair]
    typed = ["upweight", "evaluate", str(shown), *given]
    told = recipe or place.record.recipe
    code = named(place, projects, filter(is_reference, filter(None, [told])), shlex.join(typed))
    files = [part for each in projects for part in ("--project", each)]
    resume = shlex.join([*typed, *files])
    with place.held("upweight evaluate"), reopened(place, code) as (project, record, question):
        place.evaluations()  # a damaged one is reported before retraining
        scores = place.load().attach(context_of(question))
        how = recipe_of(project, told) if told else fit_of(project, record)
        with continued_by(resume):
            place.log(f"retraining by {how!r}")
            using = Resources(jobs=jobs, folder=place.retrained)
            found = check(scores, how, budget, subsets=subsets, resources=using)
            place.keep_evaluation(HALVES, kept(found, told or repr(how)))
            for note in found.notes:
                place.log(f"note: {note}")
            place.log(f"{found.verdict}: {found.reason}")
    facts = {"run": str(place.path), **found.summary()}
    return Answer(f"{found}\n  next: upweight report {shlex.quote(str(shown))}", facts)


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
    help="A upweight.report.Display, or a dict of its arguments.",
)
@project_option
@verb
def report(run: Path, out: Path | None, show: str | None, projects: tuple[str, ...]) -> Answer:
    """Write the page of a run: one HTML file that opens offline.

    It shows first how far the scores can be trusted, with what `upweight evaluate` found, then
    what raised and lowered the measurement of each query.

    It is made of what the run holds, and runs no code. What to show beside the data themselves,
    such as the names of classes or the texts that numbers stand for, comes from a dict in a file of
    yours: shown = {"names": ["ham", "spam"]}. That file is run, as are files named by --project;
    what it shows is then kept in the run.

    \b
    Examples:
        upweight report runs/digits && open runs/digits/report.html
        upweight report runs/mails --show project.py:shown
    """
    place = Run.named(run.absolute(), projects)
    place.require_finished()
    path = place.report if out is None else out.absolute()
    record = place.record
    said_of = record if show is None else replace(record, show=show)
    checked, again = checks_of(place), command(place, said_of)
    if show is None and not projects:
        written = pages.html(place.load(), path, alone(place), evidence=checked, command=again)
    else:
        given = [*(("--out", str(out)) if out else ()), *(("--show", show) if show else ())]
        typed = ["upweight", "report", str(run), *given]
        code = named(place, projects, filter(None, [show]), shlex.join(typed))
        with reopened(place, code) as (project, record, question):
            fitted = refit(place, record, question) if place.factors.exists() else None
            beside = refreshed(place, project, record, question, show, lambda: fitted)
            scores = place.load().attach(context_of(question, fitted))
            live = {"command": again} | dict(beside.live)
            live["evidence"] = [*live.get("evidence", ()), *checked]
            written = pages.html(scores, path, beside.display, **live)
    bytes_ = written.stat().st_size
    said = f"{out or run / 'report.html'}: {size(bytes_)}. Open it in a browser."
    if show is None and not projects:
        again = shlex.join(["upweight", "rerun", str(run)])
        said += f"\n  Made of the run alone. What computing it again needs: {again}"
    return Answer(
        said, {"run": str(place.path), "report": str(written), "bytes": written.stat().st_size}
    )


def recipe_of(project: Project, text: str) -> Recipe:
    """A spec, an object of the user's, or a training function of the user's.

    Of a trajectory its recipe, or the one beside it.
    """
    value = parse(text, "recipe") if not is_reference(text) else project.load(text)
    if isinstance(value, History):  # the steps of a recipe; of a loop nobody knows one
        value = getattr(value, "recipe", None) or project.beside(text, "recipe")
    if not isinstance(value, nn.Module):
        value = as_recipe(value)
    if not isinstance(value, Recipe):
        raise SpecError(
            "A recipe says how the model was trained.",
            f"{text}, an object of type {type(value).__name__}.",
            "a trained model, or a function whose first argument is not called weights, which was "
            "called without any.",
            "name an upweight.Training(...), or a function from data weights to a trained model: "
            "def recipe(weights).",
        )
    return value


def fit_of(project: Project, record: Record) -> Recipe:
    """The fit of scikit-learn or statsmodels of a run, or the `recipe` in the file of its task.

    Raises:
        SpecError: It is of a network or a task, which do not say how they were trained, and there
            is no `recipe` beside it.
    """
    found = own_recipe(project.load(record.task))
    source = record.task.rpartition(":")[0]
    if found is None and project.defines(source, "recipe"):
        return recipe_of(project, f"{source}:recipe")
    if found is None:
        raise SpecError(
            "A check trains the model again, and must know how.",
            f"{record.task}, and no recipe.",
            "a network, which does not say how it was trained.",
            "--recipe project.py:recipe, an upweight.Training(...) or a function from data weights "
            "to a trained model.",
        )
    return found


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


def checks_of(run: Run) -> list[Check]:
    """The comparison that `kept` described, if there was one."""
    facts = run.evaluations().get(HALVES)
    if facts is None:
        return []
    predicted, measured = (
        torch.tensor(facts[key], dtype=torch.float64) for key in ("predicted", "measured")
    )
    budget = float("inf") if facts["budget"] is None else facts["budget"]
    # Those kept by earlier versions have none.
    drift = facts.get("drift")
    drifted = None if drift is None else torch.tensor(drift, dtype=torch.float64)
    fraction, models, seconds = (facts[name] for name in ("fraction", "models", "seconds"))
    lds, left_out = LDS(predicted, measured), tuple(facts.get("left_out", ()))
    return [Check(lds, fraction, models, seconds, budget, drifted, left_out=left_out)]


def command(run: Run, record: Record) -> str:
    """What makes the run and its page again, from nothing, in the project's directory."""
    out = relative_to(run.path, run.path / record.directory)
    parts = [
        "upweight", "attribute", record.task, "--train", record.train, "--queries", record.queries,
        "--method", record.method, "--measure", record.measure, "--out", out,
    ]  # fmt: skip
    if record.recipe:
        parts += ["--recipe", record.recipe]
    if record.memory_bytes:
        parts += ["--memory", str(record.memory_bytes)]
    if record.show:
        parts += ["--show", record.show]
    return f"{shlex.join(parts)} && upweight report {shlex.quote(out)}"
