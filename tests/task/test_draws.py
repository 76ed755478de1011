"""Random numbers by place: what their hash must be, and what it must not correlate with."""

import itertools

import pytest
import torch

from upweight.task.draws import Draws

N = 20_000


def of(seed=0, draw=0, start=0, size=1):
    return Draws.of(seed, draw, torch.arange(start, start + size))


def test_a_sequence_is_splitmix64():
    """The first outputs of the generator's published code, from the seed 1234567."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = Draws(torch.tensor([1234567])).uniform((3,))[0]
    expected = torch.tensor([((w >> 12) + 0.5) * 2.0**-52 for w in words]).double()
    assert torch.equal(found, expected)


SEQUENCES = {
    "positions": lambda: of(seed=3).uniform((N,))[0],
    "examples": lambda: of(seed=3, size=N).uniform(()),
    "draws": lambda: torch.cat([of(draw=k).uniform((1,))[0] for k in range(2000)]),
    "seeds": lambda: torch.cat([of(seed=k).uniform((1,))[0] for k in range(-1000, 1000)]),
    "second axis": lambda: of(seed=3).uniform((2, N))[0, 1],
    "first of two axes": lambda: of(seed=3).uniform((N, 2))[0, :, 1],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_neighbours_are_uniform_and_independent(name):
    """Mean, variance, thirty-two bins and ten lags, each within four standard errors."""
    u = SEQUENCES[name]().double()
    n = len(u)
    z = (u - 0.5) * 12**0.5
    assert abs(float(z.mean())) < 4 / n**0.5
    assert abs(float(z.square().mean()) - 1) < 4 * (0.8 / n) ** 0.5
    counts = torch.histc(u, 32, 0, 1)
    chi = float(((counts - n / 32) ** 2 / (n / 32)).sum())
    assert abs(chi - 31) < 4 * (2 * 31) ** 0.5
    for lag in range(1, 11):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 4 / (n - lag) ** 0.5


@pytest.mark.parametrize("which", ["seed", "draw", "start"])
def test_neighbouring_streams_are_independent(which):
    streams = [of(**{which: k}).uniform((N,))[0] - 0.5 for k in range(5)]
    for a, b in itertools.combinations(streams, 2):
        assert abs(float((12 * a * b).mean())) < 4 / N**0.5


def test_no_two_places_share_a_number():
    u = torch.stack([of(seed, draw, 0, 50).uniform((4, 5)) for seed in (0, 1) for draw in (0, 1)])
    assert len(u.flatten().unique()) == u.numel()


def test_normal_numbers_are_normal():
    z = of(seed=1).normal((N,))[0]
    moments = [float((z**k).mean()) for k in (1, 2, 3, 4)]
    # Standard errors √(E z²ᵏ − (E zᵏ)²)/√N of the first four.
    for found, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(found - expected) < 4 * (variance / N) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_is_zero_or_one(dtype):
    u = of(size=1000).uniform((1000,), dtype)
    assert u.dtype == dtype and 0 < float(u.min()) and float(u.max()) < 1
    ends = torch.tensor([0.5, 2.0 ** (23 if dtype == torch.float32 else 52) - 0.5], dtype=dtype)
    assert float(ends[1] * 2.0 ** (-23 if dtype == torch.float32 else -52)) < 1


def test_examples_keep_their_numbers_in_any_batch():
    whole = of(7, 2, 0, 30).uniform((4, 3))
    parts = [of(7, 2, start, 6).uniform((4, 3)) for start in range(0, 30, 6)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("more", [(9, 3), (4, 8), (9, 8)])
def test_further_positions_on_any_axis_change_none(more):
    """Images padded to a common height and width, channels first or last."""
    small, large = of(size=5).uniform((4, 3)), of(size=5).uniform(more)
    assert torch.equal(large[:, :4, :3], small)


def test_positions_that_count_are_numbered_among_themselves():
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    left = torch.cat([torch.zeros(6, 5, dtype=torch.bool), mask], dim=1)
    plain, padded = (of(size=6).counting(m).uniform((*m.shape[1:], 2)) for m in (mask, left))
    assert torch.equal(padded[:, 5:][mask], plain[mask])
    rank = mask.cumsum(dim=1)[mask] - 1
    row = mask.nonzero()[:, 0]
    assert torch.equal(plain[mask], of(size=6).uniform((7, 2))[row, rank])
    # A mask of positions and one of their parts count together.
    both = of(size=6).counting(mask).counting(mask[..., None].expand(6, 7, 2))
    assert torch.equal(both.counted, mask[..., None].expand(6, 7, 2))


def test_generators_belong_to_examples():
    first = [torch.rand(3, generator=g).tolist() for g in of(size=4).generators()]
    assert len({tuple(row) for row in first}) == 4
    assert [torch.rand(3, generator=g).tolist() for g in of(start=2, size=2).generators()] == first[
        2:
    ]


def test_numbers_by_a_generator_follow_it():
    def some(generator):
        return Draws.by(generator, 3).uniform((2,))

    g = torch.Generator().manual_seed(1)
    once, then = some(g), some(g)
    assert not torch.equal(once, then)
    assert torch.equal(once, some(torch.Generator().manual_seed(1)))
