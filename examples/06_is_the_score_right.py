"""Ground truth on a cluster: does a network's ranking of its training digits survive retraining?

A small network is trained on half of the bundled digits; forty times it is trained again on a
random half of those, by the workers of a Dask cluster (here on this machine; `Client("tcp://…")`
would use another). The linear datamodeling score says how well EK-FAC influence orders them.
"""

from dataclasses import replace

import joblib
import torch
from dask.distributed import Client, LocalCluster
from torch import nn

import upweight as uw
from upweight.evaluation import lds
from upweight.training import retrain, subset_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def main() -> None:
    digits = uw.data.mnist_subset()
    X, y = torch.tensor(digits.X[:1000]).float() / 255, torch.tensor(digits.y[:1000])
    queries = (torch.tensor(digits.X_test[:100]).float() / 255, torch.tensor(digits.y_test[:100]))
    recipe = uw.Training(network, uw.SGD(0.1, momentum=0.9), epochs=15, batch=50, skip_absent=True)

    model = recipe.trained(uw.Task(network(), uw.CrossEntropy()), (X, y))
    task = uw.Task(model, uw.CrossEntropy())
    correct = (model(queries[0]).argmax(dim=1) == queries[1]).float().mean()
    print(f"a network of {task.layout.size} parameters; {correct:.0%} of the test digits right")

    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, (X, y))
    scores = method.attribute(queries)

    weights = subset_weights(len(X), 40, renormalize=True)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster), joblib.parallel_config(backend="dask"):
            using = uw.Resources(jobs=2)
            truth = [
                retrain(replace(recipe, seed=seed), task, (X, y), weights, queries, resources=using)
                for seed in range(2)
            ]
    found = lds(scores, weights, truth)
    print(found)
    assert found.spearman.low > 0.05


if __name__ == "__main__":
    main()
