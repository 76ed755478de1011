"""Is S right? Scores against really retraining.

    predicted   m_q(w) − m_q(1) ≈ Σᵢ S[q, i] (wᵢ − 1)          removal, wᵢ = 0:  −S[q, i]
    actual      m_q(𝒜(w)) − m_q(𝒜(1))                           𝒜: the recipe that trained the model

`retrain.py` makes the actual side, the only expensive one: many models, cached and resumable
(`bench.py` runs them, `identity.py` says what they depend on). `weights.py` says which w,
`prediction.py` what scores predict for it. `loo.py` holds one against the other, and `metrics.py`
says how well they agree, with confidence intervals (`bootstrap.py`).
"""

from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.evaluation.loo import LOO, compare, leave_one_out, loo
from upweight.evaluation.metrics import (
    kendall,
    mean_kendall,
    mean_spearman,
    pearson,
    slope,
    spearman,
)
from upweight.evaluation.prediction import predicted_removals
from upweight.evaluation.retrain import Retrained, retrain
from upweight.evaluation.weights import removal_weights

__all__ = [
    "LOO",
    "Bootstrap",
    "Estimate",
    "Retrained",
    "compare",
    "kendall",
    "leave_one_out",
    "loo",
    "mean_kendall",
    "mean_spearman",
    "pearson",
    "predicted_removals",
    "removal_weights",
    "retrain",
    "slope",
    "spearman",
]
