"""How well the products of an index agree with the method's own scores."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.evaluation.metrics import rank_correlation

UNCORRELATED = "it needs several examples whose scores differ"


@dataclass(frozen=True)
class Verification:
    """Means over the queries, each over the same examples. Kept with the index, as JSON.

    Args:
        spearman: Rank correlation of the products with the scores; None where there is none, as of
            one example, or of scores that are all alike.
        pearson: Linear correlation; None likewise.
        slope: Σ ŜS / Σ S², of all of them: 1 where the products have the size of the scores.
        recall: Of the k largest |S| of a query, how many are among the k largest |Ŝ|.
        k: That k.
        queries, examples: How many were compared.
        rows: What the index held then.
    """

    spearman: float | None
    pearson: float | None
    slope: float
    recall: float
    k: int
    queries: int
    examples: int
    rows: int

    def __str__(self) -> str:
        if self.spearman is None or self.pearson is None:
            correlated = f"no correlation ({UNCORRELATED})"
        else:
            correlated = f"Spearman {self.spearman:.3f}, Pearson {self.pearson:.3f}"
        return (
            f"products against scores of {self.queries} queries and {self.examples} examples: "
            f"{correlated}, slope {self.slope:.3f}, recall@{self.k} {self.recall:.2f}"
        )


def verification(
    products: Float[Tensor, "q m"], scores: Float[Tensor, "q m"], k: int, rows: int
) -> Verification:
    """Of products Ŝ and scores S.

    A query whose scores or products are all alike has no correlation and is left out.
    """
    x, y = products.double(), scores.double()
    q, m = y.shape
    once, k = torch.ones(1, m, dtype=torch.float64), min(k, m)
    spread = y.amax(dim=1) > y.amin(dim=1)
    ranks = [rank_correlation(a, b, once)[0] for a, b in zip(x[spread], y[spread], strict=True)]
    a, b = (z[spread] - z[spread].mean(dim=1, keepdim=True) for z in (x, y))
    linear = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    best = [z.abs().topk(k, dim=1).indices for z in (x, y)]
    shared = (best[0][:, :, None] == best[1][:, None, :]).sum(dim=(1, 2)) / k
    squares = float(y.square().sum())
    return Verification(
        _mean(ranks),
        _mean(list(linear)),
        float((x * y).sum()) / squares if squares else 0.0,
        float(shared.mean()),
        k,
        q,
        m,
        rows,
    )


def _mean(values: list[Tensor]) -> float | None:
    known = [float(v) for v in values if bool(v.isfinite())]
    return sum(known) / len(known) if known else None
