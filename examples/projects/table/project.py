"""Patients and a logistic regression of scikit-learn, by the command line alone.

    upweight attribute project.py:task --train project.py:train --queries project.py:test \
        --method "Influence(Hessian())" --top 3 --show project.py:shown --out run
    upweight evaluate run --recipe project.py:recipe --lds 30
    upweight report run

Breast cancer in Wisconsin, as bundled with scikit-learn (pip install 'upweight[sklearn]'): which
patients of the training set decide what the classifier says of another patient?
"""

from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight.adapters.sklearn as sk

X, y = load_breast_cancer(return_X_y=True, as_frame=True)
X, X_test, y, y_test = train_test_split(X, y, test_size=40, random_state=0)
clf = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8)).fit(X, y)

task, train = sk.task(clf, X, y)
test = sk.data(clf, X_test, y_test)
recipe = sk.recipe(clf)
shown = {
    "names": ["malignant", "benign"],
    "features": list(X.columns),
    "train_images": X.to_numpy(),  # the rows in their own units, not scaled as the model sees them
    "query_images": X_test.to_numpy(),
}
