"""Each way to multiply ⟨V_q, gᵢ⟩ out, against the product written out."""

import pytest
import torch

from upweight.gradients.factored import Lookups, Rows, Tokens
from upweight.runtime import hardware
from upweight.runtime.hardware import has_fast_bfloat16
from upweight.scoring import kernels
from upweight.scoring.kernels import Explicit, OfVector, Separable

Q, B, O, I = 3, 5, 4, 6  # noqa: E741  outputs and inputs


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(positions=1):
    return Tokens(draw(B, positions, O, seed=1), draw(B, positions, I, seed=2))


def gradients(factors):
    """g = Σ_t δ_t ⊗ a_t, in a loop."""
    out = torch.zeros(B, O, I)
    for b in range(B):
        for t in range(factors.positions):
            out[b] += torch.outer(factors.left[b, t], factors.right[b, t])
    return out


def products(vectors, factors):
    return torch.einsum("qoi,boi->qb", vectors, gradients(factors))


def added(kernel, factors):
    """What the kernel adds to scores that are not zero before."""
    scores = draw(Q, B, seed=9)
    before = scores.clone()
    kernel.add_to(scores, factors)
    return scores - before


def terms(r, s=1):
    return draw(r, Q, s, O, seed=4), draw(r, Q, s, I, seed=5)


NONE = terms(0)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 200, 2**30])
@pytest.mark.parametrize("positions", [1, 3])
def test_explicit(positions, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(kernels, "ROW_BYTES", chunk)
    V, factors = draw(Q, O, I, seed=3), tokens(positions)
    close(added(Explicit(V), factors), products(V, factors))


def test_explicit_forms_gradients_of_one_position_for_many_queries_only():
    """More than 2 i of them; both ways agree, and neither is used where precisions differ."""
    V, factors = draw(2 * I + 1, O, I, seed=3), tokens()
    some, every = Explicit(V[:-1]), Explicit(V)
    assert some._goes_by_rows(factors) and not every._goes_by_rows(factors)
    assert not Explicit(V[:-1].float())._goes_by_rows(factors)
    scores = torch.zeros(len(V), B)
    every.add_to(scores, factors)
    found = torch.zeros(len(V) - 1, B)
    some.add_to(found, factors)
    close(found, scores[:-1])


@pytest.mark.parametrize("chunk", [1, 200, 2**30])
@pytest.mark.parametrize("positions", [1, 3])
def test_explicit_with_a_bias_of_its_own(positions, chunk, monkeypatch):
    """Several batches, some of them formed whole."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(kernels, "ROW_BYTES", chunk)
    V, given = draw(Q, O, I + 1, seed=3), tokens(positions).with_ones()
    expected = torch.einsum("qoi,boi->qb", V, given.matrices())
    kernel, found = Explicit(V[..., :-1], V[..., -1]), torch.zeros(Q, 2 * B)
    kernel.add_all(found, [given.take(slice(0, 2)), given.take(slice(2, B)), given.compact()])
    close(found, torch.cat([expected, expected], dim=1))
    close(added(Explicit(V), given), expected)
    assert kernel.nbytes == Explicit(V).nbytes


def test_explicit_of_an_embedding():
    """Lookups, whose left factors are one-hot and never formed."""
    index = torch.randint(O, (B, 3), generator=torch.Generator().manual_seed(0))
    lookups = Lookups(index, O, draw(B, 3, I, seed=2))
    full = Tokens(torch.nn.functional.one_hot(index, O).double(), lookups.right)
    V = draw(Q, O, I, seed=3)
    close(added(Explicit(V), lookups), products(V, full))


@pytest.mark.parametrize("chunk", [1, 500, 2**30])
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("s", [1, 4])
@pytest.mark.parametrize("positions", [1, 2])
def test_separable_is_the_sum_of_its_terms_over_pairs_of_positions(
    positions, s, r, chunk, monkeypatch
):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", chunk)
    d, a = terms(r, s)
    factors = tokens(positions)
    close(
        added(Separable((d, a), NONE), factors),
        products(torch.einsum("rqso,rqsi->qoi", d, a), factors),
    )


def test_separable_adds_its_terms_in_bfloat16_to_the_others():
    """Off by the rounding of the short terms and by no more: 8 bits of a sum of 4 and one of 6."""
    d, a = terms(3)
    short = (d[1:].bfloat16(), a[1:].bfloat16())
    found = added(Separable((d[:1], a[:1]), short), tokens())
    exact = products(torch.einsum("rqso,rqsi->qoi", d, a), tokens())
    size = products(torch.einsum("rqso,rqsi->qoi", d.abs(), a.abs()), absolute(tokens()))
    assert bool(((found - exact).abs() <= 6 * 2**-8 * size).all())
    assert float((found - exact).abs().max()) > 1e-5, "nothing was rounded"


def absolute(factors):
    return Tokens(factors.left.abs(), factors.right.abs())


def test_of_vector():
    v, g = draw(Q, 7), draw(B, 7, seed=1)
    close(added(OfVector(v), Rows(g)), v @ g.T)


def test_bytes_are_those_of_the_tensors():
    d, a = terms(2)
    assert Explicit(draw(Q, O, I)).nbytes == 8 * Q * O * I
    assert OfVector(draw(Q, 7)).nbytes == 8 * Q * 7
    short = (d.bfloat16(), a.bfloat16())
    assert Separable((d, a), short).nbytes == (8 + 2) * 2 * Q * (O + I)


@pytest.mark.parametrize("present", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
@pytest.mark.parametrize("times", [0.5, 8, 200])
def test_bfloat16_is_asked_of_the_hardware_and_timed(present, times, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == present, raising=False)
    seconds = {torch.float32: 1.0, torch.bfloat16: times}
    monkeypatch.setattr(hardware, "product_seconds", lambda x: seconds[x.dtype])
    hardware._is_emulated.cache_clear()
    assert has_fast_bfloat16(torch.device("cpu")) == (present is not None and times < 100)
    assert not has_fast_bfloat16(torch.device("meta"))
    hardware._is_emulated.cache_clear()


def test_bfloat16_is_not_expected_of_a_torch_that_cannot_tell(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not has_fast_bfloat16(torch.device("cpu"))
