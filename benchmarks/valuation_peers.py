"""KNN-Shapley by pyDVL and cleanlab on given features, run by the Python of their environment.

    PEERS/bin/python valuation_peers.py FEATURES.npz OUT.json

For `applied/valuation.py`. FEATURES.npz holds X, y, Xt, yt and k. An environment for them:
`pip install --no-deps pyDVL==0.10.0 cleanlab==2.9.0` beside scikit-learn and what they import. For
cvxpy, which pyDVL loads for other methods, an empty module stands in.
"""

import json
import sys
import time
import types
from importlib.metadata import version

import numpy as np

sys.modules.setdefault("cvxpy", types.ModuleType("cvxpy"))


def pydvl(X, y, Xt, yt, k):
    from pydvl.valuation import Dataset, KNNShapleyValuation
    from sklearn.neighbors import KNeighborsClassifier

    started = time.perf_counter()
    model = KNeighborsClassifier(k, algorithm="brute")
    found = KNNShapleyValuation(model, Dataset(Xt, yt), progress=False, clone_before_fit=True)
    found = found.fit(Dataset(X, y))
    values = (found.values() if callable(found.values) else found.result).sort(key="index").values
    return time.perf_counter() - started, np.asarray(values).tolist()


def cleanlab(X, y, k):
    from cleanlab.data_valuation import data_shapley_knn

    started = time.perf_counter()
    values = data_shapley_knn(y, features=X, metric="euclidean", k=k)
    return time.perf_counter() - started, np.asarray(values).tolist()


def main():
    given, found = np.load(sys.argv[1]), {}
    X, y, Xt, yt, k = (given[name] for name in ("X", "y", "Xt", "yt", "k"))
    for name, run in (
        ("pyDVL", lambda: pydvl(X, y, Xt, yt, int(k))),
        ("cleanlab", lambda: cleanlab(X, y, int(k))),
    ):
        try:
            seconds, values = run()
            found[name] = {"version": version(name), "seconds": seconds, "values": values}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
