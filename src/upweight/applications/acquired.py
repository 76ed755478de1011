"""Does a way of choosing whom to label pay? Buy labels, fit again, test; at the same budget.

    accuracy(strategy, number of labels)         every model is fitted from the start
    with validation                              the same, trained on the validation examples too

The validation examples guide some strategies. Who has them could as well train on them, which is
the comparison that decides whether the guidance was worth it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.pool_ranking import classes_of, pool_data, probabilities, rank
from upweight.applications.right_answers import Correct
from upweight.applications.valuation import joined
from upweight.curvature.hessian import Hessian
from upweight.errors import (
    NonFinite,
    NotConverged,
    NotPositiveDefinite,
    SpecError,
    UnsupportedModel,
)
from upweight.evaluation.bootstrap import FEW, Bootstrap, Estimate, estimate
from upweight.linalg.cholesky import Cholesky
from upweight.methods.influence import Influence
from upweight.methods.method import Method
from upweight.methods.perturbation import with_targets
from upweight.plot import axes
from upweight.runtime.resources import Resources
from upweight.runtime.streams import stream
from upweight.task.data import Data, as_data
from upweight.task.identity import contents
from upweight.task.measures import Loss
from upweight.task.recipe import Recipe, Trained
from upweight.task.task import Task, require_task
from upweight.training.function import FromFunction, as_recipe
from upweight.training.kept import Kept, training_identity

GUIDED = {
    "expected gain": {"labels": "expected", "diverse": False},
    "diverse expected gain": {"labels": "expected", "diverse": True},
    "pseudo-label gain": {"labels": "pseudo", "diverse": False},
}
"""Strategies that read the validation examples, as arguments of `rank`."""

STRATEGIES = (*GUIDED, "random", "entropy", "class-balanced random")
"""All that `curve` knows."""

COMPARED = ("expected gain", "pseudo-label gain", "random", "entropy", "class-balanced random")


@dataclass(frozen=True, eq=False)
class Acquired(Outcome):
    """Test accuracy by number of labels, of every strategy.

    Args:
        strategies: Their names; the first is the one that the verdict is about.
        labels: How many labels were bought before each fit.
        right: Right or wrong on each test example: by strategy, start, fit.
        right_with_validation: The same of models that are trained on the validation examples too.
        predicted: Change of the mean validation loss that each batch was predicted to bring, the
            sum of its ranking; NaN for strategies that predict nothing.
        actual: The same after fitting again.
        bought: Which examples of labelled + pool, in that order, were bought.
        initial: How many were labelled before.
        validation: How many validation examples there are.
        bootstrap: How the intervals are made; starts and test examples are drawn with replacement.
        told: What to know before the numbers.
    """

    strategies: tuple[str, ...]
    labels: Int[Tensor, " r"]
    right: Bool[Tensor, "s k r t"]
    right_with_validation: Bool[Tensor, "s k r t"]
    predicted: Float[Tensor, "s k b"]
    actual: Float[Tensor, "s k b"]
    bought: Int[Tensor, "s k m"]
    initial: int
    validation: int
    bootstrap: Bootstrap = field(default_factory=lambda: Bootstrap(resamples=1000))
    told: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"Test accuracy by labels bought, up to {int(self.labels[-1])}"

    @property
    def is_confirmed(self) -> bool:
        """Whether the first strategy's lead on the best other, or its lag, leaves 0 out.

        Every model here is fitted again.
        """
        d = self._lead(self.rival)
        return d is not None and (d.low > 0 or d.high < 0)

    def accuracy(self, strategy: str, step: int = -1, *, with_validation: bool = False) -> Estimate:
        """Mean test accuracy over starts.

        Args:
            strategy: Its name.
            step: Which fit: 0 before anything is bought, −1 the last.
            with_validation: Of the models that are trained on the validation examples too.

        Raises:
            SpecError: The strategy was not run.
        """
        return self._mean(self._of(strategy, step, with_validation))

    def difference(
        self, first: str, second: str, step: int = -1, *, with_validation: bool = False
    ) -> Estimate:
        """Accuracy of `first` − accuracy of `second`, paired by start and test example.

        Args:
            first: Trained without the validation examples.
            second: What it is compared with.
            step: Which fit.
            with_validation: Whether `second` is trained on the validation examples too.

        Raises:
            SpecError: A strategy was not run.
        """
        own, other = self._of(first, step, False), self._of(second, step, with_validation)
        return self._mean(own - other)

    def labels_to(self, strategy: str, other: str) -> int | None:
        """After how many labels a strategy has the accuracy that another has in the end.

        None: never. A point estimate of the means over starts.
        """
        level = float(self._of(other, -1, False).mean())
        passed = (_curves(self.right)[self._place(strategy)] >= level).nonzero()[:, 0].tolist()
        return int(self.labels[passed[0]]) if passed else None

    @cached_property
    def rival(self) -> str:
        """The best of the other strategies by its last accuracy; the first where it is alone."""
        others = self.strategies[1:] or self.strategies
        return max(others, key=lambda name: float(self._of(name, -1, False).mean()))

    @cached_property
    def rival_with_validation(self) -> str:
        """The best strategy of all where the validation examples are trained on too."""
        return max(self.strategies, key=lambda name: float(self._of(name, -1, True).mean()))

    @property
    def verdict(self) -> str:
        own, rival, joint = self.strategies[0], self.rival, self.rival_with_validation
        a = self.accuracy(own)
        said = f"With {int(self.labels[-1])} labels bought by {own} test accuracy is {a.value:.1%}"
        d = self._lead(rival)
        if d is not None:
            when = self.labels_to(own, rival)
            other = float(self._of(rival, -1, False).mean())
            lead = (
                "more" if d.low > 0 else "less" if d.high < 0 else "no difference that can be told"
            )
            passed = "" if when is None or d.high < 0 else f", passed after {when} labels"
            said += f", by {rival} {other:.1%}: {lead}, {100 * d:+.1f} points{passed}"
        b = self.accuracy(joint, with_validation=True)
        g = self.difference(own, joint, with_validation=True)
        side = "more" if g.low > 0 else "less" if g.high < 0 else "neither more nor less"
        return (
            f"{said}; training on the {self.validation} validation examples too gives "
            f"{b.value:.1%} ({joint}), and guidance alone has {side}, {100 * g:+.1f} points; "
            f"{self.right.shape[1]} start{'s' if self.right.shape[1] > 1 else ''}."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        found = list(self.told)
        k = self.right.shape[1]
        if k == 1:
            found.append("one start: the intervals are of the test examples alone")
        elif k < FEW:
            found.append(f"{k} starts: the intervals are somewhat too narrow")
        for s, name in enumerate(self.strategies):
            if bool(self.predicted[s].isfinite().all()) and self.predicted.shape[2]:
                said, was = float(self.predicted[s].mean()), float(self.actual[s].mean())
                found.append(
                    f"a batch of {name} was predicted to change the validation loss by "
                    f"{said:+.3g}, and changed it by {was:+.3g}"
                )
        return tuple(found)

    def frame(self) -> "DataFrame":
        """One row per strategy and number of labels, with intervals over starts and tests."""
        lines = []
        for s, name in enumerate(self.strategies):
            both = torch.stack([self.predicted[s].mean(dim=0), self.actual[s].mean(dim=0)], dim=1)
            changes = [(torch.nan, torch.nan), *both.tolist()]
            for r, (count, change) in enumerate(zip(self.labels.tolist(), changes, strict=True)):
                b = float(self._of(name, r, True).mean())
                lines.append((name, count, *self.accuracy(name, r), b, *change))
        names = ["strategy", "labels", "accuracy", "low", "high", "accuracy_with_validation"]
        return as_table(lines, columns=[*names, "predicted", "actual"])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Accuracy by number of labels; dotted where the validation examples are trained on too."""
        ax = axes(ax)
        both = _curves(self.right), _curves(self.right_with_validation)
        for name, alone, joint in zip(self.strategies, *both, strict=True):
            (line,) = ax.plot(self.labels, alone, marker="o", markersize=3, label=name)
            ax.plot(self.labels, joint, linestyle=":", color=line.get_color())
        ax.set(xlabel="labels bought", ylabel="test accuracy (dotted: with validation)")
        ax.legend(frameon=False)
        return ax

    def numbers(self) -> dict[str, Any]:
        own = self.strategies[0]
        return {
            "labels": self.labels,
            "accuracy": dict(zip(self.strategies, _curves(self.right), strict=True)),
            "accuracy_with_validation": dict(
                zip(self.strategies, _curves(self.right_with_validation), strict=True)
            ),
            "labels_to_final_of": {name: self.labels_to(own, name) for name in self.strategies[1:]},
            "starts": self.right.shape[1],
            "initial": self.initial,
            "validation": self.validation,
        }

    def _place(self, strategy: str) -> int:
        if strategy not in self.strategies:
            raise _no_strategy(strategy, self.strategies)
        return self.strategies.index(strategy)

    def _of(self, strategy: str, step: int, with_validation: bool) -> Float[Tensor, "k t"]:
        found = self.right_with_validation if with_validation else self.right
        return found[self._place(strategy), :, step].double()

    def _lead(self, other: str) -> Estimate | None:
        own = self.strategies[0]
        return None if other == own else self.difference(own, other)

    def _mean(self, values: Float[Tensor, "k t"]) -> Estimate:
        def statistic(starts: Tensor, rows: Tensor) -> Float[Tensor, " r"]:
            by_start = rows @ values.mT / rows.sum(dim=1, keepdim=True)
            return (by_start * starts).sum(dim=1) / starts.sum(dim=1)

        return estimate(statistic, list(values.shape), self.bootstrap)


def _curves(right: Bool[Tensor, "s k r t"]) -> Float[Tensor, "s r"]:
    return right.double().mean(dim=(1, 3))


def curve(
    recipe: Recipe,
    task: Task,
    labelled: Any,
    pool: Any,
    oracle: Any,
    validation: Any,
    test: Any,
    strategies: Sequence[str] = COMPARED,
    batch: int = 25,
    rounds: int = 8,
    *,
    repeats: int = 3,
    method: Method | None = None,
    seed: int = 0,
    resources: Resources | None = None,
) -> Acquired:
    """Buy labels by several strategies, fit again after every batch, and test.

    Every fit starts from the task and the recipe, never from the model before, with the mean taken
    over what is labelled. A model chooses and is measured with its own running statistics. Starts
    after the first are drawn from labelled and pool together, of the same size: results are for a
    start at random.

        "expected gain", "diverse expected gain", "pseudo-label gain"   see `rank`
        "random"                  uniform
        "entropy"                 largest −Σ_c p_c log p_c (Settles 2009, §3.1)
        "class-balanced random"   at random of the predicted class that has the fewest labels yet

    Each is run once more with the validation examples in the training data. Strategies that are not
    guided then choose by that model. Guided ones keep their choices: on its own training data the
    mean loss has no gradient that a label could follow.

    Args:
        recipe: The learning algorithm.
        task: What is trained.
        labelled: What is labelled to begin with.
        pool: One array of inputs; or data as for `as_data`.
        oracle: The label of every pool example, as the loss takes it.
        validation: What guides; nothing is reported on it but `predicted` and `actual`.
        test: What accuracy is measured on.
        strategies: Which; the first is the one that the verdict is about.
        batch: Labels bought at a time.
        rounds: How many batches.
        repeats: From how many starts.
        method: What is fitted for guided strategies. None: the exact Hessian, by Cholesky.
        seed: Of starts and random strategies.
        resources: With a `folder`, which keeps the models: an interrupted call resumes. None:
            nothing is kept.

    Raises:
        SpecError: There is no such strategy, the pool is too small, there are no repeats, or the
            recipe is a function, which holds its own data.
        UnsupportedModel: A model of scikit-learn or statsmodels, whose task has its own data only.
        NotConverged: Fits failed from every start. Starts with a failed fit are left out of all
            strategies, and noted.
        StaleStore: The folder keeps the models of something else.

    Cost: 2 (`rounds` + 1) × `repeats` × strategies fits, and `rounds` × `repeats` rankings for each
    guided strategy.
    """
    require_task(task)
    if task.reads is not None and task.reads.fits_own_data:
        raise UnsupportedModel(
            "A simulation fits the task to data that grow.",
            "the task of a scikit-learn or statsmodels model, which is of its own data only.",
            "a task from an adapter.",
            "uw.Task(torch.nn.Linear(d, classes), uw.CrossEntropy(), uw.L2(...)) with "
            "uw.training.Newton(); rank(...) itself takes the estimator.",
        )
    recipe = as_recipe(recipe)
    if isinstance(recipe, FromFunction):
        raise SpecError(
            "A simulation hands its recipe the data, which grow.",
            f"{recipe!r}, a function of weights of data of its own.",
            "a training loop that takes no data.",
            "a class whose prepare(task, train) returns FromFunction(loop).prepare(task, train), "
            "where loop trains on `train`.",
        )
    names = tuple(strategies)
    for name in names:
        if name not in STRATEGIES:
            raise _no_strategy(name, STRATEGIES)
    known, held, tested = (task.queries(part) for part in (labelled, validation, test))
    unlabelled = pool_data(task, pool, known)
    if (
        not names or min(batch, rounds, repeats, len(known), len(held), len(tested)) < 1
        or batch * rounds > len(unlabelled)
    ):  # fmt: skip
        raise SpecError(
            "A simulation needs a strategy, a batch, a round, a start, some examples of each kind, "
            "and a pool that lasts.",
            f"{len(names)} strategies, {rounds} rounds of {batch} from a pool of "
            f"{len(unlabelled)}, repeats={repeats}; {len(known)} labelled, {len(held)} validation "
            f"and {len(tested)} test examples.",
            "a pool that is smaller than the budget.",
            f"rounds={max(1, len(unlabelled) // max(1, batch))}, or a smaller batch.",
        )
    answered = with_targets(unlabelled.take(range(len(unlabelled))), torch.as_tensor(oracle))
    everything = joined(known, as_data(answered))
    using = (Resources() if resources is None else resources).within("curve")
    kept = Kept.of(
        using,
        lambda: {**training_identity(recipe, task, everything), "validation": contents(held)},
    )
    world = _World(
        recipe, task, everything, held, tested, batch, rounds,
        Influence(Hessian(), Cholesky()) if method is None else method, kept, seed,
    )  # fmt: skip
    runs, failed = [], []
    for k in range(repeats):
        start = torch.arange(len(everything))
        if k:
            start = torch.randperm(len(everything), generator=stream(f"start {k}", seed))
        begin = start[: len(known)].tolist()
        try:
            runs.append([world.run(name, begin, k) for name in names])
        except (NotConverged, NotPositiveDefinite, NonFinite) as error:
            failed.append(error)
    if not runs:
        raise failed[0]
    told: tuple[str, ...] = ()
    if failed:
        told = (f"{len(failed)} of {repeats} starts had a fit that failed, and are left out",)
    # runs[start][strategy][part] as a tensor of strategies, starts, … for each part
    right, joint, predicted, actual, bought = (
        torch.stack([torch.stack([run[s][p] for run in runs]) for s in range(len(names))])
        for p in range(5)
    )
    counts = torch.arange(rounds + 1) * batch
    return Acquired(
        names, counts, right, joint, predicted, actual, bought, len(known), len(held), told=told
    )


@dataclass(frozen=True, eq=False)
class _World:
    """What stays the same in every run."""

    recipe: Recipe
    task: Task
    everything: Data
    held: Data
    test: Data
    batch: int
    rounds: int
    method: Method
    kept: Kept
    seed: int

    def run(self, name: str, start: list[int], k: int) -> tuple[Tensor, ...]:
        """Buy by a strategy, alone and with the validation examples in the training data.

        Returns:
            `right`, `right_with_validation`, `predicted`, `actual` and `bought` of one start.
        """
        alone = self._bought(name, start, k, joint=False)
        # What a guided strategy buys does not change where the guides are trained on.
        again = self._bought(name, start, k, joint=True, bought=alone[3])
        right, losses, predicted, bought = alone
        changes = torch.tensor(losses).diff()
        both = torch.stack(right), torch.stack(again[0])
        return *both, torch.tensor(predicted), changes, torch.tensor(bought)

    def _bought(
        self, name: str, start: list[int], k: int, joint: bool, bought: list[int] | None = None
    ) -> tuple[list[Tensor], list[float], list[float], list[int]]:
        generator = stream(f"bought from start {k}", self.seed)  # the same of every strategy
        plan = bought if name in GUIDED else None
        taken: list[int] = []
        right, losses, predicted = [], [], []
        for r in range(self.rounds + 1):
            rows = start + taken
            train = self._training(rows, joint)
            model = self._fitted(train, f"{rows}{' and validation' * joint}")
            right.append(model.measured(self.task, self.test, Correct())[0].bool())
            losses.append(float(model.measured(self.task, self.held, Loss()).mean()))
            if r == self.rounds:
                break
            if plan is not None:
                taken = plan[: len(taken) + self.batch]
                continue
            chosen, gain = self._chosen(name, model, train, rows, generator)
            taken = taken + chosen
            predicted.append(gain)
        return right, losses, predicted, taken

    def _training(self, rows: list[int], joint: bool) -> Data:
        alone = as_data(self.everything.take(rows))
        return joined(alone, self.held) if joint else alone

    def _fitted(self, train: Data, rows: str) -> Trained:
        trainer = self.kept.trainer(self.recipe.prepare(self.task, train), self.task, rows)
        found = trainer(torch.ones(1, len(train), dtype=torch.float64))
        if found.failures:
            raise NotConverged(
                "Every model of a simulation must train to the recipe's tolerance.",
                f"{len(train)} examples: {found.failures[0]}",
                "few examples and no penalty: a minimum at infinity.",
                "give the task a penalty, uw.L2(1e-2), or loosen the recipe.",
            )
        return found

    def _chosen(
        self,
        name: str,
        model: Trained,
        train: Data,
        rows: list[int],
        generator: torch.Generator,
    ) -> tuple[list[int], float]:
        """The next batch, and the change of the validation loss that it was predicted to bring."""
        is_open = torch.ones(len(self.everything), dtype=torch.bool)
        is_open[rows] = False
        pool = is_open.nonzero()[:, 0]
        if name == "random":
            order = torch.randperm(len(pool), generator=generator)
            return pool[order[: self.batch]].tolist(), math.nan
        data = self.everything.subset(pool.tolist())
        task, theta = model.task_of(self.task, 0), model.theta[0]
        if name in GUIDED:
            fitted = self.method.fit(task.moved_to(theta), train)
            found = rank(fitted, data, self.held, batch=self.batch, **GUIDED[name])  # type: ignore[arg-type]
            return pool[found.chosen].tolist(), float(found.predicted[found.chosen].sum())
        classes = classes_of(task, theta, data)
        p = probabilities(task, theta, data, classes)
        if name == "entropy":
            entropy = torch.special.entr(p).sum(dim=1)
            order = entropy.argsort(descending=True, stable=True)
            return pool[order[: self.batch]].tolist(), math.nan
        own = self._labels(rows, len(classes))
        return pool[_balanced(p.argmax(dim=1), own, self.batch, generator)].tolist(), math.nan

    def _labels(self, rows: list[int], classes: int) -> Int[Tensor, " c"]:
        """How many labels each class has."""
        batch = self.everything.take(rows)
        _, y = self.task.outputs(self.task.theta(), self.task.to_device(batch))
        y = y[0] if isinstance(y, tuple | list) else y
        return torch.bincount(y.reshape(-1).long().cpu(), minlength=classes)


def _balanced(
    predicted: Int[Tensor, " k"], counts: Int[Tensor, " c"], batch: int, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """At random from the predicted class with the fewest labels, one after the other."""
    order = torch.randperm(len(predicted), generator=generator)
    queues = [order[predicted[order] == c].tolist() for c in range(len(counts))]
    counts, chosen = counts.double(), []
    for _ in range(batch):
        left = torch.tensor([bool(queue) for queue in queues])
        c = int(torch.where(left, counts, torch.inf).argmin())
        chosen.append(queues[c].pop())
        counts[c] += 1
    return torch.tensor(chosen)


def _no_strategy(given: Any, known: Sequence[str]) -> SpecError:
    return SpecError(
        "A strategy is named.",
        f"{given!r}.",
        "another word for it, or a strategy that was not run.",
        f"one of {', '.join(map(repr, known))}.",
    )
