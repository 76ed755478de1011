"""Ten folds of the digits data: is a removal faster than a refit, and how near is it?

    python benchmarks/folds.py

Softmax regression, n = 1797, 10 classes, p = 650 with the intercepts, at its minimum. Each fold is
taken out by one Newton step (`removal_step`, `removal`) and by minimizing J without it: from θ̂ by
`Newton` for all folds together, and by `LogisticRegression.fit` for each by itself.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import upweight as uw
import upweight.adapters.sklearn as sk
from upweight.training.newton import Newton

FOLDS, C = 10, 1.0


def measured(C: float = C) -> dict[str, float]:
    """Seconds of each way for all folds, and ‖Δθ − refit‖ / ‖refit‖ of the worst fold."""
    X, y = load_digits(return_X_y=True)
    X = X / 16
    estimator = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(X, y)
    task, train = sk.task(estimator, X, y)
    n = len(train)
    folds = [list(range(k, n, FOLDS)) for k in range(FOLDS)]
    found: dict[str, float] = {}

    def ask(name: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = function()
        found[name] = time.perf_counter() - started
        return result

    fitted = ask("fit", lambda: uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(task, train))
    steps = ask("removal_step", lambda: [fitted.removal_step(fold) for fold in folds])
    ask("removal", lambda: fitted.removal(train.subset(range(100)), groups=folds))
    plugin = ask(
        "removal, plugin",
        lambda: fitted.removal(train.subset(range(100)), groups=folds, evaluate="plugin"),
    )

    def refits() -> torch.Tensor:
        weights = task.theta().new_ones(FOLDS, n)
        for k, fold in enumerate(folds):
            weights[k, fold] = 0.0
        return Newton().prepare(task, train)(weights).theta

    theta = ask("Newton refit", refits)

    def scikit(tol: float) -> None:
        for fold in folds:
            kept = [i for i in range(n) if i % FOLDS != fold[0]]
            LogisticRegression(C=C, tol=tol, max_iter=10_000).fit(X[kept], y[kept])

    ask("LogisticRegression, tol=1e-4", lambda: scikit(1e-4))
    ask("LogisticRegression, tol=1e-10", lambda: scikit(1e-10))
    moved = theta - task.theta()
    step = torch.stack([task.layout.flatten(s) for s in steps])
    found["error of the step"] = float(((step - moved).norm(dim=1) / moved.norm(dim=1)).max())
    some = task.to_device(train.batch(0, 100))
    with torch.no_grad():
        before = task.losses(task.theta(), some)
        change = torch.stack([task.losses(t, some) - before for t in theta], dim=1)
    found["error of the plug-in"] = float((plugin.values - change).norm() / change.norm())
    return found


def main() -> None:
    """Print the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measured()
    for name, value in found.items():
        unit = "" if name.startswith("error") else " s"
        print(f"{name:32} {value:8.3f}{unit}")


if __name__ == "__main__":
    main()
