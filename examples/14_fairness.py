"""Fairness: faithful spouses with children are suspected more often; what does undoing that cost?

Redbook's survey of 1974 (statsmodels `fair`): 6 366 wives, and whether they had an affair. Children
are no feature of the classifier, years of marriage are. Of those who had none it clears fewer who
have children. Which training rows teach it that, and what would another weighting of them cost?
Every claim is refitted by scikit-learn, chosen on one third of the data, reported on another.
"""

import numpy as np
import statsmodels.api as sm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from upweight.applications import fairness

data = sm.datasets.fair.load_pandas().data
y = (data.affairs > 0).to_numpy(int)
group = np.where(data.children > 0, "children", "none")
X = data.drop(columns=["affairs", "children"]).to_numpy()
train, choose, test = np.array_split(np.random.default_rng(0).permutation(len(y)), 3)

clf = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10)).fit(X[train], y[train])
kind = "equal_opportunity"  # of those who had no affair: class 0 is in a person's favour
before = fairness.hard_gap(kind, group[test], clf.predict(X[test]), y[test], positive=0)
print(f"cleared of those who had none: {before}, shares {before.shares}, rows {before.sizes}")

gap = fairness.gap(kind, group[choose], positive=0)
fitted_on = (X[train], y[train])
causes = fairness.causes(clf, (X[choose], y[choose]), gap, train=fitted_on)
print(f"\n{causes.verdict}")
married = np.where(X[train, 2] < 6, "under 6", np.where(X[train, 2] < 13, "6 to 13", "13 and up"))
told = [f"{m}, {'an affair' if v else 'none'}" for m, v in zip(married, y[train], strict=True)]
print(f"\n{causes.by(told, 'years married', refits=2)}")

found = fairness.repair(
    clf,
    (X[choose], y[choose]),
    gap,
    train=fitted_on,
    train_groups=group[train],
    test=(X[test], y[test]),
    test_groups=group[test],
)
print(f"\n{found}")
others = ["feasible", "loss_predicted", "loss_actual", "price", "loss_price"]
shown = found.frame().drop(columns=others)
print(f"\n{shown.round(4).to_string()}\n\n{found.who().round(1).to_string()}")
print(f"\npredicted against refitted along the path: r = {found.correlation:.4f}")
assert found.correlation > 0.95
