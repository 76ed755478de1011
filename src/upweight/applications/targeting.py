"""Which share of a corpus helps a validation set most, and does training on it show that?

    φᵢ = S[val, i] = ∂/∂wᵢ (1/q) Σ ℓ(θ̂; z_q)       the m examples with the smallest φ are chosen

As LESS does (Xia et al. 2024, §3), with the scores of any method, from gradients or from an index,
in place of gradient similarities. Scores choose and say nothing of what training on the choice
gives: that is trained, beside as many examples at random, by BM25 and by embeddings, and all of
them, by the user's recipe, at equal steps:

    w = (n/m) 1[chosen]       the mean loss is over the chosen; batches, steps and rates stay
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.held_out import MEAN_LOSS, draw_intervals, held, splits
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import subject_of
from upweight.errors import DataError, SpecError
from upweight.evaluation import bootstrap as intervals
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.index.index import Index
from upweight.methods.baselines import BM25
from upweight.methods.method import Method
from upweight.methods.neighbours import FeatureSimilarity
from upweight.plot import axes
from upweight.runtime.resources import Resources
from upweight.runtime.streams import stream
from upweight.scores import Unit
from upweight.task.recipe import Recipe
from upweight.training.kept import kept_trainer
from upweight.training.subset_models import reseeded_from

CHOSEN, RANDOM, ALL = "chosen", "random", "all data"


@dataclass(frozen=True, eq=False)
class Target(Outcome):
    """The examples chosen for a target, and what training on them gave.

    Args:
        rows: The examples chosen, in order.
        n: Of how many.
        scores: φᵢ of every example.
        predicted: Σ (wᵢ − 1) φᵢ, the change of the mean validation loss to first order: far from
            w = 1 a direction and no size. None of a method that ranks.
        losses: Mean losses on the test data `[s, q]` of the models trained on each choice, from s
            seeds; empty where nothing was trained.
        differences: Of the mean test loss, chosen less each other choice; intervals draw seeds and
            test examples.
        level: Of the intervals.
        notes: What went otherwise than asked.
    """

    rows: Int[Tensor, " m"]
    n: int
    scores: Float[Tensor, " n"]
    predicted: float | None
    losses: Mapping[str, Float[Tensor, "s q"]]
    differences: Mapping[str, Estimate]
    level: float
    notes: tuple[str, ...] = ()  # type: ignore[assignment]

    @property
    def actual(self) -> Estimate | None:  # type: ignore[override]
        """Chosen less random."""
        return self.differences.get(RANDOM)

    @property
    def title(self) -> str:
        return f"Choose {len(self.rows)} of {self.n} examples for a target"

    @property
    def helps(self) -> tuple[str, ...]:
        """The choices that the chosen examples are better than, by the whole interval."""
        return tuple(name for name, found in self.differences.items() if found.high < 0)

    @property
    def is_confirmed(self) -> bool:
        """Whether training on them is better than on as many at random."""
        return RANDOM in self.helps

    @property
    def verdict(self) -> str:
        what = f"{len(self.rows)} of {self.n} examples"
        if self.actual is None:
            return f"{what} are scored to help the target most; no training has tried them."
        told = f"the test loss changes by {self.actual:+.3f} against as many at random"
        begin = (
            f"Training on the chosen {what} helps the target: {told}"
            if self.is_confirmed
            else f"Training on the chosen {what} is not shown to help the target: {told}"
        )
        others = [name for name in self.differences if name != RANDOM]
        better = [x for x in others if x in self.helps]
        worse = [x for x in others if self.differences[x].low > 0]
        rest = [x for x in others if x not in (*better, *worse)]
        every = (("better than", better), ("worse than", worse), ("not told apart from", rest))
        parts = "".join(f"; {words} {', '.join(names)}" for words, names in every if names)
        return f"{begin}{parts}."

    def frame(self) -> "DataFrame":
        """One row per choice: examples, mean test loss, and chosen less it with its interval."""
        lines = []
        for name, losses in self.losses.items():
            found = self.differences.get(name)
            count = self.n if name == ALL else len(self.rows)
            change = (None, None, None) if found is None else tuple(found)
            lines.append((count, float(losses.mean()), *change))
        names = ["examples", "test_loss", "chosen_less_it", "low", "high"]
        return as_table(lines, list(self.losses), "trained on", names)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The change of the test loss against each other choice, with intervals."""
        ax = axes(ax)
        draw_intervals(ax, self.differences, "mean test loss, chosen less this")
        ax.axvline(0, color="0.7", linewidth=1)
        ax.set_title(self.title)
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            **self._fields("n", "rows", "predicted"),
            "test_losses": {name: float(each.mean()) for name, each in self.losses.items()},
            "is_confirmed": self.is_confirmed,
            **intervals.summarized(dict(self.differences), self.level),
        }


def for_target(
    asked: Any,
    validation: Any,
    share: float,
    *,
    test: Any = None,
    recipe: Recipe | None = None,
    against: Mapping[str, Method] | None = None,
    seeds: int = 3,
    seed: int = 0,
    bootstrap: Bootstrap = Bootstrap(),
    resources: Resources | None = None,
) -> Target:
    """The share of the training data that lowers the loss of a validation set most, tried.

    Args:
        asked: What `Method.fit` gave, or an `Index` of its training data, whose scan scores.
        validation: Examples of the target, which choose. They may be of another kind than the
            training data.
        share: How much to choose, between 0 and 1.
        test: Other examples of the target, which report. None: nothing is trained.
        recipe: How the model is trained, or fine-tuned, again. Needed with a test set.
        against: Other methods that choose as many, by their mean score over the validation set.
            None: `BM25()` and `FeatureSimilarity()`, where the data are of their kind.
        seeds: Trainings of each choice, from as many seeds; random examples are drawn anew for
            each. 1 for a recipe without a seed.
        seed: Of the random examples.
        bootstrap: How intervals are made.
        resources: With a `folder`, which keeps the models: an interrupted call resumes. None:
            those of the fitted method.

    Raises:
        SpecError: The share or the seeds cannot be meant, or there is no recipe where one is
            needed.
        DataError: Two of the three splits hold the same examples.
        StaleStore: The folder keeps the models of something else.
        UpweightError: From the method or the recipe.

    Cost: one solve and a pass over the training data, or a scan; with a test set (3 + methods) ×
    seeds trainings.

    Xia, Malladi, Gururangan, Arora & Chen (2024), LESS: selecting influential data for targeted
    instruction tuning.
    """
    fitted = asked.fitted if isinstance(asked, Index) else asked
    subject = subject_of(fitted, None, recipe)
    fitted, n = subject.fitted, len(subject.fitted.train)
    using = (fitted.resources if resources is None else resources).within("target")
    if isinstance(asked, Index) and len(asked) != n:
        raise SpecError(
            "What is chosen is chosen from the training data.",
            f"an index of {len(asked)} examples for {n} training examples.",
            "an index that was extended with other examples.",
            "fit the method to all of them, and build their index.",
        )
    m = round(share * n) if 0 < share < 1 else 0
    if not 0 < m < n or seeds < 1:
        raise SpecError(
            "The share to choose lies between 0 and 1 and gives some examples but not all; "
            "seeds ≥ 1.",
            f"share={share!r} of {n} examples, seeds={seeds!r}.",
            "a percentage, or a number of examples.",
            "share=0.05 chooses 5 %, as LESS does.",
        )
    split = splits(fitted, validation, test, seed)
    source = asked.scores if isinstance(asked, Index) else fitted.attribute
    phi = source(split.validation, MEAN_LOSS).values[0].detach().cpu().double()
    rows = _smallest(phi, m)
    predicted = None
    if fitted.spec.unit is Unit.DERIVATIVE:
        predicted = float(((_weights(n, rows) - 1) * phi).sum())
    if split.test is None:
        return Target(rows, n, phi, predicted, {}, {}, bootstrap.level)

    how, notes = subject.require_recipe("A choice for a target"), list[str]()
    runs = [reseeded_from(how, k) for k in range(seeds)]
    runs = runs[:1] if len({repr(run) for run in runs}) == 1 else runs
    if len(runs) < seeds:
        notes.append("the recipe has no seed: each choice is trained once")
    choices: dict[str, list[Tensor]] = {CHOSEN: [rows] * len(runs)}
    order = stream("random for a target", seed)
    choices[RANDOM] = [torch.randperm(n, generator=order)[:m].sort().values for _ in runs]
    defaults: Mapping[str, Method] = {"BM25": BM25(), "embedding": FeatureSimilarity()}
    for name, method in (defaults if against is None else against).items():
        try:
            other = method.fit(fitted.task, fitted.train).attribute(split.validation).values
        except DataError as error:
            if against is not None:
                raise
            notes.append(f"{name} is left out: {str(error).splitlines()[0].rstrip('.')}")
            continue
        choices[name] = [_smallest(other.mean(dim=0).cpu().double(), m)] * len(runs)
    choices[ALL] = [torch.arange(n)] * len(runs)

    losses: dict[str, list[Tensor]] = {name: [] for name in choices}
    for k, run in enumerate(runs):
        plan = torch.stack([_weights(n, chosen[k]) for chosen in choices.values()])
        # A folder for each seed: a folder is of one recipe.
        trainer = kept_trainer(run, fitted.task, fitted.train, using.within(f"seed {k}"))
        for start in range(0, len(plan), max(1, trainer.at_once)):
            part = slice(start, start + max(1, trainer.at_once))
            trained = trainer(plan[part])
            for j, name in enumerate(list(choices)[part]):
                if j in trained.failures:
                    notes.append(f"training on {name} failed from seed {k}: {trained.failures[j]}")
                else:
                    here = trained.task_of(fitted.task, j)
                    model = held(here, trained.theta[j], split.test, bootstrap)
                    losses[name].append(model.losses.double())
    whole = {name: torch.stack(each) for name, each in losses.items() if len(each) == len(runs)}
    differences = {
        name: _difference(whole[CHOSEN] - each, bootstrap)
        for name, each in whole.items()
        if name != CHOSEN and CHOSEN in whole
    }
    return Target(rows, n, phi, predicted, whole, differences, bootstrap.level, tuple(notes))


def _smallest(scores: Float[Tensor, " n"], m: int) -> Int[Tensor, " m"]:
    return scores.argsort(stable=True)[:m].sort().values


def _weights(n: int, rows: Int[Tensor, " m"]) -> Float[Tensor, " n"]:
    """n/m for these examples and 0 for others: the mean loss over them."""
    return torch.zeros(n, dtype=torch.float64).index_fill_(0, rows, n / len(rows))


def _difference(values: Float[Tensor, "s q"], bootstrap: Bootstrap) -> Estimate:
    """The mean over seeds and test examples, both drawn."""

    def statistic(seeds: Tensor, queries: Tensor) -> Tensor:
        totals = torch.einsum("rs,sq,rq->r", seeds, values, queries)
        return totals / (seeds.sum(dim=1) * queries.sum(dim=1))

    return intervals.estimate(statistic, values.shape, bootstrap)
