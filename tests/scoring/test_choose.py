"""1/(Λ + λ) as a sum of products, and how many of them: errors fall, budgets are kept."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from upweight.gradients.factored import Rows, Tokens
from upweight.linalg.eigen import Eigen
from upweight.scoring.choose import _ranks, _short_terms, choose
from upweight.scoring.kernels import Explicit, OfVector, Separable
from upweight.scoring.queries import FactoredQueries, SolvedQueries, in_basis, inner, solved
from upweight.scoring.reference import Reference, Sample, measured
from upweight.scoring.reference import reference_scores as reference_of
from upweight.scoring.separable import expansion

O, I, Q, S = 6, 40, 8, 30  # noqa: E741  outputs and inputs


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectrum(o=O, i=I, damping=1e-3):
    """A product of decaying spectra, disturbed: M = 1/(Λ + λ) is no product."""
    decay = torch.logspace(0, -3, o)[:, None] * torch.logspace(0, -5, i)
    return decay * (0.004 * draw(o, i, seed=3)).exp(), damping


def block(o=O, i=I, q=Q):
    """Queries and training examples of one matrix, as second moments Λ expect them."""
    values, damping = spectrum(o, i)
    bases = tuple(torch.linalg.qr(draw(d, d, seed=d)).Q for d in (o, i))
    eigen = Eigen(bases, values)
    rows, columns = values.sum(dim=1).sqrt(), values.sum(dim=0).sqrt()
    left, right = draw(q, o, seed=5) * rows, draw(q, i, seed=6) * columns
    queries = FactoredQueries(eigen, eigen.inverse(damping).values, left[:, None], right[:, None])
    delta = (draw(S, o, seed=7) * rows) @ bases[0].T
    a = (draw(S, i, seed=8) * columns) @ bases[1].T
    return queries, Tokens(delta[:, None], a[:, None]), values


def exact(queries, sample):
    """⟨(H + λ)⁻¹ ∇m_q, gᵢ⟩ with matrices written out."""
    eigen = queries.eigen
    dense = Eigen(eigen.bases, queries.inverse).dense()
    Q_G, Q_A = eigen.bases
    grads = (queries.left @ Q_G.T).mT @ (queries.right @ Q_A.T)
    return grads.flatten(1) @ dense @ sample.matrices().flatten(1).T


# -- the expansion ----------------------------------------------------------------------------


def rebuilt(terms):
    return torch.einsum("ro,ri->oi", terms.left, terms.right)


def test_the_error_of_the_expansion_falls_to_zero_at_full_rank():
    values, damping = spectrum()
    M = 1 / (values + damping)
    left, right = draw(O, seed=1).abs(), draw(I, seed=2).abs()
    weights = left[:, None] * right
    errors = [
        float((weights * (rebuilt(expansion(M, left, right, r)) - M)).norm())
        for r in range(1, O + 1)
    ]
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-12 * float((weights * M).norm()) < errors[-2]
    torch.testing.assert_close(rebuilt(expansion(M, left, right, O)), M, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_expansion_is_the_best_in_the_weighted_norm(r):
    """Eckart–Young: its error is that of the singular values left out; unweighted does worse."""
    values, damping = spectrum()
    M = 1 / (values + damping)
    left, right = values.sum(dim=1).sqrt(), values.sum(dim=0).sqrt()
    weights = left[:, None] * right
    found = float((weights * (rebuilt(expansion(M, left, right, r)) - M)).norm())
    tail = torch.linalg.svdvals(weights * M)[r:].norm()
    assert found == pytest.approx(float(tail), rel=1e-9)
    plain = rebuilt(expansion(M, torch.ones(O), torch.ones(I), r))
    assert float((weights * (plain - M)).norm()) > 1.5 * found


def test_a_coordinate_of_weight_zero_gets_no_share_and_no_nan():
    M = 1 / (spectrum()[0] + 1e-3)
    left, right = torch.ones(O), torch.ones(I)
    left[2] = right[5] = 0.0
    terms = expansion(M, left, right, O)
    assert bool(terms.left.isfinite().all()) and bool(terms.right.isfinite().all())
    assert not bool(terms.left[:, 2].any()) and not bool(terms.right[:, 5].any())
    kept = rebuilt(terms)[[0, 1, 3, 4, 5]][:, [0, 1, 2, 3, 4, *range(6, I)]]
    torch.testing.assert_close(
        kept, M[[0, 1, 3, 4, 5]][:, [0, 1, 2, 3, 4, *range(6, I)]], rtol=1e-9, atol=1e-9
    )


# -- how many terms ---------------------------------------------------------------------------


def curve(errors, per_term=10, in_full=100, fixed=0):
    return SimpleNamespace(errors=tuple(errors), per_term=per_term, in_full=in_full, fixed=fixed)


def price(curves, ranks):
    return sum(
        curves[k].in_full if r is None else curves[k].fixed + r * curves[k].per_term
        for k, r in ranks.items()
    )


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 1e-6])
def test_ranks_keep_the_budget_and_cost_no_more_than_all_in_full(seed, tolerance):
    """Random error curves, falling and now and then rising."""
    g = torch.Generator().manual_seed(seed)
    curves = {}
    for k in range(1 + seed % 4):
        steps = torch.rand(3 + seed % 9, generator=g) * 1.1
        errors = steps.cumprod(dim=0).tolist()
        per_term, in_full, fixed = torch.randint(1, 60, (3,), generator=g).tolist()
        curves[k] = curve(errors, per_term, in_full, fixed // 2)
    budget = tolerance**2
    ranks = _ranks(curves, budget)
    spent = sum(0.0 if r is None else curves[k].errors[r] ** 2 for k, r in ranks.items())
    assert spent <= budget
    for k, r in ranks.items():
        assert r is None or 1 <= r < len(curves[k].errors)
        assert r is None or curves[k].fixed + r * curves[k].per_term < curves[k].in_full
    assert price(curves, ranks) <= sum(c.in_full for c in curves.values())


def test_ranks_take_no_more_terms_than_the_budget_asks():
    curves = {0: curve([1, 0.5, 0.1, 0.01, 0.001]), 1: curve([1, 0.2, 0.1, 0.09, 0.08], 1, 50)}
    assert _ranks(curves, 10.0) == {0: 1, 1: 1}
    assert _ranks(curves, 0.6**2) == {0: 1, 1: 1}
    assert _ranks(curves, 0.52**2) == {0: 1, 1: 2}  # the cheaper step first
    assert _ranks(curves, 0.2**2) == {0: 2, 1: 2}
    assert _ranks(curves, 0.0) == {0: None, 1: None}
    assert _ranks({}, 0.0) == {}


def test_a_block_that_is_cheaper_in_full_is_in_full():
    assert _ranks({0: curve([1, 0.5, 0.1], per_term=40, in_full=30)}, 1.0) == {0: None}


def test_short_terms_spend_their_budget_on_the_least_errors_first():
    rounding = {0: (0.5, 0.01, 0.02), 1: (0.03,)}
    assert _short_terms(rounding, 0.0) == {0: frozenset(), 1: frozenset()}
    budget = 0.01**2 + 0.02**2 + 1e-9
    assert _short_terms(rounding, budget) == {0: frozenset({1, 2}), 1: frozenset()}
    assert _short_terms(rounding, 1.0) == {0: frozenset({0, 1, 2}), 1: frozenset({0})}


# -- the choice -------------------------------------------------------------------------------


def chosen(tolerance, short=False, **sizes):
    queries, factors, values = block(**sizes)
    sample = Sample((factors,), (S // 2, S))
    reference = reference_of([queries], torch.arange(len(queries)), sample)
    kernels, words = choose([queries], reference, sample, [values], tolerance, short)
    return queries, sample, reference, kernels, words


def test_the_reference_is_the_untruncated_score():
    queries, sample, reference, _, _ = chosen(0.0)
    expected = exact(queries, sample.factors[0])
    torch.testing.assert_close(reference.parts[0], expected, rtol=1e-9, atol=1e-9)


def test_tolerance_zero_is_exact_and_in_full():
    _, sample, reference, (kernel,), words = chosen(0.0, short=True)
    assert isinstance(kernel, Explicit) and words == ("in full, float64",)
    found = measured([kernel], Q, reference, sample)
    assert found.error < 1e-12 and found.worst < 1e-12


WIDE = {"o": 120, "i": 400, "q": 12}


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("tolerance", [0.2, 0.05, 0.01, 3e-3])
def test_kernels_keep_the_tolerance_where_they_were_chosen(tolerance, short):
    """On the sample itself: the share of truncation, and that of rounding, summed as if unrelated.

    Those two may add up instead: 1.3 × the tolerance at worst, less than 1 observed.
    """
    queries, sample, reference, kernels, words = chosen(tolerance, short, **WIDE)
    found = measured(kernels, len(queries), reference, sample)
    assert 0 < found.error <= (1.3 if short else 1.0) * tolerance
    assert found.worst >= found.error == pytest.approx(found.by_block[0], rel=1e-6)
    assert isinstance(kernels[0], Separable) and "products" in words[0]
    assert len(kernels[0].short[0]) == 0 or short


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("second", [0.045, 0.01], ids=["a little lower", "far lower"])
def test_a_second_choice_keeps_its_tolerance_with_what_the_first_measured(short, second):
    queries, factors, values = block(**WIDE)
    sample = Sample((factors,), (S // 2, S))
    reference = reference_of([queries], torch.arange(len(queries)), sample)
    curves = {}
    for tolerance in (0.05, second):
        kernels, _ = choose([queries], reference, sample, [values], tolerance, short, curves)
        found = measured(kernels, len(queries), reference, sample)
        assert 0 < found.error <= (1.3 if short else 1.0) * tolerance


def test_fewer_terms_for_a_larger_tolerance():
    counts = [len(chosen(t, **WIDE)[3][0].full[0]) for t in (0.3, 0.1, 0.03, 0.01, 3e-3)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_bfloat16_is_used_only_where_it_may_be():
    for short in (False, True):
        *_, (kernel,), _ = chosen(0.05, short, **WIDE)
        assert (len(kernel.short[0]) > 0) == short
    *_, (kernel,), _ = chosen(1e-5, True, **WIDE)
    in_full = isinstance(kernel, Explicit) and kernel.vectors.dtype == torch.float64
    assert in_full or len(kernel.full[0]) > 0


def test_a_vector_is_multiplied_as_a_vector():
    basis = torch.linalg.qr(draw(5, 5)).Q
    inverse = Eigen((basis,), draw(5).abs() + 0.1)
    m, g = Rows(draw(Q, 5, seed=1)), Rows(draw(S, 5, seed=2))
    sample = Sample((g,), (S,))
    vectors = solved(inverse, m)
    queries = SolvedQueries(vectors, vectors)
    rows = torch.arange(Q)
    reference = reference_of([queries], rows, sample)
    expected = m.values @ inverse.dense() @ g.values.T
    torch.testing.assert_close(reference.parts[0], expected, rtol=1e-12, atol=1e-12)
    (kernel,), words = choose([queries], reference, sample, [torch.ones(5)], 0.01, False)
    assert isinstance(kernel, OfVector) and words == ("in full, float64",)
    assert measured([kernel], Q, reference, sample).error < 1e-14


def test_errors_are_relative_to_each_query_and_zero_for_one_without_scores():
    parts = (torch.tensor([[3.0, 0.0], [0.0, 0.0], [30.0, 0.0]]),)
    parts += (torch.tensor([[0.0, 4.0], [0.0, 0.0], [0.0, 40.0]]),)
    reference = Reference(torch.arange(3), parts, (2,))
    error = torch.full((3, 2), 1.0)
    assert reference.relative(error)[0].tolist() == pytest.approx(
        [math.sqrt(2) / 5, 0.0, math.sqrt(2) / 50]
    )


def test_an_error_is_that_of_the_group_where_it_is_larger():
    scores = torch.tensor([[3.0, 4.0, 0.1, 0.0], [0.0, 1.0, 0.3, 0.4]])
    error = torch.tensor([[0.0, 0.5, 0.0, 0.02], [0.1, 0.0, 0.05, 0.0]])
    reference = Reference(torch.arange(2), (scores,), (2, 4))
    first, second = [0.1, 0.1], [0.2, 0.1]
    torch.testing.assert_close(reference.relative(error), torch.tensor([first, second]).double())
    assert reference.rms(error) == pytest.approx(math.sqrt((0.2**2 + 0.1**2) / 2))


# -- coordinates --------------------------------------------------------------------------------


def narrow(q):
    """Queries and examples that lie in some coordinates of the eigenbases, but for a thousandth."""
    queries, factors, values = block(120, 400, q)
    keep = [torch.ones(d).double() * 1e-3 for d in (120, 400)]
    keep[0][:30], keep[1][5:105] = 1.0, 1.0
    Q_G, Q_A = queries.eigen.bases
    queries = FactoredQueries(
        queries.eigen, queries.inverse, queries.left * keep[0], queries.right * keep[1]
    )
    factors = Tokens(factors.left @ Q_G * keep[0] @ Q_G.T, factors.right @ Q_A * keep[1] @ Q_A.T)
    values = values * keep[0].square()[:, None] * keep[1].square()
    return queries, factors, values


@pytest.mark.parametrize("short", [False, True])
def test_coordinates_that_do_not_matter_are_left_out(short):
    queries, factors, values = narrow(400)
    sample = Sample((factors,), (S,))
    reference = reference_of([queries], torch.arange(0, 400, 10), sample)
    (kernel,), (words,) = choose([queries], reference, sample, [values], 0.02, short)
    left, right = kernel.bases
    assert left.shape[1] <= 30 and right.shape[1] <= 100
    assert f"over {left.shape[1]} of 120 × {right.shape[1]} of 400 directions" in words
    assert measured([kernel], 400, reference, sample).error <= 0.02


def test_they_are_kept_where_leaving_them_out_does_not_pay():
    """A handful of queries: projecting the training set would cost more than it saves."""
    queries, factors, values = narrow(2)
    sample = Sample((factors,), (S,))
    reference = reference_of([queries], torch.arange(2), sample)
    (kernel,), (words,) = choose([queries], reference, sample, [values], 0.02, False)
    assert getattr(kernel, "bases", None) is None and "directions" not in words
    assert measured([kernel], 2, reference, sample).error <= 0.02


# -- queries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 3])
def test_solving_in_the_basis_is_solving(positions):
    queries, _, _ = block()
    inverse = Eigen(queries.eigen.bases, queries.inverse)
    m = Tokens(draw(Q, positions, O, seed=1), draw(Q, positions, I, seed=2))
    flat = m.matrices().flatten(1)
    torch.testing.assert_close(solved(inverse, m).flatten(1), inverse.mv(flat))
    rotated = in_basis(inverse, m)
    torch.testing.assert_close(inverse.unrotated(rotated).flatten(1), flat)


def test_factored_queries_are_the_solved_ones_kept_apart():
    queries, _, _ = block()
    inverse = Eigen(queries.eigen.bases, queries.inverse)
    Q_G, Q_A = queries.eigen.bases
    m = Tokens(queries.left @ Q_G.T, queries.right @ Q_A.T)
    V = solved(inverse, m)
    torch.testing.assert_close(queries.solved(slice(None)), V, rtol=1e-10, atol=1e-10)
    matrix = draw(O, I, seed=4)
    expected = (V * matrix).sum(dim=(1, 2))
    torch.testing.assert_close(inner(queries, matrix), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inner(SolvedQueries(V, V), matrix), expected, rtol=1e-10, atol=1e-10)
