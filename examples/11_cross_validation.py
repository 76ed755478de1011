"""Choose a penalty by cross-validation, from one fit per value.

A logistic regression on the breast-cancer data of Wisconsin. Leave-one-out would take 569 fits for
each C. From one fit, approximate leave-one-out chooses what those choose; the infinitesimal
jackknife, which knows nothing of leverage, does not.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import upweight as uw
import upweight.adapters.sklearn as sk
from upweight.applications import cross_validation as cv

X, y = load_breast_cancer(return_X_y=True)
X = StandardScaler().fit_transform(X)
grid = [0.01, 0.1, 1.0, 10.0]

path = cv.path(LogisticRegression(), X, y, {"C": grid}, confirm=20)
print(path)

jackknife, exact = [], []
for C in grid:
    clf = LogisticRegression(C=C, tol=1e-8, max_iter=5000).fit(X, y)
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(*sk.task(clf, X, y))
    moves = -fitted.attribute(fitted.train, uw.Logit(0)).values.diagonal().numpy()
    outputs = clf.decision_function(X) + moves
    jackknife.append(float(np.logaddexp(0, -(2 * y - 1) * outputs).mean()))
    # refit_above=0 really fits without each of them: that is exact leave-one-out.
    exact.append(cv.loo(fitted, recipe=uw.training.Newton(tol=1e-8), refit_above=0).mean)

print("\nC      exact  one fit  infinitesimal jackknife")
for C, *curve in zip(grid, exact, path.mean.tolist(), jackknife, strict=True):
    print(f"{C:<5g}  " + "   ".join(f"{value:.4f}" for value in curve))

best = {"exact": exact, "one fit": path.mean.tolist(), "infinitesimal jackknife": jackknife}
chosen = {name: grid[int(np.argmin(curve))] for name, curve in best.items()}
print("\nchosen C: " + ", ".join(f"{value:g} by {name}" for name, value in chosen.items()))

clf = LogisticRegression(C=1.0, tol=1e-8).fit(X, y)
sparse = LogisticRegression(C=0.1, l1_ratio=1.0, solver="liblinear", tol=1e-10).fit(X, y)
print(cv.difference(cv.loo(clf, (X, y)), cv.loo(sparse, (X, y)), ("ridge", "lasso")).verdict)
assert chosen["exact"] == chosen["one fit"] != chosen["infinitesimal jackknife"]
