"""A = L Lᵀ, and every way in which there is no such L."""

import pytest
import torch

from upweight.errors import NonFinite, NotConverged, NotPositiveDefinite, ShapeError
from upweight.linalg import CG, Cholesky, Dense, Identity, Result, Tag, cholesky, damped, solve
from upweight.linalg.lanczos import extreme_eigenvalues

PSD, SYMMETRIC = frozenset({Tag.PSD}), frozenset({Tag.SYMMETRIC})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(eigenvalues, tags=PSD):
    Q, _ = torch.linalg.qr(draw(len(eigenvalues), len(eigenvalues), seed=5))
    return Dense((Q * eigenvalues) @ Q.T, tags)


def test_factor_and_inverse_satisfy_their_equations():
    A = spectrum(torch.logspace(-6, 0, 30).double())
    state = Cholesky().init(A)
    L = state.factor
    torch.testing.assert_close(L @ L.T, A.matrix, rtol=0, atol=1e-14)
    assert bool((L.triu(1) == 0).all())
    inverse = Cholesky().inverse_dense(state)
    torch.testing.assert_close(inverse @ A.matrix, torch.eye(30).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tile", [3, 7, 1024])
def test_tiles_see_every_entry(tile, monkeypatch):
    monkeypatch.setattr(cholesky, "TILE", tile)
    matrix = draw(10, 10) @ draw(10, 10).T + 10 * torch.eye(10).double()
    assert solve(Dense(matrix), draw(10), Cholesky()).converged
    for i, j in [(0, 9), (9, 0), (4, 3), (8, 2)]:
        for value, error in [(matrix[i, j] + 1.0, NotPositiveDefinite), (torch.inf, NonFinite)]:
            broken = matrix.clone()
            broken[i, j] = value
            with pytest.raises(error):
                solve(Dense(broken), draw(10), Cholesky())


def test_factorizes_in_float64_and_answers_in_the_dtype_of_b():
    # The condition number is 10⁸: float32 arithmetic would not give a digit, and the matrix is
    # exact in float32.
    A = Dense(torch.diag(torch.tensor([1.0, 1e-8])).float() + 1e-9, PSD)
    b = torch.tensor([1.0, 1.0]).float()
    x = solve(A, b, Cholesky(rtol=1e-3)).value
    assert x.dtype == torch.float32
    truth = torch.linalg.solve(A.matrix.double(), b.double())
    torch.testing.assert_close(x.double(), truth, rtol=1e-6, atol=0)


def test_indefinite_names_the_smallest_eigenvalue_and_the_ways_out():
    eigenvalues = torch.linspace(-3.2e-2, 1.0, 20).double()
    text = (
        r"(?s)Cholesky needs A ≻ 0.*smallest eigenvalue is -3\.2e-02.*GGN\(\).*3\.2e-02.*MINRES\(\)"
    )
    with pytest.raises(NotPositiveDefinite, match=text) as caught:
        solve(spectrum(eigenvalues, SYMMETRIC), draw(20), Cholesky())
    assert caught.value.smallest == pytest.approx(-3.2e-2, rel=1e-6)
    solution = caught.value.solution
    assert solution.result is Result.NOT_POSITIVE_DEFINITE and bool(solution.value.isnan().all())
    A = damped(spectrum(eigenvalues, SYMMETRIC), 3.3e-2)  # the way out is one
    assert solve(A, draw(20), Cholesky()).converged


def test_a_large_indefinite_operator_has_its_eigenvalue_estimated(monkeypatch):
    monkeypatch.setattr(cholesky, "LARGEST_EIGVALSH", 10)
    A = spectrum(torch.linspace(-0.5, 1.0, 30).double(), SYMMETRIC)
    solution = solve(A, draw(30), Cholesky(), throw=False)
    assert solution.stats.extra["smallest_eigenvalue"] == extreme_eigenvalues(A).smallest
    assert solution.stats.extra["smallest_eigenvalue"] == pytest.approx(-0.5, rel=1e-3)
    with pytest.raises(NotPositiveDefinite, match=r"-5.0e-01 or below \(estimated, ± "):
        solution.throw()


def softmax_hessian():
    """Three classes, L2 on the weights alone: flat along a common shift of the biases."""
    Z = torch.cat([draw(40, 2), torch.ones(40, 1).double()], 1)
    p = torch.softmax(draw(40, 3, seed=2), 1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("nab,ni,nj->aibj", blocks, Z, Z).reshape(9, 9) / 40
    penalty = torch.tensor([1e-2, 1e-2, 0.0]).repeat(3).double()
    return H + torch.diag(penalty)


def duplicated_feature(dtype):
    X = draw(50, 8)
    X[:, 3] = X[:, 6]
    return (X.to(dtype).T @ X.to(dtype)) / 50


def kahan(n=90, angle=1.2):
    """Kahan's matrix: no small pivot, and a condition number beyond float64."""
    s, c = torch.tensor(angle).double().sin(), torch.tensor(angle).double().cos()
    R = torch.eye(n).double() - c * torch.triu(torch.ones(n, n).double(), 1)
    R = torch.diag(s ** torch.arange(n)) @ R
    return R.T @ R


@pytest.mark.parametrize(
    "matrix",
    [
        softmax_hessian(),
        duplicated_feature(torch.float64),
        duplicated_feature(torch.float32),
        kahan(),
        torch.ones(5, 5).double(),
        torch.zeros(4, 4).double(),
        torch.diag(torch.tensor([1.0, 0.0, 2.0])).double(),
        1e-14 * softmax_hessian(),
    ],
    ids=["softmax shift", "duplicate", "duplicate f32", "Kahan", "ones", "zero", "dead", "tiny"],
)
def test_singular_never_passes(matrix):
    solution = solve(
        Dense(matrix, PSD), draw(len(matrix)).to(matrix.dtype), Cholesky(), throw=False
    )
    assert solution.result is Result.SINGULAR, solution.stats.extra
    assert bool(solution.value.isnan().all())
    with pytest.raises(NotPositiveDefinite, match=r"(?s)singular.*biases.*damping.*MINRES\(\)"):
        solution.throw()
    with pytest.raises(NotPositiveDefinite, match="singular"):
        Cholesky().inverse_dense(Cholesky().init(Dense(matrix, PSD)))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.diag(torch.logspace(-30, 30, 9).double()),  # badly scaled is not singular
        damped(Dense(softmax_hessian()), 1e-10).dense(),
        spectrum(torch.logspace(-11, 0, 30).double()).matrix,
    ],
    ids=["scales", "damped", "condition 1e11"],
)
def test_hard_but_regular_is_solved(matrix):
    b = matrix @ draw(len(matrix))
    solution = solve(Dense(matrix, PSD), b, Cholesky())
    assert float(solution.stats.residuals) <= 1e-6


def test_stats_state_the_residual_the_condition_and_the_symmetry():
    A = spectrum(torch.linspace(1.0, 100.0, 12).double())
    b = draw(2, 3, 12)
    solution = solve(A, b, Cholesky())
    r = torch.linalg.vector_norm(A.mv(solution.value) - b, dim=-1)
    relative = r / torch.linalg.vector_norm(b, dim=-1)
    torch.testing.assert_close(solution.stats.residuals, relative, rtol=0, atol=1e-14)
    assert 1.0 < solution.stats.extra["condition"] <= 100.0
    assert solution.stats.extra["asymmetry"] <= 1e-14
    assert solution.stats.steps == 0 and solution.stats.solver == "Cholesky(rtol=None)"


def test_the_residual_is_that_of_the_operator_not_of_the_factor():
    class Drifting(Dense):
        """An operator whose products disagree with its matrix."""

        def mv(self, v):
            return super().mv(v) * 1.01

    with pytest.raises(NotConverged, match=r"(?s)rounding.*1\.0e-02.*another answer each time"):
        solve(Drifting(torch.eye(3).double()), draw(3), Cholesky())


def test_not_square_and_not_symmetric():
    with pytest.raises(ShapeError, match=r"(?s)square.*3×4"):
        Cholesky().init(Dense(draw(3, 4)))
    with pytest.raises(NotPositiveDefinite, match=r"(?s)symmetric operator.*max\|A − Aᵀ\| = "):
        Cholesky().init(Dense(draw(4, 4)))


def test_damping_reaches_the_factor_without_a_matrix_of_the_sum():
    A = damped(spectrum(torch.linspace(0.0, 1.0, 15).double()), 0.5)
    b = draw(15)
    x = solve(A, b, Cholesky()).value
    torch.testing.assert_close(x, torch.linalg.solve(A.dense(), b))
    torch.testing.assert_close(x, solve(A, b, CG(rtol=1e-12)).value)


def test_identity():
    b = draw(3, 4)
    torch.testing.assert_close(solve(2.0 * Identity(4), b, Cholesky()).value, b / 2)
