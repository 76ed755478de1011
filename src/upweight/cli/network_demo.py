"""`upweight demo --model mlp` and `--model cnn`: EK-FAC, held against retraining from seeds.

A network trained by SGD is not at a minimum, and another seed gives another network. So whole sets
of images are removed, the same for every seed, and the change is a mean over seeds with its
standard error, beside what removing images at random does.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from upweight.cli.demo import QUERIES, Split, images, step
from upweight.cli.networks import NETWORKS, SGD
from upweight.curvature.ekfac import EKFAC
from upweight.evaluation import LOO, Retrained, compare, removal_weights, retrain
from upweight.linalg.damping import Relative
from upweight.methods.facts import stated
from upweight.methods.influence import Influence
from upweight.notation import readable
from upweight.report import Display, html, summary
from upweight.scores import Scores
from upweight.task.losses import CrossEntropy
from upweight.task.measures import Loss
from upweight.task.penalties import L2
from upweight.task.task import Task

CHECKED = 3
"""Queries whose strongest images are removed: the first so many."""
TOGETHER = 20
"""Images in a set: one image moves the loss by less than another seed does."""
RANDOM = 3
"""Sets drawn at random, to compare with."""
SEEDS = 3
"""Networks trained without each set."""
DAMPING = 0.1
"""In mean eigenvalues of each block: the heuristic of Grosse et al. (2023)."""


@dataclass(frozen=True)
class Set:
    """Training images that are removed together.

    Args:
        query: For which query they were chosen; None: at random.
        what: Which, as said of that query.
        examples: Their indices.
    """

    query: int | None
    what: str
    examples: tuple[int, ...]

    def told(self, query: int) -> str:
        """What the set is, on a page about one query."""
        return self.what if self.query in (query, None) else f"query {self.query}: {self.what}"


def run(out: Path, network: str) -> None:
    """Train, attribute, remove, retrain, report; writes into `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train, test = images()
    recipe = SGD(network)

    with step(1, f"Train the network on {len(train.y):,} digits", 4) as done:
        model = recipe.trained(train.X, train.y)
        with torch.no_grad():
            accuracy = float((model(test.X).argmax(dim=1) == test.y).double().mean())
        done(f"test accuracy {accuracy:.1%}")

    with step(2, f"Attribute the {QUERIES} test images it gets most wrong, with EK-FAC", 4) as done:
        task = Task(model, CrossEntropy(), L2(recipe.decay))
        losses = task.losses(task.theta(), test.data).detach()
        hardest = losses.argsort(descending=True)[:QUERIES]
        queries = Split(test.X[hardest], test.y[hardest])
        fitted = Influence(EKFAC(), damping=Relative(DAMPING)).fit(task, train.data)
        scores = fitted.attribute(queries.data, measure=Loss())
        health = {**scores.provenance.health, **fitted.stationarity}
        made = replace(scores.provenance, health=health, facts=stated(health))
        scores = replace(scores, provenance=made)
        error = scores.provenance.health["contraction_error"]
        done(f"{scores.values.numel():,} scores, contraction error {error:.1%}")

    sets = chosen(scores)
    with step(3, f"Remove {len(sets)} sets of images, {SEEDS} seeds each, and retrain", 4) as done:
        rounds = retrained(scores, recipe, sets)
        done(f"{SEEDS * (len(sets) + 1)} networks")

    with step(4, "Write the report", 4) as done:
        scores.save(out / "scores")
        comparisons = compared(scores, sets, rounds)
        title = f"{NETWORKS[network][1]} on {len(train.y):,} handwritten digits"
        display = Display(
            title=title.replace(",", " "),
            names=[str(digit) for digit in range(10)],
            train_labels=train.y.tolist(),
        )
        command = f"upweight demo --model {network} --out {out}"
        report = html(scores, out / "report.html", display, evidence=comparisons, command=command)
        seconds = time.perf_counter() - started
        removals = table(sets, comparisons, rounds)
        facts = {
            "model": network,
            "recipe": repr(recipe),
            "loo": {f"query_{q}": loo.summary() for q, loo in enumerate(comparisons)},
            "removals": removals,
            "seconds": seconds,
            "test_accuracy": accuracy,
            "query": {"test_index": int(hardest[0]), "label": int(queries.y[0])},
            "provenance": asdict(scores.provenance),
        }
        (out / "summary.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        done(f"{report.stat().st_size / 1e6:.1f} MB")

    click.echo()
    click.echo(summary(scores, query=0, display=display, evidence=comparisons))
    click.echo("\n".join(told(removals)))
    click.echo(f"\n{seconds:.0f} s in all. Open {report} in a browser.")


def chosen(scores: Scores) -> list[Set]:
    """For each checked query the strongest images of either sign, twice; and some at random."""
    sets = []
    for q in range(min(CHECKED, len(scores.values))):
        order = scores.values[q].argsort().tolist()
        for word, ranked in (("lowered", order), ("raised", order[::-1])):
            first, second = ranked[:TOGETHER], ranked[TOGETHER : 2 * TOGETHER]
            sets.append(Set(q, f"the {TOGETHER} that {word} its loss most", tuple(first)))
            sets.append(Set(q, f"the next {TOGETHER} that {word} its loss", tuple(second)))
    generator = torch.Generator().manual_seed(0)
    n = scores.values.shape[1]
    for k in range(RANDOM):
        drawn = torch.randperm(n, generator=generator)[:TOGETHER]
        sets.append(Set(None, f"{TOGETHER} at random, draw {k + 1}", tuple(drawn.tolist())))
    return sets


def retrained(scores: Scores, recipe: SGD, sets: list[Set]) -> list[Retrained]:
    """Each removal by each seed, held against the same seed with all the data."""
    context = scores.require_context()
    weights = removal_weights(len(context.train), [s.examples for s in sets])
    cores = os.cpu_count() or 1
    queries = context.queries.subset(range(min(CHECKED, len(context.queries))))
    return [
        retrain(
            replace(recipe, seed=seed),
            context.task,
            context.train,
            weights,
            queries,
            context.measure,
            jobs=min(cores, 8) if cores > 1 else None,
        )
        for seed in range(SEEDS)
    ]


def compared(scores: Scores, sets: list[Set], rounds: list[Retrained]) -> list[LOO]:
    """Per checked query −Σ S of each set beside the mean change over seeds."""
    groups = [s.examples for s in sets]
    asked = replace(scores, values=scores.values[: rounds[0].change.shape[1]])
    found = compare(asked, rounds, groups, label="EK-FAC")
    return [
        replace(found.query(q), names=[s.told(q) for s in sets])
        for q in range(found.actual.shape[1])
    ]


def table(sets: list[Set], comparisons: list[LOO], rounds: list[Retrained]) -> list[dict[str, Any]]:
    """Every removal and checked query, for summary.json."""
    changes = torch.stack([each.change for each in rounds])
    return [
        {
            "query": q,
            "chosen_for": s.query,
            "removed": s.what,
            "predicted": float(loo.predicted[e, 0]),
            "actual": float(loo.actual[e, 0]),
            "standard_error": float(loo.errors[e, 0]),
            "by_seed": changes[:, e, q].tolist(),
        }
        for q, loo in enumerate(comparisons)
        if loo.errors is not None
        for e, s in enumerate(sets)
    ]


def told(rows: list[dict[str, Any]]) -> list[str]:
    """What removing did to the first query: its own sets, and those drawn at random."""
    lines = [f"change of the loss of query 0, mean of {SEEDS} seeds ± standard error (predicted)"]
    for row in rows:
        if row["query"] == 0 and row["chosen_for"] in (0, None):
            actual, predicted = (readable(row[k], signed=True) for k in ("actual", "predicted"))
            lines.append(
                f"  without {row['removed']:<35} {actual} ± {readable(row['standard_error'], 2)} "
                f"({predicted})"
            )
    return lines
