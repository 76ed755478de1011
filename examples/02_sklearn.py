"""scikit-learn: which patients made the classifier say that, and is it true?

A logistic regression on the breast-cancer data of Wisconsin. For the test patient it is least sure
of, the training patients that matter most; then the proof: each of them is really left out, the
classifier fitted again by scikit-learn, and the change of the test loss set beside the predicted.
"""

from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw
import upweight.adapters.sklearn as sk

X, y = load_breast_cancer(return_X_y=True, as_frame=True)
labels = y.map({0: "malignant", 1: "benign"})
X, X_test, y, y_test = train_test_split(X, labels, test_size=100, random_state=0)

clf = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8)).fit(X, y)
print(f"{len(X)} patients; test accuracy {clf.score(X_test, y_test):.2f}")

task, train = sk.task(clf, X, y)
fitted = uw.Influence(solver=uw.solvers.Cholesky()).fit(task, train)
for note in train.notes:
    print(f"note: {note}")
print(f"gradient norm {fitted.stationarity['gradient_norm']:.1e}")

unsure = clf.decision_function(X_test)
hardest = abs(unsure).argmin()
query = sk.data(clf, X_test[hardest : hardest + 1], y_test[hardest : hardest + 1])
effects = fitted.removal(query)

order = effects.values[0].abs().argsort(descending=True)[:30].tolist()
print(f"\nthe test patient is {y_test.iloc[hardest]}; leaving out one of")
for i in order[:5]:
    change = float(effects.values[0, i])
    print(f"  patient {X.index[i]:3d} ({y.iloc[i]}) changes its loss by {change:+.4f}")

print("\nand really leaving out each of the 30 that matter most:")
found = uw.evaluation.loo(effects, sk.recipe(clf), examples=order)
print(found)
assert found.pearson.value > 0.99
