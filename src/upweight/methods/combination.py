"""Δm[s, q] ≈ Σ_k c_k x_k[s, q], c ≥ 0: the weights with which predictions of retrainings combine.

Breiman (1996, "Stacked regressions") found what holds here too: predictions of one thing by several
methods are so alike that least squares gives them large weights of both signs, and c ≥ 0 is what
makes a combination better than its parts.

Each query counts by a scale of its own, the geometric mean of the spread of its outcomes and of its
predictions. The outcomes' alone is far too small in a query that a rare subset moves, if that
subset is not among these; the predictions' alone believes sizes that the scores made up.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.errors import DataError
from upweight.linalg.nonnegative import nonnegative

FOLDS = 10
"""Parts of the subsets, each of which is predicted from the others."""

STRENGTHS = tuple(10.0**k for k in range(-5, 2))
"""Ridge penalties that are tried, in units of the mean square of a prediction."""

RESAMPLES = 200
"""Of the subsets, for the intervals."""

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Combination:
    """The coefficients, and how well they predict subsets that they were not fitted to.

    Args:
        coefficients: c, of each prediction.
        intervals: Bounds of each from resampled subsets.
        strength: The ridge penalty.
        explained: 1 − Σ (y − ŷ)² / Σ y² of scaled outcomes, each subset predicted from others.
        size: By how much the coefficients were multiplied so that left-out changes have slope 1.
        size_interval: Its bounds.
    """

    coefficients: Float[Tensor, " k"]
    intervals: Float[Tensor, "2 k"]
    strength: float
    explained: float
    size: float
    size_interval: tuple[float, float]


def combine(
    predicted: Float[Tensor, "k s q"], measured: Float[Tensor, "s q"], group: Int[Tensor, " s"]
) -> Combination:
    """Fit the coefficients.

    Of predictions and outcomes the mean over the subsets of a group is taken out: models of one
    seed share what the seed does. A ridge penalty draws the coefficients, of predictions scaled to
    mean square 1, towards equal ones; its strength is the one that predicts left-out subsets best.
    Last the size is set so that measured against predicted changes of left-out subsets have slope
    1, in the units of m.

    Args:
        predicted: x_k, Δm of each subset and query by each predictor.
        measured: m of each subset's model and query.
        group: Which subsets share a seed.

    Raises:
        DataError: No outcome varies, or no combination predicts the left-out subsets.
    """
    x, y = (within(each.double(), group) for each in (predicted, measured))
    scale_of_x = x.square().mean(dim=(1, 2)).sqrt()
    used = scale_of_x > 0
    if not bool(used.any()):
        raise DataError(*_nothing("predictions that are all 0 or the same for every subset"))
    z = x[used] / scale_of_x[used][:, None, None]
    spread = (y.square().mean(dim=0) * z.mean(dim=0).square().mean(dim=0)).pow(0.25)
    heard = spread > 0
    if not bool(heard.any()):
        raise DataError(*_nothing("measurements that are the same for every subset"))
    z, y = z[:, :, heard], y[:, heard]
    scaled = z / spread[heard]
    target = y / spread[heard]
    target_scale = target.square().mean()
    grams = torch.einsum("ksq,lsq->skl", scaled, scaled) / target.shape[1]
    rhs = torch.einsum("ksq,sq->sk", scaled, target) / target.shape[1]
    tried = [_left_out(grams, rhs, strength) for strength in STRENGTHS]
    losses = [float(_loss(grams, rhs, c) / target_scale + 1.0) for c in tried]
    best = min(range(len(STRENGTHS)), key=losses.__getitem__)
    outside = torch.einsum("sk,ksq->sq", tried[best], z)
    products, squares = (outside * y).sum(dim=1), outside.square().sum(dim=1)
    if not bool(products.sum() > 0):
        raise DataError(
            *_nothing("predictions of left-out subsets that do not go with the outcomes")
        )
    size = products.sum() / squares.sum()
    whole = _coefficients(grams.mean(dim=0), rhs.mean(dim=0), STRENGTHS[best])
    drawn = [
        (_coefficients(_mean(grams, counts), _mean(rhs, counts), STRENGTHS[best]),
         (counts @ products) / (counts @ squares))
        for counts in _resamples(len(y))
    ]  # fmt: skip
    found = torch.stack([c * factor for c, factor in drawn])
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    coefficients = whole.new_zeros(len(predicted))
    coefficients[used] = whole * size / scale_of_x[used]
    intervals = whole.new_zeros(2, len(predicted))
    intervals[:, used] = found.quantile(ends, dim=0) / scale_of_x[used]
    low, high = torch.stack([factor for _, factor in drawn]).quantile(ends).tolist()
    return Combination(
        coefficients, intervals, STRENGTHS[best], 1 - losses[best], float(size), (low, high)
    )


def within(values: Float[Tensor, "*k s q"], group: Int[Tensor, " s"]) -> Float[Tensor, "*k s q"]:
    """Values about their mean over the subsets of each group."""
    found = values.clone()
    for k in range(int(group.max()) + 1):
        rows = group == k
        found[..., rows, :] -= values[..., rows, :].mean(dim=-2, keepdim=True)
    return found


def _coefficients(
    gram: Float[Tensor, "k k"], rhs: Float[Tensor, " k"], strength: float
) -> Float[Tensor, " k"]:
    """argmin over c ≥ 0 of ½ cᵀGc − bᵀc + strength/2 Σ (c_k − mean c)²."""
    k = len(rhs)
    eye = torch.eye(k, dtype=rhs.dtype)
    # Rounding aside, what is penalized leaves a common multiple of all free.
    penalty = strength * (eye - 1 / k) + 1e-10 * gram.diagonal().mean() * eye
    return nonnegative(gram + penalty, rhs)


def _left_out(
    grams: Float[Tensor, "s k k"], rhs: Float[Tensor, "s k"], strength: float
) -> Float[Tensor, "s k"]:
    """The coefficients for each subset, fitted without its fold."""
    found = torch.zeros_like(rhs)
    for fold in _folds(len(rhs)):
        kept = ~fold
        mean = grams[kept].mean(dim=0), rhs[kept].mean(dim=0)
        found[fold] = _coefficients(*mean, strength)
    return found


def _loss(
    grams: Float[Tensor, "s k k"], rhs: Float[Tensor, "s k"], c: Float[Tensor, "s k"]
) -> Float[Tensor, ""]:
    """Mean of (y − cᵀx)² − y² over subsets and queries."""
    return (torch.einsum("sk,skl,sl->s", c, grams, c) - 2 * (c * rhs).sum(dim=1)).mean()


def _folds(s: int) -> Iterator[Bool[Tensor, " s"]]:
    order = torch.randperm(s, generator=torch.Generator().manual_seed(0))
    for part in order.tensor_split(min(FOLDS, s)):
        fold = torch.zeros(s, dtype=torch.bool)
        fold[part] = True
        yield fold


def _resamples(s: int) -> Iterator[Float[Tensor, " s"]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(RESAMPLES):
        drawn = torch.randint(s, (s,), generator=generator)
        yield torch.bincount(drawn, minlength=s).double()


def _mean(values: Float[Tensor, "s *k"], counts: Float[Tensor, " s"]) -> Float[Tensor, "*k"]:
    return torch.tensordot(counts, values, dims=1) / counts.sum()


def _nothing(given: str) -> tuple[str, str, str, str]:
    return (
        "Coefficients are fitted to how models of random subsets differ.",
        f"{given}.",
        "too few subsets for the noise of training, or methods that say nothing of this measure.",
        "train more subsets, ask another measure, or use one method by itself.",
    )
