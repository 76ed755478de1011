"""Is S right? Scores against really retraining.

    predicted   m_q(w) − m_q(1) ≈ Σᵢ S[q, i] (wᵢ − 1)          removal, wᵢ = 0:  −S[q, i]
    actual      m_q(𝒜(w)) − m_q(𝒜(1))                           𝒜: the recipe that trained the model

`retrain.py` makes the actual side, and is the only expensive file: many models, cached, resumable.
`weights.py` says which w. `loo.py` compares removals with their predictions, and `metrics.py` says
how well they agree, with confidence intervals.
"""

from upweight.evaluation.loo import LOO, compare, leave_one_out, loo, predicted_removals
from upweight.evaluation.metrics import Bootstrap, Estimate, pearson, slope, spearman
from upweight.evaluation.retrain import Retrained, retrain
from upweight.evaluation.weights import removal_weights

__all__ = [
    "LOO",
    "Bootstrap",
    "Estimate",
    "Retrained",
    "compare",
    "leave_one_out",
    "loo",
    "pearson",
    "predicted_removals",
    "removal_weights",
    "retrain",
    "slope",
    "spearman",
]
