"""Retrieval: do the training examples ranked first for a query belong with it?

    same class     share of the first k that are of the query's class          (Hanawa et al. 2021)
    poison         AUROC and recall of known poisoned rows, per query, mean over queries

A proxy: it needs no retraining, and asks whether a ranking is plausible, not whether it is right.
A method that only looks at classes passes the first test. `values[q, i]` is larger the more
training example i speaks for query q: S for `Margin()`, `LogProb()` or `Logit()`, −S for `Loss()`.
Equal values have no order; each measure is its mean over their orders.

Intervals draw queries with replacement and take the training data as given; one query has none,
and its bounds are NaN. `k` is how many examples are retrieved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight.errors import DataError, ShapeError
from upweight.evaluation import inspection
from upweight.evaluation.bootstrap import Bootstrap, Estimate, mean, summarized
from upweight.evaluation.mislabel import checked, require_finite


def class_retrieval(
    values: Float[Tensor, "q n"],
    train_labels: Sequence[int] | Tensor,
    query_labels: Sequence[int] | Tensor,
    k: int,
    *,
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Mean over queries of the share of the first k training examples with the query's label.

    The identical class test, and with labels of subclasses under merged classes the identical
    subclass test, of Hanawa, Yokoi, Hara & Inui (2021, "Evaluation of similarity-based
    explanations"). A random ranking gets the share of the query's label in the training data.

    Raises:
        ShapeError: Sizes disagree, or k is not in 1…n.
        NonFinite: A value is NaN or infinite.
        DataError: No training example has some query's label.
    """
    train, queries = (
        torch.as_tensor(labels).detach().cpu() for labels in (train_labels, query_labels)
    )
    scores = _matrix(values, k)
    if tuple(train.shape) != scores.shape[1:] or tuple(queries.shape) != scores.shape[:1]:
        raise ShapeError(
            "Labels are one per training example, [n], and one per query, [q].",
            f"values {tuple(scores.shape)}, train labels {tuple(train.shape)}, query labels "
            f"{tuple(queries.shape)}.",
            "labels of another split, or one-hot labels.",
            "pass class indices in the order of the data.",
        )
    same = queries[:, None] == train
    absent = (~same.any(dim=1)).nonzero()[:, 0].tolist()
    if absent:
        raise DataError(
            "Every query's label must be among the training examples.",
            f"{len(absent)} of {len(queries)} queries have another: {absent[:5]}.",
            "labels coded differently in the two splits.",
            "leave those queries out.",
        )
    once = torch.ones(1, len(train), dtype=torch.float64)
    found = (inspection.levels(*pair, once) for pair in zip(scores, same, strict=True))
    return mean(torch.cat([inspection.hits(each, k) / k for each in found]), bootstrap)


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How soon known rows come up, mean over queries.

    Args:
        auroc: P(poisoned above clean) + ½ P(equal).
        recall: Share of the poisoned rows among the first k.
        k: Rows inspected.
        queries: Over how many.
        level: Of the intervals.
    """

    auroc: Estimate
    recall: Estimate
    k: int
    queries: int
    level: float

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them; intervals under `intervals`."""
        estimates = {"auroc": self.auroc, "recall": self.recall}
        return summarized(estimates, self.level) | {"k": self.k, "queries": self.queries}

    def __str__(self) -> str:
        return (
            f"retrieval over {self.queries} queries ({self.level:.0%} intervals)\n"
            f"  AUROC             {self.auroc}\n"
            f"  recall in {self.k:<7} {self.recall}"
        )


def poison_retrieval(
    values: Float[Tensor, "q n"],
    poisoned: Bool[Tensor, "..."],
    k: int,
    *,
    bootstrap: Bootstrap = Bootstrap(),
) -> Retrieval:
    """Are the poisoned rows behind a backdoored prediction ranked first for it?

    `values` are of queries that carry the trigger. `poisoned` is one mask `[n]` for all of them,
    or one each `[q, n]`.

    Raises:
        ShapeError: Sizes disagree, or k is not in 1…n.
        DtypeError: The mask is not boolean.
        NonFinite: A value is NaN or infinite.
        DataError: All rows are poisoned for a query, or none.
    """
    scores = _matrix(values, k)
    masks = poisoned.expand(len(scores), -1) if poisoned.ndim == 1 else poisoned
    if masks.shape != scores.shape:
        raise ShapeError(
            "A mask of poisoned rows is [n], or [q, n] with one per query.",
            f"values {tuple(scores.shape)}, mask {tuple(poisoned.shape)}.",
            "a mask of another split.",
            "use one entry per training example, in the order of the data.",
        )
    once = torch.ones(1, scores.shape[1], dtype=torch.float64)
    pairs = zip(scores, masks, strict=True)
    found = [inspection.levels(*checked(row, mask), once) for row, mask in pairs]
    recall = mean(torch.cat([inspection.hits(f, k) / f.positives for f in found]), bootstrap)
    area = mean(torch.cat([inspection.area(f) for f in found]), bootstrap)
    return Retrieval(area, recall, k, len(scores), bootstrap.level)


def _matrix(values: Float[Tensor, "..."], k: int) -> Float[Tensor, "q n"]:
    """Scores of queries, checked, in float64."""
    n = values.shape[-1] if values.ndim else 0
    if values.ndim != 2 or len(values) == 0 or not 0 < k <= n:
        raise ShapeError(
            "Retrieval needs values [q, n], one row per query, and k in 1…n.",
            f"values {tuple(values.shape)}, k={k}.",
            "one query's values as a vector, or more examples asked for than there are.",
            "use scores.values, and a k of 5 or 10.",
        )
    require_finite(values)
    return values.detach().cpu().double()
