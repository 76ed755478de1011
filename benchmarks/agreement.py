"""How far scores are from the truth, in numbers that say different things."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def agreement(scores: Array, truth: Array) -> dict[str, float]:
    """Compare S with the truth T, both `[q, n]`.

    max_relative_error: the largest |S − T| of a query, over that query's largest |T|; the worst
        query. (Over |T| itself it would be ruled by scores that are zero.)
    frobenius_relative_error: ‖S − T‖ / ‖T‖.
    pearson: over all q·n pairs. One query with large scores can carry it, so also
    pearson_per_query_min, pearson_per_query_median.
    slope: ⟨S, T⟩ / ⟨T, T⟩; 1 when the scale is right.
    """
    if scores.shape != truth.shape:
        shapes = f"scores {scores.shape} and truth {truth.shape} differ in shape."
        raise ValueError(shapes)
    if not np.isfinite(scores).all():
        return {"not_finite": float((~np.isfinite(scores)).sum())}
    error = np.abs(scores - truth).max(axis=1) / np.abs(truth).max(axis=1)
    per_query = [_pearson(s, t) for s, t in zip(scores, truth, strict=True)]
    return {
        "max_relative_error": float(error.max()),
        "frobenius_relative_error": float(np.linalg.norm(scores - truth) / np.linalg.norm(truth)),
        "pearson": _pearson(scores.ravel(), truth.ravel()),
        "pearson_per_query_min": float(min(per_query)),
        "pearson_per_query_median": float(np.median(per_query)),
        "slope": float((scores * truth).sum() / (truth**2).sum()),
    }


def _pearson(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
