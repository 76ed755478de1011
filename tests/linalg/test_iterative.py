"""CG, BlockCG and MINRES: what each promises beyond the contract of all solvers."""

import itertools
import math
import re

import pytest
import torch

from upweight.errors import NotConverged, NotPositiveDefinite
from upweight.linalg import CG, MINRES, BlockCG, Cholesky, Dense, DiagonalMatrix, Result, Tag, solve
from upweight.linalg.block_cg import orthonormal
from upweight.linalg.cg import most_steps

SYMMETRIC, PSD = frozenset({Tag.SYMMETRIC}), frozenset({Tag.PSD})
ALL = [CG(1e-9, 2000), BlockCG(1e-9, 2000), MINRES(1e-9, 2000)]
DEFINITE = ALL[:2]
p = 60


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, _ = torch.linalg.qr(draw(p, p, seed=9))


def spectrum(eigenvalues, tags=PSD):
    return Dense((Q * eigenvalues) @ Q.T, tags)


class Counted(Dense):
    """Counts the vectors it was given, in `seen`."""

    seen: list[int]

    def mv(self, v):
        self.seen.append(v.shape[:-1].numel())
        return super().mv(v)


def counted(A):
    out = Counted(A.matrix, A.tags)
    object.__setattr__(out, "seen", [])
    return out


name = pytest.mark.parametrize("solver", ALL, ids=lambda s: type(s).__name__)
definite = pytest.mark.parametrize("solver", DEFINITE, ids=lambda s: type(s).__name__)


@name
def test_ends_after_as_many_steps_as_distinct_eigenvalues(solver):
    A = spectrum(torch.tensor([1.0, 4.0, 9.0]).repeat(20).double())
    solution = solve(A, draw(p), solver)
    assert solution.stats.steps == 3


@name
def test_max_steps_returns_what_it_reached_and_says_how_far(solver):
    A, b = spectrum(torch.logspace(-6, 0, p).double()), draw(2, p)
    few = type(solver)(rtol=1e-9, max_steps=4)
    with pytest.raises(
        NotConverged, match=rf"(?s){type(solver).__name__}.*4 steps: 2 of 2.*max_steps"
    ):
        solve(A, b, few)
    solution = solve(A, b, few, throw=False)
    assert solution.result is Result.MAX_STEPS and solution.stats.steps == 4
    r = torch.linalg.vector_norm(A.mv(solution.value) - b, dim=1)
    torch.testing.assert_close(solution.stats.residuals, r / torch.linalg.vector_norm(b, dim=1))


@pytest.fixture
def told(capsys, monkeypatch):
    """How many products there will be, as said after each of them."""
    for name in ("FIRST", "EVERY"):
        monkeypatch.setattr(f"upweight.runtime.progress.{name}", 0.0)

    def totals():
        lines = capsys.readouterr().err.splitlines()
        found = [re.search(r"(\d+) of ([\d,]+) products", line).groups() for line in lines]
        return {int(k): int(total.replace(",", "")) for k, total in found}

    return totals


@pytest.mark.parametrize("solver", [ALL[0], ALL[2]], ids=lambda s: type(s).__name__)
def test_products_to_go_follow_the_residual(solver, told):
    A = spectrum(torch.linspace(1, 30, p).double())
    steps = solve(A, draw(4, p), solver).stats.steps
    totals = told()
    assert steps < p and max(totals.values()) <= p
    assert all(0.7 * steps < totals[k] < 1.5 * steps for k in range(steps // 2, steps))


@pytest.mark.parametrize("solver", [ALL[0], ALL[2]], ids=lambda s: type(s).__name__)
def test_products_to_go_are_no_more_than_equations_but_for_rounding(solver, told):
    steps = solve(spectrum(torch.logspace(-5, 0, p).double()), draw(p), solver).stats.steps
    totals = told()
    assert steps > p + 1
    assert max(total for k, total in totals.items() if k < p) <= p
    assert all(k < total <= 2000 for k, total in totals.items())


def test_steps_that_suffice_for_a_condition_number():
    eigenvalues = torch.linspace(1, 50, p).double()
    for rtol in (1e-2, 1e-6):
        most = most_steps(50.0, rtol)
        for solver in (CG(rtol), MINRES(rtol)):
            assert solve(spectrum(eigenvalues), draw(8, p), solver).stats.steps <= most
        assert most < 20 * math.log10(50 / rtol)
    assert most_steps(1.0, 1e-9) == 1


@name
def test_a_tolerance_out_of_reach_is_stagnation(solver):
    A, b = spectrum(torch.logspace(-5, 0, p).double()), draw(p)
    solution = solve(A, b, type(solver)(rtol=1e-16, max_steps=20_000), throw=False)
    assert solution.result is Result.STAGNATED and solution.stats.steps < 20_000
    assert float(solution.stats.residuals) <= 1e-9  # as far as rounding lets it: eps · condition
    with pytest.raises(NotConverged, match=r"(?s)rounding.*loosen rtol"):
        solution.throw()


@name
def test_inconsistent_systems_are_not_answered(solver):
    eigenvalues = torch.linspace(0.1, 1.0, p).double()
    eigenvalues[:4] = 0.0
    solution = solve(spectrum(eigenvalues), draw(3, p), solver, throw=False)
    assert solution.result is Result.SINGULAR
    with pytest.raises(NotPositiveDefinite, match=r"(?s)singular.*damping or a penalty"):
        solution.throw()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_minres_stops_at_the_least_squares_solution_of_an_inconsistent_system(sign):
    eigenvalues = torch.linspace(0.1, 1.0, p).double() * torch.where(
        torch.arange(p) % 2 == 0, 1, sign
    )
    eigenvalues[10:14] = 0.0
    A, b = spectrum(eigenvalues, SYMMETRIC), draw(p)
    solution = solve(A, b, MINRES(), throw=False)
    assert solution.result is Result.SINGULAR
    smallest = torch.linalg.vector_norm(b @ Q[:, 10:14]) / torch.linalg.vector_norm(b)
    torch.testing.assert_close(solution.stats.residuals, smallest, rtol=1e-3, atol=0)


@definite
@pytest.mark.parametrize("lowest", [-1.0, -1e-3])
def test_negative_curvature_is_found_and_measured(solver, lowest):
    eigenvalues = torch.linspace(0.01, 1.0, p).double()
    eigenvalues[0] = lowest
    A = spectrum(eigenvalues, SYMMETRIC)
    with pytest.raises(
        NotPositiveDefinite, match=r"(?s)vᵀAv/vᵀv = -.*GGN\(\).*MINRES\(\)"
    ) as caught:
        solve(A, draw(5, p), solver)
    solution = caught.value.solution
    assert solution.result is Result.NEGATIVE_CURVATURE
    assert lowest <= solution.stats.extra["curvature"] < 0.0
    assert solve(A, draw(5, p), MINRES(max_steps=5000)).converged  # the way out is one


@pytest.mark.parametrize("solver", [CG(), MINRES(), Cholesky()], ids=repr)
def test_what_denies_a_known_sign_is_rounding(solver):
    """A curvature that is positive semi-definite by definition is not advised in its own place."""
    eigenvalues = torch.linspace(0.01, 1.0, p).double()
    eigenvalues[0] = 0.0 if isinstance(solver, MINRES) else -1e-3
    A = spectrum(eigenvalues, PSD)
    with pytest.raises(NotPositiveDefinite) as caught:
        solve(A, draw(5, p), solver)
    assert (
        "GGN" not in str(caught.value) and "MINRES()" not in str(caught.value).partition("Way")[2]
    )
    assert "add damping" in str(caught.value) or "raise damping" in str(caught.value)
    assert solve(spectrum(eigenvalues + 0.1, PSD), draw(5, p), solver).converged  # the way out


@pytest.mark.parametrize("solver", [CG(1e-9), MINRES(1e-9)], ids=["CG", "MINRES"])
def test_solved_columns_leave_the_batch(solver):
    A = counted(spectrum(torch.linspace(1.0, 100.0, p).double()))
    b = torch.cat([Q[:, :7].T, draw(1, p)])  # seven eigenvectors: one step each
    solution = solve(A, b, solver)
    assert solution.converged and A.seen[0] == 8
    steps = solution.stats.steps
    # One step for all, then the looks at the true residual; after that a single vector at a time.
    assert sum(A.seen) <= steps + 7 + 8 + 8


def test_block_cg_shares_its_krylov_space():
    eigenvalues = torch.logspace(-5, 0, p).double()
    A, b = spectrum(eigenvalues), draw(10, p)
    block, single = solve(A, b, BlockCG(1e-9)), solve(A, b, CG(1e-9))
    assert block.stats.steps <= 3 * p // 10  # ⌈p/k⌉ = 6 in exact arithmetic
    assert single.stats.steps > 5 * block.stats.steps
    torch.testing.assert_close(
        block.value, torch.linalg.solve(A.matrix, b.T).T, rtol=1e-5, atol=1e-3
    )


def test_block_cg_drops_dependent_right_hand_sides():
    A = counted(spectrum(torch.logspace(-3, 0, p).double()))
    u, v = draw(2, p)
    b = torch.stack([u, v, u + v, -3e8 * u, 1e-9 * v, u + 1e-13 * v, torch.zeros(p).double()])
    solution = solve(A, b, BlockCG(1e-9))
    assert A.seen[0] == 2
    truth = torch.linalg.solve(A.matrix, b.T).T
    error = torch.linalg.vector_norm(solution.value - truth, dim=1)
    assert bool((error <= 1e-6 * torch.linalg.vector_norm(truth, dim=1)).all())


def test_block_cg_on_a_singular_operator_has_no_flat_part():
    eigenvalues = torch.linspace(0.1, 1.0, p).double()
    eigenvalues[:5] = 0.0
    A = spectrum(eigenvalues)
    b = A.mv(draw(4, p))
    b = torch.cat([b, b.sum(0, keepdim=True)])  # dependent: QR would complete the block arbitrarily
    x = solve(A, b, BlockCG(1e-9)).value
    assert float((x @ Q[:, :5]).abs().max()) <= 1e-9


def test_orthonormal_factorizes_and_finds_the_rank():
    V = draw(30, 3) @ draw(3, 6, seed=1)
    basis, coefficients = orthonormal(V)
    assert basis.shape == (30, 3)
    torch.testing.assert_close(basis @ coefficients, V)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double())
    assert orthonormal(torch.zeros(5, 2).double())[0].shape == (5, 0)


def test_preconditioner_cuts_the_steps_and_keeps_the_answer():
    d = torch.logspace(-6, 0, p).double()
    A = Dense(torch.diag(d) + 1e-9 * torch.ones(p, p).double(), PSD)
    b = draw(3, p)
    plain = solve(A, b, CG(1e-9, 5000))
    helped = solve(A, b, CG(1e-9, preconditioner=DiagonalMatrix(1 / d)))
    assert helped.stats.steps < plain.stats.steps / 3
    torch.testing.assert_close(
        helped.value, torch.linalg.solve(A.matrix, b.T).T, rtol=1e-5, atol=1e-8
    )


def test_preconditioner_that_is_not_positive_definite_is_refused():
    M = DiagonalMatrix(-torch.ones(p).double())
    with pytest.raises(NotPositiveDefinite, match=r"(?s)preconditioner M.*rᵀMr/rᵀr = -1.0e\+00"):
        solve(spectrum(torch.linspace(1.0, 2.0, p).double()), draw(2, p), CG(preconditioner=M))


@name
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e30])
def test_no_right_hand_side_is_too_small_or_large_in_float32(solver, factor):
    # The square of 1e-30 is zero in float32, and the square of 1e30 is infinite.
    A = Dense(spectrum(torch.linspace(1.0, 2.0, p).double()).matrix.float(), PSD)
    b = draw(2, p).float()
    x = solve(A, factor * b, type(solver)(rtol=1e-5)).value
    truth = torch.linalg.solve(A.matrix, b.T).T
    torch.testing.assert_close(x / factor, truth, rtol=1e-3, atol=1e-4)


def test_minres_residual_never_grows():
    signs = torch.where(torch.arange(p) % 3 == 0, -1.0, 1.0).double()
    A, b = spectrum(signs * torch.linspace(0.2, 1.0, p).double(), SYMMETRIC), draw(p)
    sizes = [
        float(solve(A, b, MINRES(1e-12, steps), throw=False).stats.residuals)
        for steps in range(1, 30)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(sizes))


def test_cg_lowers_the_energy_at_every_step():
    A, b = spectrum(torch.logspace(-3, 0, p).double()), draw(p)
    energies = []
    for steps in range(1, 30):
        x = solve(A, b, CG(1e-12, steps), throw=False).value
        energies.append(float(0.5 * x @ A.mv(x) - b @ x))
    assert all(after < before for before, after in itertools.pairwise(energies))


def test_cg_restarts_where_the_recurrence_drifts_from_the_truth():
    # Close to what rounding allows. Observed: 6 of 6 converge; without the restart, 0 of 6.
    converged = 0
    for seed in range(6):
        basis, _ = torch.linalg.qr(draw(p, p, seed=seed))
        A = Dense((basis * torch.logspace(-4, 0, p).double()) @ basis.T, PSD)
        solution = solve(A, draw(p, seed=seed + 100), CG(3e-13, 5000), throw=False)
        converged += solution.converged
    assert converged >= 4


def test_the_default_tolerance_is_within_reach_of_float32():
    # The solvers' own default must not ask of float32 what only float64 can give.
    A = Dense(spectrum(torch.logspace(-3, 0, p)).matrix.float(), PSD)
    for solver in (CG(), BlockCG(), MINRES()):
        solution = solver.solve(solver.init(A), draw(3, p).float())
        assert solution.converged, solution.stats.residuals
        assert solution.stats.extra["rtol"] == 1e-4


def test_minres_does_not_send_its_user_to_minres():
    A = Dense(torch.diag(torch.tensor([1.0, 2.0, 0.0])), SYMMETRIC)
    with pytest.raises(NotPositiveDefinite, match=r"(?s)lie in the range of A.*GGN\(\)") as error:
        MINRES().solve(A, torch.ones(3)).throw()
    assert "MINRES(), which" not in str(error.value)


def test_cg_sees_the_ends_of_the_spectrum_with_no_further_product():
    A = counted(spectrum(torch.linspace(0.5, 40, 30).double().repeat(2)))
    b = draw(3, p)
    solution = CG(1e-12).solve(CG().init(A), b)
    seen = solution.stats.extra
    assert seen["smallest_ritz"] == pytest.approx(0.5) and seen["largest_ritz"] == pytest.approx(40)
    assert seen["condition"] == pytest.approx(80)
    # A step each, and one for each right-hand side's true residual
    assert len(A.seen) <= solution.stats.steps + 3
    few = CG(max_steps=6).solve(CG().init(A), b).stats.extra
    assert 0.5 < few["smallest_ritz"] < 4 and 35 < few["largest_ritz"] < 40
    assert few["condition"] == few["largest_ritz"] / few["smallest_ritz"]
    # They are the Ritz values of the Krylov space
    one = CG(max_steps=6).solve(CG().init(A), b[0]).stats.extra
    K = [b[0]]
    for _ in range(5):
        K.append(A.mv(K[-1] / K[-1].norm()))
    Q = torch.linalg.qr(torch.stack(K).mT)[0]
    ritz = torch.linalg.eigvalsh(Q.mT @ A.mv(Q.mT).mT)
    assert one["smallest_ritz"] == pytest.approx(float(ritz[0]), rel=1e-6)
    assert one["largest_ritz"] == pytest.approx(float(ritz[-1]), rel=1e-6)
    scaled = CG(preconditioner=DiagonalMatrix(torch.full((p,), 0.1).double()))
    assert "condition" not in scaled.solve(scaled.init(A), b).stats.extra


def test_what_cg_saw_is_within_the_spectrum_in_float32_after_restarts():
    A = spectrum(torch.logspace(-4, 0, p).double())
    A = Dense(A.matrix.float(), A.tags)
    solution = CG(1e-6, max_steps=500, refresh=10).solve(CG().init(A), draw(2, p).float())
    seen = solution.stats.extra
    assert seen["largest_ritz"] == pytest.approx(1.0, rel=1e-4)
    assert 1e-4 - 1e-6 <= seen["smallest_ritz"] < 1e-3
