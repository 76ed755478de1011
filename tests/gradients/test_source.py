"""Rows, inner products and sums of gradients: twin implementations, one answer."""

import pytest
import torch

from tests.market import BUILDERS, draw, names, problem
from tests.reference import dense
from upweight.gradients.source import Direct, FactoredLinear, contract, gradient_source
from upweight.task.data import as_data


def sources(p):
    data = as_data(p.train)
    found = gradient_source(p.task, p.task.theta(), data)
    return {type(found).__name__: found, "Direct": Direct(p.task, p.task.theta())}


@pytest.mark.parametrize("name", BUILDERS)
def test_sources_agree_with_the_reference(name):
    p = problem(name)
    g = dense.gradients(p.task, p.train)
    vectors = draw(torch.Generator().manual_seed(0), 3, g.shape[1]).to(g.dtype)
    data = as_data(p.train)
    batch = data.batch(0, len(data))
    for source in sources(p).values():
        torch.testing.assert_close(source.rows(batch, len(data)), g, **p.tolerance)
        torch.testing.assert_close(
            source.inner(vectors, batch, len(data)), vectors @ g.T, **p.tolerance
        )
        torch.testing.assert_close(source.total(batch), g.sum(dim=0), **p.tolerance)
        assert source.values_per_example > 0


@pytest.mark.parametrize("name", names("linear"))
def test_linear_models_are_factored(name):
    p = problem(name)
    assert set(sources(p)) == {"FactoredLinear", "Direct"}
    data = as_data(p.train)
    batch = data.batch(0, len(data))
    delta, z = gradient_source(p.task, p.task.theta(), data).factors(batch)
    f, y = p.task.outputs(p.task.theta(), batch)
    expected = torch.func.vmap(torch.func.grad(lambda f, y: p.task.loss(f[None], _one(y))[0]))(f, y)
    torch.testing.assert_close(delta, expected.reshape(len(f), -1), **p.tolerance)
    assert z.shape[1] * delta.shape[1] == p.task.layout.size


def _one(targets):
    return torch.utils._pytree.tree_map(lambda y: y[None], targets)


@pytest.mark.parametrize("name", names(without=("linear",)))
def test_other_models_are_direct(name):
    p = problem(name)
    assert set(sources(p)) == {"Direct"}


def test_contract_is_the_inner_product_of_outer_products():
    g = torch.Generator().manual_seed(1)
    vectors, delta, z = draw(g, 4, 2, 3), draw(g, 5, 2), draw(g, 5, 3)
    rows = (delta[:, :, None] * z[:, None, :]).reshape(5, -1)
    expected = vectors.reshape(4, -1) @ rows.T
    torch.testing.assert_close(contract(vectors, delta, z), expected, rtol=1e-12, atol=1e-12)


def test_factored_rows_are_an_instance_of_the_protocol():
    p = problem("softmax")
    assert isinstance(gradient_source(p.task, p.task.theta(), as_data(p.train)), FactoredLinear)
