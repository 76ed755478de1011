"""Per-example derivatives by vmap, against loops over autograd, on the whole market."""

import pytest
import torch

import upweight as uw
from tests.market import BUILDERS, problem
from tests.reference import dense
from upweight.gradients.functional import (
    output_jacobians,
    over_examples,
    value_gradients,
)
from upweight.task.data import as_data
from upweight.task.measures import as_measure


def whole(data):
    data = as_data(data)
    return data.batch(0, len(data))


@pytest.mark.parametrize("name", BUILDERS)
def test_per_sample_gradients(name):
    p = problem(name)
    found = value_gradients(p.task.losses, p.task.theta(), whole(p.train), p.n)
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
    size = len(as_data(p.queries))

    def of(measure):
        def values(t, batch):
            return measure(p.task, p.task.named(t), batch)

        return value_gradients(values, theta, whole(p.queries), size)

    loss = of(uw.Loss())
    expected = dense.measure_gradients(p.task, p.task.loss, p.queries)
    torch.testing.assert_close(loss, expected, **p.tolerance)
    own = of(as_measure(function))
    expected = dense.measure_gradients(p.task, function, p.queries)
    torch.testing.assert_close(own, expected, **p.tolerance)


def test_gradients_are_taken_at_the_theta_given_and_not_at_the_models():
    p = problem("mlp_tanh")
    theta = p.task.theta() + 0.1
    model = dense.Replica(p.task, p.train, theta).model
    moved = uw.Task(model.requires_grad_(True), p.task.loss, p.task.penalty)
    found = value_gradients(p.task.losses, theta, whole(p.train), p.n)
    torch.testing.assert_close(found, dense.gradients(moved, p.train), **p.tolerance)


def test_a_layer_that_a_forward_converts_is_an_error_under_vmap_and_ends_no_process():
    """As the router of Switch Transformers, whose parameters stand for several examples there."""
    layer = torch.nn.Linear(2, 1)

    def value(x):
        return layer.to(torch.float32)(x).sum()

    with pytest.raises(RuntimeError, match="Linear is converted within the model's forward"):
        over_examples(value, torch.ones(3, 2), 3)
    assert layer.to(torch.float64).weight.dtype == torch.float64
