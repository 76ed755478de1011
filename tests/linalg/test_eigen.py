"""Q Λ Qᵀ with Q = Q₁ ⊗ Q₂ ⊗ …, against Kronecker products written out."""

import functools

import pytest
import torch

from upweight.errors import NotPositiveDefinite, ShapeError
from upweight.linalg import Tag
from upweight.linalg.eigen import Eigen, eigenbasis
from upweight.testing import check_operator

CHECKS = 12
SIZES = {
    "vector": (5,),
    "matrix": (3, 4),
    "matrix, left basis only": (3, 4),
    "matrix, right basis only": (3, 4),
    "diagonal": (3, 4),
    "diagonal vector": (5,),
    "three factors": (2, 3, 4),
    "wide": (1, 6),
    "float32": (3, 4),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def case(name):
    """An operator, and the same as a matrix."""
    sizes = SIZES[name]
    bases = [torch.linalg.qr(draw(d, d, seed=k + 1)).Q for k, d in enumerate(sizes)]
    if name.startswith("diagonal"):
        bases = [None] * len(sizes)
    elif "left basis" in name:
        bases[1] = None
    elif "right basis" in name:
        bases[0] = None
    values = draw(*sizes, seed=9).abs() + 0.1
    Q = functools.reduce(
        torch.kron,
        [torch.eye(d) if q is None else q.contiguous() for d, q in zip(sizes, bases, strict=True)],
    )
    dense = (Q * values.flatten()) @ Q.T
    if name == "float32":
        return Eigen(tuple(q.float() for q in bases), values.float()), dense.float(), Q.float()
    return Eigen(tuple(bases), values), dense, Q


def close(actual, expected):
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("number", range(CHECKS))
def test_is_an_operator(name, number):
    checks = list(check_operator(case(name)[0]))
    assert len(checks) == CHECKS
    checks[number][1]()


@pytest.mark.parametrize("name", SIZES)
def test_is_the_kronecker_product_written_out(name):
    A, dense, Q = case(name)
    v = draw(2, 3, len(dense), seed=4).to(A.dtype)
    array = v.reshape(2, 3, *A.values.shape)
    close(A.mv(v), v @ dense)
    close(A.dense(), dense)
    close(A.trace(), dense.trace())
    close(A.rotated(array).reshape(v.shape), v @ Q)
    close(A.unrotated(array).reshape(v.shape), v @ Q.T)
    close(A.unrotated(A.rotated(array)), array)


@pytest.mark.parametrize("name", SIZES)
def test_functions_act_on_the_eigenvalues(name):
    A, dense, _ = case(name)
    close(A.function(torch.sqrt).dense() @ A.function(torch.sqrt).dense(), dense)
    close(A.function(torch.square).dense(), dense @ dense)
    identity = torch.eye(len(dense), dtype=A.dtype)
    close(A.inverse(0.3).dense() @ (dense + 0.3 * identity), identity)
    close(A.inverse(0.0).dense() @ dense, identity)


def test_one_factor_is_an_eigendecomposition():
    M = draw(6, 6)
    M = M @ M.T
    values, Q = eigenbasis(M)
    close(Eigen((Q,), values).dense(), M)
    close(Q.T @ Q, torch.eye(6))
    assert bool((values.diff() >= 0).all())


def test_small_eigenvalues_of_a_float32_matrix_are_found_in_float64():
    """Of a matrix that float32 holds exactly: 2⁻⁴⁰ beside 1, which float32's own solver loses."""
    M = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float32)
    M = torch.block_diag(M, torch.tensor([[2.0**-40]], dtype=torch.float32))
    values, Q = eigenbasis(M)
    assert values.dtype == Q.dtype == torch.float64
    expected = torch.tensor([0.0, 2.0**-40, 2.0])
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-15)


def test_tags_follow_the_signs_of_the_eigenvalues():
    values = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    assert Eigen((None, None), values).tags == {Tag.SYMMETRIC, Tag.PSD}
    assert Eigen((None, None), values - 1.0).tags == {Tag.SYMMETRIC}


@pytest.mark.parametrize("damping, smallest", [(0.0, "-0.5"), (0.25, "-0.25"), (0.5, "0")])
def test_a_singular_inverse_is_refused_with_its_numbers(damping, smallest):
    A = Eigen((None, None), torch.tensor([[1.0, -0.5, 2.0], [3.0, 4.0, -0.5]]))
    found = rf"2 of 6 eigenvalues that are not; the smallest is {smallest} \(λ = {damping:.3g}\)"
    with pytest.raises(NotPositiveDefinite, match=found) as caught:
        A.inverse(damping)
    assert caught.value.smallest == -0.5 + damping
    assert "Relative(0.1)" in str(caught.value) and "never fires" in str(caught.value)


def test_an_eigenvalue_below_the_normal_numbers_is_as_good_as_zero():
    """1e-40 is a float32 number, but a subnormal one: its reciprocal overflows."""
    values = torch.tensor([1.0, 1e-40], dtype=torch.float32)
    assert float(values[1]) > 0 and float(1.0 / values[1]) == torch.inf
    with pytest.raises(NotPositiveDefinite, match="1 of 2 eigenvalues"):
        Eigen((None,), values).inverse(0.0)
    assert bool(Eigen((None,), values).inverse(1e-3).values.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_in_a_basis_is_as_good_as_zero(dtype):
    """(qᵀ x)² of an x that is orthogonal to q is ε² and not 0; along the axes 0 is exact."""
    q = torch.eye(3, dtype=dtype)
    values = torch.tensor([1.0, 2.0, torch.finfo(dtype).eps ** 2], dtype=dtype)
    with pytest.raises(NotPositiveDefinite, match="1 of 3 eigenvalues"):
        Eigen((q,), values).inverse(0.0)
    assert bool(Eigen((None,), values).inverse(0.0).values.isfinite().all())
    assert bool(Eigen((q,), values).inverse(1e-9).values.isfinite().all())


@pytest.mark.parametrize("bases", [(4, 3), (3, 3), (3,), (None, 3)])
def test_bases_that_do_not_fit_are_refused(bases):
    with pytest.raises(ShapeError, match=r"eigenvalues \(3, 4\) for bases of sizes"):
        Eigen(tuple(d if d is None else torch.eye(d) for d in bases), torch.ones(3, 4))


def test_rounding_does_not_choose_the_basis_of_equal_eigenvalues():
    """Nor where the matrix is diagonal: its eigenvectors stay those of the axes."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64))[0]
    true = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0], dtype=torch.float64)
    M = (Q * true) @ Q.T
    noise = torch.randn(9, 9, generator=g, dtype=torch.float64)
    _, once = eigenbasis(M)
    values, again = eigenbasis(M + 1e-16 * (noise + noise.T))
    torch.testing.assert_close(values, true, rtol=0, atol=1e-14)
    same = (once.T @ again).abs()[2:, 2:]  # of the null space any basis will do
    torch.testing.assert_close(same, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close((again * values) @ again.T, M, rtol=0, atol=1e-14)
    _, axes = eigenbasis(torch.tensor([2.0, 1.0, 2.0, 1.0]).diag())
    assert torch.equal(axes.abs().sum(dim=0), torch.ones(4, dtype=torch.float64))
