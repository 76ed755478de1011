"""Law 6: an example whose gradient is zero throughout has score zero, exactly."""

import pytest

from tests.laws.subjects import DETERMINISTIC, EVERYONE, attributed
from tests.market import problem


def assert_silent(method, p, example):
    fitted = method.fit(p.task, p.train)
    values = attributed(fitted, p.queries).values
    others = [i for i in range(p.n) if i != example]
    assert bool((values[:, example] == 0).all())
    assert bool((values[:, others] != 0).any(dim=0).all()), "another column is zero too"
    own = fitted.self_influence()
    assert float(own[example]) == 0 and bool((own[others] != 0).all())
    if not hasattr(fitted, "removal"):
        return
    removed = fitted.removal(p.queries, groups=[[example]]).values
    # A Newton step solves anew for the right-hand side zero: not a rounding error either.
    assert bool((removed == 0).all())


@pytest.mark.parametrize("method", EVERYONE)
def test_an_example_of_padding_alone(method):
    assert_silent(EVERYONE[method], problem("padded_sequences"), example=4)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_an_example_of_weight_zero(method):
    assert_silent(DETERMINISTIC[method], problem("weighted"), example=2)
