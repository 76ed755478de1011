"""Trees: any model with `fit` and `predict` gets an answer, by fitting it again.

Gradient boosting on the breast-cancer data of Wisconsin, with 15 labels turned. Which rows are
flagged by models that did not see them, and how many of those are wrong? Which training patients
made the model say that of a test patient, and is it so when they are left out? At last a forest on
the diabetes data: its prediction as a sum over the patients that share its leaves.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestRegressor
from sklearn.model_selection import train_test_split

import upweight as uw
import upweight.adapters.sklearn as sk
from upweight.applications.debugging import flagged_labels

X, y = load_breast_cancer(return_X_y=True, as_frame=True)
names = y.map({0: "malignant", 1: "benign"})
X, X_test, y, y_test = train_test_split(X, names, train_size=300, random_state=0)
turned = np.random.default_rng(0).choice(len(X), 15, replace=False)
given = y.copy()
given.iloc[turned] = given.iloc[turned].map({"malignant": "benign", "benign": "malignant"})

booster = HistGradientBoostingClassifier(max_iter=15, max_leaf_nodes=8)
booster.fit(X, given)
found = flagged_labels(booster, (X, given))
right = set(found.flagged) & set(turned.tolist())
print(found.verdict)
print(f"{len(right)} of the {len(found.flagged)} flagged are among the {len(turned)} turned")
print(found.frame().head(5))
assert len(right) > len(found.flagged) / 2

unsure = np.abs(booster.predict_proba(X_test)[:, 0] - 0.5).argmin()
query = (X_test.iloc[[unsure]], y_test.iloc[[unsure]])
scores = uw.attribute(booster, (X, given), query, method=uw.SubsampledInfluence(150))
print(f"\nthe test patient is {y_test.iloc[unsure]}; what is measured is 1 − p of that")
top = scores.top(3)
for rows, word in ((top.raises, "raises"), (top.lowers, "lowers")):
    for i in rows:
        effect, error = scores.values[0, i], scores.error[0, i]
        print(f"  patient {X.index[i]:3d} ({given.iloc[i]}) {word} it: {effect:+.3f} ± {error:.3f}")
print(scores.provenance.notes[-1])

rows, targets = load_diabetes(return_X_y=True, as_frame=True)
forest = RandomForestRegressor(50, min_samples_leaf=5, random_state=0).fit(rows, targets)
W = sk.leaf_weights(forest, rows, targets, rows[:1])[0].numpy()
print(f"\nthe forest predicts {forest.predict(rows[:1])[0]:.1f} = Σ W y = {W @ targets:.1f}")
print(
    f"of {(W > 0).sum()} patients; the ten nearest hold {np.sort(W)[-10:].sum():.0%} of the weight"
)
assert abs(W @ targets - forest.predict(rows[:1])[0]) < 1e-9
