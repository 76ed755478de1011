"""Is S right? Scores against really retraining.

    predicted   m_q(w) − m_q(1) ≈ Σᵢ S[q, i] (wᵢ − 1)          removal, wᵢ = 0:  −S[q, i]
    actual      m_q(𝒜(w)) − m_q(𝒜(1))                           𝒜: the recipe that trained the model

`upweight.training.retrain` makes the actual side, the only expensive one: many models, cached and
resumable. `upweight.training.weights` and `groups.py` say which w, `prediction.py` what scores
predict for it, `seeds.py` puts several seeds together.

What is asked of the two sides, each number with a confidence interval (`bootstrap.py`):

    loo.py             does removing an example, or a group, do what was predicted?
    lds.py             are models trained on random subsets ordered as predicted?
    removal_curve.py   how far does m move as more of the top of a ranking is removed?
    brittleness.py     how few removals flip a prediction?
    mislabel.py        are known wrong labels ranked first?      (no retraining)
    retrieval.py       is what is ranked first for a query akin to it?     (no retraining)
    tail_patch.py      does one more step on what is ranked first help?    (no retraining)
"""

from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.evaluation.brittleness import Brittleness, brittleness
from upweight.evaluation.check import Check, check
from upweight.evaluation.gaps import Gap, Gaps, gaps
from upweight.evaluation.groups import (
    class_groups,
    influential_groups,
    random_groups,
    removal_order,
)
from upweight.evaluation.lds import LDS, lds
from upweight.evaluation.loo import LOO, compare, leave_one_out, loo
from upweight.evaluation.metrics import (
    kendall,
    mean_kendall,
    mean_spearman,
    pearson,
    slope,
    slope_within,
    spearman,
)
from upweight.evaluation.mislabel import (
    Detection,
    auroc,
    average_precision,
    mislabel_detection,
    recall_at_budget,
    recall_curve,
)
from upweight.evaluation.prediction import predicted_changes, predicted_removals
from upweight.evaluation.removal_curve import (
    RemovalCurve,
    loss_order,
    random_order,
    ranked_removal_weights,
    removal_curve,
)
from upweight.evaluation.retrieval import Retrieval, class_retrieval, poison_retrieval
from upweight.evaluation.tail_patch import TailPatch, tail_patch

__all__ = [
    "LDS",
    "LOO",
    "Bootstrap",
    "Brittleness",
    "Check",
    "Detection",
    "Estimate",
    "Gap",
    "Gaps",
    "RemovalCurve",
    "Retrieval",
    "TailPatch",
    "auroc",
    "average_precision",
    "brittleness",
    "check",
    "class_groups",
    "class_retrieval",
    "compare",
    "gaps",
    "influential_groups",
    "kendall",
    "lds",
    "leave_one_out",
    "loo",
    "loss_order",
    "mean_kendall",
    "mean_spearman",
    "mislabel_detection",
    "pearson",
    "poison_retrieval",
    "predicted_changes",
    "predicted_removals",
    "random_groups",
    "random_order",
    "ranked_removal_weights",
    "recall_at_budget",
    "recall_curve",
    "removal_curve",
    "removal_order",
    "slope",
    "slope_within",
    "spearman",
    "tail_patch",
]
