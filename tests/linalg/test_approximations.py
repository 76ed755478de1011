"""Nystrom, Lanczos, Neumann and LiSSA: exact where they say so, honest about the rest."""

import math
import re

import pytest
import torch

from upweight.cli.spec import parse
from upweight.errors import NotConverged, NotPositiveDefinite, SpecError
from upweight.linalg import (
    CG,
    MINRES,
    BlockCG,
    Dense,
    DiagonalMatrix,
    FiniteSum,
    Identity,
    Lanczos,
    LinearOperator,
    LiSSA,
    LowRank,
    Neumann,
    Nystrom,
    PartialEigen,
    Result,
    Tag,
    damped,
    solve,
)
from upweight.linalg.damping import undamped
from upweight.linalg.finite_sum import examples_of, minibatch
from upweight.linalg.lanczos import extreme_eigenvalues

SYMMETRIC, PSD = frozenset({Tag.SYMMETRIC}), frozenset({Tag.PSD})
p = 40


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, _ = torch.linalg.qr(draw(p, p, seed=9))


def spectrum(eigenvalues, tags=PSD):
    return Dense((Q * eigenvalues) @ Q.T, tags)


def exact(A, b):
    return torch.linalg.solve(A.dense(), b.T).T


# -- a few directions beside damping ------------------------------------------------------------


@pytest.mark.parametrize("shift", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("solver", [Nystrom(6), Lanczos(6), Lanczos(6, steps=9)], ids=repr)
def test_low_rank_beside_damping_is_exact(solver, shift):
    A, b = damped(LowRank(draw(p, 6)), shift), draw(3, p)
    solution = solve(A, b, solver)
    assert solution.converged
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [Nystrom(6), Lanczos(6)], ids=repr)
def test_without_damping_they_give_the_solution_of_least_norm_of_what_they_kept(solver):
    A, b = LowRank(draw(p, 6)), draw(3, p)
    solution = solve(A, b, solver)
    assert solution.result is Result.APPROXIMATE  # b is not in the range, and the residual says so
    torch.testing.assert_close(solution.value, b @ torch.linalg.pinv(A.dense(), rtol=1e-9).T)
    inside = b @ A.dense()
    assert solve(A, inside, solver).converged


def test_an_approximation_states_its_residual():
    A, b = spectrum(torch.logspace(-3, 0, p).double()), draw(2, p)
    for solver in (Nystrom(15), Lanczos(5), Neumann(3)):
        solution = solve(A, b, solver)
        assert solution.result is Result.APPROXIMATE and not solution.converged
        true = torch.linalg.vector_norm(A.mv(solution.value) - b, dim=1)
        stated = solution.stats.residuals
        torch.testing.assert_close(stated, true / torch.linalg.vector_norm(b, dim=1))
        assert float(stated.min()) > 1e-3


@pytest.mark.parametrize("solver", [Nystrom(4), Lanczos(4)], ids=repr)
def test_a_rank_that_leaves_more_than_zero_does_is_no_answer(solver):
    """x = b/μ on what is left out: the residual there is λ/μ of it."""
    A, b = damped(spectrum(torch.linspace(0.5, 1.0, p).double()), 0.01), draw(2, p)
    with pytest.raises(NotConverged, match=r"(?s)that of x = 0.*raise the rank") as caught:
        solve(A, b, solver)
    solution = solve(A, b, solver, throw=False)
    assert solution.result is Result.DIVERGED and bool(solution.value.isfinite().all())
    true = torch.linalg.vector_norm(A.mv(solution.value) - b, dim=1)
    torch.testing.assert_close(solution.stats.residuals, true / torch.linalg.vector_norm(b, dim=1))
    assert float(solution.stats.residuals.max()) > 1.0
    # The ways out: more rank, more damping, and a solver that goes on.
    assert solve(A, b, type(solver)(p)).converged
    raised = damped(spectrum(torch.linspace(0.5, 1.0, p).double()), 1.0)
    assert solve(raised, b, solver).result is Result.APPROXIMATE
    names = {"CG": CG, "MINRES": MINRES, "Nystrom": Nystrom}
    code = r"or use ((?:CG|MINRES)\((?:preconditioner=Nystrom\([^)]*\))?\))"
    instead = re.search(code, str(caught.value))
    assert solve(A, b, eval(instead[1], names)).converged


def test_noise_that_leaves_more_than_zero_does_is_no_answer():
    A, b = finite_sum(shift=1e-3), draw(2, p)
    noisy = LiSSA(batch=1, depth=2000, scale=20.0, repeats=2)
    solution = solve(A, b, noisy, throw=False)
    assert float(solution.stats.residuals.max()) > 1.0 and solution.result is Result.DIVERGED
    with pytest.raises(NotConverged, match="raise batch or repeats"):
        solution.throw()
    assert solve(A, b, LiSSA(batch=25, depth=2000, repeats=8)).result is Result.APPROXIMATE


def test_no_answer_where_nothing_of_b_was_seen_is_one_of_residual_1():
    """x = 0 is not held for a divergence by rounding."""
    values = torch.cat([torch.ones(3), torch.zeros(p - 3)]).double()
    A, b = Dense(torch.diag(values), SYMMETRIC), torch.zeros(p).double()
    b[3:] = draw(p - 3)
    assert solve(A, b, Lanczos(3)).result is Result.APPROXIMATE


def test_lanczos_keeps_both_ends():
    values = torch.cat([torch.tensor([-3.0, -2.0, 4.0, 5.0]), torch.zeros(p - 4)]).double()
    A, b = spectrum(values, SYMMETRIC) + 0.5 * Identity(p), draw(3, p)
    solution = solve(A, b, Lanczos(4))
    assert solution.converged
    torch.testing.assert_close(solution.value, exact(A, b))
    seen = solution.stats.extra
    assert seen["smallest_eigenvalue"] == pytest.approx(-2.5)
    assert seen["largest_eigenvalue"] == pytest.approx(5.5)
    assert seen["negative"] == 2 and seen["ritz_residual"] < 1e-9


def test_lanczos_goes_on_after_an_invariant_subspace():
    A, b = spectrum(torch.tensor([1.0, 3.0]).repeat(p // 2).double()), draw(3, p)
    solution = solve(A, b, Lanczos(p))
    assert solution.converged and solution.stats.steps == p
    torch.testing.assert_close(solution.value, exact(A, b))


def test_nystrom_refuses_an_indefinite_operator():
    A = spectrum(torch.linspace(-1.0, 1.0, p).double(), SYMMETRIC)
    with pytest.raises(NotPositiveDefinite, match=r"(?s)vᵀAv/vᵀv = -.*GGN\(\)") as caught:
        solve(A, draw(p), Nystrom(10))
    assert caught.value.solution.stats.extra["curvature"] >= -1.0


@pytest.mark.parametrize("solver", [CG, BlockCG])
def test_nystrom_preconditions(solver):
    A, b = damped(spectrum(torch.logspace(-6, 2, p).double()), 1e-3), draw(3, p)
    plain = solve(A, b, solver(1e-9))
    helped = solve(A, b, solver(1e-9, preconditioner=Nystrom(25)))
    assert helped.stats.steps <= plain.stats.steps / 2
    torch.testing.assert_close(helped.value, exact(A, b), rtol=1e-5, atol=1e-5)


def test_nystrom_preconditioner_is_positive_definite_whatever_the_operator():
    for A in (spectrum(torch.linspace(-1, 1, p).double(), SYMMETRIC), 0.0 * Identity(p)):
        M = Nystrom(5).preconditioner(A)
        assert float(torch.linalg.eigvalsh(M.dense())[0]) > 0


def test_partial_eigen_is_what_it_says():
    U = Q[:, :3].T
    M = PartialEigen(U, torch.tensor([1.0, 4.0, 9.0]).double(), 2.0)
    dense = (U.T * M.values) @ U + 2.0 * (torch.eye(p).double() - U.T @ U)
    torch.testing.assert_close(M.dense(), dense)
    root = M.function(torch.sqrt)
    torch.testing.assert_close((root @ root).dense(), dense)


def test_undamped_takes_out_what_is_seen_of_the_identity():
    G, d = spectrum(torch.linspace(0.0, 1.0, p).double()), torch.linspace(0.2, 1.0, p).double()
    for A, shift in (
        (G, 0.0),
        (damped(G, 0.3), 0.3),
        (damped(G + DiagonalMatrix(d), 0.3), 0.5),
        (damped(0.0 * Identity(p), 0.3), 0.3),
        (DiagonalMatrix(torch.full((p,), 0.7).double()), 0.7),
        (DiagonalMatrix(-d), 0.0),
        (G + (-1.0) * Identity(p), 0.0),
    ):
        B, mu = undamped(A)
        assert mu == pytest.approx(shift)
        torch.testing.assert_close(B.dense() + mu * torch.eye(p).double(), A.dense())
        assert B.is_psd or not A.is_psd


# -- series -------------------------------------------------------------------------------------


def series(A, P, omega, b, terms):
    """ω Σ_{s < terms} (I − ωPA)ˢ P b, by matrix products."""
    A, P = A.dense(), P.dense()
    iterate, total = P @ b.T, torch.zeros(p, len(b), dtype=torch.float64)
    for _ in range(terms):
        total = total + omega * iterate
        iterate = iterate - omega * P @ (A @ iterate)
    return total.T


@pytest.mark.parametrize("terms", [1, 2, 17])
@pytest.mark.parametrize("preconditioner", [None, DiagonalMatrix(torch.linspace(1, 3, p).double())])
def test_neumann_is_its_series(preconditioner, terms):
    A, b = spectrum(torch.linspace(0.1, 1.0, p).double()), draw(3, p)
    solution = solve(A, b, Neumann(terms, preconditioner, step_size=0.4))
    expected = series(A, preconditioner or Identity(p), 0.4, b, terms)
    torch.testing.assert_close(solution.value, expected)
    assert solution.stats.steps == terms


def test_neumann_chooses_a_step_that_converges():
    A, b = spectrum(torch.linspace(3.0, 50.0, p).double()), draw(3, p)
    solution = solve(A, b, Neumann(1000, rtol=1e-9))
    assert solution.converged and solution.stats.extra["spectral_radius"] < 1
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-6, atol=1e-9)


def test_neumann_states_the_spectral_radius():
    values = torch.tensor([0.5, 1.0, 1.5, 2.5]).repeat(p // 4).double()
    for omega, radius in ((0.5, 0.75), (1.0, 1.5)):
        solution = solve(spectrum(values), draw(2, p), Neumann(2, step_size=omega), throw=False)
        assert solution.stats.extra["spectral_radius"] == pytest.approx(radius, abs=1e-9)


@pytest.mark.parametrize(
    "values, solver",
    [
        (torch.linspace(0.1, 3.0, p), Neumann(500, step_size=1.0)),
        (torch.linspace(0.1, 3.0, p), Neumann(5, step_size=1.0)),
        (torch.linspace(-1.0, 1.0, p), Neumann(500)),
        (torch.linspace(0.1, 3.0, p), LiSSA(scale=1.0)),
        (torch.linspace(-1.0, 1.0, p), LiSSA()),
    ],
    ids=str,
)
def test_divergence_is_a_result_and_no_nan(values, solver):
    A, b = spectrum(values.double(), SYMMETRIC), draw(3, p)
    with pytest.raises(NotConverged, match=r"(?s)converges where the spectral radius"):
        solve(A, b, solver)
    solution = solve(A, b, solver, throw=False)
    assert solution.result is Result.DIVERGED and bool(solution.value.isfinite().all())
    assert bool(solution.stats.residuals.isfinite().all())


def test_lissa_diverges_at_a_scale_below_every_eigenvalue():
    A, b = spectrum(torch.linspace(1.0, 2.0, p).double()), draw(3, p)
    solution = solve(A, b, LiSSA(scale=0.01), throw=False)  # one step would be b/s, far off
    assert solution.result is Result.DIVERGED


def test_extreme_eigenvalues_of_a_preconditioned_operator():
    A, d = spectrum(torch.linspace(0.5, 2.0, p).double()), torch.linspace(1.0, 3.0, p).double()
    ends = extreme_eigenvalues(A, rtol=1e-10, preconditioner=DiagonalMatrix(d))
    root = d.sqrt()
    truth = torch.linalg.eigvalsh(root[:, None] * A.dense() * root)
    assert ends.smallest == pytest.approx(float(truth[0]), rel=1e-8)
    assert ends.largest == pytest.approx(float(truth[-1]), rel=1e-8)


# -- minibatches --------------------------------------------------------------------------------


def finite_sum(n=30, shift=0.2):
    """(1/n) Σ xᵢ xᵢᵀ + μI, a term per example, of unequal sizes."""
    X = draw(n, p, seed=4) * torch.linspace(0.2, 1.5, n).double()[:, None]
    return damped(FiniteSum([Dense(x[:, None] * x, PSD) for x in X], n), shift)


def test_minibatches_have_the_operator_as_their_mean():
    A = finite_sum()
    assert examples_of(A) == 30 and examples_of(Identity(p)) == 0
    total = torch.zeros(p, p, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = 600
    parts = torch.stack([minibatch(A, 7, generator).dense() for _ in range(draws)])
    total = parts.mean(dim=0)
    error = parts.std(dim=0) / draws**0.5
    assert bool(((total - A.dense()).abs() <= 5 * error + 1e-12).all())  # of 1600 entries
    torch.testing.assert_close(minibatch(A, 30, generator).dense(), A.dense())
    torch.testing.assert_close(minibatch(A, 99, generator).dense(), A.dense())


@pytest.mark.parametrize("seed", range(2))
def test_lissa_is_within_its_standard_error(seed):
    A, b = finite_sum(shift=4.0), draw(2, p, seed=seed)
    solver = LiSSA(batch=3, depth=100, repeats=6, seed=seed)
    solution = solve(A, b, solver)
    truth = exact(A, b)
    z = (solution.value - truth) / solution.standard_error
    # t with 5 degrees of freedom, whose standard deviation is 1.29: 80 entries
    assert 0.8 < float(z.square().mean().sqrt()) < 1.8
    assert float(torch.linalg.vector_norm(solution.value - truth) / truth.norm()) < 0.3
    seen = solution.stats.extra
    assert seen["products"] == pytest.approx(6 * 100 * 3 / 30)
    assert 0 < seen["standard_error"] < 0.3


def test_lissa_chooses_scale_and_depth():
    A = finite_sum()
    state = LiSSA(batch=5).init(A)
    eigenvalues = torch.linalg.eigvalsh(A.dense())
    generator = torch.Generator().manual_seed(3)
    largest = max(
        float(torch.linalg.eigvalsh(minibatch(A, 5, generator).dense())[-1]) for _ in range(30)
    )
    assert float(eigenvalues[-1]) < largest < 2 * state.scale  # a contraction on every minibatch
    assert (1 - 0.2 / state.scale) ** state.depth == pytest.approx(0.01, rel=0.05)


def test_lissa_in_full_is_its_series_without_an_error():
    A, b = spectrum(torch.linspace(0.1, 1.0, p).double()), draw(3, p)
    solution = solve(A, b, LiSSA(depth=12, scale=2.0))
    torch.testing.assert_close(solution.value, series(A, Identity(p), 0.5, b, 12))
    assert not bool(solution.standard_error.any()) and solution.stats.extra["products"] == 12
    full = solve(finite_sum(), b, LiSSA(batch=30, depth=3))
    assert not bool(full.standard_error.any())


def test_one_run_says_nothing_of_its_error():
    solution = solve(finite_sum(), draw(p), LiSSA(batch=5, depth=10, repeats=1))
    assert solution.standard_error is None and "standard_error" not in solution.stats.extra


def test_lissa_scales_its_standard_error_with_the_right_hand_side():
    A, b = finite_sum(), draw(p)
    one, large = (solve(A, f * b, LiSSA(batch=5, depth=20)) for f in (1.0, 1e6))
    torch.testing.assert_close(large.standard_error, 1e6 * one.standard_error)
    assert one.standard_error.shape == b.shape


def test_lissa_does_not_converge_on_an_operator_with_a_nan_minibatch():
    X = draw(30, p, seed=4)
    X[3, 0] = math.nan
    A = FiniteSum([Dense(x[:, None] * x, PSD) for x in X], 30)
    assert solve(A, draw(p), LiSSA(batch=5), throw=False).result is Result.NON_FINITE


# -- specs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        Nystrom(7, seed=3),
        Lanczos(5, steps=20),
        Neumann(7, Nystrom(3), 0.5, 1e-3),
        LiSSA(3, 4, 5.0, 6, 7),
        CG(preconditioner=Nystrom(4)),
    ],
    ids=repr,
)
def test_specs_are_their_text(spec):
    assert parse(repr(spec), "solver") == spec


@pytest.mark.parametrize(
    "make",
    [
        lambda: Nystrom(0),
        lambda: Nystrom(True),
        lambda: Lanczos(-1),
        lambda: Lanczos(5, steps=4),
        lambda: Neumann(0),
        lambda: Neumann(step_size=-1.0),
        lambda: Neumann(step_size=math.inf),
        lambda: LiSSA(batch=0),
        lambda: LiSSA(depth=0),
        lambda: LiSSA(repeats=True),
        lambda: LiSSA(scale=0.0),
        lambda: LiSSA(scale=math.nan),
    ],
)
def test_hyperparameters_that_mean_nothing_are_refused(make):
    with pytest.raises(SpecError):
        make()


def test_a_preconditioner_must_be_one():
    for given in (Nystrom, "nystrom", LinearOperator):
        with pytest.raises(SpecError, match="preconditioner is an operator"):
            CG(preconditioner=given).init(Identity(p))
