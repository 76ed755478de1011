"""A table of every method, and LDS against cost: docs/methods/index.md and its chart.

    python benchmarks/method_table.py              # the page and the chart; seconds
    python benchmarks/method_table.py --page       # the page alone, without matplotlib

Numbers are those of `results/fidelity.json`, units those of the classes; the words are below. A
method that is not measured yet has –.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

from fidelity_table import HALVES, OURS, RESULTS, ceiling, cell_of, in_lines, measured  # noqa: E402

from upweight.cli.spec import REGISTRY  # noqa: E402
from upweight.scores import Unit  # noqa: E402

PAGE = HERE.parent / "docs" / "methods" / "index.md"
CHART = HERE.parent / "docs" / "images" / "frontier.png"

LOSS = "loss lds"

GAIN = 0.02
"""Of LDS, for which it is worth to pay more."""


@dataclass(frozen=True)
class Words:
    """What a method is, in words.

    Args:
        page: Where it is described, from the folder of the page.
        looks_at: What its scores are made of.
        needs: Beside a model, data and queries.
        cost: Fit, and scores of all queries.
        memory: Beside the scores.
        exact: When S is what it says.
        fails: How it goes wrong.
        measured: Its rows in the benchmark.
        unit: Where the class has no fixed one.
    """

    page: str
    looks_at: str
    needs: str
    cost: str
    memory: str
    exact: str
    fails: str
    measured: tuple[str, ...] = ()
    unit: str = ""


WORDS: Mapping[str, Words] = {
    "Influence": Words(
        "influence.md",
        "gradients at θ̂, curvature of J there",
        "λ for networks; for `FromTraining()` a recipe or trajectory",
        "`EKFAC()`: about 6 epochs for all queries; by CG: 2 epochs per product and query; "
        "`Cholesky()`: p³/3",
        "by layer o² + i² and o·i numbers; a matrix p²; by CG some vectors of p per query",
        "θ̂ is a strict minimum, H exact, λ = 0",
        "away from a minimum; by layer sizes are far too large on networks",
        (
            "Hessian",
            "Hessian, MINRES",
            "GGN",
            "GGN, CG",
            "GGN, λ of training",
            "GGN, usual λ",
            "GGN, CG by EK-FAC",
            "EK-FAC",
            "EK-FAC, λ of the task",
            "EK-FAC, λ of training",
            "K-FAC",
            "diagonal",
        ),
    ),
    "SOURCE": Words(
        "source.md",
        "gradients and curvature at states of training",
        "recipe or trajectory",
        "6 × EK-FAC; a recipe is trained once more",
        "EK-FAC's per segment; p numbers per query and segment",
        "J is quadratic, SGD in full batches, `discrete=True`",
        "curvature that turns within a segment; sizes too large by layer",
        ("SOURCE, 3 segments",),
    ),
    "TracIn": Words(
        "tracin.md",
        "gradients at states of training",
        "recipe or trajectory",
        "2 epochs per state; a recipe is trained once more",
        "p numbers per query",
        "few and small steps, every state kept",
        "does not take back what later steps undo: sizes far too large",
        ("TracIn",),
    ),
    "MAGIC": Words(
        "magic.md",
        "each step of training, backwards",
        "recipe or trajectory",
        "1 to 4 trainings per query",
        "√T states; p·(1 + memories) + n numbers per query",
        "always: the derivative of this run",
        "training at the edge of stability; another seed is another answer",
    ),
    "ASTRA": Words(
        "astra.md",
        "gradients at θ̂, GGN by minibatches",
        "λ",
        "EK-FAC, and 2 epochs per epoch and query",
        "6 p numbers per query",
        "full batches and many epochs; then `Influence(GGN())`",
        "small λ: steps become small",
        ("ASTRA",),
    ),
    "DataInf": Words(
        "datainf.md",
        "gradients at θ̂, each example's own Fisher matrix",
        "λ",
        "3 passes of gradients",
        "p numbers per query",
        "n = 1, or λ → ∞",
        "a mean of inverses is no inverse: nearly gradient products, sizes far too large",
        ("DataInf",),
    ),
    "LoGra": Words(
        "logra.md",
        "projected gradients at θ̂, their empirical Fisher matrix",
        "–",
        "1 pass of gradients; then products of k² numbers a layer",
        "n·k² numbers a layer, or on disk",
        "`rank=None` and one layer: `Influence(EmpiricalFisher())`",
        "examples that are fitted count little; a small rank",
        ("LoGra",),
        "`RANK`; `DERIVATIVE` without projection",
    ),
    "TRAK": Words(
        "trak.md",
        "projected gradients of one output at θ̂, or at several models",
        "– (several models are better)",
        "per model 1 pass of gradients, n·d² and d³/3",
        "n·d numbers per model, or on disk",
        "least squares, d ≥ p, one model",
        "one model ranks poorly; losses that are no function of one output are refused",
        ("TRAK",),
    ),
    "GradientDot": Words(
        "similarity.md",
        "gradients at θ̂",
        "–",
        "2 epochs",
        "p numbers per query",
        "H is a multiple of the identity",
        "directions that all gradients share count most",
        ("gradient dot",),
    ),
    "GradientCosine": Words(
        "similarity.md",
        "directions of gradients at θ̂",
        "–",
        "2 epochs, and norms",
        "p numbers per query",
        "as a similarity",
        "as `GradientDot`; large effects are not told from small ones",
        ("gradient cosine",),
    ),
    "BIF": Words(
        "bif.md",
        "losses at draws of θ around θ̂",
        "step and localization of the sampler",
        "chains × (burn-in + draws × thinning) gradients of a batch, a forward epoch per draw",
        "chains × draws × (p + n) numbers",
        "infinitely many draws, steps → 0: of the posterior mean",
        "noise of few draws in many parameters; noise of batches",
        ("BIF",),
    ),
    "RepresenterPoints": Words(
        "representer.md",
        "features and loss gradients of the last layer",
        "`L2` on the last layer",
        "a forward epoch",
        "features of n and q",
        "the last layer is stationary",
        "the layers below are taken as given",
        ("representer points",),
    ),
    "Ensemble": Words(
        "ensemble.md",
        "the scores of a method at K models",
        "recipe, trajectory or models",
        "K trainings (K/2 on halves), K × the method",
        "K × what the method keeps",
        "the method is, for each member",
        "as the method; each member adds less than the one before",
        ("EK-FAC, 10 seeds",),
        "of its method",
    ),
    "Averaged": Words(
        "ensemble.md#averaged",
        "the scores of several methods at θ̂",
        "what its methods need, as a recipe or trajectory",
        "of every method",
        "as its methods, and 2n numbers per query",
        "every method is",
        "a poor method counts as much as a good one",
        ("SOURCE and GGN", "SOURCE and GGN, λ of training"),
        "∂m/∂w if that of all",
    ),
    "Stacked": Words(
        "ensemble.md#stacked",
        "scores of methods by layer, and models of random subsets",
        "recipe, or `SubsetModels`",
        "`subsets`/2 trainings, each method once per member",
        "q·n numbers per method and layer",
        "m is linear in w and one of the methods has its change",
        "poor predictors; sizes are of drops of half of the data",
        (
            "EK-FAC, calibrated",
            "stacked, 10 halves",
            "stacked SOURCE, 10 halves",
            "stacked SOURCE, 16 halves",
            "stacked SOURCE, 40 halves",
            "stacked SOURCE, 10 halves, beside the GGN",
            "stacked SOURCE, 16 halves, beside the GGN",
            "stacked SOURCE, 40 halves, beside the GGN",
        ),
    ),
    "Datamodels": Words(
        "ensemble.md#datamodels",
        "models of random subsets; scores as a prior",
        "recipe, or `SubsetModels`",
        "`subsets`/2 trainings, and the prior",
        "subsets², and q·n numbers",
        "m is linear in w and as many subsets as examples, or an exact prior",
        "with fewer subsets than examples hardly better than its prior",
        ("datamodels on stacked SOURCE, 160 halves",),
    ),
    "KNNShapley": Words(
        "values.md",
        "distances of inputs or features, labels",
        "class labels or numbers",
        "q·n·(d + log n)",
        "q·n distances, in parts",
        "always, of the nearest neighbours",
        "values examples for a classifier that is not the model",
        ("kNN-Shapley",),
    ),
    "DataShapley": Words(
        "values.md#shapley-values-by-retraining",
        "models of coalitions of examples",
        "recipe",
        "n trainings per order",
        "a model at a time",
        "all orders, n ≤ 8",
        "noise of few orders; for tens of examples",
    ),
    "LeaveOneOut": Words(
        "values.md#refits",
        "models without each example",
        "recipe",
        "n + 1 trainings per seed",
        "all models",
        "always, for the recipe",
        "noise of training above what one example does",
    ),
    "SubsampledInfluence": Words(
        "values.md#refits",
        "models of random subsets",
        "recipe",
        "a training of half the data per subset",
        "all models",
        "in expectation",
        "fewer subsets than examples",
    ),
    "FeatureSimilarity": Words(
        "values.md#baselines-that-a-sceptic-asks-for",
        "inputs, or features of a layer",
        "–",
        "a forward epoch",
        "features of n and q",
        "as a similarity",
        "knows nothing of labels and losses",
        ("feature similarity",),
    ),
    "BM25": Words(
        "values.md#baselines-that-a-sceptic-asks-for",
        "words in common",
        "texts",
        "q·n·words",
        "counts of words",
        "as a similarity",
        "knows nothing of the model",
        ("BM25",),
    ),
    "TrainingLoss": Words(
        "values.md#baselines-that-a-sceptic-asks-for",
        "the loss of the training example",
        "–",
        "a forward epoch",
        "n numbers",
        "as the loss",
        "the same for every query",
        ("training loss",),
    ),
    "Random": Words(
        "values.md#baselines-that-a-sceptic-asks-for",
        "nothing",
        "–",
        "none",
        "none",
        "as noise",
        "always: what does not beat it has learned nothing",
        ("random",),
    ),
}

INTRO = """\
---
hide: [toc]
---

# Every method

<!-- Written by benchmarks/method_table.py: change that, and run it. -->

n examples, q queries, p parameters; a layer is o × i. An *epoch* is one plain forward and backward
pass over the training data, a *training* what the model itself took. A method that needs a recipe
or a trajectory takes it as `fit(..., history=...)`. Units are [those of the
conventions](../conventions.md#units). For which to take in which situation, see [How to
choose](../how-to-choose.md).
"""

MEASURED = """\
## LDS we measured

Rank correlation of predicted with retrained losses over 100 random halves of the data, mean over
queries, with its 95 % interval below it ([how](../evaluation.md#what-we-measured)). *Retraining
again*, what other seeds of the same training get, is the ceiling. –: not measured, or it does not
run on the task. *time*, *memory*: more than the limits.
"""

DRAWN = """\
## LDS against cost

![LDS against seconds of fit and scores, in plain epochs, task by task](../images/frontier.png)

Seconds of fit and scores of all queries, trainings included, divided by those of one plain epoch in
full batches. Blue circles are ours, open squares the peers' on the same truth; bars are the
intervals of the table. *10 halves* is SOURCE of as many, stacked, and *+ GGN* with the
model's GGN beside. Pale: {shared} of {ours} points of ours and {peers_shared} of {peers} of the
peers' are of wall time on a machine that did other work (`shared` in the result), and may lie
several times too far to the right; the others are of an idle machine, or of CPU seconds. The dashed
line is the ceiling with its interval. The steps join what is better than all that is cheaper by
0.02 or more, and has its name.
"""


def page(results: Mapping[str, Any]) -> str:
    """docs/methods/index.md."""
    classes = {cls.__name__: cls for cls in REGISTRY["method"]}
    linked = {name: f"[`{name}`]({words.page})" for name, words in WORDS.items()}
    what = [["method", "looks at", "needs", "unit", "exact when", "fails"], ["---"] * 6]
    price = [["method", "cost", "memory"], ["---"] * 3]
    for name, w in WORDS.items():
        what.append(
            [linked[name], w.looks_at, w.needs, unit_of(classes[name], w), w.exact, w.fails]
        )
        price.append([linked[name], w.cost, w.memory])
    others = ", ".join(linked[name] for name, w in WORDS.items() if not w.measured)
    return "\n".join(
        (
            INTRO,
            in_lines(what),
            "\n## Cost\n",
            in_lines(price),
            f"\n{MEASURED}",
            in_lines(fidelity_rows(results, linked)),
            f"\nNot among the contenders: {others}. Their pages say what else was measured.",
            f"\n{DRAWN.format(**points(results))}",
        )
    )


def beside_other_work(row: Mapping[str, Any]) -> bool:
    """Whether its cost is wall time of a machine that others used."""
    return bool(row.get("shared")) and "cpu_seconds" not in row


def points(results: Mapping[str, Any]) -> dict[str, int]:
    """How many points the chart has, and how many of them are pale."""
    drawn = [
        (method.startswith(OURS), beside_other_work(row))
        for method, rows in measured(results).items()
        for row in rows.values()
        if "plain_epochs" in row
    ]
    return {
        "ours": sum(ours for ours, _ in drawn),
        "shared": sum(ours and pale for ours, pale in drawn),
        "peers": sum(not ours for ours, _ in drawn),
        "peers_shared": sum(not ours and pale for ours, pale in drawn),
    }


def unit_of(cls: type, words: Words) -> str:
    """As the class says; in words where it depends on the method's arguments."""
    found = getattr(cls, "unit", None)
    return f"`{found.name}`" if isinstance(found, Unit) else words.unit


def fidelity_rows(results: Mapping[str, Any], linked: Mapping[str, str]) -> list[Sequence[str]]:
    """A row for each contender of ours, under its method."""
    tasks = results["tasks"]
    ceilings = [ceiling(task["methods"], LOSS, with_interval=True) for task in tasks.values()]
    lines: list[Sequence[str]] = [
        ["method", "as", *tasks],
        ["---"] * (len(tasks) + 2),
        ["*retraining again*", "", *ceilings],
    ]
    for name, words in WORDS.items():
        for label in words.measured:
            rows = (task["methods"].get(OURS + label) for task in tasks.values())
            cells = ["–" if row is None else cell_of(row, LOSS, True) or "–" for row in rows]
            if any(cell not in ("–", "") for cell in cells):
                lines.append([linked[name], label, *cells])
    return lines


APART = (4.0, 0.05)
"""Names in the chart are so many times in cost, or so much LDS, from each other."""


def best_for_price(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Of (cost, LDS, name), those that are better than every cheaper one by `GAIN`."""
    found: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not found or point[1] > found[-1][1] + GAIN:
            found.append(point)
    return found


def readable(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those whose names do not lie on that of another: of near ones the best."""
    found: list[tuple[float, float, str]] = []
    for x, y, name in reversed(points):
        if all(b - y > APART[1] or a > APART[0] * x for a, b, _ in found):
            found.append((x, y, name))
    return found[::-1]


def in_chart(name: str) -> str:
    """A short name."""
    short = name.removeprefix(OURS).removeprefix("stacked SOURCE, ")
    return short.replace(", beside the GGN", " + GGN")


def draw(results: Mapping[str, Any], file: Path) -> None:
    """A panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    rows = measured(results)
    figure, panels = plt.subplots(2, 3, figsize=(15, 9), constrained_layout=True)
    for (task, facts), panel in zip(results["tasks"].items(), panels.flat, strict=True):
        points = []
        for method, of in rows.items():
            if "plain_epochs" not in of.get(task, {}):
                continue
            lds, low, high = of[task][HALVES]["loss"]["lds"]
            cost, ours = of[task]["plain_epochs"], method.startswith(OURS)
            panel.errorbar(
                cost, lds, [[max(0.0, lds - low)], [max(0.0, high - lds)]],
                fmt="o" if ours else "s", color="tab:blue" if ours else "tab:orange",
                mfc=None if ours else "white", ms=6, lw=0.8, capsize=2,
                alpha=0.35 if beside_other_work(of[task]) else 1.0,
            )  # fmt: skip
            points.append((cost, lds, method))
        best = best_for_price(points)
        panel.step(
            *zip(*((x, y) for x, y, _ in best), strict=True), where="post", color="0.6", lw=1
        )
        for x, y, name in readable(best):
            panel.annotate(
                in_chart(name),
                (x, y),
                (4, 5),
                textcoords="offset points",
                fontsize=9,
                rotation=25,
                rotation_mode="anchor",
            )
        top = next(row[task][HALVES]["loss"]["ceiling"] for row in rows.values() if task in row)
        panel.axhline(1.0 if top is None else top[0], color="black", ls="--", lw=1)
        if top is not None:
            panel.axhspan(top[1], top[2], color="0.9", zorder=0)
        panel.set(xscale="log", ylim=(min(0.0, panel.get_ylim()[0]), 1.05), title=(
            f"{task}, {facts['parameters']:,} parameters, n = {facts['examples']:,}"
        ))  # fmt: skip
        panel.set_xlim(right=panel.get_xlim()[1] * 4)  # for the names
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("cost in plain epochs")
    for panel in panels[:, 0]:
        panel.set_ylabel("LDS of losses, random halves")
    figure.savefig(file, dpi=80, metadata={"Software": None})


def main() -> None:
    """Write the page, and the chart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="the page alone")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(results), encoding="utf-8")
    if not given.page:
        draw(results, CHART)


if __name__ == "__main__":
    main()
