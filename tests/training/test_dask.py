"""Retraining by the workers of a Dask cluster: the same numbers as in this process."""

import joblib
import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, initialized, labels

distributed = pytest.importorskip("distributed")


def network():
    # Of a dtype that says itself: the workers have another default than these tests.
    first, second = (nn.Linear(i, o, dtype=torch.float64) for i, o in ((4, 5), (5, 3)))
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_a_cluster_trains_what_this_process_trains(tmp_path):
    g = torch.Generator().manual_seed(0)
    train, queries = ((draw(g, n, 4), labels(g, n, 3)) for n in (20, 6))
    task = uw.Task(initialized(network(), g).eval(), uw.CrossEntropy())
    recipe = uw.Training(network, uw.SGD(0.3), 2, 5)
    weights = draw(g, 6, 20).abs()
    expected = uw.training.retrain(recipe, task, train, weights, queries)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        found = uw.training.retrain(
            recipe, task, train, weights, queries, resources=uw.Resources(jobs=2, folder=tmp_path)
        )
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-10)
    again = uw.training.retrain(
        recipe, task, train, weights, queries, resources=uw.Resources(folder=tmp_path)
    )
    assert again.reused == 7, "the workers recorded what they trained"
