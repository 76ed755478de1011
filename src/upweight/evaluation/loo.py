"""Leave-one-out: is the predicted effect of a removal what retraining without it gives?

    predicted[e, q] ≈ actual[e, q] = m_q(θ(w_e)) − m_q(θ(1))          w_e: 1, but 0 on removal e

The three steps are separate: `leave_one_out` retrains, `predicted_removals` reads predictions off
scores or effects, `compare` holds one against the other. Several predictions of the same removals
thus share one round of retraining. `loo` is their composition.

The objective keeps its 1/n and its penalty (wᵢ = 0).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.effects import FIRST_ORDER, Effects
from upweight.errors import ShapeError
from upweight.evaluation import metrics
from upweight.evaluation.bootstrap import FEW, Bootstrap, Estimate, summarized
from upweight.evaluation.prediction import (
    predicted_removals,
    query_index,
    removals,
)
from upweight.runtime.resources import Resources
from upweight.scores import Scores
from upweight.task.measures import Loss
from upweight.task.recipe import Recipe
from upweight.task.task import Task, require_task
from upweight.training.retrain import Retrained, retrain
from upweight.training.weights import Removal, removal_weights
from upweight.verdict import SAME_MODEL


@dataclass(frozen=True, eq=False)
class LOO:
    """Predicted against actual effects of removals.

    The metrics pool all removals and queries; `query(j)` is one query by itself.

    Args:
        examples: What each removal takes out.
        predicted: Δm as predicted.
        actual: Δm as retrained.
        retrained: Where `actual` came from, if it is known.
        bootstrap: How the intervals are made.
        label: What predicted, in words.
        queries: Which rows of the scores the columns are; None: the first, in order.
        errors: Standard error of each actual effect, where it is a mean over retrainings.
        names: What each removal is, in words.
        repeats: How often each removal was retrained.
    """

    examples: tuple[tuple[int, ...], ...]
    predicted: Float[Tensor, "e q"]
    actual: Float[Tensor, "e q"]
    retrained: Retrained | None = field(default=None, repr=False)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    label: str = "first order"
    queries: tuple[int, ...] | None = None
    errors: Float[Tensor, "e q"] | None = None
    names: Sequence[str] | None = None
    repeats: int = 1

    @property
    def n(self) -> int:
        """Pairs compared: removals times queries."""
        return self.actual.numel()

    @cached_property
    def pearson(self) -> Estimate:
        """Linear correlation of predicted and actual."""
        return metrics.pearson(self.predicted, self.actual, self.bootstrap)

    @cached_property
    def spearman(self) -> Estimate:
        """Rank correlation of predicted and actual."""
        return metrics.spearman(self.predicted, self.actual, self.bootstrap)

    @cached_property
    def slope(self) -> Estimate:
        """Least squares slope of actual against predicted: 1 where magnitudes are right."""
        return metrics.slope(self.predicted, self.actual, self.bootstrap)

    def query(self, index: int) -> "LOO":
        """The same comparison for one query.

        Raises:
            ShapeError: There is no such query.
        """
        row = query_index(index, self.actual.shape[1])
        column = slice(row, row + 1)
        return replace(
            self,
            predicted=self.predicted[:, column],
            actual=self.actual[:, column],
            errors=None if self.errors is None else self.errors[:, column],
            queries=(row if self.queries is None else self.queries[row],),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before the numbers: whether the recipe makes the model that was scored."""
        if self.retrained is None:
            return ()
        drift, typical = self.retrained.drift.abs().max(), self.actual.abs().median()
        if not drift > SAME_MODEL * typical:
            return ()
        return (
            "the model is not what the recipe makes, and this compares another one: m(θ(1)) − m(θ̂) "
            f"is up to {float(drift):.1e}, a typical effect {float(typical):.1e}",
        )

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them; intervals under `intervals`."""
        estimates = {"pearson": self.pearson, "spearman": self.spearman, "slope": self.slope}
        about = {"n": self.n, "notes": list(self.notes)}
        return summarized(estimates, self.bootstrap.level) | about

    def __str__(self) -> str:
        e, q = self.actual.shape
        level = f"{self.bootstrap.level:.0%} interval"
        lines = [
            f"leave-one-out: {e} removals × {q} {'query' if q == 1 else 'queries'}, predicted "
            "against retrained",
            f"  Pearson   {self.pearson}  {level}",
            f"  Spearman  {self.spearman}",
            f"  slope     {self.slope}  actual over predicted",
        ]
        if e < FEW:
            lines.append(f"  only {e} removals: such intervals are too narrow below {FEW}")
        if self.retrained is not None:
            norms = self.retrained.gradient_norms
            if bool(norms.isfinite().all()):
                lines.append(f"  retrained to ‖∇J‖ ≤ {float(norms.max()):.1e}")
        return "\n".join([*self.notes, *lines])


def leave_one_out(
    recipe: Recipe,
    task: Task,
    train: Any,
    examples: Iterable[Removal],
    queries: Any,
    measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    *,
    resources: Resources | None = None,
) -> Retrained:
    """Really remove, really retrain: one model per removal. Arguments as for `retrain`.

    Raises:
        ShapeError: An example is out of range or named twice, within a group or by two of them.
        UpweightError: See `retrain`.
    """
    require_task(task)
    data = task.training(train)
    groups = removals(examples, len(data))
    weights = removal_weights(len(data), groups)
    return retrain(recipe, task, data, weights, queries, measure, resources=resources)


def compare(
    predicted: Scores | Effects | Float[Tensor, "..."],
    actual: Retrained | Sequence[Retrained] | Float[Tensor, "..."],
    examples: Iterable[Removal],
    *,
    query: int | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    label: str | None = None,
    names: Sequence[str] | None = None,
) -> LOO:
    """Hold predictions against retraining.

    Args:
        predicted: Scores, which predict −S, effects, or Δm as a matrix.
        actual: What `leave_one_out` returned for the same examples, or Δm as a matrix. Of several
            rounds, as from several seeds, the mean is compared, and its standard error kept.
        examples: The removals, in that order.
        query: Which row of the scores, where only one query was retrained for.
        bootstrap: How the intervals are made.
        label: What predicted, in words; by default what made the effects: "first order".
        names: What each removal is, in words.

    Raises:
        ShapeError: The two do not fit.
    """
    groups = tuple(tuple(torch.as_tensor(g).reshape(-1).tolist()) for g in examples)
    if isinstance(predicted, Scores | Effects):
        label = label or (predicted.how if isinstance(predicted, Effects) else FIRST_ORDER)
        queries = None if query is None else (query_index(query, len(predicted)),)
        predicted = predicted_removals(predicted, groups, query)
    else:
        queries = None if query is None else (query,)
    retrained = actual if isinstance(actual, Retrained) else None
    errors, repeats = None, 1
    if isinstance(actual, Retrained | Tensor):
        truth = actual if isinstance(actual, Tensor) else actual.change
    else:
        rounds = torch.stack([each.change for each in actual])
        truth, repeats = rounds.mean(dim=0), len(rounds)
        errors = (rounds.std(dim=0) / repeats**0.5).cpu().double() if repeats > 1 else None
    truth, predicted = truth.detach().cpu().double(), predicted.detach().cpu().double()
    if truth.ndim != 2 or predicted.shape != truth.shape or len(truth) != len(groups):
        raise ShapeError(
            "Predicted and actual effects are matrices [removals, queries] of one shape.",
            f"predicted {tuple(predicted.shape)}, actual {tuple(truth.shape)}, "
            f"{len(groups)} removals.",
            "scores of all queries beside retraining for one of them.",
            "pass query= to pick the row of the scores, and the same examples to both.",
        )
    if names is not None and len(names) != len(groups):
        raise ShapeError(
            "Removals have one name each.",
            f"{len(groups)} removals, {len(names)} names.",
            "names of other removals.",
            "give one for each, in the order of the removals, or None.",
        )
    return LOO(
        groups, predicted, truth, retrained, bootstrap, label or "predicted", queries, errors,
        names, repeats,
    )  # fmt: skip


def loo(
    predicted: Scores | Effects,
    recipe: Recipe,
    examples: Iterable[Removal],
    *,
    query: int | None = None,
    resources: Resources | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> LOO:
    """Predicted against actual effect of removing each example, by really retraining.

    Scores or effects say the task, data, queries and measure; scores predict Δm ≈ −S, effects, as
    of `fitted.removal(queries, measure, groups=examples)`, what they are. `query` compares one
    query only; the rest is as for `leave_one_out` and `compare`.

    Raises:
        MissingContext: Scores were loaded from disk, without their task and data.
        UpweightError: See `leave_one_out` and `compare`.

    Example:
        >>> print(loo(scores, Newton(), examples=range(20)))
    """
    context = predicted.require_context()
    groups = removals(examples, len(context.train))
    predicted_removals(predicted, groups)  # refused before anything is retrained
    queries = context.queries
    if query is not None:
        queries = queries.subset([query_index(query, len(queries))])
    retrained = leave_one_out(
        recipe,
        context.task,
        context.train,
        groups,
        queries,
        context.measure,
        resources=resources,
    )
    return compare(predicted, retrained, groups, query=query, bootstrap=bootstrap)
