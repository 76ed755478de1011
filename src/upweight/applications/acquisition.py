"""Which examples of an unlabelled pool to label next, and does it pay?

`rank` orders a pool by one fitted model, before anyone labels; `curve` buys the labels of a pool
that has them, fits again after every batch, and shows what each way of choosing gained at the same
number of labels. Gudovskiy, Hodgkinson, Yamaguchi & Tsukizawa (2020).
"""

from upweight.applications.acquired import STRATEGIES, Acquired, curve
from upweight.applications.pool_ranking import Ranking, rank

__all__ = ["STRATEGIES", "Acquired", "Ranking", "curve", "rank"]
