"""product(a, b) is a @ b + plus, however its rows lie in memory."""

import pytest
import torch

from upweight.linalg import products
from upweight.linalg.products import product

SHAPES = [(7,), (3, 7), (2, 3, 7), (0, 7), (1, 1, 7)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 128, 129, 160, 785])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product(shape, n, dtype):
    a, b, plus = draw(*shape, dtype=dtype), draw(7, n, seed=1, dtype=dtype), draw(n, dtype=dtype)
    torch.testing.assert_close(product(a, b), a @ b)
    torch.testing.assert_close(product(a, b, plus), a @ b + plus)
    torch.testing.assert_close(product(a, b.mT.contiguous().mT), a @ b)
    torch.testing.assert_close(
        product(draw(*shape[:-1], 14, dtype=dtype)[..., ::2], b).shape, (a @ b).shape
    )


def test_rows_lie_a_whole_number_of_lines_apart():
    found = product(draw(3, 4, 7), draw(7, 129))
    assert found.stride() == (4 * 144, 144, 1) and 144 % products.LINE == 0
    assert product(draw(3, 4, 7), draw(7, 144)).is_contiguous()


def test_gradients_flow():
    a = draw(3, 7).requires_grad_()
    product(a, draw(7, 129)).sum().backward()
    torch.testing.assert_close(a.grad, draw(7, 129).sum(dim=1).expand(3, 7))
