"""Δm[s, q] ≈ Σ_k c_k x_k[s, q], c ≥ 0: the weights with which predictions of retrainings combine.

Breiman (1996, "Stacked regressions") found what holds here too: predictions of one thing by several
methods are so alike that least squares gives them large weights of both signs, and c ≥ 0 is what
makes a combination better than its parts.

Each query counts by a scale of its own, the geometric mean of the spread of its outcomes and of its
predictions. The outcomes' alone is far too small in a query that a rare subset moves, if that
subset is not among these; the predictions' alone believes sizes that the scores made up.

Intervals are over K clusters whose errors belong together: the models of a seed, or each model
where there is one seed or each has its own. Delete-one jackknife (Efron & Tibshirani 1993, ch. 11)
and Student's t, with u_k what is predicted of a cluster, Σ ŷ² over its models and queries:

    b exp(±t_ν √v)        v = (1 − 1/K) Σ_k (log b₍ₖ₎ − log b)²        ν = (Σ u)² / Σ u² − 1

b = Σ y ŷ / Σ ŷ² is the size and b₍ₖ₎ that without cluster k. A few clusters often have most of what
is predicted, and then K − 1 is too many for ν (Carter, Schnepel & Steigerwald 2017, "Asymptotic
behavior of a t-test robust to cluster heterogeneity"). Where the mean of all s models is taken out,
(1 − 1/s) (Σ u)² / Σ u² − 1, in whole numbers. The logarithm because b is a factor.
"""

import math
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

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Combination:
    """The coefficients, and how well they predict subsets that they were not fitted to.

    Args:
        coefficients: c, of each prediction.
        intervals: Bounds of each, c ± t_ν √v and 0 or more.
        strength: The ridge penalty.
        explained: 1 − Σ (y − ŷ)² / Σ y² of scaled outcomes, each subset predicted from others.
        size: By how much the coefficients were multiplied so that left-out changes have slope 1.
        size_interval: Its bounds; 0 and infinity where one cluster of models decides the sign.
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
    factor, refitted = _margins(products, squares, grams, rhs, group, whole, STRENGTHS[best])
    coefficients = whole.new_zeros(len(predicted))
    coefficients[used] = whole * size / scale_of_x[used]
    half = torch.zeros_like(coefficients)
    half[used] = refitted / scale_of_x[used]
    return Combination(
        coefficients,
        torch.stack([(coefficients - half).clamp_min(0.0), coefficients + half]),
        STRENGTHS[best],
        1 - losses[best],
        float(size),
        (float(size) / factor, float(size) * factor),
    )


def _margins(
    products: Float[Tensor, " s"],
    squares: Float[Tensor, " s"],
    grams: Float[Tensor, "s k k"],
    rhs: Float[Tensor, "s k"],
    group: Int[Tensor, " s"],
    whole: Float[Tensor, " k"],
    strength: float,
) -> tuple[float, Float[Tensor, " k"]]:
    """exp(t_ν √v) of the size, and t_ν √v of each coefficient times the size.

    Both are infinite where one cluster has all of what is predicted, or decides the sign.
    """
    from upweight.evaluation.bootstrap import student

    several = bool((group > 0).any())
    cluster = group if several else torch.arange(len(group))
    # About a mean of all, a model moves the mean too: s/(s − 1) of its centered products go.
    share = 1.0 if several else len(group) / (len(group) - 1)
    parts = [
        each.new_zeros(int(cluster.max()) + 1, *each.shape[1:]).index_add_(0, cluster, each)
        for each in (products, squares, grams, rhs)
    ]
    effective = float(parts[1].sum().square() / parts[1].square().sum())
    t = student(max(1, int(effective / share - 1)))
    rest = [each.sum(dim=0) - share * each for each in parts]
    sizes = rest[0] / rest[1].clamp_min(0.0)
    if not bool((sizes.isfinite() & (sizes > 0)).all()):
        return math.inf, torch.full_like(whole, math.inf)
    kept = len(group) - share * torch.bincount(cluster)
    refits = torch.stack([
        _coefficients(gram / count, b / count, strength) * factor
        for gram, b, count, factor in zip(*rest[2:], kept, sizes, strict=True)
    ])  # fmt: skip
    size = products.sum() / squares.sum()
    moved = (sizes / size).log(), refits - whole * size
    slack = 1 - 1 / len(sizes)
    of_size, of_each = (t * (slack * change.square().sum(dim=0)).sqrt() for change in moved)
    return float(of_size.exp()), of_each


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


def _nothing(given: str) -> tuple[str, str, str, str]:
    return (
        "Coefficients are fitted to how models of random subsets differ.",
        f"{given}.",
        "too few subsets for the noise of training, or methods that say nothing of this measure.",
        "train more subsets, ask another measure, or use one method by itself.",
    )
