"""Fairness: a model of who needs a doctor, learned from who could afford one.

The RAND health insurance experiment: adults and children, and whether each saw a physician in a
year. Some were put on a plan with a deductible of their own, went less often for the same need, and
a model of visits learns that. Which training rows teach it? What does undoing it cost? Every claim
is refitted by scikit-learn, chosen on one third of the data and reported on another.
"""

import numpy as np
import statsmodels.api as sm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from upweight.applications import fairness

data = sm.datasets.randhie.load_pandas().data.sample(12000, random_state=0)
plan = np.where(data.idp == 1, "deductible", "other")
y = (data.mdvis >= 2).to_numpy(int)
X = data.drop(columns=["mdvis", "idp"])  # the plan's own column is no feature; others tell it
train, choose, test = np.arange(4000), np.arange(4000, 8000), np.arange(8000, 12000)

clf = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10))
clf.fit(X.iloc[train], y[train])
before = fairness.hard_gap("equal_opportunity", plan[test], clf.predict(X.iloc[test]), y[test])
print(f"of those who did need a doctor, the model finds fewer on the deductible plan: {before}")

gap = fairness.gap("equal_opportunity", plan[choose])
validation = (X.iloc[choose], y[choose])
causes = fairness.causes(clf, validation, gap, train=(X.iloc[train], y[train]))
print(f"\n{causes.verdict}")
kind = [f"{p}, {'visited' if v else 'did not'}" for p, v in zip(plan[train], y[train], strict=True)]
print(f"\n{causes.by(kind, 'plan and visits')}")

found = fairness.repair(
    clf,
    validation,
    gap,
    train=(X.iloc[train], y[train]),
    train_groups=plan[train],
    test=(X.iloc[test], y[test]),
    test_groups=plan[test],
)
print(f"\n{found}")
shown = ["share", "moved", "predicted", "actual", "validation_gap", "test_gap", "accuracy"]
print(f"\n{found.frame()[shown].round(4).to_string()}\n\n{found.who().round(1).to_string()}")
print(f"\npredicted against refitted along the path: r = {found.correlation:.4f}")
assert found.correlation > 0.95
