"""Propose labels, predict what correcting them gains, correct them, and fit again to see.

Handwritten digits of scikit-learn, of which a sixth are mistaken for the next digit, as a tired
annotator might. Validation rows predict how many of the proposals to trust; test rows, which chose
nothing, say what came of it.
"""

import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import upweight as uw

X, y = load_digits(return_X_y=True)
draw = np.random.default_rng(0)
order = draw.permutation(len(y))
X, y = X[order] / 16, y[order]
train, validation, test = (slice(0, 900), slice(900, 1200), slice(1200, None))
labels = y[train].copy()
wrong = draw.permutation(900)[:150]
labels[wrong] = (labels[wrong] + 1) % 10

model = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(X[train], labels)
found = uw.applications.debugging.suspects(
    model, (X[train], labels), (X[validation], y[validation]), by="label"
)
print(found)

# As many of the proposals as the validation loss is predicted to gain from, all at once.
path = found.predicted
with warnings.catch_warnings():
    warnings.simplefilter("ignore", uw.errors.AssumptionWarning)  # the refit is what counts
    unseen = found.apply(found.proposed(path.counts[path.best]), (X[test], y[test]))
print(unseen)

# The same number of rows looked at by someone who knows the digits.
looked_at = found.order[: path.counts[path.best]].tolist()
seen = found.apply({i: y[train][i] for i in looked_at}, (X[test], y[test]))
print(seen)

clean = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(X[train], y[train])
lost = clean.score(X[test], y[test]) - seen.before[1]
for name, result in (("as proposed", unseen), ("by a person", seen)):
    back = (result.after[1] - result.before[1]) / lost
    print(f"of the accuracy lost to wrong labels, corrected {name}: {back:.0%} back")
assert seen.after[1] - seen.before[1] > 0.8 * lost
