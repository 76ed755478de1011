"""`upweight demo`: from a trained classifier to an answer that retraining confirms."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import upweight as uw
from upweight.cli.screen import Answer, table, verb
from upweight.evaluation import (
    LOO,
    compare,
    leave_one_out,
    random_groups,
)  # fmt: skip
from upweight.methods.facts import stated
from upweight.notation import readable
from upweight.report.evidence import evidence_of
from upweight.runtime.resources import Resources
from upweight.training import removal_weights, retrain
from upweight.verdict import Checked

QUERIES = 100
REMOVALS = 60
"""Images that are removed one at a time, for softmax regression."""
CHECKED = 3
"""Queries of a network whose strongest images are removed: the first so many."""
TOGETHER = 20
"""Images in a set: one image moves a network's loss by less than another seed does."""
RANDOM = 3
"""Sets drawn at random, to compare with."""
SEEDS = 3
"""Networks trained without each set."""

Split = tuple[Tensor, Tensor]
"""Images [n, 1, 28, 28] in [0, 1], and their digits."""


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("upweight-demo"),
    show_default=True, help="Directory for report.html, summary.json and the scores.",
)  # fmt: skip
@click.option(
    "--model", type=click.Choice(["softmax", "mlp", "cnn"]), default="softmax", show_default=True,
    help="What is trained: softmax regression, a perceptron, a convolutional network.",
)  # fmt: skip
@verb
def demo(out: Path, model: str) -> Answer:
    """Explain a digit classifier, and check it by retraining.

    Trains on 5 000 real digits that come with the package, finds which training images raised and
    lowered the loss on the test images it gets most wrong, then removes some of them and retrains
    to see whether the predicted change comes true.

    Softmax regression has an exact Hessian: 60 images are removed, one at a time. The networks get
    EK-FAC: sets of 20 images are removed, with three seeds each, because another seed alone changes
    the loss more than one image does.

    \b
    Example:
        upweight demo --out digits && open digits/report.html
        upweight demo --model cnn --out digits-cnn
    """
    return Answer("", run(out, model))


@dataclass(frozen=True)
class Found:
    """What retraining found, for summary.json, the report and the terminal."""

    facts: dict[str, Any]
    evidence: list[LOO]
    models: int
    text: str = ""
    removal: uw.Effects | None = None


def run(out: Path, model: str) -> dict[str, Any]:
    """Train, attribute, remove, retrain, report; writes into `out`. What summary.json holds."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    subject = MODELS[model]
    train, (X, y) = digits(next(subject.init().parameters()).dtype)

    with step(f"Train {subject.name} on {len(train[1]):,} digits") as done:
        task = subject.trained(train)
        with torch.no_grad():
            accuracy = float((task.model(X).argmax(dim=1) == y).double().mean())
        done(f"test accuracy {accuracy:.1%}")

    with step(f"Attribute the {QUERIES} test images it gets most wrong") as done:
        losses = task.losses(task.theta(), (X, y)).detach()
        hardest = losses.argsort(descending=True)[:QUERIES]
        queries = X[hardest], y[hardest]
        fitted = subject.method.fit(task, train)
        scores = fitted.attribute(queries, uw.Loss())
        health = {**scores.provenance.health, **fitted.stationarity}
        made = replace(scores.provenance, health=health, facts=stated(health))
        scores = replace(scores, provenance=made)
        done(f"{scores.values.numel():,} scores")

    found = subject.verify(fitted, scores, subject.recipe)
    told = evidence_of(found.evidence, *scores.values.shape)
    if (judged := told.judgement) is not None:
        scores.checks.append(Checked(judged.verdict, judged.reason, found.models, told.notes))

    with step("Write the report") as done:
        scores.save(out / "scores")
        display = uw.report.Display(
            title=f"{subject.name.capitalize()} on {len(train[1])} handwritten digits",
            names=[str(digit) for digit in range(10)],
            train_labels=train[1].tolist(),
        )
        report = uw.report.html(
            scores,
            out / "report.html",
            display,
            evidence=found.evidence,
            removal=found.removal,
            command=f"upweight demo --model {model} --out {out}",
        )
        seconds = time.perf_counter() - started
        facts = {
            "model": model,
            "recipe": repr(subject.recipe),
            **found.facts,
            "seconds": seconds,
            "test_accuracy": accuracy,
            "query": {"test_index": int(hardest[0]), "label": int(queries[1][0])},
            "provenance": asdict(scores.provenance),
        }
        (out / "summary.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        done(f"{report.stat().st_size / 1e6:.1f} MB")

    click.echo()
    click.echo(uw.report.summary(scores, query=0, display=display, evidence=found.evidence))
    click.echo(found.text + f"\n{seconds:.0f} s in all. Open {report} in a browser.")
    return facts


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Announce a step on standard error, and how long it took once it said that it is done."""
    started = time.perf_counter()
    click.echo(f"{title} …", err=True)
    yield lambda said: click.echo(f"    {said}, {time.perf_counter() - started:.1f} s", err=True)


def digits(dtype: torch.dtype) -> list[Split]:
    """The bundled digits: training and test images."""
    subset = uw.data.mnist_subset()
    pairs = (subset.X, subset.y), (subset.X_test, subset.y_test)
    return [(torch.from_numpy(X)[:, None].to(dtype) / 255, torch.from_numpy(y)) for X, y in pairs]


# -- what removing does ---------------------------------------------------------------------------


def one_by_one(fitted: Any, scores: uw.Scores, recipe: Any) -> Found:
    """The strongest images of query 0, removed one at a time."""
    context = scores.require_context()
    with step("Correct each predicted removal for its leverage") as done:
        removal = fitted.removal(context.queries, uw.Loss())
        done(f"{removal.values.numel():,} predictions")

    chosen = scores.values[0].abs().argsort(descending=True)[:REMOVALS].tolist()
    with step(f"Remove {REMOVALS} training images, one at a time, and retrain") as done:
        actual = leave_one_out(
            recipe, context.task, context.train, chosen, context.queries.subset([0])
        )
        done(f"each retrained to a gradient of {actual.gradient_norms.max():.0e}")
    first = compare(scores, actual, chosen, query=0)
    corrected = compare(removal, actual, chosen, query=0)
    facts = {"first_order": first.summary(), "leverage_corrected": corrected.summary()}
    return Found({"loo": facts}, [first, corrected], actual.models, removal=removal)


def in_sets(fitted: Any, scores: uw.Scores, recipe: uw.Training) -> Found:
    """Sets of images, each removed as a whole, with several seeds.

    A network trained by SGD is not at a minimum, and another seed gives another network. So whole
    sets are removed, the same for every seed, and the change is a mean over seeds with its standard
    error, beside what removing images at random does.
    """
    context = scores.require_context()
    queries = context.queries.subset(range(min(CHECKED, len(scores))))
    chosen = sets(scores, len(queries))
    groups = [examples for _, _, examples in chosen]
    weights = removal_weights(len(context.train), groups)
    jobs = min(os.cpu_count() or 1, 8)
    using = Resources(jobs=jobs if jobs > 1 else None)
    about = (context.task, context.train, weights, queries)
    with step(f"Remove {len(chosen)} sets of images, {SEEDS} seeds each, and retrain") as done:
        seeds = [replace(recipe, seed=seed) for seed in range(SEEDS)]
        rounds = [retrain(each, *about, resources=using) for each in seeds]
        changes = torch.stack([each.change for each in rounds])
        models = SEEDS * (len(chosen) + 1)
        done(f"{models} networks")
    asked = replace(scores, values=scores.values[: len(queries)])
    every = compare(asked, rounds, groups, label="EK-FAC")
    predicted, actual, errors = every.predicted, every.actual, every.errors
    assert errors is not None
    summaries, evidence, rows = {}, [], []
    for q in range(len(queries)):
        names = [what if of in (q, None) else f"query {of}: {what}" for of, what, _ in chosen]
        evidence.append(replace(every.query(q), names=names))
        summaries[f"query_{q}"] = evidence[-1].summary()
        rows += [
            {
                "query": q, "chosen_for": of, "removed": what, "by_seed": changes[:, e, q].tolist(),
                "predicted": float(predicted[e, q]), "actual": float(actual[e, q]),
                "standard_error": float(errors[e, q]),
            }
            for e, (of, what, _) in enumerate(chosen)
        ]  # fmt: skip
    title = f"change of the loss of query 0, mean of {SEEDS} seeds ± standard error (predicted)"
    own = [row for row in rows if row["query"] == 0 and row["chosen_for"] in (0, None)]
    text = f"{title}\n{table(list(map(line, own)))}\n"
    return Found({"loo": summaries, "removals": rows}, evidence, models, text)


def sets(scores: uw.Scores, checked: int) -> list[tuple[int | None, str, list[int]]]:
    """For each checked query its strongest images of either sign, twice; and some at random.

    Each set is the query (None: at random), which images it holds in words, and which.
    """
    found: list[tuple[int | None, str, list[int]]] = []
    for q in range(checked):
        order = scores.values[q].argsort().tolist()
        for word, ranked in (("lowered", order), ("raised", order[::-1])):
            found += [
                (q, f"the {TOGETHER} that {word} its loss most", ranked[:TOGETHER]),
                (q, f"the next {TOGETHER} that {word} its loss", ranked[TOGETHER : 2 * TOGETHER]),
            ]
    drawn = random_groups(scores.values.shape[1], [TOGETHER] * RANDOM)
    words = (f"{TOGETHER} at random, draw {k + 1}" for k in range(RANDOM))
    return found + [(None, what, [*group]) for what, group in zip(words, drawn, strict=True)]


def line(row: dict[str, Any]) -> tuple[str, str, str]:
    """What removing one set did, in columns."""
    actual, predicted = (readable(row[k], signed=True) for k in ("actual", "predicted"))
    error = readable(row["standard_error"], 2)
    return f"without {row['removed']}", f"{actual} ± {error}", f"({predicted})"


# -- what is trained ------------------------------------------------------------------------------


def linear() -> nn.Module:
    """Softmax regression: 7 850 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()


def mlp() -> nn.Module:
    """784-128-64-10 with ReLU: 109 386 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    """Two convolutions of stride 2 and two linear layers: 26 826 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model of the demo: how it is made, trained, attributed and held against retraining."""

    name: str
    init: Callable[[], nn.Module]
    penalty: uw.L2
    recipe: Any
    method: uw.Influence
    verify: Callable[[Any, uw.Scores, Any], Found]

    def trained(self, train: Split) -> uw.Task:
        """The task with its model trained on all images."""
        task = uw.Task(self.init(), uw.CrossEntropy(), self.penalty)
        weights = task.theta().new_ones(1, len(train[0]))
        return task.moved_to(self.recipe.prepare(task, task.training(train))(weights).alone())


def network(name: str, init: Callable[[], nn.Module], lr: float) -> Subject:
    """Momentum SGD whose rate falls to zero, and EK-FAC."""
    recipe = uw.Training(init, uw.SGD(lr, momentum=0.9), 10, 100, uw.training.LinearDecay())
    # In mean eigenvalues of each block: the heuristic of Grosse et al. (2023).
    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    return Subject(name, init, uw.L2(1e-3), recipe, method, in_sets)


MODELS = {
    "softmax": Subject(
        "softmax regression", linear, uw.L2(0.01), uw.training.Newton(),
        uw.Influence(uw.Hessian(), uw.solvers.Cholesky()), one_by_one,
    ),
    "mlp": network("a perceptron with two hidden layers", mlp, 0.1),
    # At 0.1 it learns more, but then 20 images at random change its hardest losses by 3.6, root
    # mean square, which hides what any other 20 do; at 0.03 by about 1.
    "cnn": network("a small convolutional network", cnn, 0.03),
}  # fmt: skip
