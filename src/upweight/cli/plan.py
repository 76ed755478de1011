"""`upweight plan`: what `upweight attribute` would do, before it does it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from upweight.cli.project import opened
from upweight.cli.question import Asked, question_options
from upweight.cli.screen import Answer, duration, size, table, verb
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
    """Say what attribute would do, and take.

    Takes the same arguments and writes nothing. Shows how each layer's gradients are had, memory
    for a batch, passes over the data, and the expected time, from timing a few examples.

    \b
    Example:
        upweight plan project.py:task --train project.py:train --queries project.py:test \\
            --method "Influence(EKFAC(), damping=Relative(0.1))"
    """
    asked = Asked(**options)
    with opened() as project:
        question = asked.question(project)
        record = asked.record(project, question, Run(Path.cwd()))
        made = forecast(question, record.tolerance, record.memory_bytes or None)
    facts = {"n": record.n, "q": record.q, "p": record.p, "method": record.method, **asdict(made)}
    lines = [
        f"{record.method} of {record.measure}",
        table(
            [
                ("training examples", record.n),
                ("queries", record.q),
                ("parameters", record.p),
                ("passes over the data", made.passes),
                *_memory(made),
                ("expected time", _time(made)),
                ("on disk", _disk(made)),
            ]
        ),
        layer_table(made.layers, made.notes),
    ]
    return Answer("\n".join(filter(None, lines)), facts)


def layer_table(layers: Sequence[Mapping[str, Any]], notes: tuple[str, ...]) -> str:
    """A row per block, and what falls back."""
    if not layers:
        return ""
    rows = [("parameters", "layer", "shape", "gradients")]
    rows += [
        (u["parameters"], u["layer"], "×".join(map(str, u["shape"])), u["rule"]) for u in layers
    ]
    return "\n".join([table(rows), *(f"  note: {note}" for note in notes)])


def _memory(made: Forecast) -> list[tuple[str, str]]:
    if made.batch is None:
        return [("memory of the curvature", f"up to {size(made.operator_bytes)} where it is dense")]
    return [("memory of a batch", f"{size(made.batch_bytes)} for {made.batch} examples")]


def _time(made: Forecast) -> str:
    parts = ", ".join(f"{name} {duration(s)}" for name, s in made.seconds.items())
    return f"about {duration(sum(made.seconds.values()))} ({parts})"


def _disk(made: Forecast) -> str:
    factors = f", factors about {size(made.factors_bytes)}" if made.factors_bytes else ""
    return f"scores {size(made.scores_bytes)}{factors}"
