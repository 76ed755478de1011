"""What retraining says, computed once for each task of `fidelity.py`.

    subsets    models of random shares of the data, for the linear datamodeling score
    removals   models without one example (softmax regression) or a group of one class (networks)

Each model of a network is trained from several seeds; the means over two halves of them are kept,
the second for the ceiling. The file `truths/TASK.safetensors` holds measurements as float32, the
recipe, a fingerprint of data, recipe and plan, and the library versions. `retrain` keeps every
model in the cache as it finishes, so that a run that was stopped goes on.
"""

import json
import re
import shutil
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fidelity_networks import MEASURES, Problem, measured
from fidelity_tasks import SPECS, task_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import upweight as uw
from upweight.evaluation import class_groups
from upweight.runtime.fingerprint import digest
from upweight.runtime.resources import Resources
from upweight.runtime.versions import library_versions
from upweight.training import removal_weights, retrain, subset_weights

HERE = Path(__file__).resolve().parent
TRUTHS = HERE / "truths"


@dataclass(frozen=True)
class All(uw.Measure):
    """Every measurement of a kind of task: a query's target comes with the number of its own."""

    kind: str

    def __call__(self, task: uw.Task, params: Any, batch: Any) -> Tensor:
        outputs, (y, which) = task.outputs(params, batch)
        # In float64: the loss of what a network is sure of is 0 in float32.
        every = [measured(self.kind, name, outputs.double(), y) for name in MEASURES[self.kind]]
        return torch.stack(every, dim=1).gather(1, which[:, None])[:, 0]


def asked(problem: Problem) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Every query once for each measurement."""
    m, q = len(problem.measures), len(problem.Xq)
    X, y = (torch.cat([part] * m) for part in (problem.Xq, problem.yq))
    return X, (y, torch.arange(m).repeat_interleave(q))


def removed(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """What each removal takes out."""
    spec = SPECS[problem.name]
    if spec.size == 1:
        chosen = torch.randperm(len(problem.X), generator=torch.Generator().manual_seed(2))
        return tuple((int(i),) for i in chosen[: spec.groups])
    labels = torch.tensor(problem.facts["labels"])
    return class_groups(labels, [spec.size] * spec.groups)


def plans(problem: Problem) -> dict[str, Tensor]:
    """Data weights of all models of the truth, by name."""
    spec, n = SPECS[problem.name], len(problem.X)
    found = {
        f"subsets-{fraction:g}": subset_weights(n, spec.subsets, fraction, renormalize=True)
        for fraction in spec.fractions
    }
    return found | {"removals": removal_weights(n, removed(problem))}


def recipe_of(problem: Problem, plan: str, seed: int) -> Any:
    """Subset models close ranks; a removed example leaves its place in its batch empty."""
    recipe = SPECS[problem.name].recipe
    if isinstance(recipe, uw.training.Newton):
        return recipe
    return replace(recipe, seed=seed, skip_absent=plan != "removals")


NOTHING = (None, False, 0, ())
"""Defaults that switch something off."""


def said(spec: Any) -> str:
    """A recipe or loss in words, functions by their name, without what its defaults switch off.

    What specs learn to do later, and do not do by default, leaves these words as they were.
    """
    if not is_dataclass(spec) or isinstance(spec, type):
        return re.sub(r"<function ([^ ]+) at 0x[0-9a-f]+>", r"\1", repr(spec))
    given = {each.name: getattr(spec, each.name) for each in fields(spec) if each.repr}
    off = {each.name for each in fields(spec) if each.default in NOTHING}
    told = [
        f"{name}={said(value)}"
        for name, value in given.items()
        if not (name in off and value in NOTHING)
    ]
    return f"{type(spec).__name__}({', '.join(told)})"


def fingerprint(problem: Problem) -> str:
    """Of everything that the truth depends on but the library's version."""
    plan = plans(problem)
    recipes = [said(recipe_of(problem, name, 0)) for name in plan]
    spec, shapes = SPECS[problem.name], [tuple(p.shape) for p in problem.model.parameters()]
    about = f"{problem.name} {said(spec.loss)} {spec.penalty} {spec.seeds} {problem.measures}"
    data = [problem.X, problem.y, problem.Xq, problem.yq]
    return digest(about, repr(recipes), repr(shapes), *data, *plan.values())[:32]


def truth(problem: Problem, cache: Path, *, anew: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Measurements by `PLAN/MEASURE/first` and `/again`, `[s, q]`: from the file, or made `anew`.

    A file of another truth is an error: retraining takes hours, and results judged by the file
    would be of another task.
    """
    if anew:
        shutil.rmtree(cache / f"fidelity-{problem.name}", ignore_errors=True)
    file, print_ = TRUTHS / f"{problem.name}.safetensors", fingerprint(problem)
    if anew or not file.exists():
        return _made(problem, cache, file, print_)
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["facts"])
    if facts["fingerprint"] != print_:
        raise SystemExit(
            f"{file.name} is the truth of other data, another recipe or another plan (of "
            f"{facts['recipe']}; now {said(SPECS[problem.name].recipe)}): put back what it was "
            "made with, or retrain with --truth-anew"
        )
    return load_file(file), facts


def _made(problem: Problem, cache: Path, file: Path, print_: str) -> tuple[dict[str, Tensor], dict]:
    spec, task = SPECS[problem.name], task_of(problem)
    tensors, seconds, gradient = dict[str, Tensor](), dict[str, float](), 0.0
    reused = 0
    for name, weights in plans(problem).items():
        seconds[name] = 0.0
        for half in ("first", "again")[: 1 if spec.seeds == 1 else 2]:
            values = []
            for k in range(spec.seeds):
                seed = k + spec.seeds * (half == "again")
                found = retrain(
                    recipe_of(problem, name, seed),
                    task,
                    (problem.X, problem.y),
                    weights,
                    asked(problem),
                    All(problem.kind),
                    resources=Resources(folder=cache / f"fidelity-{problem.name}"),
                )
                values.append(found.values - found.baseline)
                seconds[name] += found.seconds
                reused += found.reused
                if spec.seeds == 1:
                    gradient = max(gradient, float(found.gradient_norms.max()))
            mean = torch.stack(values).mean(dim=0)
            for measure, part in zip(
                problem.measures, mean.split(len(problem.Xq), dim=1), strict=True
            ):
                tensors[f"{name}/{measure}/{half}"] = part.float().contiguous()
    facts = {
        "task": problem.name,
        "fingerprint": print_,
        "recipe": said(spec.recipe),
        "seeds": spec.seeds,
        "retraining_seconds": seconds,
        "models_found_in_cache": reused,
        "largest_gradient_norm": gradient,
        "versions": library_versions(),
    }
    TRUTHS.mkdir(exist_ok=True)
    save_file(tensors, file, {"facts": json.dumps(facts)})
    return tensors, facts
