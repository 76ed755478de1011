"""Every operator of the package, held to the contract that others are held to."""

import pytest
import torch

from upweight.linalg import (
    Auto,
    Dense,
    DiagonalMatrix,
    FiniteSum,
    Identity,
    LinearOperator,
    LowRank,
    Tag,
    damped,
    inverse,
    materialize,
    operator,
)
from upweight.testing import check_operator

P = 7
SYMMETRIC, PSD = frozenset({Tag.SYMMETRIC}), frozenset({Tag.PSD})


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class OnlyMv(LinearOperator):
    """Nothing but what a subclass must say: the defaults do the rest."""

    def __init__(self, matrix):
        self.matrix = matrix

    shape = property(lambda self: tuple(self.matrix.shape))
    dtype = property(lambda self: self.matrix.dtype)
    device = property(lambda self: self.matrix.device)
    tags = property(lambda self: frozenset())

    def mv(self, v):
        self.check(v)
        return v @ self.matrix.mT

    def transpose(self):
        return OnlyMv(self.matrix.mT)


def market():
    M, X, d = draw(P, P), draw(12, P, seed=1), draw(P, seed=2)
    gram = Dense(X.T @ X, PSD)
    batches = [Dense(x.T @ x, PSD) for x in X.split(5)]
    return {
        "dense": Dense(M),
        "tall": Dense(X),
        "gram": gram,
        "symmetric": Dense(M + M.T, SYMMETRIC),
        "diagonal": DiagonalMatrix(d),
        "positive diagonal": DiagonalMatrix(d.abs()),
        "identity": Identity(P),
        "low rank": LowRank(draw(P, 2)),
        "finite sum": FiniteSum(batches, 12),
        "finite sum, not symmetric": FiniteSum([Dense(M), Dense(M.T @ M)], 3),
        "sum": Dense(M) + DiagonalMatrix(d),
        "difference": gram - Identity(P),
        "scaled": -2.0 * gram,
        "scaled sum of low rank": 0.5 * (LowRank(draw(P, 2)) + gram),
        "product": Dense(M) @ DiagonalMatrix(d),
        "rectangular product": Dense(X) @ Dense(M),
        "damped": damped(gram, 0.1),
        "inverse": inverse(damped(gram, 0.1), Auto()),
        "only mv": OnlyMv(draw(3, P)),
        "only mv, materialized": materialize(OnlyMv(M)),
        "float32": damped(Dense((X.T @ X).float(), PSD), 0.1) @ LowRank(draw(P, 2).float()),
    }


CASES = [
    pytest.param(check, id=f"{name}: {what}")
    for name, A in market().items()
    for what, check in check_operator(A)
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


@pytest.mark.parametrize("block", [1, 2, 3, P, 100])
@pytest.mark.parametrize("rows", [P, 3, 10])
def test_writing_an_operator_out_does_not_depend_on_the_block(block, rows, monkeypatch):
    monkeypatch.setattr(operator, "UNIT_VECTORS", block)
    M = draw(rows, P)
    torch.testing.assert_close(OnlyMv(M).dense(), M)
    if rows == P:
        torch.testing.assert_close(OnlyMv(M).diagonal(), M.diagonal())


class Broken(OnlyMv):
    """One defect at a time, to see that the suite can fail."""

    def __init__(self, matrix, defect):
        super().__init__(matrix)
        self.defect = defect

    @property
    def tags(self):
        return PSD | SYMMETRIC if self.defect == "tags" else frozenset()

    def check(self, v):
        if self.defect != "check":
            super().check(v)

    def mv(self, v):
        self.check(v)
        if self.defect == "check":
            v = v.to(self.dtype)[..., : self.shape[1]]
        if self.defect == "in place":
            v.mul_(2.0)
        return v @ self.matrix.mT + (1.0 if self.defect == "affine" else 0.0)

    def transpose(self):
        return self if self.defect == "transpose" else OnlyMv(self.matrix.mT)

    def diagonal(self):
        return torch.ones(P, dtype=self.dtype) if self.defect == "diagonal" else super().diagonal()


@pytest.mark.parametrize(
    "defect, caught",
    [
        ("tags", "has true tags"),
        ("check", "refuses another dtype"),
        ("check", "refuses another length"),
        ("in place", "leaves its input alone"),
        ("affine", "is linear"),
        ("transpose", "has its transpose"),
        ("diagonal", "has its diagonal and trace"),
    ],
)
def test_suite_catches(defect, caught):
    with pytest.raises(AssertionError, match=r"Broken\("):
        dict(check_operator(Broken(draw(P, P), defect)))[caught]()
