"""Which labels are wrong by the probabilities of models that did not see them, with a cut-off.

    t_c = mean of p(c | xᵢ) over rows labelled c
    ŷᵢ  = argmax_c p(c | xᵢ) among the classes with p(c | xᵢ) ≥ t_c

A row with ŷᵢ ≠ yᵢ is flagged, and ŷᵢ is proposed: the off-diagonal of the confident joint of
Northcutt, Jiang & Chuang (2021, Eq. 1), who call it confident learning. No threshold is chosen by
hand, and a class that the model is generally unsure of asks for less.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.errors import SpecError
from upweight.plot import axes


@dataclass(frozen=True, eq=False)
class FlaggedLabels(Outcome):
    """Training rows in the order in which to look at their labels, with a cut-off.

    Args:
        probabilities: p(c | xᵢ) by models that did not see row i.
        labels: The class of each row, as its place in `classes`.
        classes: As the user knows them.
        notes: What to know before the numbers.
        thresholds: t_c; NaN of a class without rows.
        proposals: ŷᵢ; the label itself where no other class is above its threshold.
        suspicion: Of every row max_{c ≠ y} p(c | xᵢ) − p(y | xᵢ), from −1 to 1.
        order: Rows: the flagged ones first, each part by falling suspicion.
    """

    probabilities: Float[Tensor, "n c"]
    labels: Int[Tensor, " n"]
    classes: tuple[Any, ...]
    notes: tuple[str, ...] = ()
    thresholds: Float[Tensor, " c"] = field(init=False)
    proposals: Int[Tensor, " n"] = field(init=False)
    suspicion: Float[Tensor, " n"] = field(init=False)
    order: Int[Tensor, " n"] = field(init=False)
    actual: None = None

    def __post_init__(self) -> None:
        p, y = self.probabilities, self.labels
        if p.ndim != 2 or p.shape[1] < 2 or len(y) != len(p) or not bool(p.isfinite().all()):
            raise SpecError(
                "Labels are judged by finite probabilities [n, c] of two classes or more.",
                f"probabilities {tuple(p.shape)} for {len(y)} labels.",
                "the probability of one class alone, NaN, or labels of other rows.",
                "sk.out_of_fold(estimator, (X, y)), which gives both.",
            )
        member = torch.nn.functional.one_hot(y, p.shape[1]).to(p)
        thresholds = (p * member).sum(dim=0) / member.sum(dim=0)  # NaN is never reached
        above = torch.where(p >= thresholds, p, -torch.inf)
        best, found = above.max(dim=1)
        given = p.gather(1, y[:, None])[:, 0]
        other = p.scatter(1, y[:, None], -torch.inf).max(dim=1).values
        proposals = torch.where(best.isfinite(), found, y)
        suspicion = other - given
        # Stable, so that rows that are alike keep the order of the data.
        falling = suspicion.argsort(descending=True, stable=True)
        flagged = (proposals != y)[falling]
        order = torch.cat([falling[flagged], falling[~flagged]])
        for name, value in (
            ("thresholds", thresholds),
            ("proposals", proposals),
            ("suspicion", suspicion),
            ("order", order),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def predicted(self) -> Bool[Tensor, " n"]:  # type: ignore[override]
        """Whether each row is flagged."""
        return self.proposals != self.labels

    @property
    def flagged(self) -> tuple[int, ...]:
        """The flagged rows, the most suspicious first."""
        return tuple(self.order[: int(self.predicted.sum())].tolist())

    def proposed(self) -> dict[int, Any]:
        """The proposed label of each flagged row: a guess, to be looked at."""
        return {i: self.classes[int(self.proposals[i])] for i in self.flagged}

    title = "Which labels to look at first"

    @property
    def verdict(self) -> str:
        count, n = len(self.flagged), len(self)
        return (
            f"Of {n} rows {count} ({count / n:.1%}) are flagged: models that did not see them are "
            "surer of another class than of a typical row of that class; which of them are wrong "
            "is not known."
        )

    def frame(self) -> "DataFrame":
        """A row per training row in order: flagged, its label, the proposal, p of both, suspicion.

        The index is the place of the row in the training data.
        """
        order = self.order.tolist()
        p = self.probabilities
        columns = {
            "flagged": self.predicted[self.order].tolist(),
            "label": [self.classes[int(self.labels[i])] for i in order],
            "proposed": [self.classes[int(self.proposals[i])] for i in order],
            "p_label": p.gather(1, self.labels[:, None])[self.order, 0].tolist(),
            "p_proposed": p.gather(1, self.proposals[:, None])[self.order, 0].tolist(),
            "suspicion": self.suspicion[self.order].tolist(),
        }
        return as_table(columns, order, "row")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The suspicion of the rows in order, and the cut-off."""
        ax = axes(ax)
        ax.plot(self.suspicion[self.order].tolist())
        ax.axvline(len(self.flagged) - 0.5, color="0.6", linewidth=0.8)
        ax.set(xlabel="rows, flagged first", ylabel="p(another class) − p(label)")
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "rows": len(self),
            "flagged": self.flagged,
            "proposed": list(self.proposed().values()),
        }


def flagged_labels(estimator: Any, train: Any, folds: int = 5, seed: int = 0) -> FlaggedLabels:
    """Rows whose labels models that did not see them deny: for any classifier with probabilities.

    Args:
        estimator: A fitted scikit-learn classifier or Pipeline with `predict_proba`.
        train: (X, y) or (X, y, sample_weight) as given to its `fit`.
        folds: Of the cross-validation.
        seed: Of its draw.

    Raises:
        UnsupportedModel: It has no probabilities.
        DataError: A class has fewer rows than there are folds.
        UpweightError: From the adapter.

    Exact when: probabilities are right on average and errors do not depend on x; then the flagged
    rows are the wrong ones (Northcutt et al. 2021, Theorem 1, with their conditions). Known
    failure: rows that are hard, which no model gets right, look as wrong ones do.
    Cost: a fit for each fold.

    Example:
        >>> flagged_labels(clf, (X, y)).frame().head()
    """
    import upweight.adapters.sklearn as sk

    found = sk.out_of_fold(estimator, train, folds, seed)
    return FlaggedLabels(
        found.probabilities,
        found.labels,
        found.classes,
        (f"probabilities by {folds} folds, each of a fit without it",),
    )
