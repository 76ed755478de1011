"""Wrong labels: does a ranking put the mislabeled training examples first?

    AUROC              P(mislabeled ranked above clean) + ½ P(equal)          Mann & Whitney (1947)
    average precision  Σ_k (R_k − R_{k−1}) P_k over the thresholds k of the ranking
    recall at a budget share of the mislabeled rows among the first k = round(budget · n)

A ranking is one number per training example, the largest inspected first: self-influence (Koh &
Liang 2017, §5.4), the loss, or the score of another tool. A random ranking gets ½, about the share
of mislabeled rows, and the budget. Rows with equal numbers have no order: AUROC and recall are the
mean over their orders, and average precision takes them at one threshold, as scikit-learn does.

Intervals draw rows with replacement. The labels must be known to be wrong, which in practice means
that somebody made them so: real errors are harder than random ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight.errors import DataError, DtypeError, NonFinite, ShapeError, SpecError
from upweight.evaluation import inspection
from upweight.evaluation.bootstrap import Bootstrap, Estimate, estimate
from upweight.evaluation.inspection import Levels


def auroc(
    ranking: Float[Tensor, " n"],
    positive: Bool[Tensor, " n"],
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Area under the ROC curve, U / (P N) with U of Mann & Whitney (1947); ties count one half.

    Args:
        ranking: The larger, the sooner inspected.
        positive: Whether each row is mislabeled.
        bootstrap: How the interval is made.

    Raises:
        ShapeError, DtypeError: The two are not `[n]`, or the mask is not boolean.
        NonFinite: The ranking has NaN or infinity.
        DataError: All rows are positive, or none.
    """
    return _estimate(inspection.area, ranking, positive, bootstrap)


def average_precision(
    ranking: Float[Tensor, " n"],
    positive: Bool[Tensor, " n"],
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Σ_k (R_k − R_{k−1}) P_k, with recall R and precision P at each value. As `auroc`."""
    return _estimate(inspection.precision, ranking, positive, bootstrap)


def recall_at_budget(
    ranking: Float[Tensor, " n"],
    positive: Bool[Tensor, " n"],
    budget: float,
    bootstrap: Bootstrap = Bootstrap(),
) -> Estimate:
    """Share of the positive rows among the first round(budget · n). As `auroc`.

    Raises:
        SpecError: The budget is not a share in (0, 1], or not even one row.
        UpweightError: As `auroc`.
    """
    k = _inspected(budget, len(checked(ranking, positive)[0]))
    return _estimate(lambda f: inspection.hits(f, k) / f.positives, ranking, positive, bootstrap)


def recall_curve(
    ranking: Float[Tensor, " n"], positive: Bool[Tensor, " n"]
) -> Float[Tensor, " n+1"]:
    """Share of the positive rows among the first 0, 1, …, n. As `auroc`."""
    values, mask = checked(ranking, positive)
    found = inspection.levels(values, mask, torch.ones(1, len(mask), dtype=torch.float64))
    gain = (found.positive / found.held)[0].repeat_interleave(found.held[0].long())
    return torch.cat([gain.new_zeros(1), gain.cumsum(dim=0)]) / mask.sum()


@dataclass(frozen=True, eq=False)
class Detection:
    """Rankings side by side, in the same resamples.

    Args:
        n: Training examples.
        positives: How many are mislabeled.
        inspected: Rows inspected for `recall`.
        auroc, average_precision, recall: Of each ranking, by name.
        level: Of the intervals.
    """

    n: int
    positives: int
    inspected: int
    auroc: Mapping[str, Estimate]
    average_precision: Mapping[str, Estimate]
    recall: Mapping[str, Estimate]
    level: float

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON would hold them, `[value, low, high]` each."""
        columns = {
            title: {name: list(astuple(e)) for name, e in getattr(self, title).items()}
            for title in ("auroc", "average_precision", "recall")
        }
        about = {k: getattr(self, k) for k in ("n", "positives", "inspected", "level")}
        return {**about, **columns}

    def __str__(self) -> str:
        rows = [["ranking", "AUROC", "average precision", f"recall in {self.inspected} rows"]]
        for name in self.auroc:
            found = (self.auroc[name], self.average_precision[name], self.recall[name])
            rows.append([name, *map(str, found)])
        width = max(len(row[0]) for row in rows)
        lines = [f"{self.positives} of {self.n} rows are positive ({self.level:.0%} intervals)"]
        for name, *cells in rows:
            lines.append(f"  {name:<{width}}" + "".join(f"  {c:<25}" for c in cells).rstrip())
        return "\n".join(lines)


def mislabel_detection(
    rankings: Mapping[str, Float[Tensor, " n"]],
    mislabeled: Bool[Tensor, " n"],
    budget: float = 0.1,
    *,
    bootstrap: Bootstrap = Bootstrap(),
) -> Detection:
    """Compare rankings by how soon they show the mislabeled rows.

    Raises:
        ShapeError: There is no ranking.
        UpweightError: As `auroc` and `recall_at_budget`.

    Cost: resamples × n numbers, three times per ranking; for 60 000 rows about half a minute each.

    Example:
        >>> print(mislabel_detection({"self-influence": s, "loss": losses}, mislabeled))
    """
    if not rankings:
        raise ShapeError(
            "A comparison needs at least one ranking.",
            "an empty mapping.",
            "names filtered away.",
            'pass {"loss": losses}.',
        )
    for ranking in rankings.values():  # before any of them takes its time
        checked(ranking, mislabeled)
    inspected = _inspected(budget, len(mislabeled))
    ranked, mask = rankings.items(), mislabeled
    return Detection(
        n=len(mask),
        positives=int(mask.sum()),
        inspected=inspected,
        auroc={name: auroc(r, mask, bootstrap) for name, r in ranked},
        average_precision={name: average_precision(r, mask, bootstrap) for name, r in ranked},
        recall={name: recall_at_budget(r, mask, budget, bootstrap) for name, r in ranked},
        level=bootstrap.level,
    )


def _inspected(budget: float, n: int) -> int:
    k = round(budget * n) if 0 < budget <= 1 else 0
    if k == 0:
        raise SpecError(
            "A budget is the share of rows inspected, in (0, 1], and at least one row.",
            f"budget={budget} of {n} rows.",
            "a number of rows, or a percentage.",
            "use budget=0.1 for a tenth of the rows.",
        )
    return k


def _estimate(
    statistic: Callable[[Levels], Float[Tensor, " r"]],
    ranking: Tensor,
    positive: Tensor,
    bootstrap: Bootstrap,
) -> Estimate:
    values, mask = checked(ranking, positive)
    return estimate(
        lambda counts: statistic(inspection.levels(values, mask, counts)), [len(values)], bootstrap
    )


def checked(ranking: Tensor, positive: Tensor) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """A ranking and a mask that fit each other, or the errors of `auroc`."""
    values, mask = ranking.detach().cpu().double(), positive.detach().cpu()
    if mask.dtype != torch.bool:
        raise DtypeError(
            "Which rows are positive is a boolean mask.",
            f"{mask.dtype} of shape {tuple(mask.shape)}.",
            "indices in place of a mask, or a mask of 0 and 1.",
            "use mask = torch.zeros(n, dtype=torch.bool); mask[indices] = True.",
        )
    if values.ndim != 1 or values.shape != mask.shape:
        raise ShapeError(
            "A ranking and a mask have one entry per row: [n].",
            f"ranking {tuple(values.shape)}, mask {tuple(mask.shape)}.",
            "scores [q, n] of queries, or the labels of another split.",
            "pass one number per training example, such as self-influence.",
        )
    require_finite(values)
    if not 0 < int(mask.sum()) < len(mask):
        raise DataError(
            "Finding rows needs some that are positive and some that are not.",
            f"{int(mask.sum())} of {len(mask)} positive.",
            "a mask of another split, or of correct labels negated.",
            "check how the mask was made.",
        )
    return values, mask


def require_finite(values: Tensor) -> None:
    """Refuse a ranking by NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise NonFinite(
            "A ranking needs finite values.",
            f"{int((~values.isfinite()).sum())} of {values.numel()} are not.",
            "a loss of a probability of zero, gradients that overflow, or a model that diverged.",
            "say where those rows belong: give them a number.",
        )
