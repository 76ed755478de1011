"""Leave-one-out: is the predicted effect of a removal what retraining without it gives?

    predicted[e, q] ≈ actual[e, q] = m_q(θ(w_e)) − m_q(θ(1))          w_e: 1, but 0 on removal e

The three steps are separate: `leave_one_out` retrains, `predicted_removals` reads predictions off
scores, `compare` holds one against the other. Several predictions of the same removals thus share
one round of retraining. `loo` is their composition.

The objective keeps its 1/n and its penalty (wᵢ = 0).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError, message
from upweight.evaluation import metrics
from upweight.evaluation.metrics import Bootstrap, Estimate
from upweight.evaluation.retrain import Retrained, retrain
from upweight.evaluation.weights import members, removal_weights
from upweight.scores import Scores, Unit
from upweight.task.data import as_data
from upweight.task.measures import Loss
from upweight.task.recipe import Recipe
from upweight.task.task import Task

Removal = int | Sequence[int]
FEW = 20


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
    """

    examples: tuple[tuple[int, ...], ...]
    predicted: Float[Tensor, "e q"]
    actual: Float[Tensor, "e q"]
    retrained: Retrained | None = field(default=None, repr=False)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

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
        row = _query_index(index, self.actual.shape[1])
        predicted, actual = self.predicted[:, row : row + 1], self.actual[:, row : row + 1]
        return LOO(self.examples, predicted, actual, self.retrained, self.bootstrap)

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them; intervals under `intervals`."""
        estimates = {"pearson": self.pearson, "spearman": self.spearman, "slope": self.slope}
        return {
            **{name: estimate.value for name, estimate in estimates.items()},
            "n": self.n,
            "level": self.bootstrap.level,
            "intervals": {name: [e.low, e.high] for name, e in estimates.items()},
        }

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
            lines.append(f"  retrained to ‖∇J‖ ≤ {float(norms.max()):.1e}")
            drift, typical = self.retrained.drift.abs().max(), self.actual.abs().median()
            if drift > 0.1 * typical:
                lines.append(
                    f"  the model is not what the recipe makes: m(θ(1)) − m(θ̂) is up to "
                    f"{float(drift):.1e}, a typical effect {float(typical):.1e}"
                )
        return "\n".join(lines)


def leave_one_out(
    recipe: Recipe,
    task: Task,
    train: Any,
    examples: Iterable[Removal],
    queries: Any,
    measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    *,
    jobs: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Retrained:
    """Really remove, really retrain: one model per removal. Arguments as for `retrain`.

    Raises:
        ShapeError: An example is out of range or named twice, within a group or by two of them.
        UpweightError: See `retrain`.
    """
    data = as_data(train)
    groups = removals(examples, len(data))
    weights = removal_weights(len(data), groups)
    return retrain(
        recipe, task, data, weights, queries, measure, jobs=jobs, cache=cache, progress=progress
    )


def removals(examples: Iterable[Removal], n: int) -> tuple[tuple[int, ...], ...]:
    """Each removal as the indices it takes out, checked.

    Raises:
        ShapeError: None is given, one is out of range, or the same removal is asked for twice.
    """
    groups = tuple(members(group, n) for group in examples)
    seen = [tuple(sorted(group)) for group in groups]
    twice = sorted({group for group in seen if seen.count(group) > 1})
    if not groups or twice:
        raise ShapeError(
            message(
                "Leave-one-out needs at least one removal, each asked for once.",
                f"{len(groups)} removals" + (f", repeated: {twice[:5]}." if twice else "."),
                "a list of examples put together from several rankings.",
                "drop duplicates: they would count twice in every correlation.",
            )
        )
    return groups


def predicted_removals(
    scores: Scores, examples: Iterable[Removal], query: int | None = None
) -> Float[Tensor, "e q"]:
    """Δm that scores predict for each removal.

    Scores over training examples predict −Σ S (or, in Δm, the sum of single removals). Scores whose
    columns are removals, as from `fitted.removal(queries, groups=examples)`, are taken as they are.

    Raises:
        ShapeError: A removal is not among the columns.
        UpweightError: The scores only rank.
    """
    groups: list[tuple[int, ...]] = [
        tuple(torch.as_tensor(g).reshape(-1).tolist()) for g in examples
    ]
    if scores.columns is None:
        predicted = torch.stack([scores.predict(drop=group) for group in groups])
    else:
        labels = [",".join(map(str, group)) for group in groups]
        missing = [label for label in labels if label not in scores.columns]
        if scores.unit is not Unit.DIFFERENCE or missing:
            raise ShapeError(
                message(
                    "Scores with labeled columns must be removals in Δm, labeled by the examples "
                    "they take out.",
                    f"unit {scores.unit.name}, columns {list(scores.columns[:5])}, "
                    f"asked for {missing[:5] or labels[:5]}.",
                    "scores of groups by class, or removals of other examples.",
                    "use fitted.removal(queries, measure, groups=examples), or scores over "
                    "training examples.",
                )
            )
        place = {label: k for k, label in enumerate(scores.columns)}
        predicted = scores.values[:, [place[label] for label in labels]].T
    predicted = predicted.detach().cpu().double()
    if query is None:
        return predicted
    row = _query_index(query, len(scores))
    return predicted[:, row : row + 1]


def compare(
    predicted: Scores | Float[Tensor, "e q"],
    actual: Retrained | Float[Tensor, "e q"],
    examples: Iterable[Removal],
    *,
    query: int | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> LOO:
    """Hold predictions against retraining.

    Args:
        predicted: Scores, or Δm as a matrix.
        actual: What `leave_one_out` returned for the same examples, or Δm as a matrix.
        examples: The removals, in that order.
        query: Which row of the scores, where only one query was retrained for.

    Raises:
        ShapeError: The two do not fit.
    """
    groups = tuple(tuple(torch.as_tensor(g).reshape(-1).tolist()) for g in examples)
    if isinstance(predicted, Scores):
        predicted = predicted_removals(predicted, groups, query)
    retrained = actual if isinstance(actual, Retrained) else None
    truth = (actual.change if isinstance(actual, Retrained) else actual).detach().cpu().double()
    predicted = predicted.detach().cpu().double()
    if truth.ndim != 2 or predicted.shape != truth.shape or len(truth) != len(groups):
        raise ShapeError(
            message(
                "Predicted and actual effects are matrices [removals, queries] of one shape.",
                f"predicted {tuple(predicted.shape)}, actual {tuple(truth.shape)}, "
                f"{len(groups)} removals.",
                "scores of all queries beside retraining for one of them.",
                "pass query= to pick the row of the scores, and the same examples to both.",
            )
        )
    return LOO(groups, predicted, truth, retrained, bootstrap)


def loo(
    scores: Scores,
    recipe: Recipe,
    examples: Iterable[Removal],
    *,
    removal: Scores | None = None,
    query: int | None = None,
    jobs: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    bootstrap: Bootstrap = Bootstrap(),
) -> LOO:
    """Predicted against actual effect of removing each example, by really retraining.

    Args:
        scores: Says the task, data, queries and measure; predicts Δm ≈ −S.
        recipe: How to retrain.
        examples: What to remove: indices, or lists of indices that go together.
        removal: Other predictions to compare in place of −S, such as
            `fitted.removal(queries, measure, groups=examples)`.
        query: Compare this query only. None: all of them.
        jobs, cache, progress: As for `retrain`.
        bootstrap: How the intervals are made.

    Raises:
        MissingContext: The scores were loaded from disk, without their task and data.
        UpweightError: See `leave_one_out` and `compare`.

    Example:
        >>> print(loo(scores, Newton(), examples=range(20)))
    """
    context = scores.require_context()
    groups = removals(examples, len(context.train))
    prediction = predicted_removals(scores if removal is None else removal, groups, query)
    queries = context.queries
    if query is not None:
        queries = queries.subset([_query_index(query, len(queries))])
    retrained = leave_one_out(
        recipe,
        context.task,
        context.train,
        groups,
        queries,
        context.measure,
        jobs=jobs,
        cache=cache,
        progress=progress,
    )
    return compare(prediction, retrained, groups, bootstrap=bootstrap)


def _query_index(index: int, q: int) -> int:
    if not -q <= index < q:
        raise ShapeError(
            message(
                f"The query must be one of the {q} scored.",
                f"query={index}.",
                "an index into the full data set where only some queries were scored.",
                f"use an index in 0…{q - 1}.",
            )
        )
    return index % q
