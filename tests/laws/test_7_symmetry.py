"""Law 7: with m = ℓ on the training set itself, S is symmetric, and its diagonal is ≤ 0."""

import pytest

from tests.laws.subjects import EVERYONE, assert_same, attributed, tolerance
from tests.market import problem

PROBLEMS = ["ridge_two_outputs", "softmax", "mlp_tanh", "layer_norm"]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", EVERYONE)
def test_scores_of_the_training_set_are_symmetric(method, name):
    p = problem(name)
    fitted = EVERYONE[method].fit(p.task, p.train)
    values = attributed(fitted, p.train).values
    assert_same(values, values.T.contiguous(), tolerance(method))
    assert_same(fitted.self_influence(), values.diagonal(), tolerance(method))
    assert bool((values.diagonal() < 0).all()), "more weight on an example lowers its own loss"
