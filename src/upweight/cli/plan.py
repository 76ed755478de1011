"""`upweight plan`: what `upweight attribute` would do, before it does it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from upweight.cli.project import opened
from upweight.cli.question import Asked, Posed, question_options
from upweight.cli.screen import Answer, duration, size, table, verb
from upweight.front.choice import known_as
from upweight.front.fidelity import fidelity_of
from upweight.runs.directory import Run
from upweight.runs.forecast import Forecast, forecast


@click.command()
@question_options
@click.option("--out", metavar="RUN", hidden=True, help="Ignored, so that attribute's line fits.")
@click.option("--top", hidden=True, help="Ignored as well.")
@click.option("--query", hidden=True, multiple=True, help="Ignored as well.")
@click.option("--show", hidden=True, help="Ignored as well.")
@verb
def plan(out: str | None, top: str | None, query: Any, show: str | None, **options: Any) -> Answer:
    """Show what attribute would do, and what it would cost.

    Takes the same arguments and writes nothing. Shows which rule computes each layer's gradients,
    memory for a batch, passes over the data, the expected time, from timing a few examples or steps
    of training, and how near to retraining the method came on the standing benchmark.

    \b
    Examples:
        upweight plan project.py
        upweight plan project.py:task --train project.py:train --queries project.py:test \\
            --method "Influence(EKFAC(), damping=Relative(0.1))"
    """
    asked = Asked(**options)
    with opened() as project:
        posed = asked.posed(project)
        question, record = posed.question, posed.record(project, Run(Path.cwd()))
        looks_at_training = posed.chosen is not None and question.history is not None
        memory_bytes = record.memory_bytes or None
        made = expected(posed) if looks_at_training else forecast(question, memory_bytes)
    notes = (*posed.notes[1:], *made.notes)  # the first is the choice, which was said
    made = replace(made, notes=notes)
    facts = {"n": record.n, "q": record.q, "p": record.p, "method": record.method, **asdict(made)}
    memory = ("memory of a batch", f"{size(made.batch_bytes)} for {made.batch} examples")
    if looks_at_training:
        memory = ("memory", f"about {size(made.operator_bytes)}")
    elif made.batch is None:
        memory = ("memory of the curvature", f"{size(made.operator_bytes)} at most, if dense")
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in made.seconds.items())
    factors = f", factors about {size(made.factors_bytes)}" if made.factors_bytes else ""
    about = "about" if made.products is None else "at least"
    rows = [
        ("training examples", record.n),
        ("queries", record.q),
        ("parameters", record.p),
        ("passes over the data", made.passes),
        memory,
        ("expected time", f"{about} {duration(sum(made.seconds.values()))} ({stages})"),
        *([] if made.products is None else [("of a solver", str(made.products))]),
        ("on disk", f"scores {size(made.scores_bytes)}{factors}"),
    ]
    title = f"{record.method} of {record.measure}"
    fidelity = fidelity_of(known_as(question.method))
    facts["fidelity"] = [asdict(each) for each in fidelity]
    measured = [f"    {each}" for each in fidelity]
    if measured:
        measured.insert(0, "  on the standing benchmark, against retraining on random halves:")
    parts = [title, table(rows), *measured, layer_table(made.layers, made.notes)]
    return Answer("\n".join(filter(None, parts)), facts)


def expected(posed: Posed) -> Forecast:
    """What a method that was chosen by how the model was trained would take, by the table.

    Some of the examples say little of it: it is reckoned from a step of training and a pass.
    """
    assert posed.chosen is not None
    choice, task = posed.chosen.choice, posed.question.task
    itemsize = torch.promote_types(task.layout.dtype, torch.float32).itemsize
    return Forecast(
        layers=[],
        notes=(),
        batch=None,
        batch_bytes=0,
        passes="those of training, and more",
        seconds={"training, fit and scores": choice.seconds},
        scores_bytes=len(posed.question.train) * len(posed.question.queries) * itemsize,
        factors_bytes=0,
        operator_bytes=int(choice.bytes),
    )


def layer_table(layers: Sequence[Mapping[str, Any]], notes: tuple[str, ...]) -> str:
    """A row per block, and what falls back."""
    if not layers:
        return "\n".join(f"  note: {note}" for note in notes)
    rows = [("parameters", "layer", "shape", "gradients")]
    rows += [
        (u["parameters"], u["layer"], "×".join(map(str, u["shape"])), u["rule"]) for u in layers
    ]
    return "\n".join([table(rows), *(f"  note: {note}" for note in notes)])
