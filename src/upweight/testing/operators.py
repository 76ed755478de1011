"""What every `LinearOperator` owes its callers, as named checks.

    for name, check in check_operator(A): check()

Each check compares A with itself or with its own matrix, so no reference is needed: an operator
that passes is linear, acts on the last axis, has the transpose and the tags that it says it has,
and refuses vectors it cannot take. With pytest:

    @pytest.mark.parametrize("name, check", check_operator(A), ids=str)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from upweight.errors import DtypeError, ShapeError
from upweight.linalg.operator import LinearOperator, Tag

Check = Callable[[], None]


def check_operator(A: LinearOperator, seed: int = 0) -> Iterator[tuple[str, Check]]:
    """Yield (name, check) pairs; a check raises `AssertionError` where A breaks its contract.

    Written out in full, so for operators of at most a few hundred rows.
    """
    suite = _Suite(A, seed)
    yield "is linear", suite.linear
    yield "acts on the last axis", suite.batch_axes
    yield "accepts an empty batch", suite.empty_batch
    yield "agrees with its matrix", suite.matrix
    yield "adds itself to a matrix", suite.add_to
    yield "has its transpose", suite.transposed
    yield "leaves its input alone", suite.input_alone
    yield "answers twice the same", suite.deterministic
    yield "refuses another length", suite.refuses_length
    yield "refuses another dtype", suite.refuses_dtype
    if A.shape[0] == A.shape[1]:
        yield "has its diagonal and trace", suite.diagonal
        yield "has true tags", suite.tags


class _Suite:
    """The checks, with one operator and one source of vectors."""

    def __init__(self, A: LinearOperator, seed: int) -> None:
        self.A, self.seed = A, seed
        self.tolerance = 1e-10 if A.dtype == torch.float64 else 1e-4

    def vectors(self, *leading: int, size: int | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        size = self.A.shape[1] if size is None else size
        draw = torch.randn(*leading, size, generator=generator, dtype=torch.float64)
        return draw.to(dtype=self.A.dtype, device=self.A.device)

    def same(self, actual: Tensor, expected: Tensor, what: str) -> None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            actual,
            expected,
            rtol=self.tolerance,
            atol=self.tolerance * scale,
            msg=lambda text: f"{self.A!r}: {what}\n{text}",
        )

    def linear(self) -> None:
        u, v = self.vectors(seed=1), self.vectors(seed=2)
        combined = 2.0 * self.A.mv(u) - 3.0 * self.A.mv(v)
        self.same(self.A.mv(2.0 * u - 3.0 * v), combined, "A(2u − 3v) is not 2Au − 3Av")

    def batch_axes(self) -> None:
        v = self.vectors(2, 3, seed=3)
        one_by_one = torch.stack([torch.stack([self.A.mv(x) for x in row]) for row in v])
        self.same(self.A.mv(v), one_by_one, "a batch differs from its vectors one at a time")

    def empty_batch(self) -> None:
        out = self.A.mv(self.vectors(0))
        assert out.shape == (0, self.A.shape[0]), f"{self.A!r}: mv of [0, p] gave {out.shape}"

    def matrix(self) -> None:
        dense, v = self.A.dense(), self.vectors(4, seed=4)
        assert dense.shape == self.A.shape, f"{self.A!r}: dense() has shape {tuple(dense.shape)}"
        assert dense.dtype == self.A.dtype, f"{self.A!r}: dense() has dtype {dense.dtype}"
        self.same(self.A.mv(v), v @ dense.mT, "mv(v) is not dense() @ v")

    def add_to(self) -> None:
        out = torch.ones(self.A.shape, dtype=torch.float64, device=self.A.device)
        self.A.add_to(out, -2.0)
        expected = 1.0 - 2.0 * self.A.dense().double()
        self.same(out, expected, "add_to(out, −2) is not out − 2 A in the dtype of out")

    def transposed(self) -> None:
        u, v = self.vectors(size=self.A.shape[0], seed=5), self.vectors(seed=6)
        assert self.A.T.shape == self.A.shape[::-1], f"{self.A!r}: .T has shape {self.A.T.shape}"
        left, right = u @ self.A.mv(v), self.A.T.mv(u) @ v
        scale = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(self.A.mv(v))
        gap = float((left - right).abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny))
        assert gap <= self.tolerance, f"{self.A!r}: ⟨u, Av⟩ − ⟨Aᵀu, v⟩ is {gap:.1e} of ‖u‖‖Av‖"

    def input_alone(self) -> None:
        v = self.vectors(3, seed=7)
        before = v.clone()
        out = self.A.mv(v)
        assert torch.equal(v, before), f"{self.A!r}: mv changed its input"
        out.add_(1.0)
        assert torch.equal(v, before), f"{self.A!r}: the result of mv shares memory with its input"
        again = self.A.mv(v)
        self.same(again, out - 1.0, "writing to a result changed the operator")

    def deterministic(self) -> None:
        v = self.vectors(seed=8)
        assert torch.equal(self.A.mv(v), self.A.mv(v)), f"{self.A!r}: two answers for one vector"

    def refuses_length(self) -> None:
        self.refuses(self.vectors(2, size=self.A.shape[1] + 1), ShapeError)

    def refuses_dtype(self) -> None:
        other = torch.float32 if self.A.dtype == torch.float64 else torch.float64
        self.refuses(self.vectors().to(other), DtypeError)

    def refuses(self, v: Tensor, error: type[Exception]) -> None:
        try:
            self.A.mv(v)
        except error:
            return
        shape = tuple(v.shape)
        raise AssertionError(f"{self.A!r}: mv took {shape} in {v.dtype} without {error.__name__}")

    def diagonal(self) -> None:
        dense = self.A.dense()
        self.same(self.A.diagonal(), dense.diagonal(), "diagonal() is not that of dense()")
        gap = abs(float(self.A.trace() - dense.trace()))
        scale = float(dense.diagonal().abs().sum())
        assert gap <= self.tolerance * scale, f"{self.A!r}: trace() is off by {gap:.1e}"

    def tags(self) -> None:
        dense = self.A.dense().double()
        if self.A.is_symmetric:
            self.same(dense, dense.mT.contiguous(), "tagged SYMMETRIC, but A ≠ Aᵀ")
        if Tag.PSD in self.A.tags:
            assert Tag.SYMMETRIC in self.A.tags, f"{self.A!r}: tagged PSD and not SYMMETRIC"
            eigenvalues = torch.linalg.eigvalsh(dense)
            smallest, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
            assert smallest >= -self.tolerance * largest, (
                f"{self.A!r}: tagged PSD, but its smallest eigenvalue is {smallest:.1e}"
            )
