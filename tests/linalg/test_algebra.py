"""A + B, c A, A B, Aᵀ: the matrices, and what is known about them."""

from collections.abc import Sequence

import pytest
import torch

from upweight.errors import DtypeError, NonFinite, ShapeError
from upweight.linalg import Dense, DiagonalMatrix, FiniteSum, Identity, LowRank, Tag

S, P = frozenset({Tag.SYMMETRIC}), frozenset({Tag.SYMMETRIC, Tag.PSD})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


M, X, D = draw(4, 4), draw(6, 4, seed=1), draw(4, seed=2).abs()
ANY, SYM, PSD = Dense(M), Dense(M + M.T, S), Dense(X.T @ X, P)


@pytest.mark.parametrize(
    "expression, matrix",
    [
        (ANY + SYM, M + M + M.T),
        (ANY - 2.0 * Identity(4), M - 2 * torch.eye(4)),
        (-(ANY * 3.0), -3 * M),
        (ANY @ DiagonalMatrix(D), M @ torch.diag(D)),
        ((Dense(X) @ ANY).T, (X @ M).T),
        (LowRank(X.T), X.T @ X),
        ((ANY + ANY) + (SYM + PSD), 2 * M + M + M.T + X.T @ X),
    ],
    ids=lambda value: repr(value) if not isinstance(value, torch.Tensor) else "",
)
def test_the_algebra_of_operators_is_that_of_matrices(expression, matrix):
    torch.testing.assert_close(expression.dense(), matrix.double())
    v = draw(2, 3, expression.shape[1], seed=3)
    torch.testing.assert_close(expression @ v, v @ matrix.double().T)


@pytest.mark.parametrize(
    "operator, tags",
    [
        (PSD + PSD, P),
        (PSD + SYM, S),
        (PSD + ANY, frozenset()),
        (PSD - PSD, S),
        (2.0 * PSD, P),
        (0.0 * PSD, P),
        (-2.0 * PSD, S),
        (PSD @ PSD, frozenset()),
        (PSD.T, P),
        (DiagonalMatrix(-D), S),
        (DiagonalMatrix(D), P),
        (FiniteSum([PSD, PSD], 2), P),
        (FiniteSum([PSD, SYM], 2), S),
        (FiniteSum([PSD, ANY], 2), frozenset()),
        (Dense(X.T @ X, frozenset({Tag.PSD})), P),
    ],
    ids=lambda value: (
        "+".join(sorted(t.name for t in value)) if isinstance(value, frozenset) else repr(value)
    ),
)
def test_tags_follow(operator, tags):
    assert operator.tags == tags
    assert operator.is_psd == (Tag.PSD in tags)
    assert operator.is_symmetric == (Tag.SYMMETRIC in tags)


def test_finite_sum_divides_the_sum_by_n_whatever_the_batches():
    def mean(sizes):
        return FiniteSum([Dense(x.T @ x, P) for x in X.split(sizes)], n=6)

    v = draw(3, 4, seed=4)
    for sizes in ([6], [5, 1], [1, 1, 1, 1, 1, 1]):
        torch.testing.assert_close(mean(sizes).mv(v), v @ (X.T @ X) / 6)
        torch.testing.assert_close(mean(sizes).trace(), (X.T @ X).trace() / 6)


def test_finite_sum_reads_lazy_terms_one_at_a_time():
    class Lazy(Sequence):
        built = 0

        def __len__(self):
            return 6

        def __getitem__(self, i):
            if not 0 <= i < 6:
                raise IndexError
            Lazy.built += 1
            return Dense(torch.outer(X[i], X[i]), P)

    mean = FiniteSum(Lazy(), 6, declared=P)
    assert Lazy.built < 6, "declared tags make reading every term unnecessary"
    Lazy.built = 0
    torch.testing.assert_close(mean.mv(draw(4)), draw(4) @ (X.T @ X) / 6)
    assert mean.shape == (4, 4) and Lazy.built == 6, "more than one pass"


def test_sums_are_flat_and_operators_are_immutable():
    assert len(((PSD + SYM) + (PSD + SYM)).terms) == 4
    with pytest.raises(AttributeError):
        PSD.matrix = M


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: ANY + Identity(5), ShapeError, r"one shape.*\n.*4×4.*5×5"),
        (lambda: ANY + Identity(4, torch.float32), DtypeError, r"one dtype.*\n.*float32"),
        (lambda: ANY @ Dense(X), ShapeError, r"(?s)columns in A as rows in B.*4×4.*6×4"),
        (lambda: ANY.mv(draw(4, 3)), ShapeError, r"(?s)4 entries along the last axis.*\(4, 3\)"),
        (
            lambda: ANY.mv(draw(4).float()),
            DtypeError,
            r"(?s)float64.*float32.*v\.to\(torch.float64",
        ),
        (lambda: Dense(draw(4)), ShapeError, r"(?s)2 axes.*\(4,\)"),
        (lambda: Dense(X, P), ShapeError, r"(?s)square.*\(6, 4\)"),
        (lambda: Dense(X).trace(), ShapeError, r"(?s)square.*\(6, 4\)"),
        (lambda: FiniteSum([], 3), ShapeError, r"(?s)at least one term.*0 terms and n = 3"),
        (lambda: FiniteSum([PSD], 0), ShapeError, r"(?s)n ≥ 1.*n = 0"),
        (lambda: FiniteSum([PSD, Identity(5)], 3), ShapeError, "one shape"),
        (lambda: float("nan") * PSD, NonFinite, "finite number.*\n.*nan"),
        (
            lambda: DiagonalMatrix(torch.tensor([1.0, torch.inf])),
            NonFinite,
            r"(?s)1 of 2.*entries\[1\] = i",
        ),
    ],
)
def test_errors_name_what_does_not_fit(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_operators_only_combine_with_what_they_can():
    for bad in (lambda: PSD + 1.0, lambda: PSD * PSD, lambda: PSD @ 2.0, lambda: PSD - M):
        with pytest.raises(TypeError):
            bad()
