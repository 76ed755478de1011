"""Per-example derivatives by vmap, against loops over autograd, on the whole market."""

import pytest
import torch

import upweight as uw
from tests.market import BUILDERS, problem
from tests.reference import dense
from upweight.gradients.functional import (
    measure_gradients,
    output_jacobians,
    per_sample_gradients,
)
from upweight.task.data import as_data
from upweight.task.measures import as_measure


def whole(data):
    data = as_data(data)
    return data.batch(0, len(data))


@pytest.mark.parametrize("name", BUILDERS)
def test_per_sample_gradients(name):
    p = problem(name)
    found = per_sample_gradients(p.task, p.task.theta(), whole(p.train), p.n)
    torch.testing.assert_close(found, dense.gradients(p.task, p.train), **p.tolerance)


@pytest.mark.parametrize("name", BUILDERS)
def test_output_jacobians(name):
    p = problem(name)
    found = output_jacobians(p.task, p.task.theta(), whole(p.train), p.n)
    torch.testing.assert_close(found, dense.jacobians(p.task, p.train), **p.tolerance)


@pytest.mark.parametrize("name", BUILDERS)
def test_measure_gradients(name):
    p = problem(name)

    def function(outputs, targets):
        return outputs.reshape(len(outputs), -1).tanh().sum(dim=1)

    theta = p.task.theta()
    loss = measure_gradients(p.task, uw.Loss(), theta, whole(p.queries), len(as_data(p.queries)))
    expected = dense.measure_gradients(p.task, p.task.loss, p.queries)
    torch.testing.assert_close(loss, expected, **p.tolerance)
    own = measure_gradients(
        p.task, as_measure(function), theta, whole(p.queries), len(as_data(p.queries))
    )
    expected = dense.measure_gradients(p.task, function, p.queries)
    torch.testing.assert_close(own, expected, **p.tolerance)


def test_gradients_are_taken_at_the_theta_given_and_not_at_the_models():
    p = problem("mlp_tanh")
    theta = p.task.theta() + 0.1
    model = dense.Replica(p.task, p.train, theta).model
    moved = uw.Task(model.requires_grad_(True), p.task.loss, p.task.penalty)
    found = per_sample_gradients(p.task, theta, whole(p.train), p.n)
    torch.testing.assert_close(found, dense.gradients(moved, p.train), **p.tolerance)
