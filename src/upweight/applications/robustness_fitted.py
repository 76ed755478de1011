"""The fewest training examples whose removal takes a measurement of a model past a value.

    m(θ̂(w_S)) ≈ m(θ̂) − Σ_{i ∈ S} S[q, i]

Examples are sorted once by their scores; prefixes of that order are left out and the model trained
again by its recipe, until the shortest that does it is known. With `Lead()` and the value 0 the
prediction of a classifier flips.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.applications.robustness_result import Finding, OneShot, Path, Robustness
from upweight.applications.smallest_set import Crossing, Units, shortest
from upweight.applications.subject import Subject
from upweight.errors import NonFinite, NotConverged, ShapeError, SpecError
from upweight.methods.functionals import evaluated
from upweight.runtime.resources import Resources
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Functional, Margin, Measure, as_measure, measured
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.retrain import retrain

FIRST = 8
"""Examples left out at first where scores are ranks, and predict no number."""


@dataclass(frozen=True)
class Lead(Measure):
    """m = f_y − max_{k ≠ y} f_k: positive where the target's class is predicted.

    Of several classes `Margin()` is positive where the class has more than half of the probability,
    which is another thing. Of one output it is `Margin()`.

    Raises:
        ShapeError: The targets are not one class per query.
    """

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        outputs, targets = task.outputs(params, batch)
        flat = outputs.reshape(len(outputs), -1)
        if flat.shape[1] == 1:
            return Margin()(task, params, batch)
        y = targets[0] if isinstance(targets, tuple | list) else targets  # (y, v) of weighted ones
        if y.is_floating_point() or y.shape != (len(flat),):
            raise ShapeError(
                "A prediction that flips is one class of several.",
                f"targets {tuple(y.shape)} of {y.dtype}.",
                "a regression, class probabilities or one class per position.",
                "say what passes which value: measure=uw.Logit(index=0), value=1.5.",
            )
        chosen = torch.nn.functional.one_hot(y.long(), flat.shape[1]).bool()
        others = flat.masked_fill(chosen, -torch.inf)
        return flat.gather(1, y[:, None].long())[:, 0] - others.amax(dim=1)


@dataclass(frozen=True)
class _OfAll(Measure):
    """A `Functional` of all queries together, said of each of them."""

    functional: Functional
    n: int
    batch: Any = field(repr=False)

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        flat = task.layout.flatten(params)
        ones = flat.new_ones(self.n)
        value = evaluated(self.functional, task, flat, self.batch, ones)
        return value.expand(len(task.losses(params, batch)))


@dataclass(eq=False)
class _Tested:
    """Refits of prefixes of an order: by how many are left out, what was measured."""

    recipe: Recipe
    task: Task
    train: Data
    queries: Data
    measure: Callable[..., Tensor]
    resources: Resources | None
    units: Units
    order: Sequence[int]
    values: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(self, sizes: Sequence[int]) -> None:
        new = [k for k in sizes if k not in self.values]
        if not new:
            return
        w = self.units.weights([self.order[:k] for k in new])
        try:
            found = retrain(
                self.recipe, self.task, self.train, w, self.queries, self.measure,
                resources=self.resources,
            )  # fmt: skip
        except NotConverged as error:
            found = error.solution
            self.notes.append(f"some refits did not converge: {str(error).splitlines()[1].strip()}")
        self.values.setdefault(0, float(found.baseline[0]))
        for k, value in zip(new, found.values[:, 0].tolist(), strict=True):
            self.values[k] = value


def flip(
    subject: Subject,
    queries: Any,
    measure: Callable[..., Tensor] | Functional,
    value: float,
    search: str,
    groups: np.ndarray | None,
    most: int | None,
    deadline: float,
    resources: Resources | None,
) -> Robustness:
    """The fewest examples along the order of the scores; see `upweight.applications.robustness`.

    Raises:
        ShapeError: Not one query, or not one number; or labels of other rows.
        SpecError: No recipe; a Functional of the weights; a measurement that is the value.
        UpweightError: From the method or the recipe.
    """
    fitted = subject.fitted
    task, train, n = fitted.task, fitted.train, len(fitted.train)
    recipe = subject.require_recipe("A claim on which examples carry a prediction")
    data, asked_of, now = _question(subject, queries, measure)
    if now == value:
        raise SpecError(
            "A measurement equal to the value is on neither side of it.",
            f"{now}, value={value}.",
            "an output that does not depend on the training data.",
            "ask with another value.",
        )
    labels, units = _units(groups, n)
    scores = fitted.attribute(queries, measure).values
    if len(scores) != 1:
        raise ShapeError(
            "One number at a time passes a value.",
            f"{len(scores)} of them.",
            "several queries, or a Functional of several numbers.",
            "pass one query, X[i : i + 1], or a Functional of one number.",
        )
    effects = units.sums(-scores[0].detach().cpu().double())
    crossing = Crossing(0, now < value, value)
    sign = crossing.sign
    order = (sign * effects).argsort(descending=True, stable=True).tolist()
    limit = units.limit(most)
    ranks = fitted.spec.unit is Unit.RANK
    along = now + torch.cat([effects.new_zeros(1), effects[order].cumsum(0)])
    hit = (sign * (along - value) > 0).nonzero()
    predicted = int(hit[0]) if len(hit) and not ranks else None
    test = _Tested(recipe, task, train, data, asked_of, resources, units, order)

    def crossed(k: int) -> bool:
        return sign * (test.values[k] - value) > 0  # False of NaN

    def tested(sizes: Sequence[int]) -> list[bool]:
        test(sizes)
        return [crossed(k) for k in sizes]

    notes = ["scores of this method are ranks: they order, and predict no number"] if ranks else []
    k = None
    try:
        if search == "one-shot":
            if predicted is not None and predicted < units.count:
                k = predicted if tested([predicted])[0] else None
        else:
            first = min(predicted or FIRST, limit)
            tested([first])
            if not crossed(0):
                shortest(tested, first, limit, deadline)
    except KeyboardInterrupt:
        notes.append("the search was interrupted: a longer one may find a smaller set")
    except TimeoutError:
        notes.append("the budget ran out: a longer search may find a smaller set")
    done = sorted(size for size in test.values if size and crossed(size))
    if search != "one-shot" and done:
        k = done[0]
    if 0 in test.values and crossed(0):
        k = None
        notes.append(
            f"the recipe's own model of all rows is past {value} already ({test.values[0]:.3g}): "
            "it does not lead to the model that was asked about"
        )
    if hasattr(recipe, "seed"):
        notes.append("a refit is one training, with the recipe's seed")
    steps = sorted({0, *test.values})
    members = [] if k is None else order[:k]
    gone = units.weights([members])[0] == 0
    failed = search == "one-shot" and k is None and predicted is not None
    end = predicted if failed and predicted in test.values else k
    held = None if predicted not in test.values else crossed(predicted or 0)
    nan = torch.full((len(steps), 2), torch.nan, dtype=torch.float64)
    begin = along[steps] if not ranks else torch.full_like(along[steps], torch.nan)
    refitted = torch.tensor([test.values.get(s, torch.nan) for s in steps], dtype=torch.float64)
    return Robustness(
        about=f"{measure!r}" + ("" if isinstance(measure, Functional) else " of the query"),
        asked="sign" if value == 0 else "value",
        value=value,
        level=float("nan"),
        n=n,
        units=units.count,
        unit="row" if groups is None else "group",
        start=Finding(now),
        one_shot=OneShot(predicted, held, k),
        k=k,
        rows=tuple(gone.nonzero()[:, 0].tolist()),
        left_out=tuple(labels[u] for u in members),
        end=None if end is None else Finding(test.values[end]),
        before=None if k is None or k - 1 not in test.values else Finding(test.values[k - 1]),
        tried=max(test.values, default=0),
        path=Path(
            tuple(steps),
            tuple(labels[order[s - 1]] if s and s - 1 in steps else None for s in steps),
            torch.cat([begin[:, None], nan], dim=1).numpy(),
            torch.cat([refitted[:, None], nan], dim=1).numpy(),
        ),
        by="the recipe",
        said=tuple(dict.fromkeys([*notes, *test.notes])),
    )


def _question(
    subject: Subject, queries: Any, measure: Callable[..., Tensor] | Functional
) -> tuple[Data, Callable[..., Tensor], float]:
    """The queries, the measure of refits, and what it is now."""
    fitted = subject.fitted
    task, train, theta = fitted.task, fitted.train, fitted.theta
    if not isinstance(measure, Functional):
        if queries is None:
            raise SpecError(
                "A measurement is of a query.",
                "no queries.",
                "a fitted method passed alone.",
                "queries=(X_test[i : i + 1], y_test[i : i + 1]).",
            )
        data = task.queries(queries)
        chosen = as_measure(measure)
        values = measured(task, theta, data, chosen)
        if len(values) != 1:
            raise ShapeError(
                "One prediction at a time passes a value.",
                f"{len(values)} queries.",
                "a whole test set.",
                "pass one query, X_test[i : i + 1]; or a Functional of all of them, such as their "
                "mean loss.",
            )
        value = float(values[0])
    else:
        batch = None
        data = train.subset(range(1)) if queries is None else task.queries(queries)
        if queries is not None:
            batch = task.to_device(data.batch(0, len(data)))
        ones = theta.new_ones(len(train))
        found, other = (evaluated(measure, task, theta, batch, w) for w in (ones, ones / 2))
        if not torch.equal(found, other):
            raise SpecError(
                "A Functional whose refits are measured is one of θ.",
                f"{measure!r}, which changes with the weights at the same θ.",
                "a standard error of one's own.",
                "of statsmodels results ask amip(results, coefficient, target='significance'), "
                "which knows their standard errors.",
            )
        chosen = _OfAll(measure, len(train), batch)
        value = float(found[0])
    if not np.isfinite(value):
        raise NonFinite(
            "A measurement that passes a value is a number.",
            f"{measure!r} = {value}.",
            "a model that diverged, or a probability that is exactly 0 or 1.",
            "train again with a smaller learning rate, or measure Logit(index).",
        )
    return data, chosen, value


def _units(groups: np.ndarray | None, n: int) -> tuple[Sequence[Hashable], Units]:
    if groups is None:
        return range(n), Units(torch.arange(n), n)
    labels, codes = np.unique(groups, return_inverse=True)
    if codes.shape != (n,) or len(labels) < 2:
        raise ShapeError(
            f"groups has a label for each of the {n} training examples, and at least two of them.",
            f"{groups.shape}, {len(labels)} different.",
            "labels of another data set.",
            "pass one label per example, in their order.",
        )
    return labels.tolist(), Units(torch.from_numpy(codes), len(labels))
