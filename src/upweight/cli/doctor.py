"""`upweight doctor`: what this machine has, and whether a model can be attributed."""

import contextlib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import click
import torch

from upweight.cli.plan import layer_table
from upweight.cli.project import opened
from upweight.cli.question import NAMES, loaded_task, with_training_data
from upweight.cli.screen import Answer, size, table, verb
from upweight.errors import UnsupportedModel, UpweightError
from upweight.gradients.layers import rule_for
from upweight.gradients.planning import plan
from upweight.gradients.uses import layer_uses
from upweight.runtime.hardware import has_fast_bfloat16
from upweight.runtime.memory import free_bytes
from upweight.runtime.versions import library_versions, version_of
from upweight.task.check import checked_losses
from upweight.task.data import Data
from upweight.task.measures import Logit, LogProb, Loss, Margin
from upweight.task.task import Task

OPTIONAL = ("scikit-learn", "statsmodels", "pandas", "matplotlib", "transformers", "distributed")


@click.command()
@click.argument("task", required=False, metavar="[FILE.py[:TASK]]")
@click.option("--train", metavar="FILE.py:NAME", help="The training set, to try the model on.")
@verb
def doctor(task: str | None, train: str | None) -> Answer:
    """Check this machine, and a model of yours.

    With --train, a few examples are run: the rule that computes each layer's gradients is checked
    against autograd, all targets against the loss; the measures that the loss allows are listed.
    Of a file alone the task and the training set are found by name, as `upweight attribute` does.

    \b
    Examples:
        upweight doctor
        upweight doctor project.py
        upweight doctor project.py:task --train project.py:train
    """
    facts = machine()
    text = table(_words(facts))
    if task is not None:
        with opened() as project:
            if ":" not in Path(task).name:
                source, task = task, project.reference(task, NAMES["task"])
                found_by_name = (
                    f"{source}:{n}" for n in NAMES["train"] if project.defines(source, n)
                )
                train = train or next(found_by_name, None)
            if train is None:
                model, data = loaded_task(project, task), None
            else:
                model, data = with_training_data(project, task, train)
            found, said = examined(model, data)
        facts |= found
        text += f"\n\n{task}\n{said}"
    return Answer(text, facts)


def machine() -> dict[str, Any]:
    """Versions, devices and memory."""
    devices: dict[str, dict[str, Any]] = {
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    }
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = {"name": torch.cuda.get_device_name(index)}
    for name, facts in devices.items():
        device = torch.device(name)
        facts |= {"fast_bfloat16": has_fast_bfloat16(device), "free_bytes": free_bytes(device)}
    return {
        "versions": library_versions(),
        "platform": platform.platform(),
        "devices": devices,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "optional": {name: version_of(name) for name in OPTIONAL},
    }


def examined(task: Task, data: Data | None) -> tuple[dict[str, Any], str]:
    """Whether a task can be attributed, and what each layer will use."""
    layout = task.layout
    facts: dict[str, Any] = {"p": layout.size, "dtype": str(layout.dtype).removeprefix("torch.")}
    lines = [
        f"  {layout.size} parameters of {facts['dtype']} on {layout.device}; "
        f"loss {task.loss!r}, penalty {task.penalty!r}"
    ]
    if data is None:
        layers = (m for m in task.model.modules() if list(m.parameters(recurse=False)))
        unruled = sorted({type(m).__name__ for m in layers if rule_for(m) is None})
        facts["without_rule"] = unruled
        lines.append(
            f"  layers without a rule, left to torch.func: {', '.join(unruled) or 'none'}\n"
            "  with --train the model is tried on its data"
        )
        return facts, "\n".join(lines)
    made = plan(task, task.theta(), data)
    losses = checked_losses(task, data, "training data")
    uses = layer_uses(made)
    facts |= {
        "n": len(data),
        "mean_loss": float(losses.double().mean()),
        "layers": uses,
        "notes": list(made.notes),
        "measures": measures(task, data),
        "draws_labels": draws_labels(task, data),
    }
    drawn = "labels can be drawn from the loss, a likelihood"
    if not facts["draws_labels"]:
        drawn = "no labels can be drawn from the loss: curvatures by layer need labels=Observed()"
    lines += [
        layer_table(uses, made.notes),
        f"  {len(data)} training examples, mean loss {facts['mean_loss']:.4g}",
        f"  measures: {', '.join(facts['measures'])}, and functions of your own",
        f"  {drawn}",
    ]
    return facts, "\n".join(lines)


def measures(task: Task, data: Data) -> list[str]:
    """Which measures the loss and the targets allow, tried on an example."""
    batch = task.to_device(data.take([0]))
    found = []
    for measure in (Loss(), Margin(), LogProb(), Logit()):
        with contextlib.suppress(UpweightError), torch.no_grad():
            measure(task, task.named(task.theta()), batch)
            found.append(repr(measure).replace("index=None", ""))
    return found


def draws_labels(task: Task, data: Data) -> bool:
    """Whether the loss has labels to draw, as `EKFAC()` and `KFAC()` do by default."""
    with torch.no_grad():
        outputs, targets = task.call(task.theta(), task.to_device(data.take([0])))
        try:
            task.loss.sample(outputs, targets, torch.Generator(outputs.device))
        except UnsupportedModel:
            return False
    return True


def _words(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = list(facts["versions"].items())
    for name, device in facts["devices"].items():
        parts = [device["name"]] if "name" in device else []
        parts += [f"{device[k]} {k}" for k in ("cores", "threads") if k in device]
        parts.append("fast bfloat16" if device["fast_bfloat16"] else "no fast bfloat16")
        rows.append((name, ", ".join([*parts, f"{size(device['free_bytes'])} free"])))
    rows.append(("disk", f"{size(facts['disk_free_bytes'])} free"))
    return rows + [(n, v or "not installed") for n, v in facts["optional"].items()]
