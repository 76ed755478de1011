"""⊕ₖ Aₖ over entries that need not lie side by side, against the matrix written out."""

import pytest
import torch

from upweight.errors import ShapeError
from upweight.linalg import Dense, DiagonalMatrix, Identity, Tag
from upweight.linalg.blockdiag import BlockDiagonal
from upweight.linalg.eigen import Eigen
from upweight.testing import check_operator

INDICES = (torch.tensor([5, 1]), torch.tensor([0, 6, 3]), torch.tensor([4, 2]))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks():
    M = draw(3, 3, seed=1)
    basis = torch.linalg.qr(draw(2, 2)).Q
    return (
        Eigen((basis,), torch.tensor([1.0, 3.0])),
        Dense(M @ M.T, frozenset({Tag.SYMMETRIC, Tag.PSD})),
        DiagonalMatrix(torch.tensor([2.0, 5.0])),
    )


def written_out(parts, indices):
    out = torch.zeros(7, 7)
    for part, index in zip(parts, indices, strict=True):
        out[index[:, None], index[None, :]] = part.dense()
    return out


A = BlockDiagonal(blocks(), INDICES)
NOT_SYMMETRIC = BlockDiagonal((Dense(draw(2, 2)), Dense(draw(3, 3)), Identity(2)), INDICES)


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("operator", [A, NOT_SYMMETRIC], ids=["symmetric", "not symmetric"])
def test_is_an_operator(operator, number):
    checks = list(check_operator(operator))
    assert len(checks) == 12
    checks[number][1]()


@pytest.mark.parametrize("operator", [A, NOT_SYMMETRIC], ids=["symmetric", "not symmetric"])
def test_is_the_matrix_written_out(operator):
    expected = written_out(operator.blocks, INDICES)
    v = draw(2, 3, 7, seed=3)
    torch.testing.assert_close(operator.mv(v), v @ expected.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.T.dense(), expected.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.trace(), expected.trace(), rtol=1e-12, atol=1e-12)


def test_tags_are_those_that_every_block_has():
    assert A.is_psd and A.is_symmetric
    assert not NOT_SYMMETRIC.is_symmetric
    indefinite = DiagonalMatrix(torch.tensor([1.0, -1.0]))
    mixed = BlockDiagonal((blocks()[0], blocks()[1], indefinite), INDICES)
    assert mixed.is_symmetric and not mixed.is_psd


@pytest.mark.parametrize(
    "indices, given",
    [
        ([[0, 1], [2, 3], [4, 5, 6]], r"\[2, 2, 3\] entries for blocks of \[2, 3, 2\]"),
        ([[0, 1], [2, 3, 4], [4, 5]], "some of them twice or not at all"),
        ([[0, 1], [2, 3, 4], [6, 7]], "some of them twice or not at all"),
    ],
)
def test_indices_that_are_no_partition_are_refused(indices, given):
    with pytest.raises(ShapeError, match=given):
        BlockDiagonal(blocks(), tuple(torch.tensor(i) for i in indices))
